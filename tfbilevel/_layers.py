"""Small Keras layers for the two commonest upper models."""

from typing import Any

import keras
import tensorflow as tf

from tfbilevel._arguments import require_count


class _PositiveVector(keras.layers.Layer):
    """activation(x) for a learned vector x that starts at zero."""

    def __init__(self, n: int, activation: str, **keywords: Any):
        require_count(n, "n")
        super().__init__(**keywords)
        self.n = n
        self.activation = keras.activations.get(activation)
        self.logits = self.add_weight(name="logits", shape=(n,), initializer="zeros")
        self.built = True

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "n": self.n,
            "activation": keras.activations.serialize(self.activation),
        }


@keras.saving.register_keras_serializable("tfbilevel")
class ExampleWeights(_PositiveVector):
    """One learned weight per training example.

        weights = activation(x)[index],      x = 0 at the start

    With the sigmoid every weight starts at 0.5 and stays in (0, 1).

    Args:
        n: number of training examples, at least 1.
        activation: what turns x into weights, as for any Keras layer.

    Call it with the examples' indices (integers of any shape), or with `None` for
    all weights in order, which saves the gather in full-batch problems.

    Raises:
        ValueError: if `n` is not an integer of at least 1.

    Example:
        >>> weights = tb.ExampleWeights(4)
        >>> weights(tf.constant([0, 3])).numpy().tolist()
        [0.5, 0.5]
    """

    def __init__(self, n: int, activation: str = "sigmoid", **keywords: Any):
        super().__init__(n, activation, **keywords)

    def call(self, index: Any) -> Any:
        logits = tf.convert_to_tensor(self.logits)
        if index is not None:
            logits = tf.gather(logits, index)
        return self.activation(logits)


@keras.saving.register_keras_serializable("tfbilevel")
class FeaturePenalties(_PositiveVector):
    """One learned L2 coefficient per input feature.

        penalty = 1/2 * sum_{d, c} activation(x)_d W_{dc}^2,      x = 0 at the start

    With the exponential every coefficient starts at 1 and stays positive.

    Args:
        n: number of features d, at least 1.
        activation: what turns x into coefficients.

    Call it with a kernel W of shape [n, ...] for the penalty, a scalar; the
    property `coefficients` gives activation(x).

    Example:
        >>> penalties = tb.FeaturePenalties(3)
        >>> float(penalties(tf.ones([3, 2])))
        3.0
    """

    def __init__(self, n: int, activation: str = "exponential", **keywords: Any):
        super().__init__(n, activation, **keywords)

    @property
    def coefficients(self) -> Any:
        """The coefficients, [n]."""
        return self.activation(tf.convert_to_tensor(self.logits))

    def call(self, kernel: Any) -> Any:
        kernel = tf.convert_to_tensor(kernel)
        if not kernel.shape.rank or kernel.shape[0] != self.n:
            raise ValueError(
                "`kernel` must have one row per feature, [n, ...]. Transpose it, or "
                f"change `n`. Received: shape {kernel.shape}, n={self.n}"
            )
        coefficients = tf.cast(tf.convert_to_tensor(self.coefficients), kernel.dtype)
        return _half_weighted_squares(coefficients, tf.reshape(kernel, [self.n, -1]))


@tf.custom_gradient
def _half_weighted_squares(coefficients: Any, kernel: Any) -> Any:
    """1/2 * sum over d and c of coefficients_d kernel_dc^2.

    Automatic differentiation makes about ten passes over the kernel for its gradient,
    which on minibatches can be most of a step; written out it is one.
    """
    squares = tf.reduce_sum(kernel * kernel, axis=1)
    value = 0.5 * tf.reduce_sum(coefficients * squares)

    def gradient(upstream: Any) -> tuple[Any, Any]:
        squares = tf.reduce_sum(kernel * kernel, axis=1)
        return 0.5 * upstream * squares, (upstream * coefficients)[:, None] * kernel

    return value, gradient
