"""Recursive momentum for both levels: what MRBO and SUSTAIN share."""

import abc
import dataclasses
import functools
from typing import Any

import keras
import tensorflow as tf
from keras.optimizers.schedules import LearningRateSchedule

from tfbilevel._calculus import structure
from tfbilevel._calculus.aliases import Metrics, Nest, State
from tfbilevel._core.batches import Batches
from tfbilevel._core.method import Step
from tfbilevel._core.prepared import Prepared
from tfbilevel._core.problem import Problem
from tfbilevel._core.projection import fixed_projection
from tfbilevel._core.schedules import InversePower, Schedule, as_rate
from tfbilevel._methods.moves_lower import MovesLower
from tfbilevel._methods.stochastic.recursive_momentum import as_momentum, recursive


@dataclasses.dataclass(frozen=True, eq=False)
class DoubleMomentum(MovesLower):
    """Steps of y and of x along directions with recursive momentum.

        u_k = g_y(x_k, y_k; S) + l_k ( u_{k-1} - g_y(x_{k-1}, y_{k-1}; S) )
        d_k = h(x_k, y_k)      + m_k ( d_{k-1} - h(x_{k-1}, y_{k-1}) )
        y_{k+1} = y_k - eta_k update( u_k ),    x_{k+1} = x_k - eta_k update( d_k )

    with an estimate h of the hypergradient from the same batches at both points.
    """

    lower_optimizer: keras.optimizers.Optimizer
    _: dataclasses.KW_ONLY
    scale: float | Schedule | LearningRateSchedule = InversePower(1.0, 1 / 3)
    lower_momentum: float | Schedule | LearningRateSchedule = 0.9
    upper_momentum: float | Schedule | LearningRateSchedule = 0.9

    def __post_init__(self) -> None:
        _ = self.rule, self.scales, self.momenta  # raises for invalid arguments

    @abc.abstractmethod
    def _estimate(
        self, here: Prepared, lower: Nest, step: tf.Tensor
    ) -> tuple[Any, Metrics]:
        """h and its metrics, from lower batches 1, 2, ..."""

    @functools.cached_property
    def scales(self) -> Schedule:
        """eta at every outer step."""
        return as_rate(self.scale, "scale")

    @functools.cached_property
    def momenta(self) -> tuple[Schedule, Schedule]:
        """l and m at every outer step."""
        return (
            as_momentum(self.lower_momentum, "lower_momentum"),
            as_momentum(self.upper_momentum, "upper_momentum"),
        )

    @property
    def couples_tasks(self) -> bool:
        # The upper momentum belongs to all tasks together.
        return True

    def init(self, problem: Problem, upper: Nest, lower: Nest) -> State:
        del problem
        return {
            "step": tf.constant(0, tf.int64),
            "optimizer": self.rule.init(lower),
            "upper": structure.copied(upper),
            "lower": structure.copied(lower),
            "upper_direction": structure.zeros_like(structure.to_tensors(upper)),
            "lower_direction": structure.zeros_like(structure.to_tensors(lower)),
        }

    def step(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: State
    ) -> Step:
        here = problem.prepared(upper, batches)
        before = problem.prepared(state["upper"], batches)
        lower, step = structure.to_tensors(lower), state["step"]
        lower_momentum, upper_momentum = self.momenta

        _, now = here.lower_gradient(lower, 0)
        _, old = before.lower_gradient(state["lower"], 0)
        along = recursive(lower_momentum, step, now, old, state["lower_direction"])
        estimate, metrics = self._estimate(here, lower, step)
        former, _ = self._estimate(before, state["lower"], step)
        direction = recursive(
            upper_momentum, step, estimate, former, state["upper_direction"]
        )
        moved, optimizer = self.rule.update(along, state["optimizer"], lower)
        # Steps are scaled instead of gradients, because most optimizers normalise the
        # gradient.
        scale = self.scales(step)
        moved = structure.add_scaled(lower, scale, structure.subtract(moved, lower))
        return Step(
            upper_gradient=direction,
            lower=fixed_projection(problem, upper, moved, type(self).__name__),
            state={
                "step": step + 1,
                "optimizer": optimizer,
                "upper": structure.to_tensors(upper),
                "lower": lower,
                "upper_direction": direction,
                "lower_direction": along,
            },
            metrics=metrics,
            upper_scale=scale,
        )
