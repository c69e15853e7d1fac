"""A loss that is computed on parts of its batch, one after the other."""

import contextlib
import dataclasses
from typing import Any

import tensorflow as tf

from tfbilevel._calculus import structure
from tfbilevel._calculus.accumulated import accumulated
from tfbilevel._calculus.aliases import Loss, Nest
from tfbilevel._calculus.derivatives import require_scalar
from tfbilevel._core.division import Division
from tfbilevel._randomness.operations import current_seed, fixed_randomness


@dataclasses.dataclass(frozen=True, eq=False)
class MicrobatchedLoss:
    """The mean of a loss over parts of the batch, weighted by their shares of it.

    Attributes:
        whole: the loss, the mean of something over the examples of a batch.
        most: the largest number of parts.
        axis: the axis of the examples. If it is 1, the first axis is that of tasks, and
            the loss has one value per task.
    """

    whole: Loss
    most: int
    axis: int = 0

    def __call__(self, x: Nest, y: Nest, batch: Any) -> tf.Tensor:
        batch = tf.nest.map_structure(_tensor, batch)
        division = Division(batch, self.most, self.axis)
        if division.single:
            return self.whole(x, y, batch)
        seed = current_seed()
        every = (x, y, batch)
        leaves = list(map(_tensor, tf.nest.flatten(every, expand_composites=True)))
        # The batch is among the arguments, because what `prepare` makes depends on x.
        floating = [
            index
            for index, leaf in enumerate(leaves)
            if leaf is not None and leaf.dtype.is_floating
        ]
        first = tf.convert_to_tensor(tf.nest.flatten(y)[0])
        like = tf.zeros(tf.shape(first)[: self.axis], first.dtype)

        def term(arguments: list, number: Any) -> list:
            now = list(leaves)
            for index, leaf in zip(floating, arguments, strict=True):
                now[index] = leaf
            x, y, batch = tf.nest.pack_sequence_as(every, now, expand_composites=True)
            # Again here: XLA knows sizes only in the loop that uses them.
            division = Division(batch, self.most, self.axis)
            fixed = contextlib.nullcontext()
            if seed is not None:
                fixed = fixed_randomness(division.seed(seed, number))
            with fixed:
                value = self.whole(x, y, division.part(batch, number))
            if self.axis == 0:
                value = require_scalar(value)
            share = structure.scalar(division.share(number), like.dtype)
            return [share * tf.cast(value, like.dtype)]

        arguments = [leaves[index] for index in floating]
        (value,) = accumulated(term, division.parts, arguments, [like])
        return value


def _tensor(leaf: Any) -> Any:
    if leaf is None or isinstance(leaf, tf.SparseTensor | tf.RaggedTensor):
        return leaf
    return tf.convert_to_tensor(leaf)
