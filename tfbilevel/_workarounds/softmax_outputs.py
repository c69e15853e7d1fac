"""Keras's cross-entropies of probabilities: the same result eagerly as in a graph.

In a graph they find the softmax or sigmoid that computed the probabilities and use its
logits. Eagerly they do so only for Keras's own activations. They clip the probabilities
of all others, which makes the gradient zero for every example that is clearly wrong.
"""

import functools
from typing import Any

import tensorflow as tf
from keras.src.backend.tensorflow import nn as keras_nn

from tfbilevel._workarounds.swap import Replacement

_get_logits = keras_nn._get_logits


def _logits_of_their_kind(
    output: Any, from_logits: Any, op_type: str, *names: Any
) -> Any:
    """Keras's function, but a sigmoid's logits do not count as those of a softmax."""
    if getattr(output, "_made_by", op_type) != op_type:
        output = tf.identity(output)  # a copy, which has no logits attached
    return _get_logits(output, from_logits, op_type, *names)


def _with_logits(activation: Any, kind: str) -> Any:
    @functools.wraps(activation)
    def activated(*arguments: Any, **keywords: Any) -> Any:
        probabilities = activation(*arguments, **keywords)
        logits = arguments[0] if arguments else next(iter(keywords.values()))
        axis = keywords.get("axis", arguments[1] if len(arguments) > 1 else None)
        if tf.executing_eagerly() and axis in (None, -1):
            # The attribute in which Keras's own activations store their logits.
            probabilities._keras_logits = tf.convert_to_tensor(logits)
            probabilities._made_by = kind
        return probabilities

    return activated


_sigmoid = _with_logits(tf.sigmoid, "Sigmoid")

REPLACEMENTS = [
    Replacement(tf.nn, "softmax", _with_logits(tf.nn.softmax, "Softmax")),
    Replacement(keras_nn, "_get_logits", _logits_of_their_kind),
    Replacement(tf, "sigmoid", _sigmoid),
    Replacement(tf.nn, "sigmoid", _sigmoid),
    Replacement(tf.math, "sigmoid", _sigmoid),
]
