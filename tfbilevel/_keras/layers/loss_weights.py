"""A weight for each example, computed from its loss."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from tfbilevel._core.arguments import require_count
from tfbilevel._keras.layers.upper_layer import UpperLayer
from tfbilevel._keras.layers.weighted_mean import one_loss_each


@keras.saving.register_keras_serializable("tfbilevel")
class LossWeights(UpperLayer):
    r"""A small network that turns an example's loss into its weight (Meta-Weight-Net).

        w_i = V(l_i; x),      V: a perceptron with one input, in (0, 1) by a sigmoid
        mean = 1/n sum over i of w_i l_i,      d mean / d l_i = w_i / n

    Large losses often mean wrong labels, but also rare classes; V is learned from the
    validation loss, and any shape may result. All weights are 0.5 at the start.

    As in the paper, a weight counts as a constant while the lower variables move: no
    first derivative of `mean` flows through V into the losses. Second derivatives are
    those of this training: V' is in them, so an unroll of many steps and an implicit
    gradient are exact. (The lower problem then minimises the sum of W(l_i), with W' =
    V.) For a lower loss that is an ordinary function, as `tb.ValueGap` compares lower
    losses, use `tf.reduce_mean(weights(losses) * losses)`, which differentiates V too.

    Cost: two evaluations of V for each loss, little beside a network's. Memory: 301
    numbers by default, for any number of examples, and no example needs an index. So
    prefer it to `tb.ExampleWeights` for large data, or data that are seen once; prefer
    `tb.ExampleWeights` where right and wrong labels have losses alike. (The weights of
    a network's outputs are `tb.hyper.LossWeights`.)

    Args:
        hidden: the widths of V's hidden layers, integers of at least 1; `()`: none.
        activation: of the hidden layers, given as for any Keras layer.
        **keywords: arguments of `keras.layers.Layer`.

    Call it with losses of any shape for their weights. V has the variables' precision:
    float32 even under the policy "mixed_float16". The hidden layers start at random, as
    in the paper's code.

    Raises:
        ValueError: if `hidden` is not a sequence of widths; when called, for losses
            that are not floating-point.

    Example:
        >>> weights = tb.LossWeights()
        >>> losses = tf.constant([1.0, 2.0, 6.0])
        >>> weights(losses).numpy().tolist()
        [0.5, 0.5, 0.5]
        >>> float(weights.mean(losses))
        1.5

    References:
        Shu et al. (2019), Meta-Weight-Net: learning an explicit mapping for sample
        weighting. arXiv:1902.07379.
    """

    def __init__(
        self,
        hidden: Sequence[int] = (100,),
        activation: Any = "relu",
        **keywords: Any,
    ):
        if isinstance(hidden, str) or not isinstance(hidden, Sequence):
            raise ValueError(
                "`hidden` must be a tuple of the widths of hidden layers, such as "
                f"(100,). Received: hidden={hidden!r}"
            )
        for position, width in enumerate(hidden):
            require_count(width, f"hidden[{position}]")
        super().__init__(**keywords)
        self._hidden = tuple(hidden)
        self.activation = keras.activations.get(activation)
        self.dense = []
        width = 1
        for units in self._hidden:
            limit = width**-0.5
            part = keras.layers.Dense(
                units,
                activation=self.activation,
                kernel_initializer=keras.initializers.RandomUniform(-limit, limit),
                bias_initializer=keras.initializers.RandomUniform(-limit, limit),
                dtype=self.dtype_policy,
            )
            part.build((None, width))
            self.dense.append(part)
            width = units
        last = keras.layers.Dense(
            1, "sigmoid", kernel_initializer="zeros", dtype=self.dtype_policy
        )
        last.build((None, width))
        self.dense.append(last)
        self.built = True

    def call(self, losses: Any) -> tf.Tensor:
        losses = tf.convert_to_tensor(losses)
        if not losses.dtype.is_floating:
            raise ValueError(
                "`losses` must be floating-point. "
                f"Received: losses of dtype {losses.dtype.name}"
            )
        values = tf.reshape(tf.cast(losses, self.variable_dtype), [-1, 1])
        for part in self.dense:
            values = part(values)
        return tf.reshape(values, tf.shape(losses))

    def mean(self, losses: Any) -> tf.Tensor:
        """The mean of weights * losses, in the losses' dtype.

        Args:
            losses: one loss per example, [batch], or as a column, [batch, 1].

        Raises:
            ValueError: for losses that are not one per example.
        """
        losses = one_loss_each(losses)
        if losses.shape.rank not in (1, None):
            raise ValueError(
                "`losses` of tb.LossWeights.mean must be one per example, [batch]. Do "
                "not reduce them (reduction=None, no tf.reduce_mean). "
                f"Received: losses of shape {losses.shape}"
            )
        fixed = tf.cast(self(tf.stop_gradient(losses)), losses.dtype)
        weights = tf.cast(self(losses), losses.dtype)
        return tf.reduce_mean(_weighted(fixed, weights, losses))

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "hidden": list(self._hidden),
            "activation": keras.activations.serialize(self.activation),
        }


@tf.custom_gradient
def _weighted(fixed: Any, weights: Any, losses: Any) -> Any:
    """fixed * losses, with the first derivative `weights` in the losses.

    Both hold the same numbers; `weights` depends on the losses, `fixed` does not. The
    first derivative ignores that dependence, and derivatives of it do not.
    """

    def gradient(upstream: Any) -> tuple:
        return upstream * losses, None, upstream * weights

    return fixed * losses, gradient
