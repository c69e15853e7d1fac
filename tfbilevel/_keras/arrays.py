"""Arrays of examples: NumPy, pandas, tensors, or a nest of them, as tensors."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

KINDS = "NumPy arrays, pandas columns or tables, or tensors"


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """A nest of tensors on the host whose first axis is that of the examples.

    Made by `examples_of`.

    Attributes:
        data: the nest; tuples and dictionaries, whose leaves may be `None`.
        count: the number of examples.
    """

    data: Any
    count: int

    def at(self, index: tf.Tensor) -> Any:
        """The examples with these numbers."""
        return tf.nest.map_structure(
            lambda leaf: None if leaf is None else tf.gather(leaf, index), self.data
        )

    def numbered(self, argument: str, remedy: str) -> "Examples":
        """The examples with their numbers 0, ..., count - 1 as a last part.

        Raises:
            ValueError: if the data are neither one array nor a tuple.
        """
        if isinstance(self.data, Mapping):
            raise ValueError(
                f"`{argument}` must be one array or a tuple of parts, so that the "
                f"example numbers can follow as the last part. {remedy} "
                f"Received: a dictionary of {', '.join(map(str, self.data))}"
            )
        parts = self.data if isinstance(self.data, tuple) else (self.data,)
        with tf.device("CPU:0"):
            return Examples((*parts, tf.range(self.count)), self.count)


def examples_of(data: Any, argument: str) -> Examples:
    """The arrays as tensors; fractions get Keras's type of floating point, as in `fit`.

    Memory: one copy of the data, on the host.

    Args:
        data: an array, or a nest of arrays with as many rows each. `None` stays.
        argument: the name of the argument in messages.

    Raises:
        ValueError: for a leaf that is no array, arrays without a row or with
            different numbers of rows, or values that no tensor can hold.
    """
    # Dataset functions run on the host, where they cannot read another device.
    with tf.device("CPU:0"):
        data = _mapped(data, lambda leaf: _tensor(leaf, argument))
    leaves = [leaf for leaf in tf.nest.flatten(data) if leaf is not None]
    counts = [_rows(leaf) for leaf in leaves]
    if len(set(counts)) != 1:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves) or "nothing"
        raise ValueError(
            f"`{argument}` must have as many rows in every array, one per example. "
            f"Give inputs and labels of the same examples. Received: shapes {shapes}"
        )
    if not counts[0]:
        raise ValueError(
            f"`{argument}` must hold at least one example. Look at how it was "
            f"selected. Received: shape {tuple(leaves[0].shape)}"
        )
    return Examples(data, counts[0])


def _mapped(data: Any, function: Any) -> Any:
    """The function of every leaf, with lists as tuples.

    (tf.data makes one tensor of a list.)
    """
    if isinstance(data, Mapping):
        return {name: _mapped(part, function) for name, part in data.items()}
    if isinstance(data, (tuple, list)):
        parts = [_mapped(part, function) for part in data]
        return type(data)(*parts) if hasattr(data, "_fields") else tuple(parts)
    return None if data is None else function(data)


def _tensor(leaf: Any, argument: str) -> Any:
    if not isinstance(leaf, (tf.Tensor, tf.RaggedTensor, tf.SparseTensor)):
        if not hasattr(leaf, "__array__") or not np.ndim(leaf):
            raise ValueError(
                f"`{argument}` must be {KINDS}, or a tuple or dictionary of them. "
                "Convert lists of numbers by np.asarray, and SciPy's sparse matrices "
                "by .toarray(). "
                f"Received: {leaf!r:.80} of {type(leaf)}"
            )
        try:
            leaf = tf.convert_to_tensor(np.asarray(leaf))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"`{argument}` must hold numbers, booleans or strings, and one kind in "
                "each array. Convert it with .astype(...), or give each column of a "
                "table by itself. "
                f"Received: values of type {np.asarray(leaf).dtype}, {error}"
            ) from None
    else:
        leaf = tf.identity(leaf)  # on the host
    if not leaf.shape.rank:
        raise ValueError(
            f"`{argument}` must have one row per example in every array. "
            f"Received: a tensor of shape {tuple(leaf.shape)}"
        )
    if leaf.dtype.is_floating:
        leaf = tf.cast(leaf, keras.config.floatx())
    return leaf


def _rows(leaf: Any) -> int:
    if isinstance(leaf, tf.RaggedTensor):
        return int(leaf.nrows())
    return int(leaf.shape[0])
