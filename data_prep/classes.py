"""Images of many classes, for few-shot tasks: the common format of such data sets."""

import argparse
import os
import pathlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from data_prep.command_line import one_line_errors
from data_prep.errors import one_line

SPLITS = ("train", "validation", "test")


class Classes(NamedTuple):
    """Images, ordered by class.

    Attributes:
        images: uint8 [n, height, width, channels].
        starts: int64 [classes + 1]: class c has the images starts[c]:starts[c + 1].
        names: one per class, no two equal.
    """

    images: np.ndarray
    starts: np.ndarray
    names: tuple[str, ...]

    def of(self, number: int) -> np.ndarray:
        """The images of one class."""
        return self.images[self.starts[number] : self.starts[number + 1]]


def grouped(
    images: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str] | Mapping[int, str] | None = None,
) -> Classes:
    """Images in any order, sorted by their labels.

    Args:
        images: uint8 [n, height, width, channels].
        labels: integers [n]; each one that occurs becomes a class, in ascending order.
        names: label -> name; `None`: the numbers.

    Raises:
        ValueError: if there is not one label for every image.
    """
    if len(images) != len(labels) or not len(images):
        raise ValueError(
            f"there must be a label for every image, got {len(labels)} for "
            f"{len(images)} images"
        )
    if (labels[1:] < labels[:-1]).any():  # no copy if they are sorted already
        images = images[np.argsort(labels, kind="stable")]
    present, counts = np.unique(labels, return_counts=True)
    chosen = [str(label if names is None else names[int(label)]) for label in present]
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return Classes(images, starts, tuple(chosen))


def select(classes: Classes, numbers: Sequence[int]) -> Classes:
    """Some classes, in the order given."""
    parts = [classes.of(number) for number in numbers]
    starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
    images = np.concatenate(parts) if parts else classes.images[:0]
    names = tuple(classes.names[number] for number in numbers)
    return Classes(images, starts.astype(np.int64), names)


def joined(parts: Sequence[Classes]) -> Classes:
    """All classes of several collections."""
    sizes = np.concatenate([np.diff(part.starts) for part in parts])
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    names = tuple(name for part in parts for name in part.names)
    return Classes(np.concatenate([part.images for part in parts]), starts, names)


def with_rotations(classes: Classes) -> Classes:
    """Four classes for each one: its images rotated by 0, 90, 180 and 270 degrees."""
    turned = []
    for turn in range(4):
        names = tuple(f"{name}, {90 * turn} degrees" for name in classes.names)
        images = np.rot90(classes.images, turn, axes=(1, 2))
        turned.append(Classes(images, classes.starts, names))
    count = len(classes.names)
    order = [turn * count + number for number in range(count) for turn in range(4)]
    return select(joined(turned), order)


def require_apart(splits: dict[str, Classes]) -> dict[str, Classes]:
    """The splits, or an error if a class is in two of them."""
    seen: dict[str, str] = {}
    for split, classes in splits.items():
        for name in classes.names:
            if name in seen:
                raise ValueError(
                    f"the splits must share no class, but {name} is in {seen[name]} "
                    f"and in {split}"
                )
            seen[name] = split
    return splits


def warn_unless_published(
    splits: dict[str, Classes], published: Mapping[str, int], name: str
) -> None:
    """Warn if the splits have other numbers of classes than the published ones."""
    found = [len(splits[split].names) for split in SPLITS]
    wanted = [published[split] for split in SPLITS]
    if found != wanted:
        warnings.warn(
            f"{name} has {wanted} classes for {', '.join(SPLITS)}, these "
            f"files {found}: "
            "results will not be comparable with published ones",
            stacklevel=3,
        )


def save(path: pathlib.Path, splits: dict[str, Classes], source: str) -> None:
    """Write all splits to one .npz file, atomically.

    Args:
        path: the file.
        splits: classes of "train", "validation" and "test".
        source: name of the data set, which `load` checks.
    """
    arrays: dict[str, Any] = {"source": np.array(source)}
    for split, classes in require_apart(splits).items():
        arrays[f"{split}_images"] = classes.images
        arrays[f"{split}_starts"] = classes.starts
        arrays[f"{split}_names"] = np.array(classes.names)
    partial = path.with_name(path.name + ".partial.npz")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        np.savez_compressed(partial, **arrays)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load(path: pathlib.Path, source: str) -> dict[str, Classes]:
    """The splits that `save` wrote.

    Raises:
        FileNotFoundError: if the file is not there.
        ValueError: if it is a different file or data set, or a class is in two
            splits.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. Make it with data_prep")
    try:
        with path.open("rb") as opened, np.load(opened) as file:
            found = str(file["source"])
            splits = {
                split: Classes(
                    file[f"{split}_images"],
                    file[f"{split}_starts"],
                    tuple(map(str, file[f"{split}_names"])),
                )
                for split in SPLITS
            }
    except Exception as error:  # noqa: BLE001  (NumPy raises what zip and zlib find)
        raise ValueError(
            f"{path} is damaged, or not a file of classes that data_prep made "
            f"({one_line(error)}). Make it again"
        ) from None
    if found != source:
        raise ValueError(f"{path} must hold {source}. Received: {found}")
    return require_apart(splits)


def parser(description: str | None, download: bool = False) -> argparse.ArgumentParser:
    """The flags of a command that writes classes; whether `--download` is one."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--data-dir", type=pathlib.Path, help="folder of the data files")
    made.add_argument("--out", type=pathlib.Path, required=True, help=".npz to write")
    if download:
        made.add_argument(
            "--download",
            action="store_true",
            help="fetch the data set by tensorflow-datasets, if it is not there",
        )
    return made


def prepare(
    script: str, out: pathlib.Path, source: str, read: Callable[[], dict[str, Classes]]
) -> dict[str, int]:
    """Run such a command: check the input, write, and print the numbers of classes.

    Args:
        script: the command's `__file__`.
        out: the file to write.
        source: name of the data set.
        read: function that reads the splits.

    Returns:
        split -> number of classes.
    """
    with one_line_errors(script):
        splits = read()
        save(out, splits, source)
    counts = {split: len(classes.names) for split, classes in splits.items()}
    sizes = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    shape = " x ".join(map(str, splits["train"].images.shape[1:3]))
    print(f"{out}: {sizes} classes of {source}, {shape}, uint8")
    return counts
