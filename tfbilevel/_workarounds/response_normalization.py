"""`tf.nn.local_response_normalization` with a second derivative.

The gradient has no derivative in TensorFlow. It is replaced by operations that have
one: two products with a band matrix of channels x channels instead of its kernel.
"""

from typing import Any

import tensorflow as tf

from tfbilevel._workarounds.swap import gradient


def _normalized(operation: Any, upstream: Any) -> list:
    """The gradient of y_c = x_c / n_c^beta, n_c = bias + alpha sum_{|d-c|<=r} x_d^2."""
    x = operation.inputs[0]
    radius, bias, alpha, beta = (
        operation.get_attr(name) for name in ("depth_radius", "bias", "alpha", "beta")
    )
    channels = tf.shape(x)[-1]
    reach = tf.minimum(radius, channels - 1)  # a band is no wider than its matrix
    band = tf.linalg.band_part(tf.ones([channels, channels], x.dtype), reach, reach)
    n = bias + alpha * tf.tensordot(tf.square(x), band, 1)
    inner = tf.tensordot(upstream * x * n ** (-beta - 1.0), band, 1)
    return [upstream * n**-beta - 2.0 * alpha * beta * x * inner]


REPLACEMENTS = [gradient("LRN", _normalized)]
