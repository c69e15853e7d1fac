"""Examples and labels in memory, checked before any training."""

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfbilevel._jobs.labels import Classes, classes_of


class Rows(NamedTuple):
    """Examples with their labels as integers.

    Attributes:
        x: [n, ...].
        labels: [n], from 0 to K - 1.
    """

    x: np.ndarray
    labels: np.ndarray


class Data(NamedTuple):
    """What `LabelCleaner.fit` was given.

    Attributes:
        doubtful: the examples whose labels may be wrong.
        trusted: those whose labels are right; `None`: there are none.
        classes: the classes of both.
        repeated: number of trusted examples that stand among the doubtful ones, too.
    """

    doubtful: Rows
    trusted: Rows | None
    classes: Classes
    repeated: int


def data_of(x: Any, y: Any, trusted: Any) -> Data:
    """Read and check the arguments of `fit`."""
    x, y = _separate(x, y, "x", "y")
    inputs = inputs_of(x, "x")
    if trusted is None:
        classes = classes_of(y)
        labels = classes.indices(y, "y")
        _require_as_many(inputs, labels, "x", "y")
        return Data(Rows(inputs, labels), None, classes, 0)
    if not isinstance(trusted, tf.data.Dataset) and not (
        isinstance(trusted, (tuple, list)) and len(trusted) == 2
    ):
        raise ValueError(
            "`trusted` must be (x, y) with right labels, or a tf.data.Dataset of them. "
            f"Received: {type(trusted).__name__}"
        )
    trusted_x, trusted_y = (
        _separate(trusted, None, "trusted", "trusted")
        if isinstance(trusted, tf.data.Dataset)
        else trusted
    )
    sure = inputs_of(trusted_x, "trusted[0]")
    classes = classes_of(y, trusted_y, arguments=("y", "trusted[1]"))
    labels = classes.indices(y, "y")
    right = classes.indices(trusted_y, "trusted[1]")
    if len(np.unique(labels)) < 2:
        raise ValueError(
            "`y` must hold at least two classes. Received: only one class, "
            f"{classes.values[labels].tolist()[0]!r}"
        )
    _require_as_many(inputs, labels, "x", "y")
    _require_as_many(sure, right, "trusted[0]", "trusted[1]")
    if sure.shape[1:] != inputs.shape[1:] or _is_text(sure) != _is_text(inputs):
        raise ValueError(
            "`trusted[0]` must hold examples like those in `x`. Prepare both in the "
            f"same way. Received: shape {sure.shape[1:]} of {sure.dtype}, and "
            f"{inputs.shape[1:]} of {inputs.dtype} in `x`"
        )
    lacking = np.setdiff1d(labels, right)
    if len(lacking):
        names = ", ".join(repr(v) for v in classes.values[lacking].tolist()[:10])
        raise ValueError(
            "`trusted[1]` must hold every class that `y` holds: without a right "
            "example of a class nothing tells its right labels from wrong ones. Add "
            "one, or leave the class out of `y`. Received: no trusted example of "
            f"{names}"
        )
    return Data(
        Rows(inputs, labels), Rows(sure, right), classes, _repeated(inputs, sure)
    )


def inputs_of(x: Any, argument: str) -> np.ndarray:
    """Examples as an array, [n, ...], of numbers or text.

    Raises:
        ValueError: for anything else, no examples, or NaN and infinity.
    """
    if hasattr(x, "toarray"):
        raise ValueError(
            f"`{argument}` must be dense. Pass .toarray() of it, if it fits in memory. "
            f"Received: a sparse {type(x).__name__}"
        )
    array = np.asarray(x)
    if array.ndim == 0 or not len(array):
        raise ValueError(
            f"`{argument}` must hold at least one example, one per row. "
            f"Received: shape {array.shape}"
        )
    if array.size == 0:
        raise ValueError(
            f"`{argument}` must have at least one number per example. Received: 0 "
            f"feature(s) (shape={array.shape}) while a minimum of 1 is required."
        )
    if array.dtype.kind == "O":
        values = array.reshape(-1).tolist()
        if all(isinstance(value, (str, bytes)) for value in values):
            array = array.astype(str)
        else:
            array = _numbers(array, argument)
    if array.dtype.kind in "US":
        return array
    if array.dtype.kind not in "biuf":
        raise ValueError(
            f"`{argument}` must hold real numbers or text. Complex data not supported. "
            f"Received: dtype {array.dtype}"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        rows = ~np.isfinite(array.reshape(len(array), -1)).all(axis=1)
        raise ValueError(
            f"`{argument}` must not hold NaN or infinity. Fill or remove these rows. "
            f"Received: {np.count_nonzero(rows)} such rows, the first is row "
            f"{rows.argmax()}"
        )
    return array.astype(np.float32) if array.dtype == np.float64 else array


def _numbers(array: np.ndarray, argument: str) -> np.ndarray:
    try:
        return array.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`{argument}` must hold numbers in every column, or text in a single one. "
            f"Encode columns of categories first. Received: {error}"
        ) from error


def _separate(x: Any, y: Any, x_name: str, y_name: str) -> tuple[Any, Any]:
    """Inputs and labels; those of a dataset are collected in memory."""
    if not isinstance(x, tf.data.Dataset):
        if y is None:
            raise ValueError(
                f"`{y_name}` must be the labels of `{x_name}`: requires y to be "
                "passed, but the target y is None. Received: y=None"
            )
        return x, y
    if y is not None:
        raise ValueError(
            f"`{y_name}` must be None if `{x_name}` is a dataset: its elements are (x, "
            f"y). Received: {type(y).__name__}"
        )
    spec = x.element_spec
    if not isinstance(spec, tuple) or len(spec) != 2 or spec[1].shape.rank == 0:
        raise ValueError(
            f"`{x_name}` must be a dataset of batches (x, y). Add .batch(100), for "
            f"instance. Received: elements {spec}"
        )
    if x.cardinality() == tf.data.INFINITE_CARDINALITY:
        raise ValueError(
            f"`{x_name}` must be a dataset that ends. Leave out .repeat(). "
            "Received: an endless one"
        )
    batches = list(x.as_numpy_iterator())
    if not batches:
        raise ValueError(f"`{x_name}` must not be empty. Received: 0 elements")
    inputs, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    return inputs, labels


def _require_as_many(
    x: np.ndarray, labels: np.ndarray, x_name: str, y_name: str
) -> None:
    if len(x) != len(labels):
        raise ValueError(
            f"`{x_name}` and `{y_name}` must have as many rows. Give one label per "
            f"example. Received: {len(x)} examples, {len(labels)} labels"
        )


def _is_text(array: np.ndarray) -> bool:
    return array.dtype.kind in "US"


def _repeated(x: np.ndarray, sure: np.ndarray) -> int:
    if x.dtype != sure.dtype:
        return 0
    known = {row.tobytes() for row in np.ascontiguousarray(x)}
    return sum(row.tobytes() in known for row in np.ascontiguousarray(sure))
