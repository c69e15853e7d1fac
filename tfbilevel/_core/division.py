"""A batch in parts along the axis of its examples."""

from typing import Any

import tensorflow as tf

from tfbilevel._calculus.accumulated import Parts
from tfbilevel._core.examples import number_of_examples, sparse_examples
from tfbilevel._randomness.seeds import MICROBATCH, Noisy, folded

NAN = float("nan")


class Division:
    """Parts of equal size, and a smaller last one if the examples are left over.

    Args:
        batch: a nest. Leaves without the axis of the examples belong to every part.
        most: the largest number of parts.
        axis: the axis of the examples.

    Attributes:
        single: whether there is certainly one part only.
        parts: their numbers, for `accumulated`.
    """

    def __init__(self, batch: Any, most: int, axis: int):
        self._axis = axis
        self._rows, self._agree = _rows(batch, axis)
        if isinstance(self._rows, int):
            self._size = max(-(-self._rows // most), 1)
            self._count, self._left = divmod(self._rows, self._size)
        else:
            # At least one is left, so that XLA knows whether there is a last part.
            self._size = tf.maximum((self._rows + (most - 1)) // most, 1)
            self._count = (self._rows - 1) // self._size
            self._left = self._rows - self._count * self._size
        known = isinstance(self._left, int)
        self.single = most == 1 or known and self._count + (self._left > 0) <= 1
        self.parts = Parts(self._count, most, not known or self._left > 0)

    def part(self, batch: Any, number: Any) -> Any:
        """The examples of a part; `None` is the number of the smaller last one."""
        if isinstance(batch, Noisy):
            seed = self.seed(batch.seed, number)
            return Noisy(self.part(batch.batch, number), seed)
        size = self._left if number is None else self._size
        index = self._position(number) * self._size + tf.range(size)

        def taken(leaf: Any) -> Any:
            if leaf is None or not _has_examples(leaf, self._axis):
                return leaf
            if isinstance(leaf, tf.SparseTensor):
                return sparse_examples(leaf, self._axis, index[0], size)
            # A gather has derivatives that XLA can compile.
            return tf.gather(leaf, index, axis=self._axis)

        return tf.nest.map_structure(taken, batch)

    def share(self, number: Any) -> Any:
        """The part's share of the examples."""
        size = self._left if number is None else self._size
        if isinstance(self._rows, int):
            return size / self._rows
        share = tf.cast(size, tf.float64) / tf.cast(self._rows, tf.float64)
        # XLA drops assertions.
        return tf.where(self._agree, share, tf.constant(NAN, tf.float64))

    def seed(self, seed: Any, number: Any) -> Any:
        """The part's own seed, so that its samples are not those of another part."""
        return folded(seed, MICROBATCH, self._position(number))

    def _position(self, number: Any) -> Any:
        return self._count if number is None else number


def _rows(batch: Any, axis: int) -> tuple[Any, Any]:
    """The number of examples, and whether all leaves have as many if that is not known
    before the graph runs."""
    if isinstance(batch, Noisy):
        batch = batch.batch
    leaves = [v for v in tf.nest.flatten(batch) if v is not None]
    counts = [
        number_of_examples(leaf, axis) for leaf in leaves if _has_examples(leaf, axis)
    ]
    known = {count for count in counts if isinstance(count, int)}
    if len(known) > 1 or not counts:
        raise ValueError(
            "A batch of a tb.microbatched problem is split along its examples: every "
            "tensor with an axis must have them along the "
            f"{('first', 'second')[axis]} one. Give what "
            "belongs to no example as a scalar, or close over it in the loss. "
            f"Received: {[getattr(v, 'shape', v) for v in leaves]}"
        )
    if all(isinstance(count, int) for count in counts):
        return known.pop(), True
    unknown = [tf.cast(count, tf.int32) for count in counts]
    agree = tf.reduce_all(tf.equal(tf.stack(unknown), unknown[0]))
    error = (
        "All tensors of a batch of a tb.microbatched problem must have its examples."
    )
    check = tf.debugging.Assert(agree, [error, *unknown])
    with tf.control_dependencies([] if tf.executing_eagerly() else [check]):
        return tf.identity(unknown[0]), agree


def _has_examples(leaf: Any, axis: int) -> bool:
    rank = getattr(leaf, "shape", tf.TensorShape([])).rank
    if rank is None:
        raise ValueError(
            "A batch of a tb.microbatched problem must have tensors of known rank, "
            f"because it is split along their examples. Received: {leaf!r}"
        )
    return rank > axis
