"""What methods share that carry the linear system's solution from step to step."""

import dataclasses
import functools

import keras
import tensorflow as tf
from keras.optimizers.schedules import LearningRateSchedule

from tfbilevel._calculus import structure
from tfbilevel._calculus.aliases import Nest, State
from tfbilevel._core.problem import Problem
from tfbilevel._core.schedules import Schedule, as_rate
from tfbilevel._methods.moves_lower import MovesLower


@dataclasses.dataclass(frozen=True, eq=False)
class FollowedSolution(MovesLower):
    """One step of y by an optimizer and one of v by a rate, per outer step."""

    lower_optimizer: keras.optimizers.Optimizer
    rate: float | Schedule | LearningRateSchedule = 0.1

    def __post_init__(self) -> None:
        _ = self.rule, self.rates  # raises for invalid arguments

    @functools.cached_property
    def rates(self) -> Schedule:
        """The step size of v at every outer step."""
        return as_rate(self.rate, "rate")

    @property
    def couples_tasks(self) -> bool:
        # A nonfinite residual of one task affects all of x, and momentum belongs to
        # all tasks together.
        return True

    def init(self, problem: Problem, upper: Nest, lower: Nest) -> State:
        del upper
        solution = structure.zeros_like(structure.to_tensors(lower))
        return {
            "step": tf.constant(0, tf.int64),
            "optimizer": self.rule.init(lower),
            "solution": solution,
            # The largest |f_y| so far, one per task.
            "largest": problem.inner_product.norm(solution),
        }
