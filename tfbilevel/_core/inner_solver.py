"""The inner solver: a number of optimizer steps on the lower loss."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from keras.optimizers.schedules import LearningRateSchedule

from tfbilevel._calculus import derivatives, structure
from tfbilevel._calculus.aliases import Nest
from tfbilevel._calculus.loops import serial_loop
from tfbilevel._core.arguments import require_choice, require_count
from tfbilevel._core.former_arguments import of_former, renamed
from tfbilevel._core.inner_hyperparameters import named_options, updated
from tfbilevel._core.inner_rates import is_function, require_rates
from tfbilevel._core.inner_trajectory import trajectory
from tfbilevel._core.prepared import Prepared
from tfbilevel._core.problem import Problem
from tfbilevel._core.schedules import (
    Schedule,
    as_schedule,
    is_schedule,
    require_tolerance,
)
from tfbilevel._optimizers import nesterov
from tfbilevel._optimizers.update_rule import OptimizerState, UpdateRule


class Iterate(NamedTuple):
    """A point of an inner loop: lower variables and optimizer state."""

    lower: Nest
    optimizer: OptimizerState


@renamed({"tolerance": "atol"}, split={"learning_rate": ("learned_rate", is_function)})
@dataclasses.dataclass(frozen=True, eq=False)
class InnerSolver:
    r"""Approximates the lower solution y*(x) by steps of an optimizer.

        y_0 = start,      y_{t+1} = P( y_t - update( g_y(x, y_t) ) ),   t < steps

    P is `problem.project_lower`. One step costs one gradient of the lower loss.

    `accelerated` uses Nesterov's sequence for convex lower losses (FISTA). The gradient
    is taken at a point u_t ahead of y_t, and the update starts there,

        y_{t+1} = P( u_t - update( g_y(x, u_t) ) ),    u_0 = y_0,    s_0 = 1
        s_{t+1} = (1 + sqrt(1 + 4 s_t^2)) / 2
        u_{t+1} = y_{t+1} + (s_t - 1) / s_{t+1} * (y_{t+1} - y_t)

    with an error of O(1/T^2) instead of O(1/T). Momentum with a constant factor is an
    option of the optimizer: keras.optimizers.SGD(rate, momentum=0.9, nesterov=True).

    Args:
        optimizer: a Keras optimizer that `tb.differentiable` supports, or its name.
        steps: number of steps, at least 1.
        start: the start of each outer step's solve. "warm": the current lower
            variables. "cold": `problem.lower_start(x)` or, without one, the lower
            variables that the method was initialised with. A function of the outer
            step (int64 scalar) -> lower variables (over tasks, those of all tasks),
            such as a sample of `tf.random.stateless_uniform`. A problem with a
            `lower_start` always uses that instead (except in `tb.ValueGap`, whose
            `auxiliary` sets the start).
        learning_rate: a schedule of the outer step, such as tb.CosineDecay(0.1, 0.01,
            1000). `None`: the optimizer's own rate; if that is a Keras schedule, it
            counts inner steps.
        optimizer_state: "reset": momentum and moments start at zero at every outer
            step. "carry": they continue from the last outer step.
        accelerated: whether to use Nesterov's extrapolations.
        atol: stop before `steps` once |g_y| (Euclidean, absolute) is at most
            this; a number, or a schedule of the outer step such as
            tb.Geometric(0.1, 0.9). Only for methods that do not unroll the steps.
        learned_rate: x -> scalar, the rate as a function of the upper variables; or
            x -> rates shaped like the lower variables, or that broadcast to them: one
            per entry (Meta-SGD), or one per layer. (x, t) -> either, t the number of
            updates since the optimizer's start, int64 (tf.cast it before it is
            multiplied with x): a learned schedule.
        hyperparameters: x -> {name: scalar}, options of the optimizer as functions of
            the upper variables, such as lambda x: {"momentum": tf.sigmoid(x)}: any
            option that is a number ("learning_rate", "momentum", "weight_decay",
            "beta_1", ...; not Lion's betas, whose derivative is zero). The others stay
            as the optimizer has them. A lower solution does not depend on them, so
            `tb.Implicit` raises `tb.UnconnectedGradientError`: unroll the steps.

    Raises:
        ValueError: for an unsupported optimizer, `steps` below 1, an unknown `start`
            or `optimizer_state`, a `learning_rate` that is not a schedule, a
            `learned_rate` that is not a function, more than one of these two and a
            schedule on the optimizer, or a negative `atol`; at the first step for
            learned rates that do not fit the lower variables, rates of single
            entries with Ftrl, or `hyperparameters` that the optimizer does not have.

    Example:
        >>> inner = tb.InnerSolver(keras.optimizers.SGD(0.5), steps=20)
        >>> problem = tb.Problem(
        ...     upper_loss=lambda x, y, batch: y**2,
        ...     lower_loss=lambda x, y, batch: 0.5 * (y - x) ** 2,
        ... )
        >>> x, y = tf.constant(3.0), tf.constant(0.0)
        >>> here = problem.prepared(x, tb.Batches(None, None))
        >>> y, state, loss = inner.solve(here, y, inner.init(problem, x, y))
        >>> round(float(y), 4)
        3.0
    """

    optimizer: keras.optimizers.Optimizer | str
    steps: int
    start: str | Callable[[tf.Tensor], Any] = "warm"
    learning_rate: Schedule | LearningRateSchedule | None = None
    optimizer_state: str = "reset"
    accelerated: bool = False
    atol: float | Schedule | LearningRateSchedule | None = None
    learned_rate: Callable[[Nest], Nest] | None = None
    hyperparameters: Callable[[Nest], dict[str, Any]] | None = None

    def __post_init__(self) -> None:
        # If it was given by name, the rule has created it.
        object.__setattr__(self, "optimizer", self.rule.optimizer)
        require_count(self.steps, "steps")
        if not callable(self.start):
            require_choice(self.start, "start", ("warm", "cold"))
        require_choice(self.optimizer_state, "optimizer_state", ("reset", "carry"))
        if self.atol is not None:
            require_tolerance(self.atol, "atol")
        require_rates(self)

    @functools.cached_property
    def rule(self) -> UpdateRule:
        """The update of `optimizer`, whose rate is read only once."""
        return UpdateRule(self.optimizer, learns=self.hyperparameters is not None)

    @property
    def has_constant_rate(self) -> bool:
        """Whether all steps of all outer steps use one number, the optimizer's rate."""
        changes = (self.learning_rate, self.learned_rate, self.hyperparameters)
        return not (self.rule.scheduled or any(one is not None for one in changes))

    def init(self, problem: Problem, upper: Nest, lower: Nest) -> dict[str, Any]:
        """The state that the solver carries between outer steps."""
        state: dict[str, Any] = {}
        if self.hyperparameters is not None:
            named_options(self, problem, upper)  # raises for wrong ones
        # The rule creates its templates now: creating them while a function is traced
        # would make TensorFlow trace it a second time.
        fresh = self.fresh(problem, lower)
        followed = (self.atol, self.learning_rate)
        if callable(self.start) or any(map(is_schedule, followed)):
            state["step"] = tf.constant(0, tf.int64)
        if self.start == "cold" and problem.lower_start is None:
            state["start"] = structure.copied(lower)
        if self.optimizer_state == "carry":
            state["optimizer"] = fresh
        return state

    def begin(self, here: Prepared, lower: Nest, state: dict) -> Iterate:
        """The iterate at which this outer step starts."""
        problem = here.problem
        if problem.lower_start is not None:
            start = problem._started(here.upper, structure.to_tensors(lower))
        elif callable(self.start):
            start = problem._sampled(self.start, state["step"], lower)
        else:
            start = structure.to_tensors(state.get("start", lower))
        if "optimizer" in state:
            optimizer = state["optimizer"]
        else:
            optimizer = self.fresh(problem, start)
        if self.learning_rate is not None:
            rate = as_schedule(self.learning_rate, "learning_rate")(state["step"])
            rate = tf.cast(rate, optimizer.learning_rate.dtype)
            optimizer = optimizer._replace(learning_rate=rate)
        return Iterate(start, optimizer)

    def begin_pullback(
        self, here: Prepared, lower: Nest, state: dict
    ) -> tuple[Iterate, derivatives.Pullback | None]:
        """`begin`, and the pullback of y_0 to x if the problem has a `lower_start`."""
        if here.problem.lower_start is None:
            return self.begin(here, lower, state), None

        def start(c: Nest) -> tuple[Any, Iterate]:
            iterate = self.begin(here.at(c), lower, state)
            return iterate.lower, iterate

        _, iterate, pullback = derivatives.vjp(start, here.upper)
        return iterate, pullback

    def fresh(self, problem: Problem, lower: Nest) -> OptimizerState:
        """The optimizer's state before the first step."""
        state = self.rule.init(lower)
        # If tasks stop at different steps, each has its own step count.
        tasks = tf.TensorShape([])
        if self.atol is not None:
            tasks = problem.inner_product.shape(structure.to_tensors(lower))
        if tasks.rank:
            state = self.rule.counted(state, int(tasks[0] or 0))
        return nesterov.begun(state, lower, tasks) if self.accelerated else state

    def point(self, iterate: Iterate) -> Nest:
        """The point of the next gradient: y_t, or u_t with acceleration."""
        if not self.accelerated:
            return iterate.lower
        ahead = nesterov.split(iterate.optimizer, iterate.lower).ahead
        return structure.add(iterate.lower, ahead)

    def gradient(
        self, here: Prepared, iterate: Iterate, t: Any
    ) -> tuple[tf.Tensor, Nest]:
        """The lower loss and its gradient in step t."""
        return here.lower_gradient(self.point(iterate), t)

    def move(self, here: Prepared, iterate: Iterate, gradient: Nest) -> Iterate:
        """The iterate after a step along `gradient`."""
        point, own, sequence = self.point(iterate), iterate.optimizer, None
        if self.accelerated:
            own, _, sequence = nesterov.split(own, iterate.lower)
        lower, state = updated(self, here, gradient, own, point)
        lower = here.problem.projected_lower(here.upper, lower)
        if sequence is not None:
            state = nesterov.extrapolated(state, sequence, iterate.lower, lower)
        return Iterate(lower, state)

    def advance(
        self, here: Prepared, iterate: Iterate, t: Any, first_order: bool = False
    ) -> tuple[Iterate, tf.Tensor]:
        """One inner step; returns also the lower loss before it.

        With `first_order` the gradient is treated as a constant.
        """
        value, gradient = self.gradient(here, iterate, t)
        if first_order:
            gradient = tf.nest.map_structure(tf.stop_gradient, gradient)
        return self.move(here, iterate, gradient), value

    def run(
        self,
        here: Prepared,
        iterate: Iterate,
        first: Any,
        last: Any,
        most: int,
        first_order: bool = False,
    ) -> tuple[Iterate, tf.Tensor]:
        """Makes the steps first, ..., last - 1, at most `most` (a Python integer).

        `last` may have one entry per task, at which that task stops.
        """
        dtype = tf.nest.flatten(iterate.lower)[0].dtype
        value = tf.zeros([], dtype)
        if most == 0:
            return iterate, value
        if most == 1 and isinstance(last, int) and (first, last) == (0, 1):
            # A loop with one step would delay the operations that follow it.
            iterate, value = self.advance(here, iterate, 0, first_order)
            return iterate, tf.cast(value, dtype)

        def body(t: tf.Tensor, now: Iterate, value: tf.Tensor) -> tuple:
            del value
            after, value = self.advance(here, now, t, first_order)
            after = structure.stepped(t < last, now, after)
            return t + 1, after, tf.cast(value, dtype)

        _, iterate, value = serial_loop(
            lambda t, *_: tf.reduce_any(t < last),
            body,
            (tf.convert_to_tensor(first), iterate, value),
            most,
        )
        return iterate, value

    def solve(
        self, here: Prepared, lower: Nest, state: dict, *former: Any
    ) -> tuple[Any, dict, tf.Tensor]:
        """All inner steps, without derivatives.

        Args:
            here: the problem of this outer step, `problem.prepared(upper, batches)`.
            lower: the lower variables before the solve.
            state: the solver's state, initially `init(problem, upper, lower)`.
            *former: for `solve(problem, upper, lower, batches, state)`, deprecated.

        Returns:
            The lower variables, the solver's state, and the lower loss before the
            last step (over tasks, the mean).
        """
        if former:
            here, lower, state = of_former(here, lower, state, *former)
        iterate, value = self.settle(here, lower, state)
        return iterate.lower, self.carried(iterate, state), value

    def settle(
        self, here: Prepared, lower: Nest, state: dict
    ) -> tuple[Iterate, tf.Tensor]:
        """`steps` steps, fewer if the tolerance is met, without derivatives."""
        iterate = self.begin(here, lower, state)
        if self.atol is None:
            return self.run(here, iterate, 0, self.steps, self.steps)
        dtype = tf.nest.flatten(iterate.lower)[0].dtype
        if is_schedule(self.atol):
            goal = tf.cast(as_schedule(self.atol, "atol")(state["step"]), dtype)
        else:
            goal = structure.scalar(self.atol, dtype)

        def body(t: tf.Tensor, now: Iterate, value: tf.Tensor, size: Any) -> tuple:
            del value
            value, gradient = self.gradient(here, now, t)
            after = self.move(here, now, gradient), here.norm(gradient)
            # Tasks that have ended ignore this step, which may even diverge.
            after, size = structure.stepped(size > goal, (now, size), after)
            return t + 1, after, tf.cast(value, dtype), size

        # The first gradient is not known yet, so its norm starts at infinity.
        unknown = here.problem.inner_product.shape(iterate.lower)
        _, iterate, value, _ = serial_loop(
            lambda t, now, value, size: tf.reduce_any(size > goal),
            body,
            (
                tf.constant(0),
                iterate,
                tf.zeros([], dtype),
                tf.fill(unknown, tf.constant(float("inf"), dtype)),
            ),
            self.steps,
        )
        return iterate, value

    def carried(self, iterate: Iterate, state: dict) -> dict:
        """The state for the next outer step, after a loop that ended at `iterate`."""
        after = dict(state)
        if "optimizer" in state:
            after["optimizer"] = iterate.optimizer
        if "step" in state:
            after["step"] = state["step"] + 1
        return after

    def trajectory(
        self,
        here: Prepared,
        lower: Nest,
        state: dict,
        of: Callable[[Nest], Nest] | None = None,
    ) -> Any:
        """The iterates y_1, ..., y_T of `solve`, T = `steps`.

        For inspection: how the loss or an accuracy develops over the inner steps, which
        step is best, where the steps diverge. Methods do not need it. Cost: T
        gradients, as for `solve`, and memory for T copies of what is recorded.

        Args:
            here: the problem of this outer step, `problem.prepared(upper, batches)`.
            lower: the lower variables before the solve.
            state: the solver's state, initially `init(problem, upper, lower)`. It is
                not changed.
            of: lower variables -> what to record for every iterate, such as an
                accuracy; `None`: the variables.

        Returns:
            What was recorded, with a leading axis of T entries; the last one belongs
            to the result of `solve`.

        Raises:
            ValueError: if the solver has an `atol`, whose steps may be fewer.

        Example:
            >>> inner = tb.InnerSolver(keras.optimizers.SGD(0.5), steps=3)
            >>> problem = tb.Problem(
            ...     upper_loss=lambda x, y, batch: y**2,
            ...     lower_loss=lambda x, y, batch: 0.5 * (y - x) ** 2,
            ... )
            >>> x, y = tf.constant(8.0), tf.constant(0.0)
            >>> state = inner.init(problem, x, y)
            >>> here = problem.prepared(x, tb.Batches(None, None))
            >>> inner.trajectory(here, y, state).numpy()
            array([4., 6., 7.], dtype=float32)
        """
        return trajectory(self, here, lower, state, of)


def require_inner(inner: Any) -> None:
    """Raise unless `inner` is an inner solver."""
    if not isinstance(inner, InnerSolver):
        raise ValueError(
            "`inner` must be a tb.InnerSolver, such as "
            "tb.InnerSolver(keras.optimizers.SGD(0.1), steps=20). "
            f"Received: inner={inner!r}"
        )


def require_fixed_length(inner: InnerSolver, method: str) -> None:
    """Raise if the inner solver may stop early; unrolling needs a fixed length."""
    if inner.atol is not None:
        raise ValueError(
            f"`inner.atol` must be None for tb.{method}: the steps it "
            "differentiates must not depend on the variables. Leave it out, or use "
            f"tb.Implicit. Received: atol={inner.atol!r}"
        )
