"""Ranges of hyperparameters, and the variables without bounds that move within them."""

import dataclasses
import math
from typing import Any

import numpy as np
import tensorflow as tf

SCALES = ("linear", "log", "complement")
INSIDE = 0.02  # the derivative is zero at an end of the range


@dataclasses.dataclass(frozen=True)
class Interval:
    """A range on a scale.

        value = inverse(scale(low) + (scale(high) - scale(low)) * sigmoid(u))

    Attributes:
        name: of the hyperparameter, for errors.
        low, high: the ends.
        scale: "linear", "log", or "complement": 1 - value on a log scale.
    """

    name: str
    low: float
    high: float
    scale: str

    def __post_init__(self) -> None:
        ends = math.isfinite(self.low) and math.isfinite(self.high)
        rule = "finite numbers, the smaller one first"
        fine = ends and self.low < self.high
        if fine and self.scale == "log":
            rule, fine = "above 0 on a log scale", self.low > 0
        if fine and self.scale == "complement":
            rule, fine = "below 1", self.high < 1
        if not fine:
            raise ValueError(
                f"`range` of {self.name} must be {rule}. "
                f"Received: range={(self.low, self.high)}"
            )

    def value(self, u: Any) -> tf.Tensor:
        """The value at a tensor u."""
        low, high = self._scaled(self.low), self._scaled(self.high)
        at = low + (high - low) * tf.sigmoid(u)
        if self.scale == "linear":
            return at
        return tf.exp(at) if self.scale == "log" else 1 - tf.exp(at)

    def position(self, value: Any) -> np.ndarray:
        """u at a value in the range."""
        value = np.asarray(value, np.float64)
        if not ((value >= self.low) & (value <= self.high)).all():
            raise ValueError(
                f"`start` of {self.name} must be in its range, from {self.low:g} to "
                f"{self.high:g}. Received: start={value.tolist()}"
            )
        low, high = self._scaled(self.low), self._scaled(self.high)
        share = (np.vectorize(self._scaled)(value) - low) / (high - low)
        share = np.clip(share, INSIDE, 1 - INSIDE)
        return np.log(share / (1 - share))

    def _scaled(self, value: float) -> float:
        if self.scale == "linear":
            return value
        return math.log(value if self.scale == "log" else 1 - value)
