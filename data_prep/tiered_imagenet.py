"""tieredImageNet: `{train,val,test}_images_png.pkl` and `..._labels.pkl`, as published.

An images file is a pickled list of PNG files, uint8 vectors, 84 x 84 x 3 each; a labels
file is a dictionary with `label_specific`, the class of every image, and
`label_specific_str`, the classes' names. 351, 97 and 160 classes.
"""

import pathlib

import numpy as np
import tensorflow as tf

from data_prep.classes import Classes, grouped, require_apart
from data_prep.mini_imagenet import FILES, unpickled

CLASSES = {"train": 351, "validation": 97, "test": 160}


def load(folder: pathlib.Path, any_size: bool = False) -> dict[str, Classes]:
    """The three splits; images stay uint8.

    Raises:
        FileNotFoundError: if a file is not there.
        ValueError: if one is not tieredImageNet's, or two share a class.
    """
    splits = {}
    for split, name in FILES.items():
        folder = pathlib.Path(folder)
        classes = read(folder / f"{name}_images_png.pkl", folder / f"{name}_labels.pkl")
        if not any_size and len(classes.names) != CLASSES[split]:
            raise ValueError(
                f"{folder}/{name}_labels.pkl must hold {CLASSES[split]} classes. "
                f"Received: {len(classes.names)}"
            )
        splits[split] = classes
    return require_apart(splits)


def read(images_path: pathlib.Path, labels_path: pathlib.Path) -> Classes:
    """One split."""
    files, content = unpickled(images_path), unpickled(labels_path)
    if not isinstance(content, dict) or not {
        "label_specific",
        "label_specific_str",
    } <= set(content):
        raise ValueError(
            f"{labels_path} is not a labels file of tieredImageNet: it must hold "
            "label_specific and label_specific_str"
        )
    labels = np.asarray(content["label_specific"]).astype(int)
    names = [
        name.decode() if isinstance(name, bytes) else str(name)
        for name in content["label_specific_str"]
    ]
    try:
        images = np.stack([decoded(file) for file in files])
    except (tf.errors.InvalidArgumentError, TypeError, ValueError) as error:
        raise ValueError(
            f"{images_path} is not an images file of tieredImageNet: it must hold a "
            f"list of PNG files of one size ({str(error).splitlines()[0]})"
        ) from None
    if labels.max(initial=-1) >= len(names):
        raise ValueError(f"{labels_path} has a label without a name")
    return grouped(images, labels, names)


def decoded(file: np.ndarray) -> np.ndarray:
    """One PNG. OpenCV wrote them, blue first; the published readers leave it so."""
    content = np.asarray(file, np.uint8).ravel().tobytes()
    return tf.io.decode_png(content, channels=3).numpy()
