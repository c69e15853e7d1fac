"""`tf.nn.max_pool_with_argmax` with a second derivative.

The gradient scatters its argument to the positions of the maxima; the derivative of
that gathers from these positions. TensorFlow has no entry for it.
"""

from typing import Any

import tensorflow as tf

from tfbilevel._workarounds.swap import gradient


def _taken(operation: Any, upstream: Any) -> list:
    """The gradient of MaxPoolGradWithArgmax(input, gradient, argmax)."""
    _, grads, argmax = operation.inputs
    if operation.get_attr("include_batch_in_index"):
        made = tf.gather(tf.reshape(upstream, [-1]), argmax)
    else:
        batch = tf.shape(upstream)[0]
        flat = [tf.reshape(value, [batch, -1]) for value in (upstream, argmax)]
        made = tf.reshape(tf.gather(*flat, batch_dims=1), tf.shape(grads))
    return [None, made, None]


REPLACEMENTS = [gradient("MaxPoolGradWithArgmax", _taken)]
