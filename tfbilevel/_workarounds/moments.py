"""`tf.nn.moments` with the right second derivatives.

TensorFlow takes the mean for a constant where it computes the variance. The first
derivative does not notice (its part through the mean is zero), but every further one is
wrong, and with it every hypergradient through Keras's BatchNormalization,
LayerNormalization and GroupNormalization.
"""

from typing import Any

import tensorflow as tf
from tensorflow.python.ops import nn_impl

from tfbilevel._workarounds.swap import Replacement


def moments(
    x: Any,
    axes: Any,
    shift: Any = None,
    keepdims: bool = False,
    name: str | None = None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Mean and variance over some axes, as `tf.nn.moments`."""
    del shift  # TensorFlow ignores it too
    with tf.name_scope(name or "moments"):
        x = tf.convert_to_tensor(x)
        wide = tf.cast(x, tf.float32) if x.dtype == tf.float16 else x
        mean = tf.reduce_mean(wide, axes, keepdims=True)
        squares = tf.math.squared_difference(wide, mean)
        variance = tf.reduce_mean(squares, axes, keepdims=True)
        if not keepdims:
            mean, variance = (tf.squeeze(value, axes) for value in (mean, variance))
        return tf.cast(mean, x.dtype), tf.cast(variance, x.dtype)


def _moments_of_version_1(
    x: Any,
    axes: Any,
    shift: Any = None,
    name: str | None = None,
    keep_dims: bool | None = None,
    keepdims: bool | None = None,
) -> tuple[tf.Tensor, tf.Tensor]:
    return moments(x, axes, shift, bool(keepdims or keep_dims), name)


REPLACEMENTS = [
    Replacement(tf.nn, "moments", moments),
    Replacement(tf.compat.v1.nn, "moments", _moments_of_version_1),
    # What functions of TensorFlow call, and `tf.nn.moments` imported by itself.
    Replacement(nn_impl, "moments", _moments_of_version_1),
]
