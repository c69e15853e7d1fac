"""Data sets in the layouts that circulate: the same classes and pixels from each."""

import csv
import gzip
import pickle
import tracemalloc

import numpy as np
import pytest
import tensorflow as tf

from data_prep import (
    fc100,
    idx,
    images,
    layouts,
    mini_imagenet,
    omniglot,
    tiered_imagenet,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*will not be comparable with published"
)
SHORT = {"train": "train", "validation": "val", "test": "test"}
LABELS = [1, 0, 1, 0]


def pixels(split: str) -> np.ndarray:
    seed = list(SHORT).index(split)
    return np.random.default_rng(seed).integers(0, 256, (4, 8, 6, 3), np.uint8)


def names(split: str) -> list[str]:
    return [f"{split} cat", f"{split} dog"]


def require_right(found: dict, named: bool = True) -> None:
    assert list(found) == list(SHORT)
    for split, classes in found.items():
        wanted = names(split) if named else [f"{split}-0", f"{split}-1"]
        assert list(classes.names) == wanted
        assert classes.images.dtype == np.uint8
        np.testing.assert_array_equal(classes.of(0), pixels(split)[[1, 3]])
        np.testing.assert_array_equal(classes.of(1), pixels(split)[[0, 2]])


def members(split: str) -> dict[str, list[int]]:
    return {names(split)[0]: [1, 3], names(split)[1]: [0, 2]}


def png(image: np.ndarray) -> bytes:
    return tf.io.encode_png(image).numpy()


MINI = {
    "published": lambda split: {
        "image_data": pixels(split),
        "class_dict": members(split),
    },
    "channels first": lambda split: {
        "image_data": pixels(split).transpose(0, 3, 1, 2),
        "class_dict": members(split),
    },
    "byte strings": lambda split: {
        b"image_data": pixels(split),
        b"class_dict": {n.encode(): k for n, k in members(split).items()},
    },
    "labels and names": lambda split: {
        b"data": pixels(split),
        b"labels": LABELS,
        b"catname2label": {n: i for i, n in enumerate(names(split))},
    },
    "names by label": lambda split: {
        "data": pixels(split),
        "labels": np.array(LABELS)[:, None],
        "class_names": [n.encode() for n in names(split)],
    },
    "names for labels": lambda split: {
        "images": pixels(split),
        "targets": [names(split)[label] for label in LABELS],
    },
    "names, and other numbers for them": lambda split: {
        "images": pixels(split),
        "labels": [names(split)[label] for label in LABELS],
        "catname2label": {n: 1 - i for i, n in enumerate(names(split))},
    },
    "image files": lambda split: {
        "data": [png(image) for image in pixels(split)],
        "labels": LABELS,
        "catname2label": {n: i for i, n in enumerate(names(split))},
    },
}


@pytest.mark.parametrize("content", MINI.values(), ids=MINI.keys())
@pytest.mark.parametrize(
    "file",
    [
        "mini-imagenet-cache-{}.pkl",
        "miniImageNet_category_split_{}.pickle",
        "{}.pkl",
        "mini_imagenet_{}.pickle",
    ],
)
def test_mini_imagenet_pickles(tmp_path, content, file):
    for split, short in SHORT.items():
        if "category" in file and split == "train":
            short = "train_phase_train"
        (tmp_path / file.format(short)).write_bytes(pickle.dumps(content(split), 2))
    require_right(mini_imagenet.load(tmp_path))


def test_npz(tmp_path):
    for split, short in SHORT.items():
        path = tmp_path / f"mini-imagenet-{short}.npz"
        np.savez(path, features=pixels(split), targets=np.array(LABELS))
    require_right(mini_imagenet.load(tmp_path), named=False)


def test_tiered_imagenet_of_metaoptnet(tmp_path):
    for split, short in SHORT.items():
        np.savez(tmp_path / f"{short}_images.npz", images=pixels(split))
        content = {"label_specific": LABELS, "label_specific_str": names(split)}
        (tmp_path / f"{short}_labels.pkl").write_bytes(pickle.dumps(content))
    require_right(tiered_imagenet.load(tmp_path))


