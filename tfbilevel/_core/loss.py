"""Losses of one problem or of many tasks: one value per task, and their sum or mean."""

import dataclasses
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfbilevel._calculus.aliases import Loss, Nest


@dataclasses.dataclass(frozen=True, eq=False)
class TaskLoss:
    """A loss over tasks, as a function of their stacked variables and batches.

    Methods differentiate the sum over tasks, so that each task's variables only affect
    its own term. Metrics are averaged over tasks.

    Attributes:
        each: (x, y, batch) -> one value per task.
        mean: whether a call returns the mean instead of the sum.
    """

    each: Loss
    mean: bool = False

    def __call__(self, x: Nest, y: Nest, batch: Nest) -> tf.Tensor:
        losses = self.each(x, y, batch)
        return tf.reduce_mean(losses) if self.mean else tf.reduce_sum(losses)


def losses(loss: Loss) -> Loss:
    """One value per task, or the scalar of a loss without tasks."""
    return loss.each if isinstance(loss, TaskLoss) else loss


def rewired(loss: Loss, arguments: Callable[[Any, Any, Any], tuple]) -> Loss:
    """The loss with other arguments; a loss over tasks stays one."""

    def at(x: Nest, y: Nest, batch: Nest) -> tf.Tensor:
        return losses(loss)(*arguments(x, y, batch))

    return dataclasses.replace(loss, each=at) if isinstance(loss, TaskLoss) else at
