"""Folders of pictures: a folder per class."""

import collections
import functools
import pathlib
from typing import Any

import keras
import numpy as np

from tfbilevel._jobs.command_line.bad_input import BadInput
from tfbilevel._jobs.command_line.csv_files import write_csv
from tfbilevel._jobs.command_line.data import Data, Preparation, Source
from tfbilevel._jobs.optional_packages import optional_package

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
# Pictures of many pixels are made smaller: training takes long, and labels are
# told from far fewer.
LARGEST = 96
DEFAULT_SIZE = 64


def read_folders(
    path: pathlib.Path, trusted: pathlib.Path | None, size: int | None
) -> Source:
    """The pictures folder/class/*.png (or jpg, ...), all of one size.

    Args:
        path: the folder.
        trusted: another one, whose labels are right.
        size: height and width. `None`: that of most pictures, or 64 if that is large.

    Raises:
        BadInput: for folders without classes or pictures, and files that are none.
        MissingPackageError: without pillow.
    """
    files = picture_files(path)
    other_files = picture_files(trusted) if trusted is not None else []
    pictures = [_opened(file) for file, _ in [*files, *other_files]]
    grey = all(picture.ndim == 2 for picture in pictures)
    if not grey:
        pictures = [
            np.repeat(p[..., None], 3, axis=-1) if p.ndim == 2 else p for p in pictures
        ]
    else:
        pictures = [picture[..., None] for picture in pictures]
    shape = (size, size) if size else _common_size(pictures[: len(files)])
    resize = keras.layers.Resizing(*shape, antialias=True)
    images = np.stack([_resized(picture, shape, resize) for picture in pictures])
    data = _data(path, files, images[: len(files)])
    other = None
    if trusted is not None:
        other = _data(trusted, other_files, images[len(files) :])
    note = (
        f"Pictures of {shape[0]} x {shape[1]} pixels, {'grey' if grey else 'colour'}."
    )

    def prepare() -> Preparation:
        raw = keras.Input((None, None, images.shape[-1]), name="picture")
        smaller = keras.layers.Resizing(*shape, antialias=True)(raw)
        model = keras.Model(raw, keras.layers.Rescaling(1 / 255)(smaller))
        return Preparation("image", model, note)

    def corrected(labels: np.ndarray) -> tuple[str, Any]:
        return "cleaned.csv", functools.partial(_write_corrected, data, labels)

    return Source(data, other, prepare, corrected)


def picture_files(folder: pathlib.Path) -> list[tuple[pathlib.Path, str]]:
    """The files of all classes, in sorted order, and their classes."""
    classes = sorted(
        each
        for each in folder.iterdir()
        if each.is_dir() and not each.name.startswith(".")
    )
    if not classes:
        raise BadInput(
            f"the folder {folder} holds no folders: there must be one for each class, "
            "named like it, with its pictures"
        )
    files = []
    for each in classes:
        found = sorted(
            file
            for file in each.iterdir()
            if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
        )
        if not found:
            raise BadInput(
                f"the folder {each} holds no pictures ({', '.join(SUFFIXES)})"
            )
        files += [(file, each.name) for file in found]
    return files


def _opened(file: pathlib.Path) -> np.ndarray:
    """Pixels from 0 to 255, [h, w] of a grey picture, else [h, w, 3]."""
    image = optional_package("PIL.Image", f"Reading {file.name}", "pillow")
    try:
        with image.open(file) as picture:
            grey = picture.mode in ("1", "L", "LA")
            return np.asarray(picture.convert("L" if grey else "RGB"))
    except (OSError, SyntaxError, ValueError, image.DecompressionBombError) as error:
        raise BadInput(f"{file} is not a picture that can be read: {error}") from error


def _common_size(pictures: list[np.ndarray]) -> tuple[int, int]:
    sizes = collections.Counter(picture.shape[:2] for picture in pictures)
    size = sizes.most_common(1)[0][0]
    return size if max(size) <= LARGEST else (DEFAULT_SIZE, DEFAULT_SIZE)


def _resized(picture: np.ndarray, shape: tuple[int, int], resize: Any) -> np.ndarray:
    if picture.shape[:2] == shape:
        return picture
    made = np.asarray(resize(picture[None].astype(np.float32)))[0]
    return np.clip(np.rint(made), 0, 255).astype(np.uint8)


def _data(folder: pathlib.Path, files: list, images: np.ndarray) -> Data:
    names = [str(file.relative_to(folder)) for file, _ in files]
    labels = np.array([label for _, label in files])
    return Data(str(folder), images, images, labels, names)


def _write_corrected(data: Data, labels: np.ndarray, path: Any) -> None:
    write_csv(path, {"file": data.names or [], "label": labels.tolist()})
