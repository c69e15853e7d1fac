"""Few-shot data sets, from small files in the published formats."""

import pickle
import runpy
import sys

import numpy as np
import pytest
import tensorflow as tf
from experiment_scripts import arrays_of
from published_files import TAXONOMY, prepare_cifar100

from data_prep import (
    classes,
    fc100,
    glyphs,
    mini_imagenet,
    omniglot,
    tiered_imagenet,
)
from data_prep.classes import Classes


def numbered(count, side=3, first=0):
    """Images whose every pixel is the image's number."""
    values = np.arange(first, first + count, dtype=np.uint8)
    return np.broadcast_to(values[:, None, None, None], (count, side, side, 1)).copy()


def test_grouping_sorts_images_by_class():
    labels = np.array([7, 2, 7, 2, 2, 9])
    made = classes.grouped(numbered(6), labels, {2: "two", 7: "seven", 9: "nine"})
    assert made.names == ("two", "seven", "nine")
    assert made.starts.tolist() == [0, 3, 5, 6]
    assert made.images[:, 0, 0, 0].tolist() == [1, 3, 4, 0, 2, 5]
    picked = classes.select(made, [2, 0])
    assert picked.names == ("nine", "two")
    assert picked.of(1)[:, 0, 0, 0].tolist() == [1, 3, 4]
    with pytest.raises(ValueError, match="a label for every image"):
        classes.grouped(numbered(6), labels[:5])


def test_rotations_are_classes_of_their_own():
    images = np.arange(2 * 9, dtype=np.uint8).reshape(2, 3, 3, 1)
    made = classes.with_rotations(Classes(images, np.array([0, 1, 2]), ("a", "b")))
    assert len(set(made.names)) == 8 and made.names[5] == "b, 90 degrees"
    for number in range(2):
        for turn in range(4):
            np.testing.assert_array_equal(
                made.of(4 * number + turn)[0, :, :, 0],
                np.rot90(images[number, :, :, 0], turn),
            )


def test_saving_and_a_class_in_two_splits(tmp_path):
    parts = {
        split: Classes(numbered(2, first=i), np.array([0, 1, 2]), (f"{i}a", f"{i}b"))
        for i, split in enumerate(classes.SPLITS)
    }
    classes.save(tmp_path / "x.npz", parts, "drawn")
    again = classes.load(tmp_path / "x.npz", "drawn")
    for split, one in parts.items():
        np.testing.assert_array_equal(again[split].images, one.images)
        assert again[split].names == one.names
    with pytest.raises(ValueError, match="must hold omniglot. Received: drawn"):
        classes.load(tmp_path / "x.npz", "omniglot")
    leaking = parts | {"test": parts["train"]}
    with pytest.raises(
        ValueError, match="share no class, but 0a is in train and in te"
    ):
        classes.save(tmp_path / "y.npz", leaking, "drawn")
    assert not (tmp_path / "y.npz").exists()
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(OSError, match="directory"):
        classes.save(tmp_path / "folder.npz", parts, "drawn")
    assert {p.name for p in tmp_path.iterdir()} == {"x.npz", "folder.npz"}
    arrays = arrays_of(tmp_path / "x.npz")
    arrays["test_names"] = arrays["train_names"][: len(arrays["test_names"])]
    np.savez(tmp_path / "leaks.npz", **arrays)
    with pytest.raises(ValueError, match="share no class, but 0a is in train and in"):
        classes.load(tmp_path / "leaks.npz", "drawn")
    np.savez(tmp_path / "z.npz", a=1)
    with pytest.raises(ValueError, match="not a file of classes"):
        classes.load(tmp_path / "z.npz", "drawn")
    with pytest.raises(FileNotFoundError):
        classes.load(tmp_path / "none.npz", "drawn")


# miniImageNet.


def write_mini(folder, protocol=2, **damage):
    """Interleaved images: the class is not their position."""
    for index, name in enumerate(("train", "val", "test")):
        members = {f"n{index}1": [0, 2, 4], f"n{index}0": [5, 3, 1]}
        images = np.random.default_rng(index).integers(0, 256, (6, 84, 84, 3))
        content = {"image_data": images.astype(np.uint8), "class_dict": members}
        content |= damage
        path = folder / f"mini-imagenet-cache-{name}.pkl"
        path.write_bytes(pickle.dumps(content, protocol))


