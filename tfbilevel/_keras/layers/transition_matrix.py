"""How classes are confused: a learned matrix between true and given labels."""

import numbers
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbilevel._core.arguments import require_count, require_number
from tfbilevel._keras.layers.upper_layer import UpperLayer
from tfbilevel._keras.losses import with_class_numbers

SMALLEST = 1e-6  # a zero could not be learned
ROUNDING = 1e-3  # of sums of rows


@keras.saving.register_keras_serializable("tfbilevel")
class TransitionMatrix(UpperLayer):
    r"""A learned matrix T of how labels are confused, and the loss corrected by it.

        T[k, j] = P(given label = j | true class = k) = softmax of row k of x
        l_i = -log sum over k of softmax(z_i)_k T[k, given_i]

    Training on l_i (forward correction) finds the network's probabilities of the *true*
    classes although the labels are wrong, if T is right. The upper problem learns T
    from a few trusted labels.

    Cost: a few operations of the size of the logits. Memory: K x K numbers. The noise
    must depend on the class alone. If it depends on the example, prefer
    `tb.ExampleWeights` or `tb.LabelCorrection`, which have numbers for each example, or
    `tb.LossWeights`. Trusted labels must be of every class: of a class without one, the
    upper loss says little.

    Args:
        classes: K, at least 2.
        start: T at the start: a matrix, [K, K], whose rows sum to 1, such as that of
            Gold Loss Correction; or a number, the diagonal, with the rest of each row
            shared by the other classes. Entries below 1e-6 start there, since a zero
            could not be learned.
        **keywords: arguments of `keras.layers.Layer`.

    Call it with logits, [..., K] (or log-probabilities), and given labels, integers
    [...], for the losses, [...], in the logits' precision. T has the variables'
    precision: float32 even under the policy "mixed_float16". A label that is out of
    range raises an error if its value is known; otherwise, in a compiled step, its loss
    is NaN, at which training stops.

    Raises:
        ValueError: if `classes` or `start` are none of these; when called, for logits
            of another number of classes or labels that do not fit them.

    Example:
        >>> transition = tb.TransitionMatrix(2, start=0.75)
        >>> logits = tf.constant([[0.0, 0.0], [9.0, 0.0]])
        >>> given = tf.constant([0, 1])
        >>> [round(float(loss), 2) for loss in transition(logits, given)]
        [0.69, 1.39]
        >>> transition.matrix().numpy().round(2).tolist()
        [[0.75, 0.25], [0.25, 0.75]]
        >>> transition.posterior(logits, given).numpy().round(2).tolist()
        [[0.75, 0.25], [1.0, 0.0]]

    References:
        Patrini et al. (2017), Making deep neural networks robust to label noise: a loss
        correction approach. arXiv:1609.03683. Hendrycks et al. (2018), Using trusted
        data to train deep networks on labels corrupted by severe noise.
        arXiv:1802.05300. T learned by hypergradients: Wang, Hu, Hu (2020), Training
        noise-robust deep neural networks via meta-learning. CVPR.
    """

    def __init__(self, classes: int, start: Any = 0.9, **keywords: Any):
        require_count(classes, "classes", 2)
        matrix = _matrix(start, classes)
        super().__init__(**keywords)
        self.classes = classes
        self._start = start if isinstance(start, numbers.Real) else matrix
        self.logits = self.add_weight(
            name="logits", shape=(classes, classes), initializer="zeros"
        )
        self.logits.assign(np.log(np.maximum(matrix, SMALLEST)))
        self.built = True

    def call(self, logits: Any, labels: Any) -> tf.Tensor:
        joint, inside = self._log_joint(logits, labels)
        losses = tf.cast(-tf.reduce_logsumexp(joint, axis=-1), _dtype(logits))
        return tf.where(inside, losses, tf.constant(float("nan"), losses.dtype))

    def matrix(self) -> tf.Tensor:
        """T, [K, K]: row k holds how often class k is given each label."""
        return tf.nn.softmax(tf.convert_to_tensor(self.logits))

    def posterior(self, logits: Any, labels: Any) -> tf.Tensor:
        """P(true class = k | example, given label) ~ softmax(z)_k T[k, given].

        Args:
            logits: z, [..., K].
            labels: the given labels, integers [...].

        Returns:
            The probabilities, [..., K], in the logits' precision. The largest one is
            the corrected label, and that of the given label says how far to trust it.
        """
        joint, inside = self._log_joint(logits, labels)
        shares = tf.cast(tf.nn.softmax(joint), _dtype(logits))
        nan = tf.constant(float("nan"), shares.dtype)
        return tf.where(tf.expand_dims(inside, -1), shares, nan)

    def _log_joint(self, logits: Any, labels: Any) -> tuple[tf.Tensor, tf.Tensor]:
        """log softmax(z)_k T[k, given], [..., K]; whether labels are in range."""
        logits, labels, inside = with_class_numbers(logits, labels)
        if logits.shape[-1] != self.classes:
            raise ValueError(
                "`logits` must have one entry per class on their last axis. Give the "
                "network as many outputs, or change `classes`. "
                f"Received: shape {logits.shape}, classes={self.classes}"
            )
        own = tf.convert_to_tensor(self.logits)
        dtype = logits.dtype if logits.dtype.size > own.dtype.size else own.dtype
        log_p = tf.nn.log_softmax(tf.cast(logits, dtype))
        # Row j: log T[k, j] for all k. Sums of logarithms do not underflow.
        columns = tf.transpose(tf.nn.log_softmax(tf.cast(own, dtype)))
        return log_p + tf.gather(columns, tf.where(inside, labels, 0)), inside

    def get_config(self) -> dict:
        start = self._start
        return {
            **super().get_config(),
            "classes": self.classes,
            "start": start.tolist() if isinstance(start, np.ndarray) else float(start),
        }


def _dtype(logits: Any) -> tf.DType:
    return tf.convert_to_tensor(logits).dtype


def _matrix(start: Any, classes: int) -> np.ndarray:
    """T at the start, [K, K]."""
    if isinstance(start, numbers.Real):
        rule = "above 0 and below 1, the diagonal of the matrix"
        remedy = "Or pass a matrix whose rows sum to 1."
        require_number(start, "start", lambda value: 0 < value < 1, rule, remedy)
        others = (1 - float(start)) / (classes - 1)
        return others + (float(start) - others) * np.eye(classes)
    try:
        matrix = np.asarray(start, float)
        fits = matrix.shape == (classes, classes)
        fits = fits and np.all(matrix >= 0)
        fits = fits and np.all(np.abs(matrix.sum(axis=1) - 1) < ROUNDING)
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(
            f"`start` must be a number, or a matrix of shape ({classes}, {classes}) "
            "without negative entries whose rows sum to 1: entry [k, j] is how often "
            "class k is given label j. Divide each row by its sum. "
            f"Received: start={start!r}"
        )
    return matrix
