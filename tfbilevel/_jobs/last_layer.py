"""The last layer of a classifier, and its inputs."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbilevel._jobs.networks import log_probabilities, predicted


class LastLayer:
    """A classifier as a linear one on top of features.

    If the last layer is not a `Dense` one that can be found, the features are the log
    probabilities, and the linear classifier is the identity.

    Args:
        network: the classifier.
        probabilities: whether its outputs are probabilities.
    """

    def __init__(self, network: keras.Model, probabilities: bool):
        self.network = network
        self.probabilities = probabilities
        self.dense = _last_dense(network)
        if self.dense is not None:
            self.below = keras.Model(network.inputs, self.dense.input)

    def features(self, x: np.ndarray) -> np.ndarray:
        """Of every example, [n, d + 1]; the last one is 1."""
        if self.dense is None:
            outputs = predicted(self.network, x)
            found = np.asarray(log_probabilities(outputs, self.probabilities))
        else:
            found = predicted(self.below, x)
        return np.hstack([found, np.ones((len(found), 1))]).astype(np.float32)

    def weights(self) -> np.ndarray:
        """Kernel and bias, [d + 1, K]."""
        if self.dense is None:
            classes = self.network.outputs[0].shape[-1] if self.network.built else 0
            return np.vstack([np.eye(classes), np.zeros((1, classes))])
        kernel = np.asarray(self.dense.kernel)
        bias = np.zeros(kernel.shape[1])
        if self.dense.bias is not None:
            bias = np.asarray(self.dense.bias)
        return np.vstack([kernel, bias[None]]).astype(np.float32)


def log_probabilities_of(features: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """log p of every class, [n, K]."""
    logits = tf.matmul(tf.cast(features, tf.float64), tf.cast(weights, tf.float64))
    return tf.nn.log_softmax(logits).numpy()


def _last_dense(network: keras.Model) -> Any:
    """The Dense layer whose outputs are the logits, or `None`."""
    try:
        output = network.outputs[0]
        ends = [layer for layer in network.layers if layer.output is output]
    except (AttributeError, TypeError, ValueError, IndexError):  # a subclass of Model
        return None
    last = ends[-1] if ends else None
    if isinstance(last, (keras.layers.Softmax, keras.layers.Activation)):
        inner = last.input
        last = next((layer for layer in network.layers if layer.output is inner), None)
    known = (keras.activations.linear, keras.activations.softmax)
    plain = type(last) is keras.layers.Dense and last.activation in known
    return last if plain and len(last.input.shape) == 2 else None
