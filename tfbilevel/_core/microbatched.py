"""A problem whose losses are computed on parts of their batches."""

import dataclasses
from typing import TypeVar

from tfbilevel._core.arguments import require_count
from tfbilevel._core.loss import Loss
from tfbilevel._core.microbatched_loss import MicrobatchedLoss
from tfbilevel._core.problem import Problem, require_problem

AnyProblem = TypeVar("AnyProblem", bound=Problem)


def microbatched(problem: Problem, upper: int = 1, lower: int = 1) -> Problem:
    r"""The problem with losses that are computed on parts of their batches.

        g(x, y, batch) = sum over parts p of  (n_p / n) g(x, y, p)

    where n_p of the n examples are in part p. The parts are computed one after the
    other, in the losses and in their derivatives of every order, and nothing that a
    part computes is kept. So the memory for the activations of the networks is that of
    one part, in every method, and larger batches fit. The result is that of the whole
    batch, to rounding, if the losses are means over the examples (plus terms without
    examples, such as a weight decay). `BilevelModel` has it as
    compile(..., microbatches=8).

    Not the same as with the whole batch, but not an error: sums over examples, which
    are divided by the number of parts; batch normalisation, which uses the statistics
    of a part, as usual with accumulated gradients; dropout and other samples, which
    differ, and are different in every part. Moving statistics and seeds of Keras models
    are still updated by one evaluation of the whole lower batch, without derivatives.

    Cost: a gradient computes the loss twice and takes about 4/3 of the time, a
    Hessian-vector product about 3/2, and a step takes longer to compile. Memory besides
    that of one part: the batch, and a copy of x and of y. Prefer smaller batches
    (`tb.StackedBatches`, methods of the stochastic kind) if the whole batch is not
    needed, and `mapping="sequential"` if many small tasks are too large. Eagerly
    nothing is saved: compile the step, as `fit` and `tb.minimize` do.

    Args:
        problem: the problem of one task. For tasks call
            tb.over_tasks(tb.microbatched(problem, ...)): each task's examples are
            split.
        upper: the largest number of parts of an upper batch. The parts are of equal
            size, ceil(n / upper), except for the last, which may be smaller.
        lower: likewise for lower batches (of stacked ones, each is split).

    Returns:
        A `tb.Problem`. Its batches must have the examples along the first axis of every
        tensor; scalars belong to every part.

    Raises:
        ValueError: if a number is not an integer of at least 1, or the problem is over
            tasks already; at the first step for a batch whose tensors differ in their
            number of examples.

    Example:
        >>> problem = tb.Problem(
        ...     upper_loss=lambda x, y, batch: tf.reduce_mean((y - batch) ** 2),
        ...     lower_loss=lambda x, y, batch: tf.reduce_mean((y - x * batch) ** 2),
        ... )
        >>> split = tb.microbatched(problem, lower=2)
        >>> x, y, batch = tf.constant(2.0), tf.constant(1.0), tf.constant([0.0, 3.0])
        >>> float(problem.lower_loss(x, y, batch)), float(split.lower_loss(x, y, batch))
        (13.0, 13.0)
    """
    require_problem(problem)
    require_count(upper, "upper")
    require_count(lower, "lower")
    if problem.has_tasks:
        raise ValueError(
            "`problem` must be the problem of one task: its examples are then split in "
            "every task. Call tb.over_tasks(tb.microbatched(problem, ...)). "
            "Received: a problem over tasks"
        )
    problem = unsplit(problem)
    return dataclasses.replace(
        problem,
        upper_loss=_split(problem.upper_loss, upper),
        lower_loss=_split(problem.lower_loss, lower),
    )


def unsplit(problem: AnyProblem) -> AnyProblem:
    """The problem of one task with losses of whole batches, to look at them."""
    return dataclasses.replace(
        problem,
        upper_loss=_whole(problem.upper_loss),
        lower_loss=_whole(problem.lower_loss),
    )


def _split(loss: Loss, most: int) -> Loss:
    return loss if most == 1 else MicrobatchedLoss(loss, most)


def _whole(loss: Loss) -> Loss:
    return loss.whole if isinstance(loss, MicrobatchedLoss) else loss
