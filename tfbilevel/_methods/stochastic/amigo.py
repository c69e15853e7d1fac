"""Warm-started inner steps and warm-started steps on the linear system."""

import dataclasses
import functools
from typing import Any

import tensorflow as tf
from keras.optimizers.schedules import LearningRateSchedule

from tfbilevel._calculus import structure
from tfbilevel._calculus.aliases import Nest, State
from tfbilevel._calculus.loops import serial_loop
from tfbilevel._core.arguments import require_count
from tfbilevel._core.batches import Batches
from tfbilevel._core.inner_solver import InnerSolver, require_inner
from tfbilevel._core.method import Method, Step
from tfbilevel._core.problem import Problem
from tfbilevel._core.projection import fixed_projection
from tfbilevel._core.schedules import Schedule, as_rate
from tfbilevel._methods.stochastic.directions import too_far
from tfbilevel._methods.stochastic.series import mixed_product


@dataclasses.dataclass(frozen=True, eq=False)
class AmIGO(Method):
    r"""A few steps of y and of v per outer step, both continued from the last (AmIGO).

        y_{t+1} = y_t - update( g_y(x, y_t; S_t) ),   t < T
        v_{n+1} = v_n - rho ( g_yy(x, y_T; B_n) v_n - f_y(x, y_T) ),   n < N
        dF/dx ~ f_x - g_xy(x, y_T; D) v_N

    v_0 is the v_N of the step before, so a constant N suffices for any accuracy: where
    `StocBiO` starts its series again in every step and needs more terms the
    worse conditioned g is, here the solution is followed. S_t, B_n and D are successive
    slices of a stacked lower batch, from `tb.pair(..., lower_batches=method.draws)`;
    with fewer slices they repeat, and with a plain batch all are equal.

    Cost: T lower gradients, N products with g_yy and one with g_xy. Memory: v. Assumes
    g strongly convex in y, and rho below 2 / (largest eigenvalue of g_yy on any batch).
    Prefer `SOBA` if one step of each is enough, `Implicit` for full batches.

    The metrics hold `residual` (|g_yy v - f_y| / |f_y| before the last step of v) and
    `diverged`: 1 if |g_yy v - f_y| exceeds ten times the largest |f_y| so far.

    Args:
        inner: the inner solver; its `start` is "warm" in the paper.
        steps: N, at least 1.
        rate: rho, positive: a number or a schedule of the outer step.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> problem = tb.Problem(
        ...     upper_loss=lambda x, y, batch: 0.5 * (y - 1.0) ** 2,
        ...     lower_loss=lambda x, y, batch: 0.5 * (y - x) ** 2,
        ... )
        >>> inner = tb.InnerSolver(keras.optimizers.SGD(0.5), steps=40)
        >>> method = tb.AmIGO(inner, steps=2, rate=0.5)
        >>> x, y = tf.constant(3.0), tf.constant(0.0)
        >>> step = method.step(problem, x, y, tb.Batches(None, None), method.init(
        ...     problem, x, y))
        >>> round(float(step.upper_gradient), 4)  # (0.5 + 0.25) * 2
        1.5
        >>> step = method.step(problem, x, y, tb.Batches(None, None), step.state)
        >>> round(float(step.upper_gradient), 4)  # v goes on from there
        1.875

    References:
        Arbel, Mairal (2022), Amortized implicit differentiation for stochastic bilevel
        optimization. arXiv:2111.14580.
    """

    inner: InnerSolver
    steps: int = 10
    rate: float | Schedule | LearningRateSchedule = 0.1

    def __post_init__(self) -> None:
        require_inner(self.inner)
        require_count(self.steps, "steps")
        _ = self.rates  # raises for an invalid rate

    @functools.cached_property
    def rates(self) -> Schedule:
        """rho at every outer step."""
        return as_rate(self.rate, "rate")

    @property
    def draws(self) -> int:
        """The number of lower batches that one step uses."""
        return self.inner.steps + self.steps + 1

    def init(self, problem: Problem, upper: Nest, lower: Nest) -> State:
        solution = structure.zeros_like(structure.to_tensors(lower))
        return {
            "step": tf.constant(0, tf.int64),
            "inner": self.inner.init(problem, upper, lower),
            "solution": solution,
            # The largest |f_y| so far, one per task.
            "largest": problem.inner_product.norm(solution),
        }

    def step(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: State
    ) -> Step:
        here = problem.prepared(upper, batches)
        lower, inner_state, _ = self.inner.solve(here, lower, state["inner"])
        fixed_projection(here.problem, here.upper, lower, "AmIGO")
        upper_loss, partial, adjoint = here.upper_partials(lower)
        rate, first = self.rates(state["step"]), self.inner.steps

        def body(n: tf.Tensor, solution: Any, size: Any) -> tuple:
            del size
            _, _, products = here.lower_gradient_pullback(lower, first + n)
            curved = products(solution, mixed=False)[1]
            against = structure.subtract(curved, adjoint)
            after = structure.add_scaled(solution, -rate, against)
            return n + 1, after, here.norm(against)

        slope = here.norm(adjoint)
        _, solution, size = serial_loop(
            lambda n, *_: n < self.steps,
            body,
            (tf.constant(0), state["solution"], slope),
            self.steps,
        )
        largest = tf.maximum(state["largest"], slope)
        mixed, lower_loss = mixed_product(
            here, lower, structure.scale(-1, solution), self.draws - 1
        )
        return Step(
            upper_gradient=here.gradient(partial, mixed),
            lower=lower,
            state={
                "step": state["step"] + 1,
                "inner": inner_state,
                "solution": solution,
                "largest": largest,
            },
            metrics={
                "upper_loss": upper_loss,
                "lower_loss": lower_loss,
                "residual": structure.ratio(size, slope),
                "diverged": too_far(size, largest),
            },
        )
