"""MNIST and FashionMNIST as published: IDX files, gzipped or not."""

import gzip
import pathlib
import zlib

import numpy as np

from data_prep.errors import one_line

NAMES = {"train": "train", "test": "t10k"}
PACKED = 1100  # gzip's compression ratio is below this
PLACES = ("", "raw", "MNIST/raw", "FashionMNIST/raw")  # torchvision creates folders


def find(folder: pathlib.Path, split: str) -> tuple[pathlib.Path, pathlib.Path] | None:
    """The files of images and labels, or `None` if there are none."""
    for place in PLACES:
        for suffix in ("", ".gz"):
            images, labels = (
                folder / place / f"{NAMES[split]}-{kind}-ubyte{suffix}"
                for kind in ("images-idx3", "labels-idx1")
            )
            if images.is_file() and labels.is_file():
                return images, labels
    return None


def read_pair(images: pathlib.Path, labels: pathlib.Path) -> tuple:
    """Images, uint8 [n, 28, 28, 1], and integer labels, in the files' order.

    Raises:
        ValueError: if a file is damaged or of another kind, or the two do not belong
            together.
    """
    pixels, numbers = read(images, 3), read(labels, 1)
    if pixels.shape[1:] != (28, 28) or len(pixels) != len(numbers):
        raise ValueError(
            f"{images} and {labels} must hold as many images, 28 x 28, as labels. "
            f"Received: images {pixels.shape}, {len(numbers)} labels"
        )
    if numbers.size and numbers.max() > 9:
        raise ValueError(
            f"{labels} must hold labels up to 9. Received: {numbers.max()}"
        )
    return pixels[..., None], numbers.astype(np.int64)


def read(path: pathlib.Path, axes: int) -> np.ndarray:
    """One IDX file of bytes.

    Raises:
        ValueError: if its header is of another kind, or its length is wrong.
    """
    try:
        with path.open("rb") as plain:
            packed = plain.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else path.open("rb") as file:
            head = file.read(4 * (1 + axes))
            whole = head[: len(head) // 4 * 4]
            magic, *shape = np.frombuffer(whole, ">i4").tolist() or [0]
            if magic != 0x0800 + axes or len(shape) != axes or min(shape) < 0:
                raise ValueError(
                    f"it must begin with {0x0800 + axes}, an IDX file of bytes with "
                    f"{axes} axes, and begins with {magic}"
                )
            count = int(np.prod(shape, dtype=object))
            # Reading allocates memory for the requested size. Limit it to what the file
            # can contain and to what it declares (a small gzip may hold gigabytes).
            content = file.read(min(count, PACKED * path.stat().st_size) + 1)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(
            f"{path} is damaged, or not a file of MNIST ({one_line(error)})"
        ) from None
    if len(content) != count:
        more = "more" if len(content) > count else f"{len(content):,}"
        raise ValueError(
            f"{path} is cut short, or not a file of MNIST: it speaks of {count:,} "
            f"bytes and has {more}"
        )
    return np.frombuffer(content, np.uint8).reshape(shape)
