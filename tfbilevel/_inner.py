"""The inner solver: a number of optimizer steps on the lower loss."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tfbilevel import _derivatives as derivatives
from tfbilevel import _structure as structure
from tfbilevel._arguments import require_choice, require_count
from tfbilevel._differentiable import OptimizerState, differentiable
from tfbilevel._inner_trajectory import trajectory
from tfbilevel._problem import Batches, Prepared, Problem
from tfbilevel._schedules import Schedule, require_tolerance

# TensorFlow would start ten iterations of a loop before the first one's results are
# used, and keep what they all computed: many times the memory for no speed.
SERIAL = 1


class Iterate(NamedTuple):
    """A point of an inner loop: lower variables and optimizer state."""

    lower: Any
    optimizer: OptimizerState


@dataclasses.dataclass(frozen=True, eq=False)
class InnerSolver:
    r"""Approximates the lower solution y*(x) by steps of an optimizer.

        y_0 = start,      y_{t+1} = P( y_t - update( g_y(x, y_t) ) ),   t < steps

    P is `problem.project_lower`. One step costs one gradient of the lower loss.

    `accelerated` is Nesterov's sequence for convex lower losses (FISTA): the gradient
    is taken, and the update made, at a point u_t ahead of y_t,

        y_{t+1} = P( u_t - update( g_y(x, u_t) ) ),    u_0 = y_0,    s_0 = 1
        s_{t+1} = (1 + sqrt(1 + 4 s_t^2)) / 2
        u_{t+1} = y_{t+1} + (s_t - 1) / s_{t+1} * (y_{t+1} - y_t)

    at an error O(1/T^2) instead of O(1/T). Momentum with a constant factor is an
    option of the optimizer: keras.optimizers.SGD(rate, momentum=0.9, nesterov=True).

    Args:
        optimizer: a Keras optimizer that `tb.differentiable` supports, or its name.
        steps: number of steps, at least 1.
        start: where each outer step starts. "warm": at the current lower variables.
            "cold": at `problem.lower_start(x)` or, without one, at the lower
            variables that the method was initialised with. A function of the outer
            step (int64 scalar) -> lower variables, over tasks those of all of them: at
            what it returns, say a fresh draw of `tf.random.stateless_uniform`. A
            problem with a `lower_start` always starts there (but for `tb.ValueGap`,
            whose `auxiliary` decides).
        learning_rate: a schedule of the outer step, such as tb.CosineDecay(0.1, 0.01,
            1000); or x -> scalar, the rate as a function of the upper variables
            where it is to be learned; or x -> rates like the lower variables, or that
            broadcast to them: one per entry (Meta-SGD), or one per layer. `None`: the
            optimizer's own.
        optimizer_state: "reset": momentum and moments start at zero at every outer
            step. "carry": they go on from the last one.
        accelerated: Nesterov's sequence of extrapolations.
        tolerance: stop before `steps` once |g_y| (Euclidean, absolute) is at most
            this; a number, or a schedule of the outer step such as
            tb.Geometric(0.1, 0.9). Only for methods that do not unroll the steps.

    Raises:
        ValueError: for an unsupported optimizer, `steps` below 1, an unknown `start`
            or `optimizer_state`, a `learning_rate` that is not callable or is Keras's
            schedule, or a negative `tolerance`; at the first step for rates that do
            not fit the lower variables, or of single entries with Ftrl.

    Example:
        >>> inner = tb.InnerSolver(keras.optimizers.SGD(0.5), steps=20)
        >>> problem = tb.Problem(
        ...     upper_loss=lambda x, y, batch: y**2,
        ...     lower_loss=lambda x, y, batch: 0.5 * (y - x) ** 2,
        ... )
        >>> x, y = tf.constant(3.0), tf.constant(0.0)
        >>> y, _, _ = inner.solve(problem, x, y, tb.Batches(None, None), inner.init(
        ...     problem, x, y))
        >>> round(float(y), 4)
        3.0
    """

    optimizer: keras.optimizers.Optimizer | str
    steps: int
    start: str | Callable[[tf.Tensor], Any] = "warm"
    learning_rate: Schedule | Callable[[Any], tf.Tensor] | None = None
    optimizer_state: str = "reset"
    accelerated: bool = False
    tolerance: float | Schedule | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rule", differentiable(self.optimizer))
        # Given by name, it is the rule's.
        object.__setattr__(self, "optimizer", self.rule.optimizer)
        require_count(self.steps, "steps")
        if not callable(self.start):
            require_choice(self.start, "start", ("warm", "cold"))
        require_choice(self.optimizer_state, "optimizer_state", ("reset", "carry"))
        if self.tolerance is not None:
            require_tolerance(self.tolerance)
        if self.learning_rate is not None:
            if not callable(self.learning_rate):
                raise ValueError(
                    "`learning_rate` must be a function of the upper variables or a "
                    "schedule of the outer step. Set a constant rate on the "
                    "optimizer instead; one rate per inner step too: "
                    "keras.optimizers.schedules.PiecewiseConstantDecay. Received: "
                    f"learning_rate={self.learning_rate!r}"
                )
            if isinstance(
                self.learning_rate, keras.optimizers.schedules.LearningRateSchedule
            ):
                raise ValueError(
                    "`learning_rate` must not be a Keras schedule: it would be called "
                    "with the upper variables. Use a schedule of the outer step, such "
                    "as tb.CosineDecay, or give the optimizer Keras's, which counts "
                    "inner steps. "
                    f"Received: learning_rate={self.learning_rate!r}"
                )
            if self.rule.scheduled:
                raise ValueError(
                    "`learning_rate` and a LearningRateSchedule exclude each other. "
                    "Give the optimizer a number. Received: "
                    f"optimizer={self.optimizer!r}"
                )

    def init(self, problem: Problem, upper: Any, lower: Any) -> dict[str, Any]:
        """What the solver carries over outer steps."""
        state: dict[str, Any] = {}
        # The rule makes its templates here: made while a function is traced, they
        # would have TensorFlow trace it a second time.
        fresh = self._fresh(problem, lower)
        followed = (self.tolerance, self.learning_rate)
        if callable(self.start) or any(isinstance(one, Schedule) for one in followed):
            state["step"] = tf.constant(0, tf.int64)
        if self.start == "cold" and problem.lower_start is None:
            state["start"] = structure.copied(lower)
        if self.optimizer_state == "carry":
            state["optimizer"] = fresh
        return state

    def begin(self, problem: Problem, upper: Any, lower: Any, state: dict) -> Iterate:
        """The iterate that this outer step starts from."""
        if problem.lower_start is not None:
            start = problem.started(upper, structure.to_tensors(lower))
        elif callable(self.start):
            start = self.drawn(state["step"], lower)
        else:
            start = structure.to_tensors(state.get("start", lower))
        if "optimizer" in state:
            optimizer = state["optimizer"]
        else:
            optimizer = self._fresh(problem, start)
        if isinstance(self.learning_rate, Schedule):
            rate = tf.cast(
                self.learning_rate(state["step"]), optimizer.learning_rate.dtype
            )
            optimizer = optimizer._replace(learning_rate=rate)
        return Iterate(start, optimizer)

    def drawn(self, step: tf.Tensor, lower: Any) -> Any:
        """What `start`, a function, returns."""
        assert callable(self.start)
        start = structure.to_tensors(self.start(step))
        rule = "return variables like the lower ones"
        structure.require_like(start, structure.to_tensors(lower), "start", rule)
        return start

    def begin_pullback(
        self, here: Prepared, lower: Any, state: dict
    ) -> tuple[Iterate, derivatives.Pullback | None]:
        """`begin`, and the pullback of y_0 to x where the problem has a start."""
        if here.problem.lower_start is None:
            return self.begin(here.problem, here.upper, lower, state), None

        def start(c: Any) -> tuple[Any, Iterate]:
            iterate = self.begin(here.problem, c, lower, state)
            return iterate.lower, iterate

        _, iterate, pullback = derivatives.vjp(start, here.upper)
        return iterate, pullback

    def point(self, iterate: Iterate) -> Any:
        """Where the next gradient is taken: y_t, or u_t of the accelerated steps."""
        if not self.accelerated:
            return iterate.lower
        _, ahead, _ = self._split(iterate)
        return structure.add(iterate.lower, ahead)

    def gradient(
        self, problem: Problem, upper: Any, batches: Batches, iterate: Iterate, t: Any
    ) -> tuple[tf.Tensor, Any]:
        """The lower loss and its gradient that step t is made of."""
        return derivatives.lower_gradient(
            problem.lower_loss, upper, self.point(iterate), batches.lower_at(t)
        )

    def move(
        self, problem: Problem, upper: Any, iterate: Iterate, gradient: Any
    ) -> Iterate:
        """The iterate after a step along `gradient`."""
        point = self.point(iterate)
        own, _, sequence = self._split(iterate)
        state = own
        rates: Any = None
        learned = None
        if not isinstance(self.learning_rate, Schedule):
            learned = self.learning_rate
        if learned is not None:
            made = problem.reading(learned, upper)
            state, rates = _rated(state, made, iterate.lower)
        lower, state = self.rule.update(gradient, state, point)
        if learned is not None:
            state = state._replace(learning_rate=own.learning_rate)
        if rates is not None:
            if isinstance(self.optimizer, keras.optimizers.Ftrl):
                raise ValueError(
                    "`learning_rate` must return a scalar with Ftrl, whose shrinkage "
                    "depends on the rate: its step is no multiple of one of rate 1. "
                    "Use another optimizer for rates of single entries. Received: "
                    f"{rates!r}"
                )
            # A step of rate 1, entry by entry as long as its own rate says.
            lower = tf.nest.map_structure(
                lambda y, rate, z: y + rate * (z - y), point, rates, lower
            )
        lower = problem.projected_lower(upper, lower)
        if not self.accelerated:
            return Iterate(lower, state)
        after = (1 + tf.sqrt(1 + 4 * sequence * sequence)) / 2
        ahead = structure.scale(
            (sequence - 1) / after, structure.subtract(lower, iterate.lower)
        )
        slots = [*state.slots, *tf.nest.flatten(ahead), after]
        return Iterate(lower, state._replace(slots=slots))

    def advance(
        self,
        problem: Problem,
        upper: Any,
        batches: Batches,
        iterate: Iterate,
        t: Any,
        first_order: bool = False,
    ) -> tuple[Iterate, tf.Tensor]:
        """One inner step, and the lower loss it started from.

        With `first_order` the gradient counts as a constant.
        """
        value, gradient = self.gradient(problem, upper, batches, iterate, t)
        if first_order:
            gradient = tf.nest.map_structure(tf.stop_gradient, gradient)
        return self.move(problem, upper, iterate, gradient), value

    def _fresh(self, problem: Problem, lower: Any) -> OptimizerState:
        state = self.rule.init(lower)
        ahead = tf.nest.flatten(structure.zeros_like(structure.to_tensors(lower)))
        # Where tasks stop at different steps, each has its own count of them.
        alone = problem.leading and self.tolerance is not None
        tasks = ahead[0].shape[:1] if alone else []
        if alone:
            state = self.rule.counted(state, *tasks)
        if not self.accelerated:
            return state
        slots = [*state.slots, *ahead, tf.ones(tasks, ahead[0].dtype)]
        return state._replace(slots=slots)

    def _split(self, iterate: Iterate) -> tuple[OptimizerState, Any, Any]:
        """The optimizer's own state, u_t - y_t and s_t of the accelerated steps."""
        state = iterate.optimizer
        if not self.accelerated:
            return state, None, None
        leaves = len(tf.nest.flatten(iterate.lower))
        *own, sequence = state.slots
        own, ahead = own[:-leaves], own[-leaves:]
        ahead = tf.nest.pack_sequence_as(iterate.lower, ahead)
        return state._replace(slots=own), ahead, sequence

    def run(
        self,
        problem: Problem,
        upper: Any,
        batches: Batches,
        iterate: Iterate,
        first: Any,
        last: Any,
        most: int,
        first_order: bool = False,
    ) -> tuple[Iterate, tf.Tensor]:
        """Steps first, ..., last - 1 (at most `most` of them, a Python integer).

        With one `last` per task, each task stops at its own.
        """
        dtype = tf.nest.flatten(iterate.lower)[0].dtype
        value = tf.zeros([], dtype)
        if most == 0:
            return iterate, value
        each = tf.is_tensor(last) and last.shape.rank == 1
        if most == 1 and isinstance(last, int) and (first, last) == (0, 1):
            # A loop of one step would keep what comes after it waiting.
            iterate, value = self.advance(
                problem, upper, batches, iterate, 0, first_order
            )
            return iterate, tf.cast(value, dtype)

        def body(t: tf.Tensor, now: Iterate, value: tf.Tensor) -> tuple:
            del value
            after, value = self.advance(problem, upper, batches, now, t, first_order)
            if each:
                after = moved_where(t < last, now, after)
            return t + 1, after, tf.cast(value, dtype)

        _, iterate, value = tf.while_loop(
            lambda t, *_: tf.reduce_any(t < last),
            body,
            (tf.convert_to_tensor(first), iterate, value),
            maximum_iterations=most,
            parallel_iterations=SERIAL,
        )
        return iterate, value

    def solve(
        self, problem: Problem, upper: Any, lower: Any, batches: Batches, state: dict
    ) -> tuple[Any, dict, tf.Tensor]:
        """All steps, not differentiated.

        Returns:
            The lower variables, the solver's state, and the lower loss before the
            last step.
        """
        iterate, value = self.settle(problem, upper, lower, batches, state)
        return iterate.lower, self.carried(iterate, state), value

    def settle(
        self, problem: Problem, upper: Any, lower: Any, batches: Batches, state: dict
    ) -> tuple[Iterate, tf.Tensor]:
        """`steps` steps, or fewer where the tolerance is met, not differentiated."""
        iterate = self.begin(problem, upper, lower, state)
        if self.tolerance is None:
            return self.run(problem, upper, batches, iterate, 0, self.steps, self.steps)
        dtype = tf.nest.flatten(iterate.lower)[0].dtype
        if isinstance(self.tolerance, Schedule):
            goal = tf.cast(self.tolerance(state["step"]), dtype)
        else:
            goal = tf.constant(self.tolerance, dtype)

        leading = problem.leading

        def body(t: tf.Tensor, now: Iterate, value: tf.Tensor, size: Any) -> tuple:
            del value
            value, gradient = self.gradient(problem, upper, batches, now, t)
            after = self.move(problem, upper, now, gradient)
            if leading:
                after = moved_where(size > goal, now, after)
            norm = structure.norm(gradient, leading)
            if leading:  # where a task has ended, the step it did not make may be large
                norm = tf.where(size > goal, norm, size)
            return t + 1, after, tf.cast(value, dtype), norm

        # The first gradient is not known yet: infinitely far from done.
        unknown = tf.nest.flatten(iterate.lower)[0].shape[:leading]
        _, iterate, value, _ = tf.while_loop(
            lambda t, now, value, size: tf.reduce_any(size > goal),
            body,
            (
                tf.constant(0),
                iterate,
                tf.zeros([], dtype),
                tf.fill(unknown, tf.constant(float("inf"), dtype)),
            ),
            maximum_iterations=self.steps,
            parallel_iterations=SERIAL,
        )
        return iterate, value

    def carried(self, iterate: Iterate, state: dict) -> dict:
        """The state for the next outer step after a loop that ended at `iterate`."""
        after = dict(state)
        if "optimizer" in state:
            after["optimizer"] = iterate.optimizer
        if "step" in state:
            after["step"] = state["step"] + 1
        return after

    def trajectory(
        self,
        problem: Problem,
        upper: Any,
        lower: Any,
        batches: Batches,
        state: dict,
        of: Callable[[Any], Any] | None = None,
    ) -> Any:
        """The iterates y_1, ..., y_T that `solve` goes through, T = `steps`.

        For looking at them: how the loss or an accuracy develops over the inner steps,
        which step is best, where they diverge. Methods need none of this. Costs T
        gradients, as `solve`, and memory for T copies of what is kept.

        Args:
            problem: the problem.
            upper: the upper variables x.
            lower: the lower variables before the outer step.
            batches: the batches of the outer step.
            state: what the solver carries, at first `init(problem, upper, lower)`. It
                is not moved on.
            of: lower variables -> what to keep of every iterate, such as an accuracy;
                `None`: the variables.

        Returns:
            What is kept, with a leading axis of T entries; the last one belongs to
            what `solve` returns.

        Raises:
            ValueError: if the solver has a `tolerance`, whose steps may be fewer.

        Example:
            >>> inner = tb.InnerSolver(keras.optimizers.SGD(0.5), steps=3)
            >>> problem = tb.Problem(
            ...     upper_loss=lambda x, y, batch: y**2,
            ...     lower_loss=lambda x, y, batch: 0.5 * (y - x) ** 2,
            ... )
            >>> x, y = tf.constant(8.0), tf.constant(0.0)
            >>> state = inner.init(problem, x, y)
            >>> inner.trajectory(problem, x, y, tb.Batches(None, None), state).numpy()
            array([4., 6., 7.], dtype=float32)
        """
        return trajectory(self, problem, upper, lower, batches, state, of)