@pytest.mark.parametrize("split", ["fc100", "cifar_fs"])
def test_few_shot_cifar_pickles(tmp_path, split):
    prefix = {"fc100": "FC100", "cifar_fs": "CIFAR_FS"}[split]
    for part, short in SHORT.items():
        content = {"data": pixels(part), "labels": LABELS}
        path = tmp_path / f"{prefix}_{short}.pickle"
        path.write_bytes(pickle.dumps(content, 2))
    require_right(fc100.load(split, tmp_path), named=False)


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "by class"])
def test_a_csv_and_a_folder_of_images(tmp_path, nested):
    for split, short in SHORT.items():
        with (tmp_path / f"{short}.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["filename", "label"])
            for number, (image, label) in enumerate(
                zip(pixels(split), LABELS, strict=True)
            ):
                name, kind = f"{split}{number}.png", names(split)[label]
                rows.writerow([name, kind])
                place = tmp_path / "images" / (kind if nested else "") / name
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(png(image))
    require_right(mini_imagenet.load(tmp_path))
    place.unlink()
    with pytest.raises(FileNotFoundError, match="test3.png does not exist, which"):
        mini_imagenet.load(tmp_path)


def test_a_csv_that_a_spreadsheet_saved(tmp_path):
    """It begins with a mark of its encoding, and its lines end as on Windows."""
    (tmp_path / "a.png").write_bytes(png(pixels("train")[0]))
    table = "\ufefffilename,label\r\na.png,cat\r\n"
    (tmp_path / "a.csv").write_text(table, encoding="utf-8", newline="")
    found = layouts.read([tmp_path / "a.csv", tmp_path], "train", "mini")
    np.testing.assert_array_equal(found.of(0)[0], pixels("train")[0])
    assert found.names == ("cat",)


def test_images_of_other_sizes_become_84_x_84(tmp_path):
    (tmp_path / "images").mkdir()
    for side in (84, 168):
        flat = np.full((side, side, 3), side, np.uint8)
        (tmp_path / "images" / f"{side}.png").write_bytes(png(flat))
    (tmp_path / "a.csv").write_text("filename,label\n84.png,cat\n168.png,dog\n")
    found = layouts.read([tmp_path / "a.csv", tmp_path / "images"], "train", "mini")
    assert found.images.shape == (2, 84, 84, 3)
    assert (found.of(0) == 84).all() and (found.of(1) == 168).all()


@pytest.mark.parametrize("name", ["../secret.png", "{}/secret.png"])
def test_a_csv_cannot_leave_its_folder(tmp_path, name):
    (tmp_path / "images").mkdir()
    (tmp_path / "secret.png").write_bytes(png(pixels("train")[0]))
    (tmp_path / "a.csv").write_text(f"filename,label\n{name.format(tmp_path)},cat\n")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        layouts.read([tmp_path / "a.csv", tmp_path / "images"], "train", "mini")


WRONG = {
    "floats": ({"data": np.zeros((2, 4, 4, 3)), "labels": [0, 1]}, "float64"),
    "flat": ({"data": np.zeros((2, 48), np.uint8), "labels": [0, 1]}, r"\(2, 48\)"),
    "7 channels": ({"data": np.zeros((2, 4, 4, 7), np.uint8), "labels": [0, 1]}, "7"),
    "no labels": ({"data": np.zeros((2, 4, 4, 3), np.uint8)}, "label for every image"),
    "too few labels": (
        {"data": np.zeros((2, 4, 4, 3), np.uint8), "labels": [0]},
        r"\(1,\) labels of type int64 for 2",
    ),
    "broken images": ({"data": [b"no png"], "labels": [0]}, "image files of one size"),
    "a label without a name": (
        {
            "data": np.zeros((2, 4, 4, 3), np.uint8),
            "labels": [0, 1],
            "catname2label": {"a": 0},
        },
        "without a name: 1",
    ),
    "an image twice": (
        {"data": np.zeros((2, 4, 4, 3), np.uint8), "class_dict": {"a": [0, 0]}},
        "every image in one class",
    ),
    "numbers that are none": (
        {"data": np.zeros((2, 4, 4, 3), np.uint8), "class_dict": {"a": [0.5, 1.2]}},
        "every image in one class",
    ),
    "huge numbers": (
        {"data": np.zeros((2, 4, 4, 3), np.uint8), "class_dict": {"a": [0, 10**30]}},
        "every image in one class",
    ),
    "two names": (
        {
            "data": np.zeros((2, 4, 4, 3), np.uint8),
            "labels": [0, 1],
            "catname2label": {"a": 0, "b": 0, "c": 1},
        },
        "two names for a label",
    ),
    "names of half labels": (
        {
            "data": np.zeros((2, 4, 4, 3), np.uint8),
            "labels": [0, 1],
            "catname2label": {"a": 0.7, "b": 1.2},
        },
        "a label of no integer",
    ),
    "a word for names": (
        {
            "data": np.zeros((2, 4, 4, 3), np.uint8),
            "labels": [0, 1],
            "class_names": "ab",
        },
        "without a name: 0",
    ),
    "channels on either side": (
        {"data": np.zeros((2, 3, 4, 3), np.uint8), "labels": [0, 1]},
        "cannot be told which axis",
    ),
    "lists of no bytes": ({"data": [[300]], "labels": [0]}, "image files of one size"),
    "a list": ([1, 2], "image files of one size"),
}


@pytest.mark.parametrize(("content", "said"), WRONG.values(), ids=WRONG.keys())
def test_other_pickles_are_named_in_one_line(tmp_path, content, said):
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=said) as caught:
        layouts.read([path], "train", "miniImageNet")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="of another layout.*test.npz"):
        mini_imagenet.load(tmp_path)
    (tmp_path / "val.pkl").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="train.pkl does not exist, though"):
        mini_imagenet.load(tmp_path)


