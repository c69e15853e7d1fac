"""One weight per training example."""

from typing import Any

import keras
import tensorflow as tf

from tfbilevel._keras.layers.by_index import ByIndex, matched
from tfbilevel._keras.layers.positive_vector import PositiveVector
from tfbilevel._keras.layers.weighted_mean import one_loss_each, without_column


@keras.saving.register_keras_serializable("tfbilevel")
class ExampleWeights(ByIndex, PositiveVector):
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
        losses = one_loss_each(losses)
        weights = self(None if index is None else tf.convert_to_tensor(index))
        weights = without_column(weights)
        rule = "`losses` of tb.ExampleWeights.mean must be one per example, [batch]"
        what = f"the {self.n} weights" if index is None else "the indices"
        remedy = (
            f"like {what}. Do not reduce them (reduction=None, no tf.reduce_mean), "
            "and pass the batch's `index` if it is a part of the training set."
        )
        losses = matched(losses, weights, 1, rule, remedy)
        return tf.reduce_mean(tf.cast(weights, losses.dtype) * losses)
