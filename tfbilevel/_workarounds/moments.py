"""`tf.nn.moments` with the right second derivatives.

TensorFlow treats the mean as a constant when it computes the variance. The first
derivative is unaffected (its part through the mean is zero), but every higher one is
wrong, and so is every hypergradient through Keras's BatchNormalization,
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
    """Mean and variance over some axes, like `tf.nn.moments`."""
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
    # Used by functions of TensorFlow and by `tf.nn.moments` when imported directly.
    Replacement(nn_impl, "moments", _moments_of_version_1),
]
