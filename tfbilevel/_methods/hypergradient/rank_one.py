"""The implicit gradient with a rank-one lower Hessian."""

import dataclasses
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from tfbilevel._calculus import derivatives, structure
from tfbilevel._calculus.aliases import Nest, State
from tfbilevel._core.aggregation import Aggregation
from tfbilevel._core.batches import Batches
from tfbilevel._core.inner_solver import InnerSolver
from tfbilevel._core.method import Method, Step
from tfbilevel._core.problem import Problem
from tfbilevel._core.projection import fixed_projection
from tfbilevel._methods.hypergradient.end_point import EndPoint


@dataclasses.dataclass(frozen=True, eq=False)
class RankOne(Method):
    r"""Hypergradient with the Hessian replaced by an outer product (BSG-1, IGA, GN).

        dF/dx = f_x - ( <g_y, f_y> / <g_y, g_y> ) g_x      at the last iterate y_T
        (or the one that `end` says)

    which is the implicit gradient if g_yy is g_y g_y' and g_xy is g_x g_y' (a
    Gauss-Newton model of the lower loss). It uses first derivatives only: one gradient
    of each loss after the inner solve. The model is valid for lower losses near zero at
    their minimum; for others the result is a heuristic, which is not exact even at the
    solution. Prefer `Implicit` where second derivatives are affordable.

    Args:
        inner: the inner solver. Its last iterate must not be stationary: at g_y = 0
            the coefficient is set to 0.
        end: "final", or "pessimistic": at the iterate with the largest f, as in
            `tb.Unroll`; the lower variables after the step are still y_T.
        aggregate: a `tb.Aggregation`, whose mixture at the end replaces g; or `None`.

    Raises:
        ValueError: if `inner` is not a `tb.InnerSolver`, for an unknown `end`, or if
            `inner` has a tolerance together with a pessimistic end or an aggregation.

    Example:
        >>> problem = tb.Problem(
        ...     upper_loss=lambda x, y, batch: 0.5 * (y - 1.0) ** 2,
        ...     lower_loss=lambda x, y, batch: 0.5 * (y - x) ** 2,
        ... )
        >>> method = tb.RankOne(tb.InnerSolver(keras.optimizers.SGD(0.5), steps=1))
        >>> x, y = tf.constant(2.0), tf.constant(4.0)
        >>> step = method.step(problem, x, y, tb.Batches(None, None), method.init(
        ...     problem, x, y))
        >>> float(step.lower), float(step.upper_gradient)
        (3.0, 2.0)

    References:
        Giovannelli, Kent, Vicente (2021), Inexact bilevel stochastic gradient methods
        for constrained and unconstrained lower-level problems. arXiv:2110.00604.
    """

    inner: InnerSolver
    end: str = "final"
    aggregate: Aggregation | None = None

    def __post_init__(self) -> None:
        _ = self._end_point  # raises for invalid arguments

    @property
    def _end_point(self) -> EndPoint:
        """The inner solve, with the choice of its end point."""
        return EndPoint(self.inner, self.end, self.aggregate)

    @property
    def takes_second_derivatives(self) -> bool:
        return False

    def init(self, problem: Problem, upper: Nest, lower: Nest) -> State:
        return self.inner.init(problem, upper, lower)

    def step(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: State
    ) -> Step:
        reached = self._end_point.reach(problem.prepared(upper, batches), lower, state)
        here, point = reached.here, reached.point.lower
        fixed_projection(here.problem, here.upper, point, "RankOne")
        upper_loss, partial, adjoint = here.upper_partials(point)
        lower_loss, pullback = here.lower_pullback(point, self.inner.steps)
        one = tf.ones_like(here.norm(adjoint))
        gradient = derivatives.require_connected(
            pullback(one)[1], point, "lower", "the lower loss"
        )
        coefficient = structure.ratio(
            here.dot(gradient, adjoint), here.dot(gradient, gradient)
        )
        # Propagate NaN where the coefficient is 0.
        fine = tf.math.is_finite(here.norm(adjoint))
        coefficient = tf.where(fine, coefficient, np.nan)
        response = pullback(-coefficient)[0]
        return Step(
            upper_gradient=here.gradient(partial, response),
            lower=reached.after.lower,
            state=self.inner.carried(reached.after, state),
            metrics={
                "upper_loss": upper_loss,
                "lower_loss": lower_loss,
                "stationarity": here.norm(gradient),
                **reached.metrics,
            },
        )

    def objective(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: State
    ) -> Callable[[Nest], tf.Tensor]:
        return self._end_point.objective(problem, upper, lower, batches, state)
