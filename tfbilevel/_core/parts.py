"""The problem of one outer step whose batches are divided among replicas."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from tfbilevel._calculus.collectives import spread, total_loss
from tfbilevel._calculus.derivatives import require_scalar
from tfbilevel._core.batches import Batches
from tfbilevel._core.problem import Problem
from tfbilevel._randomness.seeds import of_replica


class Part(NamedTuple):
    """What one replica has of an outer step's batches.

    Attributes:
        batches: its examples, or its tasks.
        upper_share: the share of the upper batch that they are, a scalar.
        lower_share: the share of the lower batch.
        first: the number of its first upper example, or of its first task.
    """

    batches: Batches
    upper_share: Any
    lower_share: Any
    first: Any


def of_all_parts(problem: Problem, part: Part) -> Problem:
    """The problem of all parts together, as a replica with one part computes it.

        f = sum_r share_r f_r,        g = sum_r share_r g_r

    If f and g are means over the examples of a batch, these are the losses of the whole
    batch, for parts of different sizes too. The losses and all their derivatives are
    the same numbers on every replica, and so is everything that a method computes from
    them. What the losses and `prepare` sample is different on every replica.

    Cost: one collective for each loss, and one for each derivative in x or y.

    Args:
        problem: the problem, without tasks.
        part: the part of this replica.
    """

    def whole(loss: Callable, share: Any) -> Callable:
        def at(x: Any, y: Any, batch: Any) -> tf.Tensor:
            with of_replica():
                value = require_scalar(loss(spread(x), spread(y), batch))
            return total_loss(tf.cast(share, value.dtype) * value)

        return at

    prepare = problem.prepare

    def own(x: Any, batches: Batches) -> Batches:
        assert prepare is not None
        with of_replica():
            return prepare(spread(x), batches)

    return dataclasses.replace(
        problem,
        upper_loss=whole(problem.upper_loss, part.upper_share),
        lower_loss=whole(problem.lower_loss, part.lower_share),
        prepare=prepare and own,
    )
