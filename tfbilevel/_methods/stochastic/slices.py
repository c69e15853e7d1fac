"""The lower slices and the upper parts of an outer step, and sums over them."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfbilevel._calculus import structure
from tfbilevel._calculus.loops import serial_loop
from tfbilevel._core.batches import Batches, count_lower, successive_lower
from tfbilevel._core.examples import sparse_examples
from tfbilevel._core.prepared import Prepared
from tfbilevel._core.problem import Problem


class Slices:
    """The batches of one outer step as many small ones, which may be joined.

    The lower slices are those of stacked batches; a plain batch is one slice. The upper
    batch is cut along its examples into parts of equal size: part p has every p-th of
    them, so that the parts of replicas together are that of one device.

    Args:
        problem: the problem.
        batches: of this outer step.
        upper_parts: the number of parts of the upper batch.

    Attributes:
        lower: the number of lower slices, a tensor if it is not static.
        upper: the number of upper parts.
    """

    def __init__(self, problem: Problem, batches: Batches, upper_parts: int):
        self._problem, self._batches = problem, batches
        self._axis = int(problem.has_tasks)
        self.lower, self.upper = count_lower(batches), upper_parts
        if upper_parts > 1:
            for leaf in tf.nest.flatten(batches.upper):
                self._require_equal_parts(leaf)

    def chosen(self, seed: int, step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """A lower slice and an upper part, chosen at random, the same on all replicas.

        Where all steps get the same stack, as with all data in memory, a fixed choice
        would be of the same examples always.
        """
        seeds = tf.stack([tf.cast(seed, tf.int64), step])
        free = tf.random.stateless_uniform([2], seeds, 0, 2**31 - 1, tf.int32)
        lower, upper = tf.unstack(free)
        floormod = tf.math.floormod
        return floormod(lower, self.lower), floormod(upper, self.upper)

    def prepared(self, upper: Any, slice_: Any, part: Any, count: int = 1) -> Prepared:
        """The problem with `count` successive lower slices, which become number 0, 1,
        ..., and with one upper part.

        Every choice has samples of its own, the same at any x.
        """
        lower = successive_lower(self._batches, slice_, count)
        own = tf.nest.map_structure(
            lambda leaf: self._part(leaf, part), self._batches.upper
        )
        batches = type(self._batches)(own, lower)
        return self._problem.seeded(slice_).seeded(part).prepared(upper, batches)

    def _part(self, leaf: Any, number: Any) -> Any:
        if self.upper == 1 or not self._has_examples(leaf):
            return leaf
        size = leaf.shape[self._axis] // self.upper
        if isinstance(leaf, tf.SparseTensor):
            return self._sparse_part(leaf, number, size)
        return tf.gather(leaf, number + self.upper * tf.range(size), axis=self._axis)

    def _sparse_part(self, leaf: tf.SparseTensor, number: Any, size: int) -> Any:
        sizes = tf.unstack(leaf.dense_shape, leaf.shape.rank)
        before, after = sizes[: self._axis], sizes[self._axis + 1 :]
        rows = tf.sparse.reshape(leaf, tf.stack([*before, size, self.upper, *after]))
        taken = sparse_examples(rows, self._axis + 1, number, 1)
        made = tf.sparse.reshape(taken, tf.stack([*before, size, *after]))
        shape = leaf.shape.as_list()
        made.set_shape([*shape[: self._axis], size, *shape[self._axis + 1 :]])
        return made

    def _has_examples(self, leaf: Any) -> bool:
        """Whether it is divided; what has no axis of examples belongs to all parts."""
        rank = tf.TensorShape(getattr(leaf, "shape", ())).rank
        return rank is None or rank > self._axis

    def _require_equal_parts(self, leaf: Any) -> None:
        if not self._has_examples(leaf):
            return
        shape = tf.TensorShape(leaf.shape)
        count = None if shape.rank is None else shape[self._axis]
        if count is None or count % self.upper:
            raise ValueError(
                "The number of examples in an upper batch must be known and a multiple "
                "of `upper_parts`, because ordinary steps take one of so many equal "
                "parts. Choose another size, with drop_remainder=True in .batch(size); "
                "or upper_parts=1, which takes the whole batch in every step. "
                f"Received: upper_parts={self.upper}, a tensor of shape {shape}"
            )


def summed(begin: Any, count: Any, term: Callable[[tf.Tensor], Any]) -> Any:
    """begin + term(0) + ... + term(count - 1), one after the other.

    What kind of step is made decides the count, where other code would branch: sums
    over replicas may be exchanged in a loop, but not in a branch.

    Args:
        begin: a nest of tensors.
        count: an integer or a tensor.
        term: number -> a nest like `begin`.
    """

    def body(t: tf.Tensor, total: Any) -> tuple:
        return t + 1, structure.add(total, term(t))

    _, total = serial_loop(lambda t, _: t < count, body, (tf.constant(0), begin), count)
    return total
