"""NPZ files of NumPy arrays: examples `x` and labels `y`."""

import functools
import pathlib
import zipfile
from typing import Any

import keras
import numpy as np

from tfbilevel._jobs.command_line.bad_input import BadInput, nearest
from tfbilevel._jobs.command_line.data import Data, Preparation, Source
from tfbilevel._jobs.default_networks import kind_of, text_layer


def read_arrays(path: pathlib.Path, trusted: pathlib.Path | None, label: str) -> Source:
    """The arrays `x` and `label` of one or two files.

    Raises:
        BadInput: for files that are none, arrays that are not there or do not fit.
    """
    data = _data(path, label)
    other = _data(trusted, label) if trusted is not None else None
    x = data.shown
    if other is not None and other.shown.shape[1:] != x.shape[1:]:
        raise BadInput(
            f"the examples of {other.source} have another shape, "
            f"{other.shown.shape[1:]}, than those of {data.source}, {x.shape[1:]}"
        )
    kind = kind_of(x)
    if x.ndim > 4 or (kind == "tabular" and x.ndim != 2):
        raise BadInput(
            f"`x` of {path} must be rows [n, d], images [n, h, w] or [n, h, w, c], or "
            f"strings [n]. Its shape is {x.shape}"
        )

    def corrected(labels: np.ndarray) -> tuple[str, Any]:
        return "cleaned.npz", functools.partial(_write_corrected, path, label, labels)

    return Source(data, other, lambda: _preparation(kind, x), corrected)


def _loaded(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise BadInput(f"{path} cannot be read as arrays: {error}") from error


def _data(path: pathlib.Path, label: str) -> Data:
    arrays = _loaded(path)
    for name in "x", label:
        if name not in arrays:
            raise BadInput(f"{path} has no array {name!r}. {nearest(name, arrays)}")
    x, y = arrays["x"], arrays[label]
    if not x.ndim or not len(x):
        raise BadInput(f"{path} has no examples: `x` has the shape {x.shape}")
    if not y.ndim or len(x) != len(y):
        raise BadInput(
            f"`x` and {label!r} of {path} must have the same length. Their shapes are "
            f"{x.shape} and {y.shape}"
        )
    if kind_of(x) == "text":
        return Data(str(path), x, x.astype(str)[:, None], y)
    if x.dtype.kind not in "biuf":
        raise BadInput(f"`x` of {path} must hold numbers or strings, not {x.dtype}")
    finite = np.isfinite(x.reshape(len(x), -1)).all(axis=1)
    if not finite.all():
        raise BadInput(
            f"`x` of {path} has NaN or infinity in {np.count_nonzero(~finite):,} "
            f"examples, the first is {int(np.argmin(finite)) + 1}. Remove them"
        )
    return Data(str(path), x, x if x.dtype == np.uint8 else x.astype(np.float32), y)


def _preparation(kind: str, x: np.ndarray) -> Preparation:
    if kind == "text":
        layer = text_layer(x)
        raw = keras.Input((1,), dtype="string", name="text")
        size = layer.vocabulary_size()
        return Preparation(kind, keras.Model(raw, layer(raw)), "Texts.", size)
    raw = keras.Input(x.shape[1:], name="x")
    shape = " x ".join(map(str, x.shape[1:]))
    if kind == "tabular":
        layer = keras.layers.Normalization()
        layer.adapt(x.astype(np.float32))
        return Preparation(kind, keras.Model(raw, layer(raw)), f"{shape} numbers.")
    # Pixels from 0 to 1, as augmentations expect them.
    largest = float(x.max())
    pixels = keras.layers.Rescaling(1 / 255 if 2 < largest <= 255 else 1.0)(raw)
    if x.ndim == 3:
        pixels = keras.layers.Reshape((*x.shape[1:], 1))(pixels)
    return Preparation(kind, keras.Model(raw, pixels), f"Images of {shape}.")


def _write_corrected(
    source: pathlib.Path, label: str, labels: np.ndarray, path: Any
) -> None:
    arrays: dict[str, Any] = {**_loaded(source), label: labels}
    np.savez_compressed(path, **arrays)
