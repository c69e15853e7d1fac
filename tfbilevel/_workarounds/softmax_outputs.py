"""Keras's cross-entropies of probabilities, the same eagerly as in a graph.

In a graph they find the softmax or sigmoid that made the probabilities and take its
logits. Eagerly they find those of Keras's own activations only, and clip the others'
probabilities, which ends the gradient of every example that is clearly wrong.
"""

import functools
from typing import Any

import tensorflow as tf

from tfbilevel._workarounds.swap import Replacement


def _with_logits(activation: Any) -> Any:
    @functools.wraps(activation)
    def activated(*arguments: Any, **keywords: Any) -> Any:
        probabilities = activation(*arguments, **keywords)
        logits = arguments[0] if arguments else next(iter(keywords.values()))
        axis = keywords.get("axis", arguments[1] if len(arguments) > 1 else None)
        if tf.executing_eagerly() and axis in (None, -1):
            # Where Keras's own activations leave it.
            probabilities._keras_logits = tf.convert_to_tensor(logits)
        return probabilities

    return activated


_sigmoid = _with_logits(tf.sigmoid)

REPLACEMENTS = [
    Replacement(tf.nn, "softmax", _with_logits(tf.nn.softmax)),
    Replacement(tf, "sigmoid", _sigmoid),
    Replacement(tf.nn, "sigmoid", _sigmoid),
    Replacement(tf.math, "sigmoid", _sigmoid),
]
