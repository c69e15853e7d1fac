"""The value-gap penalty with solved copies."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tfbilevel._calculus import derivatives, structure
from tfbilevel._calculus.aliases import Nest, State
from tfbilevel._calculus.loops import serial_loop
from tfbilevel._core.batches import Batches
from tfbilevel._core.inner_solver import InnerSolver, require_inner
from tfbilevel._core.method import Step
from tfbilevel._core.prepared import Prepared
from tfbilevel._core.problem import Problem
from tfbilevel._core.projection import fixed_projection
from tfbilevel._core.schedules import Schedule, as_weight
from tfbilevel._methods.moves_lower import MovesLower
from tfbilevel._methods.penalty.divergence import grown
from tfbilevel._methods.penalty.value_gap import (
    penalised,
    penalty_weight,
    require_warm,
    solved_copy,
)


@dataclasses.dataclass(frozen=True, eq=False)
class F2SA(MovesLower):
    r"""First-order penalty method that solves both of its copies (F2SA).

        z_{t+1} = z_t - update( g_y(x, z_t) ),                            t < T
        y_{t+1} = y_t - update( c (f_y(x, y_t) + lambda g_y(x, y_t)) ),   t < T
        d_x = c ( f_x(x, y_T) + lambda (g_x(x, y_T) - g_x(x, z_T)) )
        c = min(1 / lambda, 1)

    Both copies continue from the last outer step. If both are solved, d_x / c differs
    from the hypergradient by O(1 / lambda), so lambda grows with the outer steps; c
    keeps the steps of y and x bounded meanwhile. (The paper writes alpha_k for c times
    the rate.) The steps of z, then those of y, then d_x use successive slices of a
    stacked lower batch, from `tb.pair(..., lower_batches=method.draws)`; with fewer
    slices they repeat.

    Cost: 2 T + 2 lower and T + 1 upper gradients; no second derivatives. Memory: one
    more copy of y. Prefer `ValueGap`, which makes one step of y per outer step, if
    lambda is small; prefer `Implicit` or `StocBiO` where second derivatives are
    affordable: they have no error of O(1 / lambda).

    The metrics hold `gap` (g(x, y_T) - g(x, z_T), which is near 0 if z is solved and
    lambda is large, and negative if z lags behind), `weight` (lambda) and `diverged`: 1
    if the last direction of y is ten times as long as the first of all. The rate is too
    large for the curvature then.

    Args:
        inner: the solver of z, with T steps; its `start` must be "warm".
        lower_optimizer: a Keras optimizer for y.
        weight: lambda, a number or a schedule of the outer step, not negative, such as
            tb.LinearRamp(1.0, 100.0, steps=1000).

    Raises:
        ValueError: for an unsupported optimizer, a negative weight, or an `inner` that
            does not start "warm".

    Example:
        >>> problem = tb.Problem(
        ...     upper_loss=lambda x, y, batch: 0.5 * (y - 1.0) ** 2,
        ...     lower_loss=lambda x, y, batch: 0.5 * (y - x) ** 2,
        ... )
        >>> inner = tb.InnerSolver(keras.optimizers.SGD(0.5), steps=40)
        >>> method = tb.F2SA(inner, keras.optimizers.SGD(0.5), weight=99.0)
        >>> x, y = tf.constant(3.0), tf.constant(0.0)
        >>> step = method.step(problem, x, y, tb.Batches(None, None), method.init(
        ...     problem, x, y))
        >>> round(99.0 * float(step.upper_gradient), 2)  # 2 in the limit
        1.98

    References:
        Kwon, Kwon, Wright, Nowak (2023), A fully first-order method for stochastic
        bilevel optimization. arXiv:2301.10945.
    """

    inner: InnerSolver
    lower_optimizer: keras.optimizers.Optimizer
    weight: float | Schedule

    def __post_init__(self) -> None:
        _ = self.rule, self.schedule  # raises for invalid arguments
        require_inner(self.inner)
        require_warm(self.inner)

    @functools.cached_property
    def schedule(self) -> Schedule:
        """The weight at every outer step."""
        return as_weight(self.weight, "weight")

    @property
    def draws(self) -> int:
        """The number of lower batches that one step uses."""
        return 2 * self.inner.steps + 1

    @property
    def takes_second_derivatives(self) -> bool:
        return False

    @property
    def lower_steps(self) -> int:
        return self.inner.steps

    @property
    def mean_metrics(self) -> tuple[str, ...]:
        return (*super().mean_metrics, "gap", "weight")

    def init(self, problem: Problem, upper: Nest, lower: Nest) -> State:
        return {
            "step": tf.constant(0, tf.int64),
            "optimizer": self.rule.init(lower),
            "inner": self.inner.init(problem, upper, lower),
            "auxiliary": structure.copied(lower),
            "first": tf.zeros_like(
                problem.inner_product.norm(structure.to_tensors(lower))
            ),
        }

    def step(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: State
    ) -> Step:
        here = problem.prepared(upper, batches)
        weight, scale = penalty_weight(self.schedule, state["step"], lower)
        auxiliary, inner_state = solved_copy(self.inner, here, state)
        draw = self.draws - 1
        moved, optimizer, sizes = self._descended(here, lower, state, weight, scale)
        _, (partial, response) = derivatives.value_and_partials(
            lambda a, b: penalised(here, a, b, moved, auxiliary, draw, (1.0, weight)),
            here.upper,
            here.upper,
        )
        losses = [here.lower_loss(each, draw) for each in (moved, auxiliary)]
        metrics, first = grown(sizes, state)
        return Step(
            upper_gradient=structure.scale(scale, here.gradient(partial, response)),
            lower=fixed_projection(problem, upper, moved, "F2SA"),
            state={
                "step": state["step"] + 1,
                "optimizer": optimizer,
                "inner": inner_state,
                "auxiliary": auxiliary,
                "first": first,
            },
            metrics={
                "upper_loss": here.upper_loss(moved),
                "lower_loss": losses[0],
                "gap": losses[0] - losses[1],
                "weight": weight,
                **metrics,
            },
        )

    def objective(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: State
    ) -> Callable[[Nest], tf.Tensor]:
        at = problem.prepared(upper, batches)
        weight, scale = penalty_weight(self.schedule, state["step"], lower)
        auxiliary, _ = solved_copy(self.inner, at, state)
        draw = self.draws - 1
        moved, _, _ = self._descended(at, lower, state, weight, scale)

        def value(x: Nest) -> tf.Tensor:
            here = problem.prepared(x, batches)
            c = here.upper
            made = penalised(here, c, c, moved, auxiliary, draw, (1.0, weight))
            return scale * here.mean(made)

        return value

    def _descended(
        self,
        here: Prepared,
        lower: Nest,
        state: State,
        weight: tf.Tensor,
        scale: tf.Tensor,
    ) -> tuple[Any, Any, tuple]:
        """y_T, the optimizer's state, and the first and the last |d_y|."""
        steps = self.inner.steps

        def loss(y: Nest, t: Any) -> tf.Tensor:
            batch = here.batches.lower_at(steps + t)
            f = here.problem.upper_loss(here.upper, y, here.batches.upper)
            g = here.problem.lower_loss(here.upper, y, batch)
            return scale * (tf.cast(f, scale.dtype) + weight * tf.cast(g, scale.dtype))

        def body(t: tf.Tensor, y: Any, optimizer: Any, first: Any, size: Any) -> tuple:
            _, (gradient,) = derivatives.value_and_partials(lambda y: loss(y, t), y)
            gradient = derivatives.require_connected(
                gradient, y, "lower", "the penalised loss"
            )
            size = here.norm(gradient)
            moved, optimizer = self.rule.update(gradient, optimizer, y)
            moved = here.problem.projected_lower(here.upper, moved)
            return t + 1, moved, optimizer, tf.where(t == 0, size, first), size

        lower = structure.to_tensors(lower)
        nothing = tf.zeros_like(here.norm(lower))
        _, moved, optimizer, *sizes = serial_loop(
            lambda t, *_: t < steps,
            body,
            (tf.constant(0), lower, state["optimizer"], nothing, nothing),
            steps,
        )
        return moved, optimizer, tuple(sizes)
