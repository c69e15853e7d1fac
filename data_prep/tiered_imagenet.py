"""tieredImageNet: `{train,val,test}_images_png.pkl` and `..._labels.pkl`, as published.

    python data_prep/tiered_imagenet.py --data-dir FOLDER --out tiered.npz

An images file is a pickled list of PNG files, uint8 vectors, 84 x 84 x 3 each. A labels
file is a dictionary with `label_specific`, the class of every image, and
`label_specific_str`, the names of the classes. There are 351, 97 and 160 classes.
MetaOptNet's layout, `{train,val,test}_images.npz` and `..._labels.pkl`, is read too.
"""

import functools
import pathlib
import sys

import numpy as np
import tensorflow as tf

if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from data_prep import layouts, pickles
from data_prep.classes import (
    Classes,
    grouped,
    parser,
    prepare,
    require_apart,
    warn_unless_published,
)
from data_prep.errors import one_line
from data_prep.layouts import splits

LAYOUTS = (
    splits("{}_images_png.pkl", "{}_labels.pkl"),
    splits("{}_images.npz", "{}_labels.pkl"),
    splits("{}_images.npz", "{}_labels.npz"),
    splits("{}.npz"),
    splits("{}.pkl"),
)
CLASSES = {"train": 351, "validation": 97, "test": 160}


def load(folder: pathlib.Path) -> dict[str, Classes]:
    """The three splits, images as uint8; warns if the numbers of classes are unusual.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is not tieredImageNet's, or two splits share a class.
    """
    files = layouts.find(pathlib.Path(folder), LAYOUTS, "tieredImageNet")
    found = {}
    for split, paths in files.items():
        published = paths[0].name.endswith("_images_png.pkl")
        found[split] = (
            read(*paths) if published else layouts.read(paths, split, "tieredImageNet")
        )
    warn_unless_published(found, CLASSES, "tieredImageNet")
    return require_apart(found)


def read(images_path: pathlib.Path, labels_path: pathlib.Path) -> Classes:
    """One split."""
    files, content = pickles.load(images_path), pickles.load(labels_path)
    try:
        labels = np.asarray(content["label_specific"]).astype(int).ravel()
        names = [
            name.decode() if isinstance(name, bytes) else str(name)
            for name in content["label_specific_str"]
        ]
    except (LookupError, TypeError, ValueError):
        raise ValueError(
            f"{labels_path} is not a labels file of tieredImageNet: it must hold "
            "label_specific, integers, and label_specific_str, their names"
        ) from None
    if labels.min(initial=0) < 0 or labels.max(initial=-1) >= len(names):
        raise ValueError(f"{labels_path} has a label without a name")
    try:
        if len(files) != len(labels):
            raise ValueError(f"{len(files)} files for {len(labels)} labels")
        order = np.argsort(labels, kind="stable")
        first = decoded(files[order[0]])
        # Filled in place, in the order of `grouped`: the images take gigabytes.
        images = np.empty([len(files), *first.shape], np.uint8)
        for place, number in enumerate(order):
            image = decoded(files[number])
            if image.shape != first.shape:
                raise ValueError(f"{image.shape} among {first.shape}")
            images[place] = image
    except (
        LookupError,
        tf.errors.InvalidArgumentError,
        TypeError,
        ValueError,
    ) as error:
        raise ValueError(
            f"{images_path} is not an images file of tieredImageNet: it must hold a "
            "list of PNG files of one size, one for every label "
            f"({one_line(error)})"
        ) from None
    return grouped(images, labels[order], names)


def decoded(file: np.ndarray) -> np.ndarray:
    """One PNG file. OpenCV wrote it in BGR order, which published readers keep."""
    content = np.asarray(file, np.uint8).ravel().tobytes()
    return tf.io.decode_png(content, channels=3).numpy()


def main(argv: list[str] | None = None) -> dict[str, int]:
    args = parser(__doc__).parse_args(argv)
    read = functools.partial(load, args.data_dir or pathlib.Path())
    return prepare(__file__, args.out, "tiered-imagenet", read)


if __name__ == "__main__":
    main()
