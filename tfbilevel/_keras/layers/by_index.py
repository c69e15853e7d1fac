"""Learned rows, one per training example, found by the examples' indices."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from tfbilevel._check.example_indices import PerExampleError, range_error


class ByIndex:
    """A part of layers whose `logits`, [n, ...], have one row per training example."""

    n: int
    logits: Any
    activation: Callable[[tf.Tensor], tf.Tensor]
    _listener: Callable[[tf.Tensor], None] | None = None
    in_graphs = False  # whether it was called by indices in a graph

    def call(self, index: Any = None) -> Any:
        """activation(logits)[index]; `None`: of all examples in order."""
        logits = tf.convert_to_tensor(self.logits)
        if index is None:
            return self.activation(logits)
        index = _whole(index)
        known = tf.get_static_value(index)
        if known is not None:
            beyond = known[(known < 0) | (known >= self.n)]
            if beyond.size:
                raise range_error(self, int(beyond.flat[0]))
            return self.activation(tf.gather(logits, index))
        self.in_graphs = True
        if self._listener is not None:
            self._listener(index)
        # For an index out of range, a gather gives zero on a GPU and XLA the nearest.
        inside = (index >= 0) & (index < self.n)
        found = self.activation(tf.gather(logits, tf.where(inside, index, 0)))
        for _ in logits.shape[1:]:
            inside = inside[..., tf.newaxis]
        return tf.where(inside, found, tf.constant(float("nan"), found.dtype))

    @contextlib.contextmanager
    def heard(self, listener: Callable[[tf.Tensor], None]) -> Iterator[None]:
        """While it is open, `listener` gets every index whose value is unknown."""
        self._listener = listener
        try:
            yield
        finally:
            self._listener = None


def matched(
    values: tf.Tensor, own: tf.Tensor, rank: int, rule: str, remedy: str
) -> tf.Tensor:
    """`values`, which must have the shape of a layer's own rows.

    Args:
        values: what the user gave.
        own: the rows at the indices that go with it.
        rank: the number of axes of both.
        rule: "`losses` of ... must be one per example", say.
        remedy: what else is expected, and what to do; sentences.

    Raises:
        PerExampleError: if the shapes are known to differ. Otherwise a compiled
            step fails, and `explain` finds the error.
    """
    fits = values.shape.is_compatible_with(own.shape)
    if values.shape.rank not in (rank, None) or not fits:
        raise PerExampleError(
            f"{rule}, {remedy} Received: shape {values.shape} for {own.shape}"
        )
    if values.shape.is_fully_defined() and own.shape.is_fully_defined():
        return values
    # A single row would be broadcast to all. XLA drops assertions, and TensorFlow's
    # graphs drop a reshape to the same rank.
    same = tf.debugging.assert_equal(tf.size(values), tf.size(own), rule)
    with tf.control_dependencies([] if same is None else [same]):
        values = tf.identity(values)
    return tf.reshape(values, tf.shape(own), "one_per_example")


def _whole(index: Any) -> tf.Tensor:
    """Indices as integers that `tf.gather` accepts."""
    index = tf.convert_to_tensor(index)
    if not index.dtype.is_integer:
        raise ValueError(
            "`index` must be integers, one per example of the batch. Cast it with "
            f"tf.cast(index, tf.int32). Received: index of dtype {index.dtype.name}"
        )
    return index if index.dtype == tf.int32 else tf.cast(index, tf.int64)