@pytest.mark.parametrize("protocol", [2, 4])
def test_mini_imagenet_goes_by_its_class_dictionary(protocol, tmp_path):
    write_mini(tmp_path, protocol)
    with pytest.warns(UserWarning, match=r"has \[64, 16, 20\] .* files \[2, 2, 2\]"):
        made = mini_imagenet.load(tmp_path)["validation"]
    assert made.names == ("n10", "n11") and made.images.dtype == np.uint8
    images = np.random.default_rng(1).integers(0, 256, (6, 84, 84, 3))
    np.testing.assert_array_equal(made.of(0), images[[5, 3, 1]])
    with pytest.warns(UserWarning, match="miniImageNet"):
        counts = mini_imagenet.main(
            ["--data-dir", str(tmp_path), "--out", str(tmp_path / "m.npz")]
        )
    assert counts == {"train": 2, "validation": 2, "test": 2}
    again = classes.load(tmp_path / "m.npz", "mini-imagenet")["validation"]
    np.testing.assert_array_equal(again.images, made.images)


def test_mini_imagenet_files_that_are_not(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="mini-imagenet-cache-train.pkl does not"
    ):
        mini_imagenet.load(tmp_path)
    for foreign in ({"n": [0, 1]}, {"a": 0, "b": 1}, {"n": ["a", "b"]}, [1, 2]):
        write_mini(tmp_path, class_dict=foreign)
        with pytest.raises(ValueError, match="not a file of miniImageNet"):
            mini_imagenet.load(tmp_path)
    write_mini(tmp_path)
    path = tmp_path / "mini-imagenet-cache-val.pkl"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cut short or not a pickle"):
        mini_imagenet.load(tmp_path)
    write_mini(tmp_path)
    path.write_bytes((tmp_path / "mini-imagenet-cache-train.pkl").read_bytes())
    with (
        pytest.warns(UserWarning, match="miniImageNet"),
        pytest.raises(ValueError, match="share no class"),
    ):
        mini_imagenet.load(tmp_path)


# tieredImageNet.


def write_tiered(folder):
    generator = np.random.default_rng(0)
    kept = {}
    for index, name in enumerate(("train", "val", "test")):
        images = generator.integers(0, 256, (5, 84, 84, 3)).astype(np.uint8)
        files = [
            np.frombuffer(tf.io.encode_png(image).numpy(), np.uint8)[:, None]
            for image in images
        ]
        labels = {
            "label_specific": np.array([1, 0, 1, 0, 1]),
            "label_specific_str": [f"a{index}", f"b{index}"],
            "label_general": np.zeros(5, int),
            "label_general_str": ["x"],
        }
        (folder / f"{name}_images_png.pkl").write_bytes(pickle.dumps(files))
        (folder / f"{name}_labels.pkl").write_bytes(pickle.dumps(labels))
        kept[name] = images
    return kept


