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
        # The batch is among the arguments, because what `prepare` makes depends on x.
        every = (x, y, batch)
        leaves = [
            [_tensor(leaf) for leaf in tf.nest.flatten(nest, expand_composites=True)]
            for nest in every
        ]
        first = leaves[1][0]
        like = tf.zeros(tf.shape(first)[: self.axis], first.dtype)

        def term(arguments: list[list], number: Any) -> list[list]:
            x, y, batch = (
                _packed(nest, group, floating)
                for nest, group, floating in zip(every, leaves, arguments, strict=True)
            )
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
            return [[share * tf.cast(value, like.dtype)]]

        arguments = [list(filter(_is_floating, group)) for group in leaves]
        ((value,),) = accumulated(term, division.parts, arguments, [[like]])
        return value


def _packed(nest: Any, leaves: list, floating: list) -> Any:
    """The nest with other floating-point leaves."""
    others = iter(floating)
    made = [next(others) if _is_floating(leaf) else leaf for leaf in leaves]
    return tf.nest.pack_sequence_as(nest, made, expand_composites=True)


def _is_floating(leaf: Any) -> bool:
    return leaf is not None and leaf.dtype.is_floating


def _tensor(leaf: Any) -> Any:
    if leaf is None or isinstance(leaf, tf.SparseTensor | tf.RaggedTensor):
        return leaf
    return tf.convert_to_tensor(leaf)
