"""The last inner step differentiated by a finite difference."""

import dataclasses
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfbilevel._calculus import derivatives, structure
from tfbilevel._calculus.aliases import Nest, State
from tfbilevel._core.aggregation import Aggregation, aggregated, require_aggregation
from tfbilevel._core.arguments import positive, require_number
from tfbilevel._core.batches import Batches
from tfbilevel._core.inner_solver import (
    InnerSolver,
    Iterate,
    require_fixed_length,
    require_inner,
)
from tfbilevel._core.method import Method, Step
from tfbilevel._core.prepared import Prepared
from tfbilevel._core.problem import Problem
from tfbilevel._methods.hypergradient.unroll import Unroll


@dataclasses.dataclass(frozen=True, eq=False)
class FiniteDifference(Method):
    r"""One inner step's hypergradient without second derivatives (DARTS, SAMA).

        y' = y - r g_y(x, y),      v = f_y(x, y'),      e = radius / |v|
        dF/dx = f_x(x, y') - r ( g_x(x, y + e v) - g_x(x, y - e v) ) / 2e

    the same number as `Unroll(inner, last=1)` up to O(e^2), where y is the iterate
    before the last inner step. It takes two gradients of the lower loss instead of a
    Hessian-vector product, for losses whose second derivatives TensorFlow lacks or
    computes slowly. In float32 the difference of nearly equal gradients loses digits;
    prefer `Unroll` where it works. There is no pessimistic end, because the published
    method makes only one step. With optimizers other than plain SGD, v is first pulled
    back through the optimizer's own update. So this is also the published form of SAMA,
    but for f_y, which SAMA takes at y and not after one more step; `Identity` has it
    there, with second derivatives.

    Args:
        inner: the inner solver; the published method makes one step.
        radius: length of the perturbation of all lower variables together, positive.
        aggregate: a `tb.Aggregation`, whose mixture replaces g; or `None`.

    Raises:
        ValueError: if `inner` is not a `tb.InnerSolver`, `radius` not positive or
            `aggregate` not a `tb.Aggregation`.

    Example:
        >>> problem = tb.Problem(
        ...     upper_loss=lambda x, y, batch: 0.5 * (y - 1.0) ** 2,
        ...     lower_loss=lambda x, y, batch: 0.5 * (y - x) ** 2,
        ... )
        >>> inner = tb.InnerSolver(keras.optimizers.SGD(0.5), steps=1)
        >>> method = tb.FiniteDifference(inner)
        >>> x, y = tf.constant(2.0, tf.float64), tf.constant(4.0, tf.float64)
        >>> step = method.step(problem, x, y, tb.Batches(None, None), method.init(
        ...     problem, x, y))
        >>> round(float(step.upper_gradient), 6)
        1.0

    References:
        Liu, Simonyan, Yang (2019), DARTS: differentiable architecture search.
        arXiv:1806.09055. Choe et al. (2023), Making scalable meta learning practical.
        arXiv:2310.05674.
    """

    inner: InnerSolver
    radius: float = 0.01
    aggregate: Aggregation | None = None

    def __post_init__(self) -> None:
        require_inner(self.inner)
        require_fixed_length(self.inner, "FiniteDifference")
        require_aggregation(self.aggregate)
        remedy = "The published value is 0.01."
        require_number(self.radius, "radius", positive, "above 0", remedy)

    @property
    def takes_second_derivatives(self) -> bool:
        return False

    def init(self, problem: Problem, upper: Nest, lower: Nest) -> State:
        return self.inner.init(problem, upper, lower)

    def step(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: State
    ) -> Step:
        here = aggregated(self.aggregate, problem.prepared(upper, batches))
        inner, last = self.inner, self.inner.steps - 1
        iterate, pull_start = inner.begin_pullback(here, lower, state)
        iterate, _ = inner.run(here, iterate, 0, last, last)
        lower_loss, gradient = inner.gradient(here, iterate, last)

        def move(c: Nest, y: Nest, g: Any) -> tuple[Any, Any]:
            end = inner.move(here.at(c), iterate._replace(lower=y), g)
            return end.lower, end

        _, end, pullback = derivatives.vjp(move, here.upper, iterate.lower, gradient)
        upper_loss, partial, adjoint = here.upper_partials(end.lower)
        through_rate, start, direction = pullback(adjoint)
        direction = derivatives.fill_zeros(direction, gradient)
        mixed, curved = self._products(here, iterate, direction, last)
        response = derivatives.add_partials(through_rate, mixed)
        if last == 0 and pull_start is not None:
            start = derivatives.fill_zeros(start, iterate.lower)
            adjoint = structure.add(start, derivatives.fill_zeros(curved, start))
            response = derivatives.add_partials(response, pull_start(adjoint)[0])
        return Step(
            upper_gradient=here.gradient(partial, response),
            lower=end.lower,
            state=inner.carried(end, state),
            metrics={
                "upper_loss": upper_loss,
                "lower_loss": lower_loss,
            },
        )

    def objective(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: State
    ) -> Callable[[Nest], tf.Tensor]:
        exact = Unroll(self.inner, last=1, aggregate=self.aggregate)
        return exact.objective(problem, upper, lower, batches, state)

    def _products(
        self, here: Prepared, iterate: Iterate, direction: Nest, t: int
    ) -> tuple:
        """g_xy w and g_yy w along `direction`, by central differences; each task has
        its own width."""
        size = here.norm(direction)
        width = structure.ratio(tf.cast(self.radius, size.dtype), size)
        factor = structure.ratio(tf.constant(0.5, width.dtype), width)

        def partials(sign: float) -> tuple[Any, Any]:
            point = self.inner.point(iterate)
            y = structure.add_scaled(point, sign * width, direction)
            return here.lower_pullback(y, t)[1](sign * factor)

        return derivatives.add_partials(partials(1.0), partials(-1.0))
