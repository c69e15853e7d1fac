"""CIFAR10 from the files that people have: pickles, the binary version, image folders.

| layout | files, in the folder, or in the folder that the archive unpacks to          |
|--------|-----------------------------------------------------------------------------|
| python | `data_batch_1` to `data_batch_5`, `test_batch` (`cifar-10-batches-py`)      |
| binary | `data_batch_1.bin` to `data_batch_5.bin`, `test_batch.bin` (`...-bin`)      |
| images | `train/CLASS/*.png`, `test/CLASS/*.png`, or `train/NUMBER_CLASS.png`        |

Every layout gives the same arrays, in the order of the first two. Image files have
that order too, if their names begin with the images' numbers, as those of the usual
folders do; otherwise they are sorted by name. Files may have fewer images than the
published ones.
"""

import pathlib
import re

import numpy as np
import tensorflow as tf

from data_prep import pickles
from data_prep.errors import one_line

NAMES = (
    "airplane automobile bird cat deer dog frog horse ship truck".split()  # by label
)
FILES = {
    "train": [f"data_batch_{number}" for number in range(1, 6)],
    "test": ["test_batch"],
}
SIDE = 32
PIXELS = 3 * SIDE * SIDE
ENDINGS = (".png", ".jpg", ".jpeg", ".bmp")


def load(folder: pathlib.Path, split: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Images, uint8 [n, 32, 32, 3], and integer labels of one split.

    Args:
        folder: the folder with the files, or the one that the archive was unpacked in.
        split: "train" or "test".

    Returns:
        `None` if the folder has none of the layouts.

    Raises:
        FileNotFoundError: if a layout is there in part.
        ValueError: if a file is damaged or of another kind. Nothing that a pickle
            names is run.
    """
    for place, ending, read in (
        ("cifar-10-batches-py", "", read_pickle),
        ("cifar-10-batches-bin", ".bin", read_binary),
    ):
        for where in (folder, folder / place):
            paths = [where / f"{name}{ending}" for name in FILES[split]]
            if any(path.is_file() for path in paths):
                parts = [read(path) for path in paths if _there(path)]
                pixels, labels = (np.concatenate(x) for x in zip(*parts, strict=True))
                images = pixels.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
                return np.ascontiguousarray(images), labels
    for where in (folder, folder / "cifar10", folder / "cifar"):
        if (where / split).is_dir():
            return read_folder(where / split)
    return None


def _there(path: pathlib.Path) -> bool:
    if path.is_file():
        return True
    raise FileNotFoundError(
        f"{path} does not exist, though others of its kind do. Complete CIFAR10 "
        "there, or point --data-dir at a whole copy"
    )


def read_pickle(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """One batch of the Python version: rows of channel planes, [n, 3072], and labels.

    Raises:
        ValueError: if it does not contain images and their labels.
    """
    found = pickles.load(path)
    content = found if isinstance(found, dict) else {}
    content = {
        key.decode("latin1") if isinstance(key, bytes) else key: value
        for key, value in content.items()
    }
    pixels, given = content.get("data"), content.get("labels")
    labels = np.asarray(given if isinstance(given, (list, np.ndarray)) else [])
    shape = getattr(pixels, "shape", None)
    if (
        not isinstance(pixels, np.ndarray)
        or pixels.dtype != np.uint8
        or shape != (len(labels), PIXELS)
        or labels.dtype.kind not in "iu"
    ):
        raise ValueError(
            f"{path} must hold uint8 images, [n, {PIXELS}], under data and as many "
            f"integers under labels. Received: data of {shape or type(pixels).__name__}"
            f", {labels.size} labels"
        )
    return pixels, _checked(labels, path)


def read_binary(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """One file of the binary version: a byte of label and the planes, per image.

    Raises:
        ValueError: if its length is not a multiple of a record's.
    """
    content = np.fromfile(path, np.uint8)
    if not content.size or content.size % (PIXELS + 1):
        raise ValueError(
            f"{path} is cut short, or not a file of CIFAR10: its length must be a "
            f"multiple of {PIXELS + 1}. Received: {content.size:,} bytes"
        )
    rows = content.reshape(-1, PIXELS + 1)
    return rows[:, 1:], _checked(rows[:, 0], path)


def _checked(labels: np.ndarray, path: pathlib.Path) -> np.ndarray:
    if labels.size and not (0 <= labels.min() and labels.max() < len(NAMES)):
        raise ValueError(
            f"{path} must hold labels from 0 to 9. Received: {labels.min()} to "
            f"{labels.max()}"
        )
    return labels.astype(np.int64)


def read_folder(folder: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Image files, in a folder per class or with the class in their names.

    Raises:
        FileNotFoundError: if there are none.
        ValueError: if a class is none of CIFAR10's, or a file no image of 32 x 32.
    """
    paths = [
        path
        for path in [*folder.glob("*/*"), *folder.glob("*")]
        if path.suffix.lower() in ENDINGS
    ]
    if not paths:
        raise FileNotFoundError(
            f"{folder} has no images. It must hold a folder per class, such as "
            f"{folder / NAMES[0]}, with .png or .jpg files"
        )
    numbers = [re.match(r"\d+", path.stem) for path in paths]
    known = [int(one[0]) for one in numbers if one]
    if len({*known}) == len(paths):  # the images' numbers in the published files
        order = np.argsort(known)
    else:
        order = np.argsort([str(path) for path in paths])
    paths = [paths[place] for place in order]
    labels = [_label(path, folder) for path in paths]
    return np.stack([_image(path) for path in paths]), np.array(labels, np.int64)


def _label(path: pathlib.Path, folder: pathlib.Path) -> int:
    flat = path.parent == folder
    name = re.sub(r"^\d+_", "", path.stem) if flat else path.parent.name
    if name in NAMES:
        return NAMES.index(name)
    if not flat and name in map(str, range(len(NAMES))):
        return int(name)
    raise ValueError(
        f"{path} must be in a folder named after its class, or be called "
        f"NUMBER_CLASS{path.suffix}. Classes are {', '.join(NAMES)}. Received: {name}"
    )


def _image(path: pathlib.Path) -> np.ndarray:
    try:
        image = tf.io.decode_image(
            path.read_bytes(), channels=3, expand_animations=False
        ).numpy()
    except tf.errors.InvalidArgumentError as error:
        raise ValueError(
            f"{path} is not an image file, or damaged ({one_line(error)})"
        ) from None
    if image.shape != (SIDE, SIDE, 3):
        raise ValueError(f"{path} must be 32 x 32. Received: {image.shape[:2]}")
    return image
