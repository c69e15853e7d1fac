"""The method of multipliers on the lower problem's stationarity."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tfbilevel._calculus import structure
from tfbilevel._calculus.aliases import Nest, State
from tfbilevel._calculus.loops import serial_loop
from tfbilevel._core.arguments import (
    not_negative,
    positive,
    require_choice,
    require_count,
    require_number,
)
from tfbilevel._core.batches import Batches
from tfbilevel._core.former_arguments import renamed
from tfbilevel._core.inner_solver import InnerSolver
from tfbilevel._core.method import Method, Step
from tfbilevel._core.prepared import Prepared
from tfbilevel._core.problem import Problem
from tfbilevel._core.projection import fixed_projection
from tfbilevel._methods.penalty.penalty_schedule import PenaltySchedule
from tfbilevel._optimizers.update_rule import UpdateRule

FOLLOWING = ("weight", "lower_weight", "tolerance", "rate_scale")


@renamed(
    {
        "tolerance": "atol",
        "multiplier": "initial_multiplier",
        "starts": "independent_starts",
        "multipliers": "multiplier_state",
    },
    gathered={"schedule": PenaltySchedule},
    positional=(
        *(field.name for field in dataclasses.fields(PenaltySchedule)),
        *("smoothing", "start", "starts", "optimizer_state", "multipliers"),
    ),
)
@dataclasses.dataclass(frozen=True, eq=False)
class AugmentedLagrangian(Method):
    r"""Augmented Lagrangian for g_y = 0, without inversion (Penalty, Mehra & Hamm).

        h(x, y) = f(x, y) + <nu, g_y(x, y)> + (rho / 2) ||g_y(x, y)||^2

    One outer step makes T steps of y along d_y, and then the upper optimizer's step of
    x along d_x, all with w = nu + rho g_y:

        d_y = f_y + g_yy w + lambda g_y,        d_x = f_x + g_xy w

    These are exact derivatives of h + lambda g in y, and of h in x. The term lambda g
    keeps y away from maxima and saddle points of g and is not part of h. Where d_y
    vanishes, w is -g_yy^{-1} (f_y + lambda g_y), and d_x approaches the hypergradient
    as lambda g_y -> 0.

    Whenever the pair is nearly stationary for the current penalty,

        ||d_x||^2 + ||d_y||^2 < epsilon^2       (d_x, d_y at y after its T steps),

    the schedule is updated: nu <- nu + rho g_y, rho <- growth rho,
    lambda <- decay lambda, epsilon <- tolerance_decay epsilon, and all later steps of
    x and y are shortened by rate_decay (`tb.PenaltySchedule`). With projections, d_x
    and d_y are the projected gradients z - P(z - d), which also vanish at an active
    bound. Over tasks (`tb.over_tasks`) ||d_y||^2 is the mean over the tasks.

    Cost per inner step: one gradient of f, one of g and one second-order product
    (about two gradients of g); the step of x costs one more. Memory: nu, w and the
    slots of one optimizer, for any T. Assumes f_y and g_y smooth; g_yy may be singular.
    Prefer `Implicit` with conjugate gradients if g is convex and solved well, `Unroll`
    if the inner loop itself matters, `GradientNorm` if a single penalty weight gamma is
    sufficient.

    The metrics hold `stationarity` (norm of g_y), `penalty` and `multiplier_term` (the
    two terms of h besides f), `kkt_residual` (which is compared with epsilon) and the
    schedule: `weight` (rho), `lower_weight` (lambda), `tolerance` (epsilon) and
    `rate_scale`, all with their values in this step.

    Args:
        lower_optimizer: a Keras optimizer for y that `tb.differentiable` supports; its
            slots are carried from one outer step to the next.
        steps: T, at least 1. With several lower batches inner step t uses slice t, and
            the step of x slice T.
        weight: initial rho, positive.
        lower_weight: initial lambda, not negative.
        atol: initial epsilon, positive.
        initial_multiplier: initial value of all entries of nu.
        smoothing: compare a running mean with epsilon^2, in which the past has this
            share, in [0, 1); otherwise one lucky minibatch updates the schedule.
        start: the start of y in every outer step, as in `tb.InnerSolver`.
        independent_starts: `None`, or the number of independent problems along a
            leading axis of all variables: each has its own schedule, and metrics are
            means.
        optimizer_state: "carry": the slots of `lower_optimizer` are carried from one
            outer step to the next. "reset": they start at zero, for changing tasks.
        multiplier_state: "carry", or "reset": nu is `initial_multiplier` at every
            outer step, for tasks that change with it.
        schedule: the factors of a schedule update.

    Raises:
        ValueError: for an unsupported optimizer or an argument out of its range.

    Example:
        >>> problem = tb.Problem(
        ...     upper_loss=lambda x, y, batch: 0.5 * (y - 1.0) ** 2 + 0.5 * x**2,
        ...     lower_loss=lambda x, y, batch: 0.5 * (y - x) ** 2,
        ... )
        >>> method = tb.AugmentedLagrangian(
        ...     keras.optimizers.SGD(0.1), steps=20, atol=0.1)
        >>> result = tb.minimize(problem, method, tf.constant(3.0), tf.constant(0.0),
        ...     keras.optimizers.SGD(0.1), tb.Batches(None, None), steps=400)
        >>> round(float(result.upper), 2), round(float(result.lower), 2)
        (0.5, 0.5)

    References:
        Mehra, Hamm (2021), Penalty method for inversion-free deep bilevel
        optimization. arXiv:1911.03432.
    """

    lower_optimizer: keras.optimizers.Optimizer
    steps: int
    weight: float = 1.0
    lower_weight: float = 1.0
    atol: float = 1.0
    initial_multiplier: float = 0.0
    _: dataclasses.KW_ONLY
    smoothing: float = 0.0
    start: str | Callable[[tf.Tensor], Any] = "warm"
    independent_starts: int | None = None
    optimizer_state: str = "carry"
    multiplier_state: str = "carry"
    schedule: PenaltySchedule = PenaltySchedule()

    def __post_init__(self) -> None:
        UpdateRule(self.lower_optimizer, "lower_optimizer")  # raises if unsupported
        _ = self.inner  # raises for invalid arguments
        require_choice(self.multiplier_state, "multiplier_state", ("carry", "reset"))
        if not isinstance(self.schedule, PenaltySchedule):
            raise ValueError(
                "`schedule` must be a tb.PenaltySchedule, such as "
                "tb.PenaltySchedule(growth=1.1). "
                f"Received: schedule={self.schedule!r}"
            )
        for name, holds, rule in (
            ("weight", positive, "above 0"),
            ("lower_weight", not_negative, "not negative"),
            ("atol", positive, "above 0"),
            ("initial_multiplier", lambda v: True, "of either sign"),
            ("smoothing", lambda v: 0 <= v < 1, "at least 0 and below 1"),
        ):
            require_number(getattr(self, name), name, holds, rule)
        if self.independent_starts is not None:
            require_count(self.independent_starts, "independent_starts")

    @functools.cached_property
    def inner(self) -> InnerSolver:
        """The solver that provides the start of y and the state of its steps."""
        return InnerSolver(
            self.lower_optimizer,
            self.steps,
            self.start,
            optimizer_state=self.optimizer_state,
        )

    @property
    def couples_tasks(self) -> bool:
        # All tasks share one schedule, which uses the mean over the tasks.
        return True

    def init(self, problem: Problem, upper: Nest, lower: Nest) -> State:
        if self.independent_starts is not None and problem.has_tasks:
            raise ValueError(
                "`independent_starts` must be None over tasks: the leading axis holds "
                "the tasks. Leave it out. Received: "
                f"independent_starts={self.independent_starts} and a problem over tasks"
            )
        upper, lower = structure.to_tensors((upper, lower))
        dtype = tf.nest.flatten(lower)[0].dtype
        count = self.independent_starts
        shape = [] if count is None else [count]
        for level, variables in (("upper", upper), ("lower", lower)):
            leaves = tf.nest.flatten(variables)
            for leaf, path in zip(
                leaves, structure.paths(variables, level), strict=True
            ):
                if count is not None and leaf.shape[:1] != [count]:
                    raise ValueError(
                        "`independent_starts` must be the leading axis of all "
                        "variables. Stack the starts along it. Received: "
                        f"independent_starts={count}, {path} of shape {leaf.shape}"
                    )

        def begun(value: float) -> tf.Tensor:
            return tf.fill(shape, tf.constant(value, dtype))

        def multiplier(y: tf.Tensor) -> tf.Tensor:
            return tf.fill(y.shape, tf.constant(self.initial_multiplier, y.dtype))

        return {
            "inner": self.inner.init(problem, upper, lower),
            "multiplier": tf.nest.map_structure(multiplier, lower),
            "weight": begun(self.weight),
            "lower_weight": begun(self.lower_weight),
            "tolerance": begun(self.atol),
            "rate_scale": begun(1.0),
            # There is no mean yet; infinity is never below the tolerance.
            "mean": begun(math.inf),
        }

    def step(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: State
    ) -> Step:
        here = problem.prepared(upper, batches)
        iterate = self.inner.begin(here, lower, state["inner"])

        def body(t: tf.Tensor, y: Nest, optimizer: Any) -> tuple:
            _, along = self._directions(here, y, t, state, mixed=False)
            moved, optimizer = self.inner.rule.update(along, optimizer, y)
            moved = structure.subtract(moved, y)
            moved = structure.add_scaled(y, state["rate_scale"], moved)
            return (
                t + 1,
                fixed_projection(problem, upper, moved, "AugmentedLagrangian"),
                optimizer,
            )

        _, lower, optimizer = serial_loop(
            lambda t, *_: t < self.steps,
            body,
            (tf.constant(0), iterate.lower, iterate.optimizer),
            self.steps,
        )
        end, along = self._directions(here, lower, self.steps, state)
        gradient = here.gradient(end.partial, end.mixed)
        upper = structure.to_tensors(upper)
        along_x, along_y = gradient, along
        if problem.project_upper is not None:
            along_x = _projected(problem.projected_upper, upper, gradient)
        if problem.project_lower is not None:
            along_y = _projected(
                lambda y: problem.projected_lower(upper, y), lower, along
            )
        size = self._dot(here, along_y, along_y)
        size += tf.cast(self._starts.dot(along_x, along_x), size.dtype)
        after, size = self._schedule(state, end.gradient, size)
        after["inner"] = self.inner.carried(
            iterate._replace(lower=lower, optimizer=optimizer), state["inner"]
        )
        norms = self._dot(here, end.gradient, end.gradient)
        terms = {
            "stationarity": tf.sqrt(norms),
            "penalty": 0.5 * state["weight"] * norms,
            "multiplier_term": self._dot(here, state["multiplier"], end.gradient),
            "kkt_residual": tf.sqrt(size),
            **{name: state[name] for name in FOLLOWING},
        }
        return Step(
            upper_gradient=gradient,
            lower=lower,
            state=after,
            metrics={
                "upper_loss": end.upper_loss,
                "lower_loss": end.lower_loss,
                **{name: tf.reduce_mean(term) for name, term in terms.items()},
            },
            upper_scale=state["rate_scale"],
        )

    def _directions(
        self, here: Prepared, lower: Nest, draw: Any, state: State, mixed: bool = True
    ) -> tuple["_Point", Any]:
        """All derivatives at a point (g_xy w only if `mixed`), and d_y."""
        upper_loss, partial, direct = here.upper_partials(lower)
        lower_loss, gradient, pullback = here.lower_gradient_pullback(lower, draw)
        vector = structure.add_scaled(state["multiplier"], state["weight"], gradient)
        product, curvature = pullback(vector, mixed=mixed)
        along = structure.add_scaled(direct, state["lower_weight"], gradient)
        point = _Point(upper_loss, lower_loss, gradient, partial, product)
        return point, structure.add(along, curvature)

    def _schedule(
        self, state: dict, gradient: Nest, size: tf.Tensor
    ) -> tuple[dict, tf.Tensor]:
        """The state after a step, and the value compared with the tolerance."""
        dtype = state["weight"].dtype
        smoothing = structure.scalar(self.smoothing, dtype)
        past = tf.where(
            tf.math.is_inf(state["mean"]), tf.zeros_like(smoothing), smoothing
        )
        mean = tf.math.multiply_no_nan(state["mean"], past) + (1 - past) * size
        near = mean < state["tolerance"] ** 2
        raised = structure.add_scaled(state["multiplier"], state["weight"], gradient)
        factors = dataclasses.astuple(self.schedule)
        after = {
            name: tf.where(near, structure.scalar(factor, dtype), 1) * state[name]
            for name, factor in zip(FOLLOWING, factors, strict=True)
        }
        if self.multiplier_state == "reset":
            raised = state["multiplier"]
        after["multiplier"] = structure.where(near, raised, state["multiplier"])
        # A new penalty defines a new problem, so the mean starts again.
        after["mean"] = tf.where(near, tf.constant(math.inf, dtype), mean)
        return after, mean

    @property
    def _starts(self) -> structure.InnerProduct:
        """The inner product of variables, one value per start."""
        return structure.InnerProduct(0 if self.independent_starts is None else 1)

    def _dot(self, here: Prepared, a: Nest, b: Nest) -> tf.Tensor:
        """The inner product of lower variables, one per start; over tasks, the mean."""
        if not here.problem.has_tasks:
            return self._starts.dot(a, b)
        return tf.reduce_mean(here.dot(a, b))

    def objective(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: State
    ) -> Callable[[Nest], tf.Tensor]:
        reached = self.step(problem, upper, lower, batches, state).lower

        def value(x: Nest) -> tf.Tensor:
            here = problem.prepared(x, batches)
            upper_loss = here.upper_loss(reached)
            _, gradient = here.lower_gradient(reached, self.steps)
            penalty = 0.5 * state["weight"] * self._dot(here, gradient, gradient)
            penalty += self._dot(here, state["multiplier"], gradient)
            return upper_loss + tf.cast(tf.reduce_sum(penalty), upper_loss.dtype)

        return value


class _Point(NamedTuple):
    """f, g, g_y, f_x (`None` where not connected) and g_xy w at a point."""

    upper_loss: tf.Tensor
    lower_loss: tf.Tensor
    gradient: Nest
    partial: Nest
    mixed: Nest


def _projected(project: Callable, point: Any, gradient: Nest) -> Nest:
    """The projected gradient z - P(z - d)."""
    return structure.subtract(point, project(structure.subtract(point, gradient)))
