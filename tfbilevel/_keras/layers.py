"""Small Keras layers for the two most common upper models."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from tfbilevel._check.example_indices import ExampleWeightsError, range_error
from tfbilevel._core.arguments import require_count


class _PositiveVector(keras.layers.Layer):
    """activation(x) for a learned vector x that starts at zero."""

    def __init__(self, n: int, activation: str, dtype: Any = None, **keywords: Any):
        require_count(n, "n")
        # Under a mixed policy, use the variables' precision, as Keras's losses do.
        policy = keras.dtype_policies.get(dtype or keras.config.dtype_policy())
        super().__init__(dtype=policy.variable_dtype, autocast=False, **keywords)
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
        activation: maps x to weights, given as for any Keras layer.
        **keywords: arguments of `keras.layers.Layer`.

    Call it with the examples' indices (integers of any shape), or with `None` for
    all weights in order, which saves the gather in full-batch problems. In a loss
    prefer `mean`, which checks shapes.

    Indices must be from 0 to n - 1. If their values are known, others raise an error
    at once. In a compiled step, where XLA and GPUs cannot raise errors, the weight
    becomes NaN: `fit`, `train_on_batch` and `tb.minimize` then stop at that step and
    name the index.

    The weights have the variables' precision: float32 even under the policy
    "mixed_float16".

    Raises:
        ValueError: if `n` is not an integer of at least 1; when called, for an index
            that is out of range or not an integer.

    Example:
        >>> weights = tb.ExampleWeights(4)
        >>> weights(tf.constant([0, 3])).numpy().tolist()
        [0.5, 0.5]
        >>> float(weights.mean(tf.constant([1.0, 2.0, 3.0, 4.0])))
        1.25
    """

    def __init__(self, n: int, activation: str = "sigmoid", **keywords: Any):
        super().__init__(n, activation, **keywords)
        self._listener: Callable[[tf.Tensor], None] | None = None
        self.in_graphs = False  # whether it was called by indices in a graph

    def call(self, index: Any) -> Any:
        logits = tf.convert_to_tensor(self.logits)
        if index is None:
            return self.activation(logits)
        index = _whole(index)
        known = tf.get_static_value(index)
        if known is not None:
            beyond = known[(known < 0) | (known >= self.n)]
            if beyond.size:
                raise range_error(self, int(beyond.flat[0]))
            return self.activation(tf.gather(logits, index))
        self.in_graphs = True
        if self._listener is not None:
            self._listener(index)
        # For an index out of range, a gather gives zero on a GPU and XLA the nearest.
        inside = (index >= 0) & (index < self.n)
        found = self.activation(tf.gather(logits, tf.where(inside, index, 0)))
        return tf.where(inside, found, tf.constant(float("nan"), found.dtype))

    def mean(self, losses: Any, index: Any = None) -> tf.Tensor:
        """The mean of weights * losses, in the losses' dtype.

        Args:
            losses: one loss per example, [batch], or as a column, [batch, 1].
            index: the examples' indices, [batch] or [batch, 1]; `None`: the batch is
                the whole training set, in order.

        Raises:
            ValueError: for losses that are not one per index. (Without this check, n
                weights times a column of n losses would broadcast to n x n products.)
        """
        losses = tf.convert_to_tensor(losses)
        if not losses.dtype.is_floating:
            raise ValueError(
                "`losses` must be floating-point. "
                f"Received: losses of dtype {losses.dtype.name}"
            )
        weights = self(None if index is None else tf.convert_to_tensor(index))
        losses, weights = _without_column(losses), _without_column(weights)
        fits = losses.shape.is_compatible_with(weights.shape)
        if losses.shape.rank not in (1, None) or not fits:
            what = f"the {self.n} weights" if index is None else "the indices"
            raise ExampleWeightsError(
                "`losses` of tb.ExampleWeights.mean must be one per example, [batch], "
                f"like {what}. Do not reduce them (reduction=None, no tf.reduce_mean), "
                "and pass the batch's `index` if it is a part of the training set. "
                f"Received: losses of shape {losses.shape}, weights of shape "
                f"{weights.shape}"
            )
        if not (losses.shape.is_fully_defined() and weights.shape.is_fully_defined()):
            # A single loss would be broadcast to all weights. XLA drops assertions, and
            # TensorFlow's graphs drop a reshape to the same rank.
            rule = "`losses` of tb.ExampleWeights.mean must be one per example"
            same = tf.debugging.assert_equal(tf.size(losses), tf.size(weights), rule)
            with tf.control_dependencies([] if same is None else [same]):
                losses = tf.identity(losses)
            losses = tf.reshape(losses, tf.shape(weights), "ExampleWeights_mean_losses")
        return tf.reduce_mean(tf.cast(weights, losses.dtype) * losses)

    @contextlib.contextmanager
    def heard(self, listener: Callable[[tf.Tensor], None]) -> Iterator[None]:
        """While it is open, `listener` gets every index whose value is unknown."""
        self._listener = listener
        try:
            yield
        finally:
            self._listener = None


def _whole(index: Any) -> tf.Tensor:
    """Indices as integers that `tf.gather` accepts."""
    index = tf.convert_to_tensor(index)
    if not index.dtype.is_integer:
        raise ValueError(
            "`index` must be integers, one per example of the batch. Cast it with "
            f"tf.cast(index, tf.int32). Received: index of dtype {index.dtype.name}"
        )
    return index if index.dtype == tf.int32 else tf.cast(index, tf.int64)


def _without_column(values: tf.Tensor) -> tf.Tensor:
    """[batch, 1] as [batch]."""
    column = values.shape.rank == 2 and values.shape[1] == 1
    return tf.squeeze(values, axis=1) if column else values


@keras.saving.register_keras_serializable("tfbilevel")
class FeaturePenalties(_PositiveVector):
    """One learned L2 coefficient per input feature.

        penalty = 1/2 * sum_{d, c} activation(x)_d W_{dc}^2,      x = 0 at the start

    With the exponential every coefficient starts at 1 and stays positive.

    Args:
        n: number of features d, at least 1.
        activation: maps x to coefficients.

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