def test_tiered_imagenet(tmp_path):
    kept = write_tiered(tmp_path)
    with pytest.warns(UserWarning, match=r"has \[351, 97, 160\]"):
        made = tiered_imagenet.load(tmp_path)
    assert made["test"].names == ("a2", "b2")
    np.testing.assert_array_equal(made["test"].of(1), kept["test"][[0, 2, 4]])
    out = ["--data-dir", str(tmp_path), "--out", str(tmp_path / "t.npz")]
    with pytest.warns(UserWarning, match="tieredImageNet"):
        tiered_imagenet.main(out)
    again = classes.load(tmp_path / "t.npz", "tiered-imagenet")["train"]
    np.testing.assert_array_equal(again.images, made["train"].images)
    smaller = np.frombuffer(
        tf.io.encode_png(np.zeros([2, 2, 3], np.uint8)).numpy(), np.uint8
    )
    files = pickle.loads((tmp_path / "val_images_png.pkl").read_bytes())
    for foreign in (
        [np.zeros(9, np.uint8)] * 5,
        files[:4],
        [*files[:4], smaller],
        dict.fromkeys("abcde"),
        None,
    ):
        (tmp_path / "val_images_png.pkl").write_bytes(pickle.dumps(foreign))
        with pytest.raises(ValueError, match="a list of PNG files"):
            tiered_imagenet.load(tmp_path)
    names = {"label_specific": np.zeros(5, int), "label_specific_str": None}
    for foreign in ([1, 2], 7, {"label_specific": [0]}, names):
        (tmp_path / "val_labels.pkl").write_bytes(pickle.dumps(foreign))
        with pytest.raises(ValueError, match="not a labels file"):
            tiered_imagenet.load(tmp_path)
    for wrong in ([0, 1, 2, 0, 0], [0, 1, -1, 0, 0]):
        labels = {"label_specific": wrong, "label_specific_str": ["a", "b"]}
        (tmp_path / "val_labels.pkl").write_bytes(pickle.dumps(labels))
        with pytest.raises(ValueError, match="a label without a name"):
            tiered_imagenet.load(tmp_path)


# CIFAR-100.


def test_fc100_and_cifar_fs_splits():
    above = {name: group for group, some in TAXONOMY.items() for name in some.split()}
    assert len(above) == 100
    fine = sorted(above)
    every = Classes(numbered(100), np.arange(101), tuple(fine))
    made = fc100.divide(every, above, "fc100")
    assert {s: len(c.names) for s, c in made.items()} == {
        "train": 60, "validation": 20, "test": 20,
    }  # fmt: skip
    groups = [{above[name] for name in made[s].names} for s in classes.SPLITS]
    assert [len(some) for some in groups] == [12, 4, 4]
    assert groups[2] == {"aquatic_mammals", "insects", "medium_mammals", "people"}
    made = fc100.divide(every, above, "cifar_fs")
    assert {s: len(c.names) for s, c in made.items()} == {
        "train": 64, "validation": 16, "test": 20,
    }  # fmt: skip
    number = made["test"].names.index("whale")
    assert made["test"].of(number)[0, 0, 0, 0] == fine.index("whale")


def test_cifar100_from_its_published_files(tmp_path):
    """Three images of each class, every pixel the number of its class."""
    fine = prepare_cifar100(tmp_path)
    made = fc100.load("fc100", tmp_path / "tfds")
    for split in classes.SPLITS:
        for number, name in enumerate(made[split].names):
            images = made[split].of(number)
            assert images.shape == (3, 32, 32, 3)
            assert (images == fine.index(name)).all()
    assert "whale" in made["test"].names and "tiger" in made["validation"].names
    flags = ["--data-dir", str(tmp_path / "tfds"), "--out", str(tmp_path / "c.npz")]
    counts = fc100.main([*flags, "--split", "cifar-fs"])
    assert counts == {"train": 64, "validation": 16, "test": 20}
    again = classes.load(tmp_path / "c.npz", "cifar-fs")
    assert "snail" in again["test"].names


# Omniglot.


def alphabet_of(name, count, first):
    names = tuple(f"{name}/{number:02d}" for number in range(1, count + 1))
    return Classes(numbered(count, first=first), np.arange(count + 1), names)


def test_omniglot_splits_have_the_published_counts():
    sizes = {"Armenian": 41, "Bengali": 46, "Early_Aramaic": 22, "Hebrew": 22,
             "Mkhedruli_(Georgian)": 41, "Balinese": 24, "Greek": 768}  # fmt: skip
    background = classes.joined(
        [alphabet_of(n, c, 0) for n, c in sorted(sizes.items())]
    )
    assert len(background.names) == 964
    evaluation = alphabet_of("Gurmukhi", 659, 0)
    made = omniglot.divide(background, evaluation, "vinyals")
    counts = {split: len(c.names) for split, c in made.items()}
    assert counts == {"train": 1028, "validation": 172, "test": 423}
    assert {n.split("/")[0] for n in made["validation"].names} == set(
        omniglot.VALIDATION
    )
    assert made["test"].names == evaluation.names[-423:]
    for rule in omniglot.RULES:
        with pytest.raises(ValueError, match="evaluation set.*least 424. Received: 9"):
            omniglot.divide(background, alphabet_of("Gurmukhi", 9, 0), rule)
        with pytest.raises(ValueError, match="background set.*least 101. Received: 9"):
            omniglot.divide(alphabet_of("Greek", 9, 0), evaluation, rule)
    made = omniglot.divide(background, evaluation, "sorted")
    counts = {split: len(c.names) for split, c in made.items()}
    assert counts == {"train": 1100, "validation": 100, "test": 423}
    order = [n for split in classes.SPLITS for n in made[split].names]
    assert order == sorted(order)


