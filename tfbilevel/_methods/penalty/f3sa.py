"""The value-gap penalty in a single loop, with recursive momentum."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from keras.optimizers.schedules import LearningRateSchedule

from tfbilevel._calculus import derivatives, structure
from tfbilevel._calculus.aliases import Nest, State
from tfbilevel._core.batches import Batches
from tfbilevel._core.method import Step
from tfbilevel._core.prepared import Prepared
from tfbilevel._core.problem import Problem
from tfbilevel._core.projection import fixed_projection
from tfbilevel._core.schedules import Schedule, as_weight
from tfbilevel._methods.penalty.divergence import grown
from tfbilevel._methods.penalty.moves_copy import MovesCopy
from tfbilevel._methods.penalty.value_gap import penalised, penalty_weight
from tfbilevel._methods.stochastic.recursive_momentum import as_momentum, recursive


class _Estimates(NamedTuple):
    """Gradients, each of f or of g alone: lambda, which grows, is not in them.

    Attributes:
        z: g_y at z.
        f_y, g_y: at y.
        f_x: at y after its step.
        g_x: the difference of g_x at y and z after their steps.
    """

    z: Any
    f_y: Any
    g_y: Any
    f_x: Any
    g_x: Any


class _Point(NamedTuple):
    """x, y and z before a step."""

    upper: Any
    lower: Any
    auxiliary: Any


@dataclasses.dataclass(frozen=True, eq=False)
class F3SA(MovesCopy):
    r"""`F2SA` in a single loop, with recursive momentum on every gradient (F3SA).

        z_{k+1} = z_k - update( ~g_y(x_k, z_k) )
        y_{k+1} = y_k - update( c (~f_y(x_k, y_k) + lambda ~g_y(x_k, y_k)) )
        d_x = c ( ~f_x(x_k, y_{k+1})
                  + lambda (~g_x(x_k, y_{k+1}) - ~g_x(x_k, z_{k+1})) )
        c = min(1 / lambda, 1)

    where ~h is the estimate of a gradient h with recursive momentum (STORM),

        ~h_k = h(p_k; S) + m_k ( ~h_{k-1} - h(p_{k-1}; S) ),

    from the same batch S at the point p_k of this step and at that of the step before.
    Their common noise cancels in the difference, so ~h is less noisy than h as long as
    x, y and z move slowly. f and g have estimates of their own, because lambda grows.
    z, y and x use slices 0, 1 and 2 of a stacked lower batch
    (`tb.pair(..., lower_batches=3)`); with fewer they repeat. (The paper writes alpha_k
    for c times the rate, and eta_k for 1 - m_k.)

    Cost: eight lower and four upper gradients; no second derivatives. Memory: z, five
    more copies of y, three of x. Assumes g strongly convex in y and lambda large in the
    end: the error is O(1 / lambda). Prefer `F2SA` where batches have little noise, or
    where y and z need several steps for each of x.

    `tb.check_hypergradient` holds y, z and what momentum adds to d_x constant.

    The metrics hold `gap` (g(x, y) - g(x, z) after the steps), `weight` (lambda) and
    `diverged`: 1 if the direction of y is ten times as long as the first of all.

    Args:
        lower_optimizer: a Keras optimizer for y; SGD in the paper.
        weight: lambda, a number or a schedule of the outer step, not negative, such as
            tb.LinearRamp(1.0, 100.0, steps=1000).
        momentum: m, from 0 to below 1: a number, or a schedule that may end at 1. 0: no
            momentum.
        auxiliary_optimizer: a Keras optimizer for z. `None`: like `lower_optimizer`.

    Raises:
        ValueError: for an unsupported optimizer, a negative weight or a momentum out of
            its range.

    Example:
        >>> problem = tb.Problem(
        ...     upper_loss=lambda x, y, batch: 0.5 * (y - 1.0) ** 2 + 0.5 * x**2,
        ...     lower_loss=lambda x, y, batch: 0.5 * (y - x) ** 2,
        ... )
        >>> method = tb.F3SA(keras.optimizers.SGD(0.5), weight=50.0)
        >>> result = tb.minimize(problem, method, tf.constant(3.0), tf.constant(0.0),
        ...     keras.optimizers.SGD(1.0), tb.Batches(None, None), steps=1000)
        >>> round(float(result.upper), 1), round(float(result.lower), 1)
        (0.5, 0.5)

    References:
        Kwon, Kwon, Wright, Nowak (2023), A fully first-order method for stochastic
        bilevel optimization. arXiv:2301.10945.
    """

    lower_optimizer: keras.optimizers.Optimizer
    weight: float | Schedule | LearningRateSchedule
    momentum: float | Schedule | LearningRateSchedule = 0.9
    auxiliary_optimizer: keras.optimizers.Optimizer | None = None

    def __post_init__(self) -> None:
        # Raise for invalid arguments.
        _ = self.rule, self.auxiliary_rule, self.schedule, self.momenta

    @functools.cached_property
    def schedule(self) -> Schedule:
        """The weight at every outer step."""
        return as_weight(self.weight, "weight")

    @functools.cached_property
    def momenta(self) -> Schedule:
        """m at every outer step."""
        return as_momentum(self.momentum, "momentum")

    @property
    def draws(self) -> int:
        """The number of lower batches that one step uses."""
        return 3

    @property
    def couples_tasks(self) -> bool:
        # The momentum of x belongs to all tasks together.
        return True

    def init(self, problem: Problem, upper: Nest, lower: Nest) -> State:
        x, y = (structure.zeros_like(structure.to_tensors(v)) for v in (upper, lower))
        return {
            "step": tf.constant(0, tf.int64),
            "optimizer": self.rule.init(lower),
            "auxiliary_optimizer": self.auxiliary_rule.init(lower),
            "auxiliary": structure.copied(lower),
            "before": _Point(*map(structure.copied, (upper, lower, lower))),
            "estimates": _Estimates(z=y, f_y=y, g_y=y, f_x=x, g_x=x),
            "first": problem.inner_product.norm(y),
        }

    def step(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: State
    ) -> Step:
        here, last = problem.prepared(upper, batches), state["before"]
        before = problem.prepared(last.upper, batches)
        upper, y = structure.to_tensors((upper, lower))
        z, step = state["auxiliary"], state["step"]
        weight, scale = penalty_weight(self.schedule, step, y)
        estimates = state["estimates"]

        def smoothed(now: Any, old: Any, estimate: Any) -> Any:
            return recursive(self.momenta, step, now, old, estimate)

        of_z = smoothed(
            here.lower_gradient(z, 0)[1],
            before.lower_gradient(last.auxiliary, 0)[1],
            estimates.z,
        )
        f_y = smoothed(_f_y(here, y), _f_y(before, last.lower), estimates.f_y)
        g_y = smoothed(
            here.lower_gradient(y, 1)[1],
            before.lower_gradient(last.lower, 1)[1],
            estimates.g_y,
        )
        along = structure.scale(scale, structure.add_scaled(f_y, weight, g_y))
        moved, optimizer = self.rule.update(along, state["optimizer"], y)
        moved = fixed_projection(problem, upper, moved, "F3SA")
        auxiliary, of_auxiliary = self.auxiliary_rule.update(
            of_z, state["auxiliary_optimizer"], z
        )
        auxiliary = here.problem.projected_lower(here.upper, auxiliary)

        now = _of_upper(here, moved, auxiliary, weight)
        old = _of_upper(before, y, z, weight)
        f_x, g_x = smoothed(now, old, (estimates.f_x, estimates.g_x))
        direction = structure.scale(scale, structure.add_scaled(f_x, weight, g_x))

        length = here.norm(along)
        metrics, first = grown((length, length), state)
        losses = [here.lower_loss(each, 2) for each in (moved, auxiliary)]
        return Step(
            upper_gradient=direction,
            lower=moved,
            state={
                "step": step + 1,
                "optimizer": optimizer,
                "auxiliary_optimizer": of_auxiliary,
                "auxiliary": auxiliary,
                "before": _Point(upper, y, z),
                "estimates": _Estimates(of_z, f_y, g_y, f_x, g_x),
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
        made = self.step(problem, upper, lower, batches, state)
        y, z = made.lower, made.state["auxiliary"]
        weight, scale = penalty_weight(self.schedule, state["step"], y)
        f_x, g_x = _of_upper(problem.prepared(upper, batches), y, z, weight)
        plain = structure.scale(scale, structure.add_scaled(f_x, weight, g_x))
        kept = structure.subtract(made.upper_gradient, plain)

        def value(x: Nest) -> tf.Tensor:
            """The penalised loss, and what the momentum adds to its derivative."""
            here = problem.prepared(x, batches)
            c = here.upper
            total = scale * here.mean(penalised(here, c, c, y, z, 2, (1.0, weight)))
            added = structure.dot(kept, structure.to_tensors(x))
            return total + tf.cast(added, total.dtype)

        return value


def _f_y(here: Prepared, y: Nest) -> Any:
    """f_y, zero for what f does not depend on: g does."""
    _, (slope,) = derivatives.value_and_partials(
        lambda y: here.problem.upper_loss(here.upper, y, here.batches.upper), y
    )
    return derivatives.fill_zeros(slope, y)


def _of_upper(here: Prepared, y: Nest, z: Nest, like: tf.Tensor) -> tuple[Any, Any]:
    """f_x and g_x(x, y) - g_x(x, z) in the problem's own x, on the last lower batch."""
    weights = (tf.ones_like(like), 1.0)
    _, (partial, response) = derivatives.value_and_partials(
        lambda a, b: penalised(here, a, b, y, z, 2, weights), here.upper, here.upper
    )
    nothing = structure.zeros_like(structure.to_tensors(here.upper))
    return here.gradient(partial), here.gradient(nothing, response)