def _rated(state: OptimizerState, made: Any, lower: Any) -> tuple[Any, Any]:
    """The optimizer's state at a learned rate, and the rates of single entries, `None`
    if one rate is for all."""
    rate = state.learning_rate
    if not tf.nest.is_nested(made) and tf.convert_to_tensor(made).shape.rank == 0:
        return state._replace(learning_rate=tf.cast(made, rate.dtype)), None
    try:
        tf.nest.assert_same_structure(made, lower)
        rates = tf.nest.map_structure(
            lambda r, y: tf.broadcast_to(tf.cast(r, y.dtype), tf.shape(y)), made, lower
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            "`learning_rate` must return a scalar or rates that broadcast to the lower "
            "variables, in a nest like theirs. Return one rate, or one tensor for each "
            "lower variable. One rate per inner step cannot be learned: every step has "
            f"the same. Received: {made!r} for {lower!r}"
        ) from error
    return state._replace(learning_rate=tf.ones_like(rate)), rates


def moved_where(going: tf.Tensor, now: Iterate, after: Iterate) -> Iterate:
    """The iterate after a step of those tasks that are `going` on."""

    def chosen(new: tf.Tensor, old: tf.Tensor) -> tf.Tensor:
        # A number of the optimizer's belongs to all tasks.
        return structure.where(going, new, old) if new.shape.rank else new

    return Iterate(
        tf.nest.map_structure(chosen, after.lower, now.lower),
        after.optimizer._replace(
            iteration=chosen(after.optimizer.iteration, now.optimizer.iteration),
            slots=tf.nest.map_structure(
                chosen, after.optimizer.slots, now.optimizer.slots
            ),
        ),
    )


def require_inner(inner: Any) -> None:
    """Raise unless `inner` is an inner solver."""
    if not isinstance(inner, InnerSolver):
        raise ValueError(
            "`inner` must be a tb.InnerSolver, such as "
            "tb.InnerSolver(keras.optimizers.SGD(0.1), steps=20). "
            f"Received: inner={inner!r}"
        )


def require_fixed_length(inner: InnerSolver, method: str) -> None:
    """Raise if the inner solver may stop early, which no unroll can differentiate."""
    if inner.tolerance is not None:
        raise ValueError(
            f"`inner.tolerance` must be None for tb.{method}: the steps it "
            "differentiates must not depend on the variables. Leave it out, or use "
            f"tb.Implicit. Received: tolerance={inner.tolerance!r}"
        )
