"""The value-gap penalty."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tfbilevel._calculus import derivatives, structure
from tfbilevel._calculus.aliases import Metrics, Nest, State
from tfbilevel._core.arguments import require_choice
from tfbilevel._core.batches import Batches
from tfbilevel._core.inner_solver import InnerSolver, require_inner
from tfbilevel._core.method import Step
from tfbilevel._core.prepared import Prepared
from tfbilevel._core.problem import Problem
from tfbilevel._core.projection import fixed_projection
from tfbilevel._core.schedules import Schedule, as_weight
from tfbilevel._methods.moves_lower import MovesLower


@dataclasses.dataclass(frozen=True, eq=False)
class ValueGap(MovesLower):
    r"""First-order penalty on the lower value gap (V-PBGD).

        min_{x, y}  f(x, y) + gamma ( g(x, y) - v(x) ),       v(x) = min_z g(x, z)

    A second copy z of the lower variables follows argmin g(x, .) by inner steps.
    v_x is approximated by g_x(x, z) with z held constant (Danskin). Both levels make
    their steps at the same point:

        d_x = c ( f_x + gamma (g_x(x, y) - g_x(x, z)) ),   d_y = c ( f_y + gamma g_y )
        c = min(1 / gamma, 1)

    so that a growing weight does not require a smaller rate. Cost: the inner steps, two
    gradients and one more evaluation of g; no second derivatives. Memory: one more copy
    of y. Assumes z close to a minimiser of g(x, .); if z lags behind, the metric `gap`
    becomes negative. The solution is that of the penalised problem, with an error of
    O(1 / gamma). Prefer it where second derivatives are expensive or unavailable;
    prefer `Implicit` or `Unroll` where the exact hypergradient matters.

    Args:
        inner: the solver of z; its `start` must be "warm". `None`: v(x) is known not to
            depend on x, and there is no z.
        lower_optimizer: a Keras optimizer for y.
        weight: gamma, a number or a schedule, not negative.
        auxiliary: the start of z in each outer step. "persistent": its last value.
            "copy": y.

    Raises:
        ValueError: for an unsupported optimizer or choice, a negative weight, or an
            `inner` that does not start "warm".

    Example:
        >>> problem = tb.Problem(
        ...     upper_loss=lambda x, y, batch: 0.5 * (y - 1.0) ** 2,
        ...     lower_loss=lambda x, y, batch: 0.5 * (y - x) ** 2,
        ... )
        >>> method = tb.ValueGap(None, keras.optimizers.SGD(0.5), weight=1.0)
        >>> x, y = tf.constant(0.0), tf.constant(2.0)
        >>> step = method.step(problem, x, y, tb.Batches(None, None), method.init(
        ...     problem, x, y))
        >>> float(step.upper_gradient), float(step.lower)
        (-2.0, 0.5)

    References:
        Shen, Chen (2023), On penalty-based bilevel gradient descent method.
        arXiv:2302.05185.
    """

    inner: InnerSolver | None
    lower_optimizer: keras.optimizers.Optimizer
    weight: float | Schedule
    auxiliary: str = "persistent"

    def __post_init__(self) -> None:
        _ = self.rule, self.schedule  # raises for invalid arguments
        require_choice(self.auxiliary, "auxiliary", ("persistent", "copy"))
        if self.inner is not None:
            require_inner(self.inner)
            require_warm(self.inner)

    @functools.cached_property
    def schedule(self) -> Schedule:
        """The weight at every outer step."""
        return as_weight(self.weight, "weight")

    @property
    def takes_second_derivatives(self) -> bool:
        return False

    @property
    def mean_metrics(self) -> tuple[str, ...]:
        return (*super().mean_metrics, "gap", "weight")

    def init(self, problem: Problem, upper: Nest, lower: Nest) -> State:
        state = {
            "step": tf.constant(0, tf.int64),
            "optimizer": self.rule.init(lower),
        }
        if self.inner is not None:
            state["inner"] = self.inner.init(problem, upper, lower)
            state["auxiliary"] = structure.copied(lower)
        return state

    def step(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: State
    ) -> Step:
        here = problem.prepared(upper, batches)
        weight, scale = penalty_weight(self.schedule, state["step"], lower)
        after = dict(state, step=state["step"] + 1)
        value, constraint = tf.zeros([], weight.dtype), ()
        if self.inner is not None:
            auxiliary, after["inner"] = self._solve(here, lower, state)
            after["auxiliary"] = auxiliary
            value, (constraint,) = derivatives.value_and_partials(
                lambda c: _lower_loss(here, c, auxiliary, self._draw), here.upper
            )
            value = tf.cast(value, weight.dtype)

        losses: Metrics = {}

        def penalised(c_partial: Any, c_response: Any, y: Nest) -> tf.Tensor:
            f = here.problem.upper_loss(c_partial, y, here.batches.upper)
            g = _lower_loss(here, c_response, y, self._draw)
            losses.update(upper_loss=f, lower_loss=g)
            return tf.cast(f, weight.dtype) + weight * tf.cast(g, weight.dtype)

        _, (partial, response, gradient) = derivatives.value_and_partials(
            penalised, here.upper, here.upper, lower
        )
        if self.inner is not None:
            response = derivatives.add_partials(
                response, derivatives.scale_partial(-weight, constraint)
            )
        gradient = derivatives.require_connected(
            gradient, lower, "lower", "the penalised loss"
        )
        new_lower, after["optimizer"] = self.rule.update(
            structure.scale(scale, gradient), state["optimizer"], lower
        )
        return Step(
            upper_gradient=structure.scale(scale, here.gradient(partial, response)),
            lower=fixed_projection(problem, upper, new_lower, "ValueGap"),
            state=after,
            metrics={
                **{name: here.mean(loss) for name, loss in losses.items()},
                "gap": here.mean(tf.cast(losses["lower_loss"], weight.dtype) - value),
                "weight": weight,
            },
        )

    def objective(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: State
    ) -> Callable[[Nest], tf.Tensor]:
        weight, scale = penalty_weight(self.schedule, state["step"], lower)
        at = problem.prepared(upper, batches)
        auxiliary = None if self.inner is None else self._solve(at, lower, state)[0]

        def value(x: Nest) -> tf.Tensor:
            here = problem.prepared(x, batches)
            gap = _lower_loss(here, here.upper, lower, self._draw)
            if auxiliary is not None:
                gap -= _lower_loss(here, here.upper, auxiliary, self._draw)
            gap = tf.cast(here.mean(gap), weight.dtype)
            f = tf.cast(here.upper_loss(lower), weight.dtype)
            return scale * (f + weight * gap)

        return value

    @property
    def _draw(self) -> int:
        return 0 if self.inner is None else self.inner.steps

    def _solve(self, here: Prepared, lower: Nest, state: State) -> tuple[Any, Any]:
        assert self.inner is not None
        copy = self.auxiliary == "copy"
        return solved_copy(self.inner, here, state, lower if copy else None)


def require_warm(inner: InnerSolver) -> None:
    """Raise unless the second copy starts where the method says."""
    if inner.start != "warm":
        raise ValueError(
            "`inner.start` must be 'warm' here: the method sets the start of the "
            "second copy. Use tb.InnerSolver(..., start='warm'). "
            f"Received: start={inner.start!r}"
        )


def solved_copy(
    inner: InnerSolver, here: Prepared, state: State, start: Nest | None = None
) -> tuple[Any, Any]:
    """z after the inner steps, and the inner solver's state.

    Args:
        inner: the solver of z.
        here: the problem of this outer step.
        state: the method's, with "inner" and "auxiliary", the z of the last step.
        start: where z starts instead.
    """
    # Not at the problem's `lower_start`.
    problem = dataclasses.replace(here.problem, lower_start=None)
    here = dataclasses.replace(here, problem=problem)
    start = state["auxiliary"] if start is None else start
    auxiliary, inner_state, _ = inner.solve(here, start, state["inner"])
    return auxiliary, inner_state


def penalty_weight(
    schedule: Schedule, step: tf.Tensor, lower: Nest
) -> tuple[tf.Tensor, tf.Tensor]:
    """gamma at this step and the step scale min(1 / gamma, 1), in y's dtype."""
    weight = schedule(step)
    scale = 1.0 / tf.maximum(weight, 1.0)
    dtype = tf.nest.flatten(lower)[0].dtype
    return tf.cast(weight, dtype), tf.cast(scale, dtype)


def _lower_loss(here: Prepared, c: Nest, y: Nest, draw: int) -> tf.Tensor:
    return here.problem.lower_loss(c, y, here.batches.lower_at(draw))


def penalised(
    here: Prepared,
    a: Nest,
    b: Nest,
    y: Nest,
    z: Nest,
    draw: Any,
    weights: tuple[Any, Any],
) -> tf.Tensor:
    """w f(a, y) + w' (g(b, y) - g(b, z)); over tasks, summed.

    Args:
        here: the problem of this outer step.
        a, b: upper variables: those of f, and those of g.
        y, z: the lower variables and their second copy.
        draw: the number of the lower batch.
        weights: w and w'; one of them is a tensor, in whose dtype the sum is made.
    """
    dtype = next(each.dtype for each in weights if tf.is_tensor(each))
    f = here.problem.upper_loss(a, y, here.batches.upper)
    gap = _lower_loss(here, b, y, draw) - _lower_loss(here, b, z, draw)
    return weights[0] * tf.cast(f, dtype) + weights[1] * tf.cast(gap, dtype)
