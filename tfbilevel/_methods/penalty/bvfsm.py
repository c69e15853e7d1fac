"""A sequence of barriers or penalties for the lower value."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from keras.optimizers.schedules import LearningRateSchedule

from tfbilevel._calculus import derivatives, structure
from tfbilevel._calculus.aliases import Nest, State
from tfbilevel._calculus.loops import serial_loop
from tfbilevel._core.arguments import require_choice, require_count
from tfbilevel._core.batches import Batches
from tfbilevel._core.inner_solver import InnerSolver, require_inner
from tfbilevel._core.loss import TaskLoss, losses
from tfbilevel._core.method import Step
from tfbilevel._core.prepared import Prepared
from tfbilevel._core.problem import Problem
from tfbilevel._core.projection import fixed_projection
from tfbilevel._core.schedules import InversePower, Schedule, as_positive, as_weight
from tfbilevel._methods.moves_lower import MovesLower
from tfbilevel._methods.penalty.divergence import grown
from tfbilevel._methods.penalty.value_gap import require_warm, solved_copy
from tfbilevel._methods.penalty.value_penalties import BARRIERS, PENALTIES

Number = float | Schedule | LearningRateSchedule


class _Numbers(NamedTuple):
    """The schedules' values in one step, in the dtype of y."""

    relaxation: tf.Tensor
    slack: tf.Tensor
    auxiliary_ridge: tf.Tensor
    lower_ridge: tf.Tensor


class _Reached(NamedTuple):
    """The lower variables after their steps.

    Attributes:
        lower, auxiliary: y and z.
        outside: whether y was outside of the barrier at the end, so that it is z now.
        share: the share of y's points that were outside.
        sizes: the lengths of the first and of the last direction of y.
        optimizer, inner: the states of both optimizers.
    """

    lower: Any
    auxiliary: Any
    outside: tf.Tensor
    share: tf.Tensor
    sizes: tuple[tf.Tensor, tf.Tensor]
    optimizer: Any
    inner: Any


