"""Penalties and barriers of one constraint q <= 0, by their name."""

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf


class Penalty(NamedTuple):
    """A function of q.

    Attributes:
        value: (q, sigma) -> P.
        slope: (q, sigma) -> its derivative in q.
    """

    value: Callable[[Any, Any], Any]
    slope: Callable[[Any, Any], Any]


# For q < 0 alone.
BARRIERS = {
    "log": Penalty(lambda q, s: -s * tf.math.log(-q), lambda q, s: -s / q),
    "inverse": Penalty(lambda q, s: -s / q, lambda q, s: s / q**2),
}
PENALTIES = {
    **BARRIERS,
    "quadratic": Penalty(
        lambda q, s: tf.nn.relu(q) ** 2 / (2 * s), lambda q, s: tf.nn.relu(q) / s
    ),
}
