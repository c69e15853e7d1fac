"""miniImageNet: `mini-imagenet-cache-{train,val,test}.pkl`, as published.

    python data_prep/mini_imagenet.py --data-dir FOLDER --out mini.npz

Each file is a pickled dictionary: `image_data`, uint8 [n, 84, 84, 3], and `class_dict`,
class name -> numbers of its images. There are 64, 16 and 20 classes of 600 images. Two
other common layouts are read too: MetaOptNet's pickles, `{train,val,test}.pkl` and
`.npz`, and Ravi and Larochelle's `{train,val,test}.csv` with a folder `images`.
"""

import functools
import pathlib
import sys

if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from data_prep import layouts
from data_prep.classes import (
    Classes,
    parser,
    prepare,
    require_apart,
    warn_unless_published,
)
from data_prep.layouts import splits

CLASSES = {"train": 64, "validation": 16, "test": 20}
LAYOUTS = (
    splits("mini-imagenet-cache-{}.pkl"),
    splits("miniImageNet_category_split_{}.pickle")
    | {"train": ["miniImageNet_category_split_train_phase_train.pickle"]},
    *(
        splits(prefix + "{}" + suffix)
        for prefix in ("", "mini_imagenet_", "mini-imagenet-")
        for suffix in (".pkl", ".pickle", ".npz")
    ),
    splits("{}.csv", "images"),
)


def load(folder: pathlib.Path) -> dict[str, Classes]:
    """The three splits, images as uint8; warns if the numbers of classes are unusual.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is not miniImageNet's, or two splits share a class.
    """
    files = layouts.find(pathlib.Path(folder), LAYOUTS, "miniImageNet")
    found = {
        split: layouts.read(paths, split, "miniImageNet")
        for split, paths in files.items()
    }
    warn_unless_published(found, CLASSES, "miniImageNet")
    return require_apart(found)


def main(argv: list[str] | None = None) -> dict[str, int]:
    args = parser(__doc__).parse_args(argv)
    read = functools.partial(load, args.data_dir or pathlib.Path())
    return prepare(__file__, args.out, "mini-imagenet", read)


if __name__ == "__main__":
    main()
