"""The single loop on the regularised gap, for a lower problem with constraints."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from keras.optimizers.schedules import LearningRateSchedule

from tfbilevel._calculus import derivatives, structure
from tfbilevel._calculus.aliases import Nest, State
from tfbilevel._core.arguments import positive, require_callable, require_number
from tfbilevel._core.batches import Batches
from tfbilevel._core.method import Step
from tfbilevel._core.prepared import Prepared
from tfbilevel._core.problem import Problem
from tfbilevel._core.projection import fixed_projection
from tfbilevel._core.schedules import InversePower, Schedule, as_weight
from tfbilevel._methods.penalty.divergence import grown
from tfbilevel._methods.penalty.lower_constraints import (
    LowerConstraints,
    require_between,
)
from tfbilevel._methods.penalty.moves_copy import MovesCopy
from tfbilevel._optimizers.update_rule import UpdateRule

LAST = 1  # the number of the lower batch of everything after the step of theta


class _Maximisers(NamedTuple):
    """Where the maximum of the gap is taken, one step on.

    Attributes:
        auxiliary: theta.
        multiplier: lambda.
        optimizer: the state of theta's optimizer.
    """

    auxiliary: Any
    multiplier: Any
    optimizer: Any


@dataclasses.dataclass(frozen=True, eq=False)
class GAFFA(MovesCopy):
    r"""First-order single loop for lower problems with constraints (BiC-GAFFA).

        y*(x) in argmin_y g(x, y)   subject to   h(x, y) <= 0

    Its solutions and multipliers z >= 0 are the zeros of the gap of the Lagrangian
    L(x, y, z) = g(x, y) + <z, h(x, y)>, with two regularisations,

        G(x, y, z) = max_{theta, lambda >= 0}  L(x, y, lambda) - |lambda - z|^2 / (2 b)
                                             - L(x, theta, z) - |theta - y|^2 / (2 a)

    which is penalised:  min_{x, y, 0 <= z <= r} w_k f(x, y) + G(x, y, z), by one step
    of theta, the maximum in lambda, and then one step of x, y and z, from one point:

        theta <- theta - update( g_y(x, theta) + h_y(x, theta)' z + (theta - y) / a )
        lambda = max( z + b h(x, y), 0 )
        d_x = w_k f_x(x, y) + g_x(x, y) + h_x(x, y)' lambda
                            - g_x(x, theta) - h_x(x, theta)' z
        d_y = w_k f_y(x, y) + g_y(x, y) + h_y(x, y)' lambda - (y - theta) / a
        d_z = (lambda - z) / b - h(x, theta)

    z is then cut to [0, r]; w_k = 1 / c_k. `project_lower` projects theta and y on a
    simple set besides h <= 0.

    Cost: three lower and one upper gradient, three gradients of <z, h> and one value of
    h; no second derivatives, no inner loop. Memory: theta, z and the slots of three
    optimizers. Assumes g and h convex in y (h need not be so in x and y together), and
    multipliers below r. w_k falls slowly, and y satisfies the constraints in the limit
    only. Prefer `project_lower` with `Unroll` where the projection on all constraints
    is known; `MEHA` without constraints.

    The first step of theta uses slice 0 of a stacked lower batch, all else slice 1
    (`tb.pair(..., lower_batches=2)`). Constraints that read the batch have one
    multiplier each, so a constraint must be at the same place in every batch, and all
    batches have one size, which is known (`drop_remainder=True`).

    The metrics hold `gap` (G at this theta, at most the true one), `violation` (the
    largest h, at least 0), `weight` (c_k), `truncated` (1 if a multiplier is r: it is
    too small then) and `diverged`: 1 if the direction of y is ten times as long as the
    first of all.

    Args:
        lower_optimizer: a Keras optimizer for y; SGD in the paper.
        constraints: h, called as `constraints(x, y)`, or `constraints(x, y, batch)`
            with a third required parameter. It returns any nest of floating tensors,
            whose entries must not be positive. In `tb.BilevelModel` it receives the
            models.
        auxiliary_optimizer: a Keras optimizer for theta. `None`: like
            `lower_optimizer`.
        multiplier_optimizer: a Keras optimizer for z. `None`: like `lower_optimizer`.
        smoothing: a, positive (gamma_1 in the paper). 1 / a must exceed the negative
            curvature of g.
        multiplier_smoothing: b, positive (gamma_2 in the paper).
        largest_multiplier: r, positive.
        upper_weight: w, a number or a schedule of the outer step, not negative. The
            paper has (k + 1)^{-p} / c with p below 1/2.
        initial_multiplier: z at the start, from 0 to r: a number for all constraints,
            or a nest like their values. A nest is needed if they read the batch.

    Raises:
        ValueError: for an unsupported optimizer, constraints that are not a function or
            an argument out of its range; in `init` over tasks, and for constraints of a
            batch without a nest as `initial_multiplier`; for values that are not
            floating, without a static shape, or not like the multipliers; on several
            replicas for constraints of a batch.

    Example:
        >>> problem = tb.Problem(
        ...     upper_loss=lambda x, y, batch: (x - 1.0) ** 2 + (y - 2.0) ** 2,
        ...     lower_loss=lambda x, y, batch: 0.5 * (y - 3.0) ** 2,
        ... )
        >>> method = tb.GAFFA(
        ...     keras.optimizers.SGD(0.1), lambda x, y: y - x, upper_weight=0.01)
        >>> result = tb.minimize(problem, method, tf.constant(0.0), tf.constant(0.0),
        ...     keras.optimizers.SGD(0.1), tb.Batches(None, None), steps=3000)
        >>> round(float(result.upper), 1), round(float(result.lower), 1)  # y* = x
        (1.5, 1.5)

    References:
        Yao, Yin, Zeng, Zhang (2025), Overcoming lower-level constraints in bilevel
        optimization: a novel approach with regularized gap functions. arXiv:2406.01992.
    """

    lower_optimizer: keras.optimizers.Optimizer
    constraints: Callable[..., Nest]
    _: dataclasses.KW_ONLY
    auxiliary_optimizer: keras.optimizers.Optimizer | None = None
    multiplier_optimizer: keras.optimizers.Optimizer | None = None
    smoothing: float = 1.0
    multiplier_smoothing: float = 1.0
    largest_multiplier: float = 100.0
    upper_weight: float | Schedule | LearningRateSchedule = InversePower(1.0, 0.25)
    initial_multiplier: Any = 0.0

    def __post_init__(self) -> None:
        # Raise for invalid ones.
        _ = self.rule, self.auxiliary_rule, self.multiplier_rule, self.schedule
        require_callable(self.constraints, "constraints")
        for name in ("smoothing", "multiplier_smoothing", "largest_multiplier"):
            require_number(getattr(self, name), name, positive, "above 0")
        require_between(self.initial_multiplier, self.largest_multiplier)

    @functools.cached_property
    def multiplier_rule(self) -> UpdateRule:
        """The update of z."""
        if self.multiplier_optimizer is None:
            return self.rule
        return UpdateRule(self.multiplier_optimizer, "multiplier_optimizer")

    @functools.cached_property
    def schedule(self) -> Schedule:
        """w at every outer step."""
        return as_weight(self.upper_weight, "upper_weight")

    @functools.cached_property
    def held(self) -> LowerConstraints:
        """The constraints."""
        return LowerConstraints(self.constraints)

    @property
    def draws(self) -> int:
        """The number of lower batches that one step uses."""
        return 2

    def init(self, problem: Problem, upper: Nest, lower: Nest) -> State:
        if problem.has_tasks:
            raise ValueError(
                "tb.GAFFA takes no tasks: it keeps one multiplier for each constraint "
                "of one lower problem. Project with `project_lower`, and use tb.Unroll "
                "or tb.MEHA. Received: a problem over tasks"
            )
        upper, lower = structure.to_tensors((upper, lower))
        multiplier = self.held.begun(problem, upper, lower, self.initial_multiplier)
        return {
            "step": tf.constant(0, tf.int64),
            "optimizer": self.rule.init(lower),
            "auxiliary_optimizer": self.auxiliary_rule.init(lower),
            "multiplier_optimizer": self.multiplier_rule.init(multiplier),
            "auxiliary": structure.copied(lower),
            "multiplier": multiplier,
            "first": tf.zeros_like(structure.norm(lower)),
        }

    def step(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: State
    ) -> Step:
        here = problem.prepared(upper, batches)
        weight, y = self._weight(state, lower), structure.to_tensors(lower)
        z = state["multiplier"]
        values = self.held.values(here, y, z, LAST)
        made = self._maximisers(here, y, state, values)
        theta, multiplier, _ = made
        seen: dict[str, Any] = {}

        def penalised(a: Nest, b: Nest, y: Nest) -> tf.Tensor:
            f = here.problem.upper_loss(a, y, here.batches.upper)
            of_y, _ = self._lagrangian(here.at(b), y, multiplier)
            of_theta, ahead = self._lagrangian(here.at(b), theta, z)
            seen.update(upper_loss=f, gap=of_y - of_theta, ahead=ahead)
            return weight * tf.cast(f, weight.dtype) + of_y - of_theta

        _, (partial, response, along) = derivatives.value_and_partials(
            penalised, here.upper, here.upper, y
        )
        along = derivatives.require_connected(along, y, "lower", "the penalised loss")
        pull, climb = structure.subtract(y, theta), structure.subtract(multiplier, z)
        along = structure.add_scaled(along, -1 / self.smoothing, pull)
        of_z = structure.add_scaled(
            structure.scale(-1, seen["ahead"]), 1 / self.multiplier_smoothing, climb
        )
        moved, optimizer = self.rule.update(along, state["optimizer"], y)
        raised, of_multiplier = self.multiplier_rule.update(
            of_z, state["multiplier_optimizer"], z
        )
        most = self.largest_multiplier
        raised = tf.nest.map_structure(lambda m: tf.clip_by_value(m, 0, most), raised)
        length = here.norm(along)
        metrics, first = grown((length, length), state)
        gap = seen["gap"] - _half(pull, self.smoothing, weight)
        return Step(
            upper_gradient=here.gradient(partial, response),
            lower=fixed_projection(problem, upper, moved, "GAFFA"),
            state={
                "step": state["step"] + 1,
                "optimizer": optimizer,
                "auxiliary_optimizer": made.optimizer,
                "multiplier_optimizer": of_multiplier,
                "auxiliary": theta,
                "multiplier": raised,
                "first": first,
            },
            metrics={
                "upper_loss": seen["upper_loss"],
                "lower_loss": here.lower_loss(y, LAST),
                "gap": gap - _half(climb, self.multiplier_smoothing, weight),
                "violation": tf.maximum(_largest(values, weight), 0),
                "weight": tf.math.reciprocal_no_nan(weight),
                "truncated": tf.cast(_largest(raised, weight) >= most, weight.dtype),
                **metrics,
            },
        )

    def objective(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: State
    ) -> Callable[[Nest], tf.Tensor]:
        at, weight = problem.prepared(upper, batches), self._weight(state, lower)
        y, z = structure.to_tensors(lower), state["multiplier"]
        values = self.held.values(at, y, z, LAST)
        theta, multiplier, _ = self._maximisers(at, y, state, values)

        def value(x: Nest) -> tf.Tensor:
            here = problem.prepared(x, batches)
            of_y, _ = self._lagrangian(here, y, multiplier)
            of_theta, _ = self._lagrangian(here, theta, z)
            f = tf.cast(here.upper_loss(y), weight.dtype)
            return weight * f + of_y - of_theta

        return value

    def _weight(self, state: State, lower: Nest) -> tf.Tensor:
        dtype = structure.to_tensors(tf.nest.flatten(lower)[0]).dtype
        return tf.cast(self.schedule(state["step"]), dtype)

    def _lagrangian(
        self, here: Prepared, y: Nest, multiplier: Nest, draw: Any = LAST
    ) -> tuple[tf.Tensor, Any]:
        """g + <multiplier, h> in the first lower leaf's dtype, and h."""
        dtype = tf.nest.flatten(y)[0].dtype
        values = self.held.values(here, y, multiplier, draw)
        held = structure.dot(multiplier, values)
        return tf.cast(here.lower_loss(y, draw), dtype) + tf.cast(held, dtype), values

    def _maximisers(
        self, here: Prepared, y: Nest, state: State, values: Nest
    ) -> _Maximisers:
        theta, z = state["auxiliary"], state["multiplier"]
        _, (slope,) = derivatives.value_and_partials(
            lambda t: self._lagrangian(here, t, z, 0)[0], theta
        )
        slope = derivatives.require_connected(slope, theta, "lower", "the lower loss")
        pull = structure.subtract(theta, y)
        slope = structure.add_scaled(slope, 1 / self.smoothing, pull)
        theta, optimizer = self.auxiliary_rule.update(
            slope, state["auxiliary_optimizer"], theta
        )
        raised = structure.add_scaled(z, self.multiplier_smoothing, values)
        return _Maximisers(
            here.problem.projected_lower(here.upper, theta),
            tf.nest.map_structure(tf.nn.relu, raised),
            optimizer,
        )


def _half(difference: Nest, smoothing: float, like: tf.Tensor) -> tf.Tensor:
    """|difference|^2 / (2 smoothing)."""
    square = tf.cast(structure.dot(difference, difference), like.dtype)
    return square / (2 * smoothing)


def _largest(values: Nest, like: tf.Tensor) -> tf.Tensor:
    """The largest entry of a nest."""
    each = [tf.reduce_max(leaf) for leaf in tf.nest.flatten(values)]
    return tf.reduce_max(tf.stack([tf.cast(value, like.dtype) for value in each]))
