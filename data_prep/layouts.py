"""The file layouts in which few-shot data sets are distributed."""

import csv
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from data_prep import pickles
from data_prep.classes import Classes, grouped
from data_prep.errors import one_line

# The names used for each kind of content, in the order in which they are tried.
IMAGES = ("image_data", "images", "data", "features")
LABELS = ("label_specific", "labels", "label", "targets")
NAMES = ("catname2label", "label_specific_str", "class_names")
FORMS = "uint8 [n, height, width, 3], [n, 3, height, width] or a list of image files"
SIDE = 84  # images of different sizes are resized to this


def find(
    folder: pathlib.Path, layouts: Sequence[Mapping[str, Sequence[str]]], source: str
) -> dict[str, list[pathlib.Path]]:
    """The files of every split, in the first layout that is there.

    Args:
        folder: where they are.
        layouts: split -> names of its files.
        source: name of the data set.

    Raises:
        FileNotFoundError: if no layout is there whole; of one that is there in part,
            with what is missing.
    """
    begun = None
    for layout in layouts:
        files = {split: [folder / name for name in layout[split]] for split in layout}
        absent = [path for some in files.values() for path in some if not path.exists()]
        if not absent:
            return files
        if begun is None and len(absent) < sum(map(len, files.values())):
            begun = absent[0]
    if begun is not None:
        raise FileNotFoundError(
            f"{begun} does not exist, though others of its kind do. Complete "
            f"{source} there, or point --data-dir at its folder"
        )
    first = folder / next(iter(layouts[0].values()))[0]
    known = "; ".join(", ".join(layout["test"]) for layout in layouts)
    raise FileNotFoundError(
        f"{first} does not exist, nor files of another layout of {source}. Point "
        f"--data-dir at its folder. Known are, of the test split: {known}"
    )


def read(paths: Sequence[pathlib.Path], split: str, source: str) -> Classes:
    """One split from its files: pickles, .npz, or a .csv and a folder of images.

    Raises:
        ValueError: if they do not contain images and the class of each.
    """
    if paths[0].suffix == ".csv":
        return _read_csv(paths[0], paths[1])
    content: dict[str, Any] = {}
    for path in paths:
        content |= _content(path)
    where = " and ".join(map(str, paths))
    images = as_images(_first(content, IMAGES), where, source)
    members = content.get("class_dict")
    if isinstance(members, dict):
        # Not by position, although the published loader uses image // 600 as the class.
        order, labels, names = _from_members(members, len(images), where, source)
        images = images[order]
    else:
        given = _first(content, LABELS)
        labels, names = _from_labels(given, len(images), where, source)
        named = _first(content, NAMES)
        if names is None and named is not None:  # names with explicit numbers
            names = _names(named, labels, where)
        elif names is None:  # plain numbers, which start at 0 in every split
            names = {int(n): f"{split}-{int(n)}" for n in np.unique(labels)}
    return grouped(images, labels, names)


