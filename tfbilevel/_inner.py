"""The inner solver: a number of optimizer steps on the lower loss."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tfbilevel import _derivatives as derivatives
from tfbilevel import _structure as structure
from tfbilevel._differentiable import OptimizerState, differentiable
from tfbilevel._problem import Batches, Problem

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

    Args:
        optimizer: a Keras optimizer that `tb.differentiable` supports.
        steps: number of steps, at least 1.
        start: where each outer step starts. "warm": at the current lower variables.
            "cold": at `problem.lower_start(x)` or, without one, at the lower
            variables that the method was initialised with. A function of the outer
            step (int64 scalar) -> lower variables: at what it returns, say a fresh
            draw of `tf.random.stateless_uniform`. A problem with a `lower_start`
            always starts there.
        learning_rate: x -> scalar, the rate as a function of the upper variables
            where it is to be learned; `None`: the optimizer's own.
        optimizer_state: "reset": momentum and moments start at zero at every outer
            step. "carry": they go on from the last one.

    Raises:
        ValueError: for an unsupported optimizer, `steps` below 1, an unknown
            `start` or `optimizer_state`, or a `learning_rate` that is not callable.

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

    optimizer: keras.optimizers.Optimizer
    steps: int
    start: str | Callable[[tf.Tensor], Any] = "warm"
    learning_rate: Callable[[Any], tf.Tensor] | None = None
    optimizer_state: str = "reset"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rule", differentiable(self.optimizer))
        require_count(self.steps, "steps")
        if not callable(self.start):
            require_choice(self.start, "start", ("warm", "cold"))
        require_choice(self.optimizer_state, "optimizer_state", ("reset", "carry"))
        if self.learning_rate is not None:
            if not callable(self.learning_rate):
                raise ValueError(
                    "`learning_rate` must be a function of the upper variables. Set "
                    "a constant rate on the optimizer instead. Received: "
                    f"learning_rate={self.learning_rate!r}"
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
        if callable(self.start):
            state["step"] = tf.constant(0, tf.int64)
        elif self.start == "cold" and problem.lower_start is None:
            state["start"] = lower
        if self.optimizer_state == "carry":
            state["optimizer"] = self.rule.init(lower)
        return state

    def begin(self, problem: Problem, upper: Any, lower: Any, state: dict) -> Iterate:
        """The iterate that this outer step starts from."""
        rule = "return variables like the lower ones"
        if problem.lower_start is not None:
            start = problem.lower_start(upper)
            structure.require_like(start, lower, "lower_start", rule)
        elif callable(self.start):
            start = structure.to_tensors(self.start(state["step"]))
            structure.require_like(start, structure.to_tensors(lower), "start", rule)
        else:
            start = structure.to_tensors(state.get("start", lower))
        if "optimizer" in state:
            return Iterate(start, state["optimizer"])
        return Iterate(start, self.rule.init(start))

    def advance(
        self, problem: Problem, upper: Any, batches: Batches, iterate: Iterate, t: Any
    ) -> tuple[Iterate, tf.Tensor]:
        """One inner step, and the lower loss it started from."""
        value, gradient = derivatives.lower_gradient(
            problem.lower_loss, upper, iterate.lower, batches.lower_at(t)
        )
        state = iterate.optimizer
        if self.learning_rate is not None:
            rate = self.learning_rate(problem.own_upper(upper))
            state = state._replace(
                learning_rate=tf.cast(rate, state.learning_rate.dtype)
            )
        lower, state = self.rule.update(gradient, state, iterate.lower)
        if self.learning_rate is not None:
            state = state._replace(learning_rate=iterate.optimizer.learning_rate)
        return Iterate(problem.projected_lower(lower), state), value

    def run(
        self,
        problem: Problem,
        upper: Any,
        batches: Batches,
        iterate: Iterate,
        first: Any,
        last: Any,
        most: int,
    ) -> tuple[Iterate, tf.Tensor]:
        """Steps first, ..., last - 1 (at most `most` of them, a Python integer)."""
        dtype = tf.nest.flatten(iterate.lower)[0].dtype
        value = tf.zeros([], dtype)
        if most == 0:
            return iterate, value

        def body(t: tf.Tensor, now: Iterate, value: tf.Tensor) -> tuple:
            del value
            after, value = self.advance(problem, upper, batches, now, t)
            return t + 1, after, tf.cast(value, dtype)

        _, iterate, value = tf.while_loop(
            lambda t, *_: t < last,
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
        iterate = self.begin(problem, upper, lower, state)
        iterate, value = self.run(
            problem, upper, batches, iterate, 0, self.steps, self.steps
        )
        return iterate.lower, self.carried(iterate, state), value

    def carried(self, iterate: Iterate, state: dict) -> dict:
        """The state for the next outer step after a loop that ended at `iterate`."""
        after = dict(state)
        if "optimizer" in state:
            after["optimizer"] = iterate.optimizer
        if "step" in state:
            after["step"] = state["step"] + 1
        return after


def require_inner(inner: Any) -> None:
    """Raise unless `inner` is an inner solver."""
    if not isinstance(inner, InnerSolver):
        raise ValueError(
            "`inner` must be a tb.InnerSolver, such as "
            "tb.InnerSolver(keras.optimizers.SGD(0.1), steps=20). "
            f"Received: inner={inner!r}"
        )


def require_count(value: Any, name: str, least: int = 1) -> None:
    """Raise unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"`{name}` must be an integer of at least {least}. "
            f"Received: {name}={value!r}"
        )


def require_choice(value: Any, name: str, choices: tuple[str, ...]) -> None:
    """Raise unless `value` is one of the named choices."""
    if value not in choices:
        raise ValueError(
            f"`{name}` must be one of {', '.join(map(repr, choices))}. "
            f"Received: {name}={value!r}"
        )
