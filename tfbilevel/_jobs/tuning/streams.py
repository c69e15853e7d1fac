"""The data of a job: streams of batches for both levels."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfbilevel._jobs.tuning.outputs import Output
from tfbilevel._keras.index_batches import index_batches

SEEN = 2000  # examples from which the inputs' deviation is taken


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Examples of one level, in memory.

    Attributes:
        x: the inputs, [n, ...].
        y: the targets of each output, a tuple.
    """

    x: np.ndarray
    y: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return len(self.x)

    def batches(self, size: int, seed: int) -> tf.data.Dataset:
        """An endless stream of shuffled batches (x, y)."""
        x, y = tf.constant(self.x), tuple(map(tf.constant, self.y))

        def gather(index: tf.Tensor) -> tuple:
            return tf.gather(x, index), tuple(tf.gather(part, index) for part in y)

        return index_batches(len(self), min(size, len(self)), seed).map(gather)

    def in_order(self, size: int) -> tf.data.Dataset:
        """All examples once, in their order."""
        return tf.data.Dataset.from_tensor_slices((self.x, self.y)).batch(size)


def inputs(x: Any, argument: str) -> np.ndarray:
    """Inputs as an array: floats as float32, integers unchanged."""
    array = np.asarray(x)
    if array.dtype.kind not in "biuf" or array.ndim < 2 or not len(array):
        raise ValueError(
            f"`{argument}` must be an array of numbers, one row or image per example. "
            f"Received: shape {array.shape} of {array.dtype}"
        )
    if array.dtype.kind == "f":
        array = array.astype(np.float32)
        wrong = ~np.isfinite(array).reshape(len(array), -1).all(axis=1)
        if wrong.any():
            raise ValueError(
                f"`{argument}` must not hold NaN or infinity. Fill in or remove these "
                f"rows. Received: {int(wrong.sum())} such rows, the first is "
                f"{int(wrong.argmax())}"
            )
    return array


def as_taken(network: Any, x: np.ndarray) -> np.ndarray:
    """Integers, such as pixels, as float32 if the network takes floating numbers."""
    taken = getattr(network, "inputs", None) or ()
    if all("float" in each.dtype for each in taken):
        return x.astype(np.float32)
    return x


def require_same_length(x: np.ndarray, labels: Sequence, argument: str) -> None:
    """Raise unless there is one label per example."""
    for each in labels:
        if len(each) != len(x):
            raise ValueError(
                f"`{argument}` must have one entry for each example. Received: "
                f"{len(each)} for {len(x)} examples"
            )


def split(count: int, share: float, labels: Any, seed: int) -> tuple:
    """Rows for training and for validation, `share` of them, from each class.

    Args:
        count: number of rows.
        share: of the rows for validation.
        labels: class indices, [n]; `None`: no classes.
        seed: of the choice.
    """
    if not 0 < share < 1:
        raise ValueError(
            "`validation_split` must be above 0 and below 1. "
            f"Received: validation_split={share!r}"
        )
    order = np.random.default_rng(seed).permutation(count)
    if labels is not None:  # classes one after the other, then every so-many-th row
        order = order[np.argsort(labels[order], kind="stable")]
    held = np.zeros(count, bool)
    wanted = min(max(1, round(share * count)), count - 1)
    held[order[np.linspace(0, count - 1, wanted).round().astype(int)]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def labels_of(y: Any, names: Sequence[str]) -> list:
    """The labels of each output, from an array, or a list or dictionary of arrays.

    Args:
        y: the labels.
        names: the names of the network's outputs.
    """
    if isinstance(y, dict):
        missing = [name for name in names if name not in y]
        if missing:
            raise ValueError(
                f"`y` must have labels for the output {missing[0]!r}. Received: "
                f"{', '.join(map(repr, y))}"
            )
        return [y[name] for name in names]
    several = isinstance(y, (list, tuple)) and len(y) and len(names) != 1
    if several and all(isinstance(each, np.ndarray) and each.ndim for each in y):
        return list(y)
    return [y]


def streamed(outputs: Sequence[Output]) -> Callable[[Any, Any], Any]:
    """The map of a dataset's elements (x, y) to (x, targets)."""

    def convert(x: Any, y: Any) -> tuple:
        parts = []
        for one, part in zip(outputs, tf.nest.flatten(y), strict=True):
            if one.classes is not None and not one.classes.one_hot:
                part = tf.one_hot(tf.reshape(part, [-1]), len(one.classes))
            parts.append(tf.cast(part, tf.float32))
        return (tf.cast(x, tf.float32) if x.dtype.is_floating else x), tuple(parts)

    return convert