def text(value: Any) -> str:
    """A name, which Python 2 may have stored as bytes."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def as_images(found: Any, where: str, source: str) -> np.ndarray:
    """Images with the channels last, from any form used in a file."""
    objects = isinstance(found, np.ndarray) and found.dtype.hasobject
    if isinstance(found, (list, tuple)) or objects:
        try:
            found = np.stack([decoded(one) for one in found])
        except (
            OverflowError,
            TypeError,
            ValueError,
            tf.errors.InvalidArgumentError,
        ) as error:
            raise ValueError(
                f"{where}: not a file of {source}: its images must be image files of "
                f"one size ({one_line(error)})"
            ) from None
    shape = getattr(found, "shape", None)
    if not isinstance(found, np.ndarray) or found.ndim != 4 or found.dtype != np.uint8:
        kind = f"{shape}, {found.dtype}" if isinstance(found, np.ndarray) else None
        raise ValueError(
            f"{where}: not a file of {source}: it must hold images ({FORMS}) under one "
            f"of {', '.join(IMAGES)}. Received: {kind or type(found).__name__}"
        )
    if found.shape[1] in (1, 3) and found.shape[3] in (1, 3):
        raise ValueError(
            f"{where}: it cannot be told which axis of its images holds the channels, "
            f"1 or 3. Received: {shape}"
        )
    if found.shape[1] in (1, 3):
        return np.ascontiguousarray(found.transpose(0, 2, 3, 1))
    if found.shape[3] not in (1, 3):
        raise ValueError(
            f"{where}: not a file of {source}: images must have 1 or 3 channels. "
            f"Received: {shape}"
        )
    return found


def decoded(file: Any) -> np.ndarray:
    """The pixels of an encoded image file; an image is returned unchanged."""
    if isinstance(file, np.ndarray) and file.ndim == 3:
        return file
    content = file if isinstance(file, bytes) else np.asarray(file, np.uint8).tobytes()
    return tf.io.decode_image(content, channels=3, expand_animations=False).numpy()


def _content(path: pathlib.Path) -> dict[str, Any]:
    """The contents of a file, by name."""
    if path.suffix == ".npz":
        try:
            with path.open("rb") as opened, np.load(opened) as file:
                return {name: file[name] for name in file.files}
        except Exception as error:  # noqa: BLE001  (NumPy raises what zip and zlib find)
            raise ValueError(
                f"{path} is damaged, or not an .npz of plain arrays ({one_line(error)})"
            ) from None
    found = pickles.load(path)
    if isinstance(found, dict):
        return {text(name): value for name, value in found.items()}
    return {"images": found}  # a list of files, or one array


def _first(content: dict[str, Any], names: Sequence[str]) -> Any:
    return next((content[name] for name in names if name in content), None)


def _from_members(members: dict, count: int, where: str, source: str) -> tuple:
    """The images' order by class, their labels and the labels' names, from a mapping
    of class names to image numbers."""
    names = sorted(members, key=text)
    try:
        given = [np.asarray(members[name]) for name in names]
        if not all(some.dtype.kind in "iu" or not some.size for some in given):
            raise TypeError  # rounding 0.5 to 0 would hide an error
        numbers = [some.astype(int).ravel() for some in given]
    except (OverflowError, TypeError, ValueError):
        numbers = []
    every = np.concatenate([*numbers, np.empty(0, int)])
    if not np.array_equal(np.sort(every), np.arange(count)):
        raise ValueError(
            f"{where}: not a file of {source}: class_dict must have every image in one "
            f"class. Received: {len(every)} numbers for {count} images"
        )
    labels = np.repeat(np.arange(len(names)), [len(some) for some in numbers])
    return every, labels, {label: text(name) for label, name in enumerate(names)}


def _from_labels(given: Any, count: int, where: str, source: str) -> tuple:
    """Labels, and their names if the labels are given as names."""
    labels = np.asarray([] if given is None else given)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape != (count,) or count == 0 or labels.dtype.kind not in "iuSU":
        raise ValueError(
            f"{where}: not a file of {source}: it must hold a label for every image "
            f"under one of class_dict, {', '.join(LABELS)}. Received: {labels.shape} "
            f"labels of type {labels.dtype} for {count} images"
        )
    if labels.dtype.kind in "SU":
        known, numbers = np.unique(labels, return_inverse=True)
        return numbers, {n: text(name) for n, name in enumerate(known.tolist())}
    return labels.astype(np.int64), None


def _names(named: Any, labels: np.ndarray, where: str) -> dict[int, str]:
    """Label -> name, from a list of names or a dictionary in either direction."""
    pairs: list[tuple[Any, Any]] = []
    if isinstance(named, dict):
        pairs = [(k, v) if _whole(k) else (v, k) for k, v in named.items()]
    elif isinstance(named, (list, tuple, np.ndarray)) and np.ndim(named):
        pairs = list(enumerate(named))
    found = {int(label): text(name) for label, name in pairs if _whole(label)}
    if len(found) < len(pairs):
        raise ValueError(f"{where} has two names for a label, or a label of no integer")
    missing = set(np.unique(labels).tolist()) - set(found)
    if missing:
        raise ValueError(f"{where} has a label without a name: {min(missing)}")
    return found


def _whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _read_csv(path: pathlib.Path, folder: pathlib.Path) -> Classes:
    """Ravi and Larochelle's split: rows of `filename,label`, and the image files."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        pairs = [(row["filename"], row["label"]) for row in rows]
    except (KeyError, UnicodeDecodeError, csv.Error):
        pairs = []
    if not pairs or not all(name and label for name, label in pairs):
        raise ValueError(
            f"{path} is not a split of miniImageNet: it must be a table with the "
            "columns filename and label"
        )
    images = []
    for name, label in pairs:
        places = [folder / name, folder / label / name]
        image = next((place for place in places if place.is_file()), None)
        # Reject a name with ".." or an absolute path, which would leave the folder.
        if image is None or folder.resolve() not in image.resolve().parents:
            raise FileNotFoundError(f"{places[0]} does not exist, which {path} names")
        try:
            images.append(decoded(image.read_bytes()))
        except tf.errors.InvalidArgumentError:
            raise ValueError(f"{image} is not an image file, or damaged") from None
    if len({image.shape for image in images}) > 1:
        images = [_of_one_size(image) for image in images]
    names, labels = np.unique([label for _, label in pairs], return_inverse=True)
    return grouped(np.stack(images), labels, names.tolist())


def _of_one_size(image: np.ndarray) -> np.ndarray:
    small = tf.image.resize(image, [SIDE, SIDE], "lanczos3", antialias=True)
    return tf.cast(tf.clip_by_value(tf.round(small), 0, 255), tf.uint8).numpy()


def splits(*names: str) -> dict[str, list[str]]:
    """Split -> names of its files; {} in a name stands for train, val and test."""
    short = {"train": "train", "validation": "val", "test": "test"}
    return {s: [name.format(part) for name in names] for s, part in short.items()}
