"""miniImageNet: `mini-imagenet-cache-{train,val,test}.pkl`, as published.

Each file is a pickled dictionary: `image_data`, uint8 [n, 84, 84, 3], and `class_dict`,
class name -> numbers of its images. 64, 16 and 20 classes of 600 images.
"""

import pathlib
import pickle
from typing import Any

import numpy as np

from data_prep.classes import Classes, require_apart

FILES = {"train": "train", "validation": "val", "test": "test"}
CLASSES = {"train": 64, "validation": 16, "test": 20}


def load(folder: pathlib.Path, any_size: bool = False) -> dict[str, Classes]:
    """The three splits; images stay uint8.

    Args:
        folder: where the three files lie.
        any_size: accept other numbers of classes than the published ones.

    Raises:
        FileNotFoundError: if a file is not there.
        ValueError: if one is not miniImageNet's, or two share a class.
    """
    splits = {}
    for split, name in FILES.items():
        path = pathlib.Path(folder) / f"mini-imagenet-cache-{name}.pkl"
        classes = read(path)
        if not any_size and len(classes.names) != CLASSES[split]:
            raise ValueError(
                f"{path} must hold {CLASSES[split]} classes. Received: "
                f"{len(classes.names)}"
            )
        splits[split] = classes
    return require_apart(splits)


def read(path: pathlib.Path) -> Classes:
    """One file: its classes by name."""
    content = unpickled(path)
    images = content.get("image_data") if isinstance(content, dict) else None
    members = content.get("class_dict") if isinstance(content, dict) else None
    if (
        not isinstance(images, np.ndarray)
        or images.ndim != 4
        or images.dtype != np.uint8
        or not isinstance(members, dict)
        or sorted(i for some in members.values() for i in some)
        != list(range(len(images)))
    ):
        raise ValueError(
            f"{path} is not a file of miniImageNet: it must hold image_data, uint8 "
            "[n, height, width, 3], and class_dict, which has every image in a class"
        )
    # Not by position: the published loader takes image // 600 for the class.
    names = sorted(members)
    order = np.concatenate([np.asarray(members[name], int) for name in names])
    starts = np.concatenate([[0], np.cumsum([len(members[name]) for name in names])])
    return Classes(images[order], starts.astype(np.int64), tuple(map(str, names)))


def unpickled(path: pathlib.Path) -> Any:
    """A pickle of Python 2 or 3, or a clear error."""
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist. Point --data-dir at its folder"
        )
    try:
        with path.open("rb") as file:
            return pickle.load(file, encoding="latin1")
    except Exception as error:  # noqa: BLE001  (pickle raises whatever it meets)
        raise ValueError(
            f"{path} cannot be read: it is cut short or not a pickle ({error})"
        ) from None
