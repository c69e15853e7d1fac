"""miniImageNet: `mini-imagenet-cache-{train,val,test}.pkl`, as published.

    python data_prep/mini_imagenet.py --data-dir FOLDER --out mini.npz

Each file is a pickled dictionary: `image_data`, uint8 [n, 84, 84, 3], and `class_dict`,
class name -> numbers of its images. 64, 16 and 20 classes of 600 images.
"""

import functools
import pathlib
import sys

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from data_prep import pickles
from data_prep.classes import (
    Classes,
    parser,
    prepare,
    require_apart,
    warn_unless_published,
)

FILES = {"train": "train", "validation": "val", "test": "test"}
CLASSES = {"train": 64, "validation": 16, "test": 20}


def load(folder: pathlib.Path) -> dict[str, Classes]:
    """The three splits; images stay uint8. Other numbers of classes are a warning.

    Raises:
        FileNotFoundError: if a file is not there.
        ValueError: if one is not miniImageNet's, or two share a class.
    """
    splits = {}
    for split, name in FILES.items():
        splits[split] = read(pathlib.Path(folder) / f"mini-imagenet-cache-{name}.pkl")
    warn_unless_published(splits, CLASSES, "miniImageNet")
    return require_apart(splits)


def read(path: pathlib.Path) -> Classes:
    """One file: its classes by name."""
    content = pickles.load(path)
    images = content.get("image_data") if isinstance(content, dict) else None
    members = content.get("class_dict") if isinstance(content, dict) else None
    if (
        not isinstance(images, np.ndarray)
        or images.ndim != 4
        or images.dtype != np.uint8
        or not isinstance(members, dict)
        or not _each_once(members, len(images))
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


def _each_once(members: dict, count: int) -> bool:
    """Whether the classes' numbers are 0, ..., count - 1, each in one class."""
    try:
        found = sorted(int(i) for some in members.values() for i in some)
    except (TypeError, ValueError):  # no lists, or of other things
        return False
    return found == list(range(count))


def main(argv: list[str] | None = None) -> dict[str, int]:
    args = parser(__doc__).parse_args(argv)
    read = functools.partial(load, args.data_dir or pathlib.Path())
    return prepare(__file__, args.out, "mini-imagenet", read)


if __name__ == "__main__":
    main()