@pytest.mark.parametrize("place", idx.PLACES)
@pytest.mark.parametrize("packed", [False, True])
def test_mnist_as_published(tmp_path, place, packed):
    """In the order of tensorflow-datasets, so that runs are of the same examples."""
    content = np.random.default_rng(0).integers(0, 256, (30, 28, 28), np.uint8)
    folder = tmp_path / place
    folder.mkdir(parents=True, exist_ok=True)
    parts = {
        "t10k-images-idx3-ubyte": np.array([2051, 30, 28, 28], ">i4").tobytes()
        + content.tobytes(),
        "t10k-labels-idx1-ubyte": np.array([2049, 30], ">i4").tobytes()
        + bytes(i % 10 for i in range(30)),
    }
    for name, whole in parts.items():
        path = folder / (name + ".gz" * packed)
        path.write_bytes(gzip.compress(whole) if packed else whole)
    data = images.load_file("mnist", "test", tmp_path)
    back = images.in_published_order(data, "test")
    np.testing.assert_array_equal(back.images[..., 0], content)
    assert back.labels.tolist() == [i % 10 for i in range(30)]
    assert data.labels.tolist() != back.labels.tolist()


def idx_file(*numbers: int, content: bytes = b"") -> bytes:
    return np.array(numbers, ">i4").tobytes() + content


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "begins with 0"),
        (idx_file(2049, 3, content=b"abc"), "must begin with 2051.*begins with 2049"),
        (idx_file(2051, 2), "must begin with 2051"),
        (idx_file(2051, 2, 2, 2, content=b"1234567"), "8 bytes and has 7"),
        (idx_file(2051, 2, 2, 2, content=b"123456789"), "8 bytes and has more"),
        (idx_file(2051, -1, 2, 2), "must begin with"),
        (idx_file(2051, 2**31 - 1, 2**31 - 1, 9), "and has 0"),
        (gzip.compress(idx_file(2051, 1, 1, 1, content=b"x" * 10**6)), "has more"),
        (gzip.compress(idx_file(2051, 1, 1, 1, content=b"x"))[:-4], "end-of-stream"),
        (b"\x1f\x8b no gzip", "damaged"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # gzip has the time
)
def test_other_idx_files_are_one_line(tmp_path, content, said):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=said) as caught:
        idx.read(path, 3)
    assert "\n" not in str(caught.value)


def test_omniglot_folders(tmp_path):
    """A drawing is ink on paper: black where it is dark."""
    for file, folder in omniglot.FOLDERS.items():
        for alphabet, count in (("Latin", 2), ("Armenian", 1)):
            for number in range(1, count + 1):
                place = (
                    tmp_path / folder / f"{alphabet}_{file}" / f"character{number:02d}"
                )
                place.mkdir(parents=True)
                for drawing in range(3):
                    image = np.full((105, 105, 1), 255, np.uint8)
                    image[: 35 * (drawing + 1)] = 0
                    path = place / f"0001_{drawing:02d}.png"
                    path.write_bytes(png(image))
    found = omniglot.characters("test", tmp_path)
    assert found.names == ("Armenian_test/01", "Latin_test/01", "Latin_test/02")
    assert found.images.shape == (9, 28, 28, 1)
    inked = (found.of(0) == 255).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(inked, [1 / 3, 2 / 3, 1], atol=1 / 28)
    path.write_bytes(png(np.zeros((28, 28, 1), np.uint8)))
    with pytest.raises(ValueError, match="must be 105 x 105"):
        omniglot.characters("test", tmp_path)


@pytest.mark.parametrize("packed", [True, False])
def test_an_idx_file_that_speaks_of_gigabytes_takes_no_memory(tmp_path, packed):
    content = idx_file(2051, 2**30, 28, 28, content=b"abc")
    path = tmp_path / "a"
    path.write_bytes(gzip.compress(content) if packed else content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="cut short, or not a file of MNIST"):
            idx.read(path, 3)
        assert tracemalloc.get_traced_memory()[1] < 10**7
    finally:
        tracemalloc.stop()
