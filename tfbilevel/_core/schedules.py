"""Schedules: values, such as penalty weights, tolerances and learning rates, that
change from one outer step to the next. `tb.schedules.LinearRamp` is `tb.LinearRamp`."""

import abc
import dataclasses
import math
import numbers
from typing import Any

import keras
import tensorflow as tf

from tfbilevel._core.arguments import (
    not_negative,
    positive,
    require_count,
    require_number,
)

# This module is also `tb.schedules`.
__all__ = [
    "Constant",
    "CosineDecay",
    "Geometric",
    "InversePower",
    "LinearRamp",
    "Schedule",
]


class Schedule(abc.ABC):
    """A value for every step, computed inside the compiled step.

    A `keras.optimizers.schedules.LearningRateSchedule` is accepted everywhere instead:
    it is called with the same step, and computes in float32.
    """

    @abc.abstractmethod
    def __call__(self, step: tf.Tensor) -> tf.Tensor:
        """The value at `step` (integer scalar, from 0), as a float64 scalar."""


@dataclasses.dataclass(frozen=True, eq=False)
class Constant(Schedule):
    """The same value at every step.

    Args:
        value: the value, finite.

    Example:
        >>> float(tb.Constant(0.5)(tf.constant(7)))
        0.5
    """

    value: float

    def __post_init__(self) -> None:
        _require_finite(value=self.value)

    def __call__(self, step: tf.Tensor) -> tf.Tensor:
        del step
        return tf.constant(self.value, tf.float64)


@dataclasses.dataclass(frozen=True, eq=False)
class _Passage(Schedule):
    """A change from one value to another in a number of steps."""

    start: float
    stop: float
    steps: int

    def __post_init__(self) -> None:
        _require_finite(start=self.start, stop=self.stop)
        require_count(self.steps, "steps")

    def _progress(self, step: tf.Tensor) -> tf.Tensor:
        """The completed share of the passage, from 0 to 1."""
        return tf.minimum(tf.cast(step, tf.float64) / self.steps, 1.0)


@dataclasses.dataclass(frozen=True, eq=False)
class LinearRamp(_Passage):
    """start + (stop - start) * min(step / steps, 1).

    Args:
        start: value at step 0.
        stop: value from step `steps` on.
        steps: length of the ramp, at least 1.

    Raises:
        ValueError: if a value is not finite or `steps` is below 1.

    Example:
        >>> ramp = tb.LinearRamp(0.0, 0.2, steps=10)
        >>> [round(float(ramp(tf.constant(k))), 3) for k in (0, 5, 10, 99)]
        [0.0, 0.1, 0.2, 0.2]
    """

    def __call__(self, step: tf.Tensor) -> tf.Tensor:
        progress = self._progress(step)
        return self.start + (self.stop - self.start) * progress


@dataclasses.dataclass(frozen=True, eq=False)
class CosineDecay(_Passage):
    """stop + (start - stop) * (1 + cos(pi * min(step / steps, 1))) / 2.

    Args:
        start: value at step 0.
        stop: value from step `steps` on.
        steps: length of the decay, at least 1.

    Raises:
        ValueError: if a value is not finite or `steps` is below 1.

    Example:
        >>> decay = tb.CosineDecay(0.3, 0.1, steps=10)
        >>> [round(float(decay(tf.constant(k))), 3) for k in (0, 5, 10, 99)]
        [0.3, 0.2, 0.1, 0.1]
    """

    def __call__(self, step: tf.Tensor) -> tf.Tensor:
        progress = self._progress(step)
        share = 0.5 * (1 + tf.cos(math.pi * progress))
        return self.stop + (self.start - self.stop) * share


@dataclasses.dataclass(frozen=True, eq=False)
class Geometric(Schedule):
    """start * ratio ** step.

    Args:
        start: value at step 0.
        ratio: factor from one step to the next, positive.

    Raises:
        ValueError: if `start` is not finite or `ratio` is not positive.

    Example:
        >>> float(tb.Geometric(1.0, 0.5)(tf.constant(3)))
        0.125
    """

    start: float
    ratio: float

    def __post_init__(self) -> None:
        _require_finite(start=self.start)
        remedy = "Use a ratio below 1 to decay, above 1 to grow."
        require_number(self.ratio, "ratio", positive, "above 0", remedy)

    def __call__(self, step: tf.Tensor) -> tf.Tensor:
        ratio = tf.constant(self.ratio, tf.float64)
        return self.start * tf.pow(ratio, tf.cast(step, tf.float64))


