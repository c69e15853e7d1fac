"""One L2 coefficient per input feature."""

from typing import Any

import keras
import tensorflow as tf

from tfbilevel._keras.layers.positive_vector import PositiveVector


@keras.saving.register_keras_serializable("tfbilevel")
class FeaturePenalties(PositiveVector):
    """One learned L2 coefficient per input feature.

        penalty = 1/2 * sum_{d, c} activation(x)_d W_{dc}^2,      x = 0 at the start

    With the exponential every coefficient starts at 1 and stays positive.

    Args:
        n: number of features d, at least 1.
        activation: maps x to coefficients.
        **keywords: arguments of `keras.layers.Layer`, such as `name`.

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

    Automatic differentiation makes about ten passes over the kernel for the gradient,
    which can be most of a step on minibatches; the explicit formula makes one.
    """
    squares = tf.reduce_sum(kernel * kernel, axis=1)
    value = 0.5 * tf.reduce_sum(coefficients * squares)

    def gradient(upstream: Any) -> tuple[Any, Any]:
        squares = tf.reduce_sum(kernel * kernel, axis=1)
        return 0.5 * upstream * squares, (upstream * coefficients)[:, None] * kernel

    return value, gradient
