"""CIFAR10 from pickles, the binary version and image folders."""

import pathlib
import pickle
from typing import Any

import numpy as np
import pytest
from experiment_scripts import load_experiment
from published_files import cifar10 as colours
from published_files import write_cifar10

from data_prep import cifar10, images

SPLITS = ("train", "test")
LAYOUTS = ("python", "python 2", "binary", "folders", "numbered", "flat")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_images_that_were_written(
    layout: str, tmp_path: pathlib.Path
):
    data = colours(15, 5)
    folder = write_cifar10(tmp_path, layout, data)
    for split, (pixels, labels) in data.items():
        found = cifar10.load(folder, split)
        assert found is not None
        order = np.arange(len(labels))
        if layout == "folders":  # by class, then as written
            order = np.argsort(labels, kind="stable")
        np.testing.assert_array_equal(found[0], pixels[order])
        np.testing.assert_array_equal(found[1], labels[order])
        assert found[0].dtype == np.uint8 and found[0].flags.c_contiguous


def test_files_and_tensorflow_datasets_give_the_same_order(tmp_path: pathlib.Path):
    """`load_file` is in tensorflow-datasets' order, whatever it reads; that of the
    files comes back."""
    data = colours(15, 5)
    folder = write_cifar10(tmp_path, "binary", data)
    part = images.load_file("cifar10", "train", folder)
    assert not np.array_equal(part.labels, data["train"][1])
    published = images.in_published_order(part, "train")
    np.testing.assert_array_equal(published.images, data["train"][0])
    # The inner folder may be named itself.
    own = images.load_file("cifar10", "train", folder / "cifar-10-batches-bin")
    np.testing.assert_array_equal(own.images, part.images)


@pytest.mark.slow
def test_the_order_is_that_of_tensorflow_datasets(tmp_path: pathlib.Path):
    """Prepared by it from the same binary files."""
    from published_files import CIFAR10, prepare_with_tfds

    folder = write_cifar10(tmp_path / "archive", "binary", colours(50, 10))
    names = folder / "cifar-10-batches-bin" / "batches.meta.txt"
    names.write_text("\n".join(CIFAR10))
    prepare_with_tfds("cifar10", folder, tmp_path / "tfds")
    for split in SPLITS:
        part = images.load_file("cifar10", split, folder)
        other = images.load_file("cifar10", split, tmp_path / "tfds")
        np.testing.assert_array_equal(part.images, other.images)
        np.testing.assert_array_equal(part.labels, other.labels)


def test_a_folder_without_it_is_none(tmp_path: pathlib.Path):
    assert cifar10.load(tmp_path, "train") is None


class Malicious:
    """A pickle that runs a command when it is read by `pickle`."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return pathlib.Path.touch, (self.path,)


def test_a_pickle_is_never_run(tmp_path: pathlib.Path):
    folder = write_cifar10(tmp_path, "python", colours(15, 5))
    content = {"data": Malicious(tmp_path / "ran"), "labels": []}
    (folder / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match="a pickle runs what it names"):
        cifar10.load(folder, "train")
    assert not (tmp_path / "ran").exists()


def broken(folder: pathlib.Path, what: str) -> None:
    batches, binary = folder / "cifar-10-batches-py", folder / "cifar-10-batches-bin"
    image = folder / "train" / "0_cat.png"
    if what == "missing batch":
        (batches / "data_batch_3").unlink()
    elif what == "no labels":
        content = {"data": np.zeros((3, 3072), np.uint8)}
        (batches / "data_batch_3").write_bytes(pickle.dumps(content, protocol=2))
    elif what == "cut short":
        path = binary / "data_batch_2.bin"
        path.write_bytes(path.read_bytes()[:-1])
    elif what == "label 10":
        path = binary / "data_batch_2.bin"
        path.write_bytes(b"\x0a" + path.read_bytes()[1:])
    elif what == "no image":
        next(folder.glob("train/*_*.png")).write_bytes(b"nothing")
    else:
        image.rename(image.with_name("0_lion.png"))


@pytest.mark.parametrize(
    ("layout", "what", "message"),
    [
        ("python", "missing batch", "data_batch_3 does not exist, though others"),
        ("python", "no labels", "as many integers under labels"),
        ("binary", "cut short", "must be a multiple of 3073. Received: 9,218 bytes"),
        ("binary", "label 10", "must hold labels from 0 to 9. Received: "),
        ("flat", "no image", "is not an image file, or damaged"),
        ("flat", "class", "Classes are airplane, .*, truck. Received: lion"),
    ],
)
def test_a_damaged_file_is_named(
    layout: str, what: str, message: str, tmp_path: pathlib.Path
):
    data = colours(15, 5)
    data["train"][1][0] = 3  # a cat
    folder = write_cifar10(tmp_path, layout, data)
    broken(folder, what)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        cifar10.load(folder, "train")


def test_images_of_another_size_are_refused(tmp_path: pathlib.Path):
    import keras

    (tmp_path / "train" / "cat").mkdir(parents=True)
    image = np.zeros((8, 8, 3), np.uint8)
    keras.utils.save_img(tmp_path / "train" / "cat" / "1.png", image, scale=False)
    with pytest.raises(ValueError, match="must be 32 x 32"):
        cifar10.load(tmp_path, "train")


# A tenth of CIFAR10, in the published formats: one colour per class.


@pytest.fixture(scope="module")
def tenth(tmp_path_factory: Any) -> dict[str, pathlib.Path]:
    """Layout -> folder."""
    data = colours(5000, 1000)
    folder = tmp_path_factory.mktemp("tenth")
    return {
        layout: write_cifar10(folder / layout, layout, data)
        for layout in ("python 2", "binary")
    }


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["python 2", "binary"])
def test_cleaning_a_tenth(layout: str, tenth: dict, tmp_path: pathlib.Path):
    cleaning = load_experiment("data_hyper_cleaning")
    sizes = ["--train-size", "2000", "--validation-size", "1000"]
    sizes += ["--test-size", "1000", "--selection-size", "1000"]
    summary = cleaning.main(
        [
            *("--dataset", "cifar10", "--data-dir", str(tenth[layout]), *sizes),
            *("--method", "aid-cg", "--outer-steps", "20", "--eval-every", "10"),
            *("--upper-lr", "0.3", "--inner-lr", "0.1", "--solver-steps", "5"),
            *("--baseline-epochs", "1", "--out", str(tmp_path / "run")),
        ]
    )
    assert summary["before"]["precision"] == 50  # keeping all of them
    assert summary["test_accuracy"] > 90 and summary["precision"] > 90


@pytest.mark.slow
@pytest.mark.parametrize("net", ["logistic"])
def test_denoising_a_tenth(net: str, tenth: dict, tmp_path: pathlib.Path):
    denoising = load_experiment("data_denoising")
    summary = denoising.main(
        [
            *("--dataset", "cifar10", "--data-dir", str(tenth["python 2"])),
            *("--train-size", "4000", "--validation-size", "1000", "--no-augment"),
            *("--net", net, "--epochs", "2", "--inner-steps", "1", "--noise", "0.4"),
            *(
                "--lower-lr",
                "0.001",
                "--pretrain-epochs",
                "10",
                "--retrain-threshold",
                "0",
            ),
            *("--batch-size", "100", "--out", str(tmp_path / "run")),
        ]
    )
    assert summary["test_accuracy"] > 90 and summary["auc"] > 95