@dataclasses.dataclass(frozen=True, eq=False)
class InversePower(Schedule):
    """start / (step + 1) ** power.

    Args:
        start: value at step 0.
        power: the exponent of the decay; not negative.

    Raises:
        ValueError: if `start` is not finite or `power` is negative.

    Example:
        >>> float(tb.InversePower(1.0, 0.5)(tf.constant(3)))
        0.5
    """

    start: float
    power: float

    def __post_init__(self) -> None:
        _require_finite(start=self.start)
        require_number(self.power, "power", not_negative, "not negative")

    def __call__(self, step: tf.Tensor) -> tf.Tensor:
        count = tf.cast(step, tf.float64) + 1
        return self.start * tf.pow(count, tf.constant(-self.power, tf.float64))


@dataclasses.dataclass(frozen=True, eq=False)
class _OfKeras(Schedule):
    """A Keras schedule, called with the outer step."""

    schedule: keras.optimizers.schedules.LearningRateSchedule

    def __call__(self, step: tf.Tensor) -> tf.Tensor:
        return tf.cast(self.schedule(step), tf.float64)


def is_schedule(value: Any) -> bool:
    """Whether the value is a schedule of this library or of Keras."""
    kinds = (Schedule, keras.optimizers.schedules.LearningRateSchedule)
    return isinstance(value, kinds)


def as_schedule(value: Any, name: str) -> Schedule:
    """The schedule itself, a Keras schedule wrapped, or a number as a constant."""
    if isinstance(value, Schedule):
        return value
    if is_schedule(value):
        return _OfKeras(value)
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if number and math.isfinite(value):
        return Constant(float(value))
    raise ValueError(
        f"`{name}` must be a finite number, or a schedule such as tb.LinearRamp(0.0, "
        f"0.2, steps=30000). Received: {name}={value!r}"
    )


def at_ends(schedule: Schedule) -> tuple[float, float]:
    """A schedule's value at its start and long after that."""
    with tf.init_scope():
        start, end = (
            float(schedule(tf.constant(step, tf.int64))) for step in (0, 2**62)
        )
    return start, end


def as_weight(value: Any, name: str) -> Schedule:
    """The schedule of a penalty's weight."""
    why = "a penalty weight pulls towards the lower solution"
    return _not_negative(as_schedule(value, name), name, why)


def as_rate(value: Any, name: str) -> Schedule:
    """The schedule of a step size: positive at its start, never negative."""
    return as_positive(value, name, "it is a step size")


def as_positive(value: Any, name: str, why: str) -> Schedule:
    """The schedule, after a check that it starts above 0 and is never negative."""
    schedule = as_schedule(value, name)
    start, end = at_ends(schedule)
    if not (start > 0 and end >= 0):
        raise ValueError(
            f"`{name}` must be above 0, or a schedule that starts above 0 and does not "
            f"become negative: {why}. Received: {name}={value!r}, from "
            f"{start:g} to {end:g}"
        )
    return schedule


def _not_negative(schedule: Schedule, name: str, why: str) -> Schedule:
    """The schedule, after a check that it is not negative at its start and end."""
    ends = at_ends(schedule)
    if min(ends) < 0:
        raise ValueError(
            f"`{name}` must not be negative: {why}. "
            f"Received: {name}={schedule!r}, from {ends[0]:g} to {ends[1]:g}"
        )
    return schedule


def require_tolerance(tolerance: Any, name: str) -> None:
    """Raise unless it is a finite number or a schedule, and not negative."""
    if is_schedule(tolerance):
        _not_negative(as_schedule(tolerance, name), name, "it is compared with a norm")
    else:
        require_number(
            tolerance,
            name,
            not_negative,
            "not negative",
            "A schedule such as tb.Geometric(0.1, 0.9) is accepted too.",
        )


def _require_finite(**values: float) -> None:
    for name, value in values.items():
        require_number(value, name, lambda v: True, "of either sign")