@dataclasses.dataclass(frozen=True, eq=False)
class BVFSM(MovesLower):
    r"""First-order barriers or penalties for the lower value, in sequence (BVFSM).

        v(x) = min_z  g(x, z) + (mu / 2) |z|^2
        phi(x) = min_y  f(x, y) + P( g(x, y) - v(x) - s ) + (theta / 2) |y|^2

    One outer step makes T_z steps of z and T_y of y on these two problems, from where
    the last step ended, and returns the gradient of phi at them:

        d_x = f_x(x, y) + P'(q) ( g_x(x, y) - g_x(x, z) ),
        q = g(x, y) - g(x, z) - (mu / 2) |z|^2 - s

    with one of the penalties

        "log":        P(q) = -sigma log(-q)         a barrier: q < 0
        "inverse":    P(q) = -sigma / q             a barrier: q < 0
        "quadratic":  P(q) = max(q, 0)^2 / (2 sigma)

    ("log" is that of the paper of 2021; that of 2023 truncates it far from q = 0.)
    sigma, s, mu and theta go to 0 with the outer steps, and phi to f(x, y*(x)), for y*
    the best for f of all lower solutions (optimistic). g need not be convex.

    A barrier must not be left, and whether q < 0 is tested at every point, on the batch
    of that step. From a y outside, also at the start, the step goes half of the way to
    z instead, and a y that is outside at the end is replaced by z. z is always inside.
    (The paper assumes a y inside; its code moves the barrier with y instead.) Begin
    with a wide barrier, s as large as g varies: y is inside then, and goes to the best
    of several minima before the barrier becomes narrow.

    Cost: T_z + T_y + 2 lower gradients, T_y + 1 upper ones and T_y + 1 values of g; no
    second derivatives. Memory: one more copy of y. The curvature of the barrier near
    its boundary is about |f_y|^2 / sigma, so the rate of y must fall with sigma. P is
    not linear, so steps of minibatches are biased. Prefer `ValueGap` or `BOME` if g is
    convex: they need no schedules of four numbers. Prefer `Implicit` where second
    derivatives are affordable.

    Slices of a stacked lower batch: those of z's steps, of y's steps, one for d_x
    (`tb.pair(..., lower_batches=method.draws)`); with fewer they repeat.

    The metrics hold `gap` (g(x, y) - g(x, z)), `weight` (P'(q)), `infeasible` (the
    share of the T_y + 1 points that were outside) and `diverged`: 1 if y was outside
    at the end; for "quadratic", 1 if the last direction of y is ten times as long as
    the first of all.

    Args:
        inner: the solver of z, with T_z steps; its `start` must be "warm".
        lower_optimizer: a Keras optimizer for y.
        steps: T_y, at least 1.
        penalty: P: "log", "inverse" or "quadratic".
        relaxation: sigma, positive: a number or a schedule of the outer step.
        slack: s, positive for a barrier, likewise. (mu_2 in the paper of 2021,
            sigma^(2) in that of 2023, which has none for "quadratic".)
        auxiliary_ridge: mu, not negative, likewise.
        lower_ridge: theta, not negative, likewise.

    Raises:
        ValueError: for an unsupported optimizer or choice, a number out of its range,
            or an `inner` that does not start "warm".

    Example:
        >>> problem = tb.Problem(
        ...     upper_loss=lambda x, y, batch: 0.5 * (y - 1.0) ** 2 + 0.5 * x**2,
        ...     lower_loss=lambda x, y, batch: 0.5 * (y - x) ** 2,
        ... )
        >>> inner = tb.InnerSolver(keras.optimizers.SGD(0.5), steps=10)
        >>> method = tb.BVFSM(inner, keras.optimizers.SGD(0.02), steps=10,
        ...     relaxation=0.05, slack=tb.Geometric(10.0, 0.99))
        >>> result = tb.minimize(problem, method, tf.constant(3.0), tf.constant(0.0),
        ...     keras.optimizers.SGD(0.05), tb.Batches(None, None), steps=800)
        >>> round(float(result.upper), 1), round(float(result.lower), 1)
        (0.5, 0.5)

    References:
        Liu, Liu, Yuan, Zeng, Zhang (2021), A value-function-based interior-point method
        for non-convex bi-level optimization. arXiv:2106.07991. Liu, Liu, Zeng, Zhang,
        Zhang (2023), Value-function-based sequential minimization for bi-level
        optimization. arXiv:2110.04974.
    """

    inner: InnerSolver
    lower_optimizer: keras.optimizers.Optimizer
    steps: int
    _: dataclasses.KW_ONLY
    penalty: str = "log"
    relaxation: Number = InversePower(0.1, 0.5)
    slack: Number = InversePower(1.0, 0.5)
    auxiliary_ridge: Number = InversePower(0.01, 1.0)
    lower_ridge: Number = InversePower(0.01, 1.0)

    def __post_init__(self) -> None:
        _ = self.rule  # raises if the optimizer is not supported
        require_inner(self.inner)
        require_warm(self.inner)
        require_count(self.steps, "steps")
        require_choice(self.penalty, "penalty", tuple(PENALTIES))
        _ = self.schedules  # raises for invalid numbers

    @functools.cached_property
    def schedules(self) -> tuple[Schedule, ...]:
        """sigma, s, mu and theta at every outer step."""
        slack = as_weight(self.slack, "slack")
        if self.is_barrier:
            why = "a barrier needs room for y around z"
            slack = as_positive(self.slack, "slack", why)
        return (
            as_positive(self.relaxation, "relaxation", "the penalty is scaled by it"),
            slack,
            as_weight(self.auxiliary_ridge, "auxiliary_ridge"),
            as_weight(self.lower_ridge, "lower_ridge"),
        )

    @property
    def is_barrier(self) -> bool:
        """Whether the penalty is infinite outside."""
        return self.penalty in BARRIERS

    @property
    def draws(self) -> int:
        """The number of lower batches that one step uses."""
        return self.inner.steps + self.steps + 1

    @property
    def takes_second_derivatives(self) -> bool:
        return False

    @property
    def lower_steps(self) -> int:
        return self.steps

    @property
    def mean_metrics(self) -> tuple[str, ...]:
        return (*super().mean_metrics, "gap")

    def init(self, problem: Problem, upper: Nest, lower: Nest) -> State:
        lengths = problem.inner_product.norm(structure.to_tensors(lower))
        return {
            "step": tf.constant(0, tf.int64),
            "optimizer": self.rule.init(lower),
            "inner": self.inner.init(problem, upper, lower),
            "auxiliary": structure.copied(lower),
            "first": tf.zeros_like(lengths),
        }

    def step(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: State
    ) -> Step:
        here = problem.prepared(upper, batches)
        numbers = self._numbers(state, lower)
        made = self._reached(here, lower, state, numbers)
        y, z, draw = made.lower, made.auxiliary, self.draws - 1
        seen: dict[str, Any] = {}

        def function(a: Nest, b: Nest) -> tf.Tensor:
            total, gap = self._function(here.at(a), here.at(b), y, z, draw, numbers)
            seen["gap"] = gap
            return tf.reduce_sum(total)

        _, (partial, response) = derivatives.value_and_partials(
            function, here.upper, here.upper
        )
        metrics, first = grown(made.sizes, state)
        if self.is_barrier:
            metrics = {"diverged": tf.cast(made.outside, first.dtype)}
        lower_losses = [here.lower_loss(each, draw) for each in (y, z)]
        return Step(
            upper_gradient=here.gradient(partial, response),
            lower=fixed_projection(problem, upper, y, "BVFSM"),
            state={
                "step": state["step"] + 1,
                "optimizer": made.optimizer,
                "inner": made.inner,
                "auxiliary": z,
                "first": first,
            },
            metrics={
                "upper_loss": here.upper_loss(y),
                "lower_loss": lower_losses[0],
                "gap": lower_losses[0] - lower_losses[1],
                "weight": PENALTIES[self.penalty].slope(
                    seen["gap"], numbers.relaxation
                ),
                "infeasible": made.share,
                **metrics,
            },
        )

    def objective(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: State
    ) -> Callable[[Nest], tf.Tensor]:
        at, numbers = problem.prepared(upper, batches), self._numbers(state, lower)
        y, z, *_ = self._reached(at, lower, state, numbers)
        draw = self.draws - 1

        def value(x: Nest) -> tf.Tensor:
            here = problem.prepared(x, batches)
            total, _ = self._function(here, here, y, z, draw, numbers)
            return here.mean(tf.reduce_sum(total))

        return value

    def _numbers(self, state: State, lower: Nest) -> _Numbers:
        dtype = structure.to_tensors(tf.nest.flatten(lower)[0]).dtype
        values = [schedule(state["step"]) for schedule in self.schedules]
        return _Numbers(*(tf.cast(value, dtype) for value in values))

    def _function(
        self,
        at_f: Prepared,
        at_g: Prepared,
        y: Nest,
        z: Nest,
        draw: Any,
        numbers: _Numbers,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """f + P(q) and q; over tasks, one value per task.

        Where y is outside of a barrier, P is left out, and has no derivative.

        Args:
            at_f, at_g: the problem at the upper variables of f, and at those of g.
            y, z: the lower variables and their second copy.
            draw: the number of the lower batch.
            numbers: those of this step.
        """
        dtype = numbers.slack.dtype
        f = tf.cast(at_f.upper_losses(y), dtype)
        gap = at_g.lower_losses(y, draw) - at_g.lower_losses(z, draw)
        ridge = tf.cast(at_g.dot(z, z), dtype)
        gap = tf.cast(gap, dtype) - numbers.slack
        gap -= 0.5 * numbers.auxiliary_ridge * ridge
        value = PENALTIES[self.penalty].value
        if not self.is_barrier:
            return f + value(gap, numbers.relaxation), gap
        inside = gap < 0
        safe = tf.where(inside, gap, -1)
        barrier = value(safe, numbers.relaxation)
        return f + tf.where(inside, barrier, tf.zeros_like(barrier)), gap

    def _reached(
        self, here: Prepared, lower: Nest, state: State, numbers: _Numbers
    ) -> _Reached:
        """y and z after their steps."""
        ridged = _with_ridge(here, numbers.auxiliary_ridge)
        z, inner = solved_copy(self.inner, ridged, state)
        lower, first = structure.to_tensors(lower), self.inner.steps

        def outside_at(gap: tf.Tensor) -> tf.Tensor:
            # Not gap >= 0: what is not a number is not inside.
            inside = gap < 0 if self.is_barrier else tf.ones_like(gap, tf.bool)
            return tf.logical_not(inside)

        def body(t: tf.Tensor, y: Any, optimizer: Any, *counts: Any) -> tuple:
            begun, _, count = counts
            seen: dict[str, Any] = {}

            def function(y: Nest) -> tf.Tensor:
                total, gap = self._function(here, here, y, z, first + t, numbers)
                seen["outside"] = outside_at(gap)
                ridge = tf.cast(here.dot(y, y), total.dtype)
                return tf.reduce_sum(total + 0.5 * numbers.lower_ridge * ridge)

            _, (along,) = derivatives.value_and_partials(function, y)
            along = derivatives.require_connected(
                along, y, "lower", "the penalised loss"
            )
            outside, size = seen["outside"], here.norm(along)
            moved, after = self.rule.update(along, optimizer, y)
            halfway = structure.add_scaled(y, 0.5, structure.subtract(z, y))
            moved = here.where(outside, halfway, moved)
            moved = here.problem.projected_lower(here.upper, moved)
            return (
                t + 1,
                moved,
                after._replace(slots=here.where(outside, optimizer.slots, after.slots)),
                tf.where(t == 0, size, begun),
                size,
                count + tf.cast(outside, size.dtype),
            )

        none = tf.zeros_like(here.norm(lower))
        _, y, optimizer, *sizes, count = serial_loop(
            lambda t, *_: t < self.steps,
            body,
            (tf.constant(0), lower, state["optimizer"], none, none, none),
            self.steps,
        )
        _, gap = self._function(here, here, y, z, self.draws - 1, numbers)
        outside = outside_at(gap)
        count += tf.cast(outside, none.dtype)
        return _Reached(
            lower=here.where(outside, z, y),
            auxiliary=z,
            outside=outside,
            share=count / (self.steps + 1),
            sizes=tuple(sizes),
            optimizer=optimizer,
            inner=inner,
        )


def _with_ridge(here: Prepared, weight: tf.Tensor) -> Prepared:
    """The problem with (weight / 2) |y|^2 in its lower loss."""
    loss, dot = here.problem.lower_loss, here.problem.inner_product.dot

    def ridged(c: Nest, y: Nest, batch: Any) -> tf.Tensor:
        value = tf.convert_to_tensor(losses(loss)(c, y, batch))
        return value + tf.cast(0.5 * weight * dot(y, y), value.dtype)

    made: Any = ridged
    if isinstance(loss, TaskLoss):
        made = dataclasses.replace(loss, each=ridged)
    problem = dataclasses.replace(here.problem, lower_loss=made)
    return dataclasses.replace(here, problem=problem)
