"""`tf.nn.softmax_cross_entropy_with_logits` with the right derivatives in its labels.

TensorFlow takes softmax(z) - t for the gradient in the logits, which is right where
labels sum to one, and takes it for a constant in t: learned labels never move.
"""

from typing import Any

import tensorflow as tf

from tfbilevel._workarounds.swap import gradient


def softmax_cross_entropy(operation: Any, of_loss: Any, of_backprop: Any) -> list:
    """Of the loss -sum t log softmax(z) and of the second output, softmax(z) - t.

    Eager tapes keep no labels, since TensorFlow's own entry does not read them: their
    sum comes from the second output. Costs a softmax, a sum and a product more than
    TensorFlow's entry, each of the size of z.
    """
    logits, backprop = operation.inputs[0], operation.outputs[1]
    softmax = tf.nn.softmax(logits)
    excess = -tf.reduce_sum(backprop, -1, keepdims=True)  # of sum t over one
    of_logits = of_loss[:, None] * (backprop + excess * softmax)
    of_labels = -of_loss[:, None] * tf.nn.log_softmax(logits)
    if of_backprop is not None and not getattr(of_backprop, "_is_zeros_tensor", False):
        mean = tf.reduce_sum(of_backprop * softmax, -1, keepdims=True)
        of_logits += softmax * (of_backprop - mean)
        of_labels -= of_backprop
    return [of_logits, of_labels]


REPLACEMENTS = [gradient("SoftmaxCrossEntropyWithLogits", softmax_cross_entropy)]
