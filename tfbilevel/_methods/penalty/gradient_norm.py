"""The gradient-norm penalty."""

import dataclasses
import functools
from collections.abc import Callable

import keras
import tensorflow as tf

from tfbilevel._calculus import structure
from tfbilevel._calculus.aliases import Nest, State
from tfbilevel._core.batches import Batches
from tfbilevel._core.method import Step
from tfbilevel._core.problem import Problem
from tfbilevel._core.projection import fixed_projection
from tfbilevel._core.schedules import Schedule, as_weight
from tfbilevel._methods.moves_lower import MovesLower
from tfbilevel._methods.penalty.value_gap import penalty_weight


@dataclasses.dataclass(frozen=True, eq=False)
class GradientNorm(MovesLower):
    r"""Penalty on the norm of the lower gradient (G-PBGD).

        min_{x, y}  f(x, y) + (gamma / 2) ||g_y(x, y)||^2

    With w = gamma g_y held constant, the exact gradients need one second-order product
    and no inner loop:

        d_x = c ( f_x + g_xy w ),   d_y = c ( f_y + g_yy w ),   c = min(1 / gamma, 1)

    Cost: one gradient of f, one gradient of g and one product. No extra copy of y.
    Assumes that stationary points of g(x, .) are its minimisers (it accepts saddles
    and maxima as well). The solution is that of the penalised problem. Prefer
    `ValueGap` where second derivatives are expensive or g is not convex in y.

    Args:
        lower_optimizer: a Keras optimizer for y.
        weight: gamma, a number or a schedule, not negative.

    Raises:
        ValueError: for an unsupported optimizer or a negative weight.

    Example:
        >>> problem = tb.Problem(
        ...     upper_loss=lambda x, y, batch: 0.5 * (y - 1.0) ** 2,
        ...     lower_loss=lambda x, y, batch: 0.5 * (y - x) ** 2,
        ... )
        >>> method = tb.GradientNorm(keras.optimizers.SGD(0.5), weight=1.0)
        >>> x, y = tf.constant(0.0), tf.constant(2.0)
        >>> step = method.step(problem, x, y, tb.Batches(None, None), method.init(
        ...     problem, x, y))
        >>> float(step.upper_gradient), float(step.lower)
        (-2.0, 0.5)

    References:
        Shen, Chen (2023), On penalty-based bilevel gradient descent method.
        arXiv:2302.05185.
    """

    lower_optimizer: keras.optimizers.Optimizer
    weight: float | Schedule

    def __post_init__(self) -> None:
        _ = self.rule, self.schedule  # raises for invalid arguments

    @functools.cached_property
    def schedule(self) -> Schedule:
        """The weight at every outer step."""
        return as_weight(self.weight, "weight")

    @property
    def mean_metrics(self) -> tuple[str, ...]:
        return (*super().mean_metrics, "weight")

    def init(self, problem: Problem, upper: Nest, lower: Nest) -> State:
        return {"step": tf.constant(0, tf.int64), "optimizer": self.rule.init(lower)}

    def step(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: State
    ) -> Step:
        here = problem.prepared(upper, batches)
        weight, scale = penalty_weight(self.schedule, state["step"], lower)
        upper_loss, partial, direct = here.upper_partials(lower)
        lower_loss, gradient, pullback = here.lower_gradient_pullback(lower, 0)
        mixed, curvature = pullback(structure.scale(weight, gradient))
        new_lower, optimizer = self.rule.update(
            structure.scale(scale, structure.add(direct, curvature)),
            state["optimizer"],
            lower,
        )
        return Step(
            upper_gradient=structure.scale(scale, here.gradient(partial, mixed)),
            lower=fixed_projection(problem, upper, new_lower, "GradientNorm"),
            state={"step": state["step"] + 1, "optimizer": optimizer},
            metrics={
                "upper_loss": upper_loss,
                "lower_loss": lower_loss,
                "stationarity": here.norm(gradient),
                "weight": weight,
            },
        )

    def objective(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: State
    ) -> Callable[[Nest], tf.Tensor]:
        weight, scale = penalty_weight(self.schedule, state["step"], lower)

        def value(x: Nest) -> tf.Tensor:
            here = problem.prepared(x, batches)
            _, gradient = here.lower_gradient(lower, 0)
            penalty = 0.5 * weight * structure.dot(gradient, gradient)
            f = tf.cast(here.upper_loss(lower), weight.dtype)
            return scale * (f + here.mean(penalty))

        return value