def test_omniglot_from_tensorflow_datasets(tmp_path, monkeypatch):
    """A few characters, as tensorflow-datasets gives them: 105 x 105 x 3, ink dark."""
    names = {"alphabet": ["Greek", "Latin"], "label": []}

    def load_named(dataset, file, data_dir, download):
        assert dataset == "omniglot"
        pages = np.full((6, 105, 105, 3), 255, np.uint8)
        for number, page in enumerate(pages):
            page[:, : 15 * (number + 1)] = 0  # ever more ink
        data = {
            "image": pages,
            "alphabet": np.array([1, 0, 1, 0, 1, 1]),
            "alphabet_char_id": np.array([3, 2, 3, 2, 1, 3]),
        }
        return data, names

    monkeypatch.setattr(omniglot, "load_named", load_named)
    made = omniglot.characters("train", None)
    assert made.names == ("Greek/02", "Latin/01", "Latin/03")
    assert made.starts.tolist() == [0, 2, 3, 6]
    assert made.images.shape == (6, 28, 28, 1)
    # Image 1 (of the first class) has 30 of 105 columns of ink: light now.
    assert made.of(0)[0].mean() == pytest.approx(255 * 30 / 105, rel=0.01)
    assert made.of(0)[0][:, :7].min() == 255 and made.of(0)[0][:, 9:].max() == 0


@pytest.mark.slow
def test_an_unprepared_omniglot_is_one_line(tmp_path, monkeypatch, capsys):
    argv = ["omniglot.py", "--data-dir", str(tmp_path), "--out"]
    monkeypatch.setattr(sys, "argv", [*argv, str(tmp_path / "x.npz")])
    monkeypatch.setattr(sys, "path", [*sys.path])  # as a file it adds to it
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(omniglot.__file__, run_name="__main__")
    assert stop.value.code == 2
    assert "omniglot is not prepared" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "x.npz").exists()
    with pytest.raises(ValueError, match="`rule` must be one of"):
        omniglot.load(tmp_path, "random")


# Glyphs.


@pytest.mark.slow
def test_glyphs_are_hundreds_of_classes_that_can_be_told_apart():
    made = glyphs.load(images_per_class=6)
    assert {s: len(c.names) for s, c in made.items()} == glyphs.COUNTS
    assert sum(glyphs.COUNTS.values()) >= 200
    test = made["test"]
    assert test.images.shape == (60 * 6, 28, 28, 1) and test.images.dtype == np.uint8
    share = (test.images > 127).mean()
    assert 0.04 < share < 0.4  # strokes, not blots
    # The nearest other image is of the same class far more often than by chance.
    blurred = tf.nn.avg_pool2d(tf.cast(test.images, tf.float32), 4, 2, "SAME")
    flat = tf.reshape(blurred, [len(test.images), -1]).numpy()
    squares = (flat**2).sum(1)
    distances = squares[:, None] + squares - 2 * flat @ flat.T
    np.fill_diagonal(distances, np.inf)
    same = distances.argmin(axis=1) // 6 == np.arange(len(flat)) // 6
    assert 0.7 < same.mean() < 1.0  # neither hopeless nor trivial
    again = glyphs.load(images_per_class=6)["test"].images
    np.testing.assert_array_equal(again, test.images)
    other = glyphs.load(images_per_class=6, seed=1)["test"].images
    assert (other != test.images).any()
    with pytest.raises(ValueError, match="an image of each class"):
        glyphs.load(images_per_class=0)
