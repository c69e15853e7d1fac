"""`tf.nn.softmax_cross_entropy_with_logits` with the right derivatives in the labels.

TensorFlow uses softmax(z) - t as the gradient in the logits, which is right where
labels sum to one, but treats it as constant in t, so that learned labels never change.
"""

from typing import Any

import tensorflow as tf

from tfbilevel._workarounds.swap import gradient


def softmax_cross_entropy(operation: Any, of_loss: Any, of_backprop: Any) -> list:
    """The gradient of the loss -sum t log softmax(z) and of the second output,
    softmax(z) - t.

    Eager tapes do not keep the labels, because TensorFlow's own entry does not read
    them; their sum is computed from the second output. This costs one softmax, one sum
    and one product of the size of z more than TensorFlow's entry.
    """
    logits, backprop = operation.inputs[0], operation.outputs[1]
    softmax = tf.nn.softmax(logits)
    excess = -tf.reduce_sum(backprop, -1, keepdims=True)  # sum t - 1
    of_logits = of_loss[:, None] * (backprop + excess * softmax)
    of_labels = -of_loss[:, None] * tf.nn.log_softmax(logits)
    if of_backprop is not None and not getattr(of_backprop, "_is_zeros_tensor", False):
        mean = tf.reduce_sum(of_backprop * softmax, -1, keepdims=True)
        of_logits += softmax * (of_backprop - mean)
        of_labels -= of_backprop
    return [of_logits, of_labels]


REPLACEMENTS = [gradient("SoftmaxCrossEntropyWithLogits", softmax_cross_entropy)]
