"""`tf.nn.softsign` with a second derivative, for which TensorFlow has no entry."""

from typing import Any

import tensorflow as tf

from tfbilevel._workarounds.swap import gradient


def softsign_grad(operation: Any, upstream: Any) -> list:
    """The gradient of SoftsignGrad(g, x) = g / (1 + |x|)^2."""
    g, x = operation.inputs
    of_g = tf.raw_ops.SoftsignGrad(gradients=upstream, features=x)
    return [of_g, -2.0 * of_g * g * tf.sign(x) / (1.0 + tf.abs(x))]


REPLACEMENTS = [gradient("SoftsignGrad", softsign_grad)]
