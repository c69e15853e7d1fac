"""The precision of losses where networks compute in half precision."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

HALF = (tf.bfloat16, tf.float16)


def in_float32(loss: Callable) -> Callable:
    """The loss as float32 if it is in half precision (8 or 11 bits).

    Sums with penalties, over parts of a batch and over replicas, and differences of
    losses are then not rounded to these bits.
    """

    def at(upper: Any, lower: Any, batch: Any) -> Any:
        value = loss(upper, lower, batch)
        half = tf.is_tensor(value) and value.dtype in HALF
        return tf.cast(value, tf.float32) if half else value

    return at
