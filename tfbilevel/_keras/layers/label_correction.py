"""A learned label for each training example."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbilevel._core.arguments import require_count, require_number
from tfbilevel._keras.layers.by_index import ByIndex, matched
from tfbilevel._keras.layers.upper_layer import UpperLayer
from tfbilevel._keras.layers.weighted_mean import without_column
from tfbilevel._keras.losses import soft_cross_entropy


@keras.saving.register_keras_serializable("tfbilevel")
class LabelCorrection(ByIndex, UpperLayer):
    r"""A learned soft label for each training example.

        t_i = softmax(x_i),      at the start: `confidence` for the given label
        l_i = -sum over c of t_ic log softmax(z_i)_c

    The lower problem trains on t. The upper problem changes t so that the trained
    network does well on trusted examples. A label can become another one, where
    `tb.ExampleWeights` can only ignore it.

    Memory: n x K numbers, and as many for each slot of the upper optimizer. Each label
    moves only when its example is in the batch; use `tb.LazyAdam`, which leaves the
    others alone. With n x K numbers and few trusted examples, the labels fit what the
    trusted examples need, and no more: stop early, and prefer `tb.TransitionMatrix`,
    K x K numbers, where the noise depends on the class.

    Args:
        labels: the given labels, integers from 0 to classes - 1, [n].
        classes: K, at least 2.
        confidence: the probability of the given label at the start, at least
            1 / classes and below 1; the other classes share the rest. With much
            confidence the softmax is flat, and labels move slowly.
        **keywords: arguments of `keras.layers.Layer`.

    Call it with the examples' indices (integers of any shape) for their soft labels, or
    with `None` for all in order. In a loss prefer `loss`, which checks shapes. For
    other soft labels at the start, assign their logarithms to `logits`.

    Indices must be from 0 to n - 1. If their values are known, others raise an error
    at once. In a compiled step the labels become NaN: `fit`, `train_on_batch` and
    `tb.minimize` then stop at that step and name the index.

    The labels have the variables' precision: float32 even under the policy
    "mixed_float16".

    Raises:
        ValueError: if an argument is none of these; when called, for an index that is
            out of range or not an integer.

    Example:
        >>> labels = tb.LabelCorrection([1, 0, 1], classes=2, confidence=0.75)
        >>> labels(tf.constant([0, 1])).numpy().round(2).tolist()
        [[0.25, 0.75], [0.75, 0.25]]
        >>> losses = labels.loss(tf.zeros([2, 2]), tf.constant([0, 1]))
        >>> [round(float(loss), 4) for loss in losses]
        [0.6931, 0.6931]
        >>> labels.corrected().numpy().tolist()
        [1, 0, 1]

    References:
        Algan, Ulusoy (2020), Meta soft label generation for noisy labels.
        arXiv:2007.05836. Vyas, Saxena, Voice (2020), Learning soft labels via meta
        learning. arXiv:2009.09496.
    """

    def __init__(
        self, labels: Any, classes: int, confidence: float = 0.9, **keywords: Any
    ):
        require_count(classes, "classes", 2)
        given = _given(labels, classes)
        rule = f"at least 1 / classes, {1 / classes:.3g}, and below 1"
        require_number(
            confidence, "confidence", lambda value: 1 / classes <= value < 1, rule
        )
        super().__init__(**keywords)
        self.n, self.classes, self.confidence = len(given), classes, float(confidence)
        self.activation = tf.nn.softmax
        self._given = given
        self.logits = self.add_weight(
            name="logits", shape=(self.n, classes), initializer="zeros"
        )
        others = (1 - self.confidence) / (classes - 1)
        start = np.full((self.n, classes), np.log(others))
        start[np.arange(self.n), given] = np.log(self.confidence)
        self.logits.assign(start)
        self.built = True

    def loss(self, logits: Any, index: Any = None) -> tf.Tensor:
        """The cross-entropies with the soft labels, [batch], in the logits' precision.

        Args:
            logits: z, [batch, K]: what the network returns before any softmax.
            index: the examples' indices, [batch] or [batch, 1]; `None`: the batch is
                the whole training set, in order.

        Raises:
            ValueError: for logits that are not one row per index, or of another number
                of classes.
        """
        logits = tf.convert_to_tensor(logits)
        if index is not None:
            index = without_column(tf.convert_to_tensor(index))
        labels = self(index)
        what = f"the {self.n} labels" if index is None else "the indices"
        logits = matched(
            logits,
            labels,
            2,
            "`logits` of tb.LabelCorrection.loss must be one row of "
            f"{self.classes} per example, [batch, classes]",
            f"like {what}. Pass the batch's `index` if it is a part of the training "
            "set.",
        )
        return soft_cross_entropy(logits, labels)

    def corrected(self) -> tf.Tensor:
        """The likeliest class of every example, integers [n]."""
        return tf.argmax(tf.convert_to_tensor(self.logits), axis=1)

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "labels": self._given.tolist(),
            "classes": self.classes,
            "confidence": self.confidence,
        }


def _given(labels: Any, classes: int) -> np.ndarray:
    """The given labels, [n]."""
    given = np.asarray(labels)
    if given.ndim == 2 and given.shape[1] == 1:
        given = given[:, 0]
    if given.ndim != 1 or not given.size or not np.issubdtype(given.dtype, np.integer):
        raise ValueError(
            "`labels` must be integers, one class number per training example, [n]. "
            f"Received: shape {given.shape} of {given.dtype}"
        )
    beyond = given[(given < 0) | (given >= classes)]
    if beyond.size:
        raise ValueError(
            f"`labels` must be from 0 to {classes - 1}. Count the classes from 0, or "
            f"change `classes`. Received: label {beyond[0]}, classes={classes}"
        )
    return given.copy()
