"""Cross-entropies with right and fast second derivatives."""

from typing import Any

import tensorflow as tf


def sparse_cross_entropy(logits: Any, labels: Any) -> tf.Tensor:
    r"""Cross-entropy of integer labels, one value per example.

        l_i = -log softmax(z_i)[labels_i]

    The first derivative costs as much as that of TensorFlow's fused operation, plus
    memory for a one-hot copy of the labels, which is as large as the logits. For the
    second derivative the fused operation computes a tiny matrix product per example,
    and this form does not. Bilevel training, which differentiates lower losses twice,
    is therefore faster with it. For labels that are probabilities, or learned, use
    `tb.soft_cross_entropy`.

    A label out of range raises an error at once if its value is known. Otherwise, in a
    compiled step, the example's loss is NaN, at which training stops.

    Args:
        logits: z, [..., classes], floating and finite: what a network returns before
            any softmax.
        labels: integers from 0 to classes - 1, [...]: one axis less than `logits`.

    Returns:
        The losses, [...], in the logits' precision. Their mean is the usual loss.

    Raises:
        ValueError: for labels that are not integers, have another shape, or are known
            to be out of range.

    Example:
        >>> logits = tf.constant([[2.0, 0.0], [0.0, 0.0]])
        >>> losses = tb.sparse_cross_entropy(logits, tf.constant([0, 1]))
        >>> [round(float(loss), 4) for loss in losses]  # log(1 + exp(-2)), log 2
        [0.1269, 0.6931]
    """
    logits, labels, inside = with_class_numbers(logits, labels)
    targets = tf.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    losses = -tf.reduce_sum(targets * tf.nn.log_softmax(logits), axis=-1)
    return tf.where(inside, losses, tf.constant(float("nan"), logits.dtype))


def soft_cross_entropy(logits: Any, labels: Any) -> tf.Tensor:
    r"""Cross-entropy of soft labels, one value per example.

        l_i = -sum over c of t_ic log softmax(z_i)_c
        dl_i / dz_i = (sum over c of t_ic) softmax(z_i) - t_i
        dl_i / dt_i = -log softmax(z_i)

    The labels t may be learned: they may depend on the upper variables. The derivatives
    above and all higher ones are right, whatever the labels sum to. TensorFlow's
    `softmax_cross_entropy_with_logits` uses softmax(z) - t as the first derivative,
    and treats that as constant in t. (While tfbilevel differentiates, TensorFlow's
    function is corrected; this one needs no correction.) Cost: a few operations of the
    size of the logits. For class numbers use `tb.sparse_cross_entropy`.

    Args:
        logits: z, [..., classes], floating and finite: what a network returns before
            any softmax.
        labels: t, floating, of the same shape. They need not sum to one.

    Returns:
        The losses, [...], in the logits' precision. Their mean is the usual loss.

    Raises:
        ValueError: for labels that are integers or of another shape.

    Example:
        >>> logits = tf.constant([[2.0, 0.0], [0.0, 0.0]])
        >>> labels = tf.constant([[1.0, 0.0], [0.5, 0.5]])
        >>> losses = tb.soft_cross_entropy(logits, labels)
        >>> [round(float(loss), 4) for loss in losses]  # log(1 + exp(-2)), log 2
        [0.1269, 0.6931]
    """
    logits, labels = _tensors(logits, labels)
    if not labels.dtype.is_floating:
        raise ValueError(
            "`labels` must be floating, one probability per class. For class numbers "
            f"use tb.sparse_cross_entropy. Received: labels of {labels.dtype.name}"
        )
    if not labels.shape.is_compatible_with(logits.shape):
        raise ValueError(
            "`labels` must have the shape of `logits`, one probability per class. For "
            "class numbers use tb.sparse_cross_entropy. "
            f"Received: labels {labels.shape} for logits {logits.shape}"
        )
    labels = tf.cast(labels, logits.dtype)
    return -tf.reduce_sum(labels * tf.nn.log_softmax(logits), axis=-1)


def with_class_numbers(logits: Any, labels: Any) -> tuple:
    """Logits and integer labels as tensors, and whether each label is in range.

    Raises:
        ValueError: as `sparse_cross_entropy`.
    """
    logits, labels = _tensors(logits, labels)
    if not labels.dtype.is_integer:
        raise ValueError(
            "`labels` must be integers, one class number per example. "
            "(tb.soft_cross_entropy takes probabilities.) "
            f"Received: labels of {labels.dtype.name}"
        )
    if not labels.shape.is_compatible_with(logits.shape[:-1]):
        raise ValueError(
            "`labels` must have the shape of `logits` without its last axis. Squeeze "
            "or index them so that each example has one. "
            f"Received: labels {labels.shape} for logits {logits.shape}"
        )
    classes = logits.shape[-1]
    inside = (labels >= 0) & (labels < classes)
    known = tf.get_static_value(labels)
    if known is not None and ((known < 0) | (known >= classes)).any():
        beyond = known[(known < 0) | (known >= classes)].flat[0]
        raise ValueError(
            f"`labels` must be from 0 to {classes - 1}, the last class of `logits`. "
            "Count the classes from 0, and let the network have one output for each. "
            f"Received: label {beyond} for logits {logits.shape}"
        )
    return logits, labels, inside


def _tensors(logits: Any, labels: Any) -> tuple[tf.Tensor, tf.Tensor]:
    """Both as tensors; the number of classes must be known."""
    logits, labels = tf.convert_to_tensor(logits), tf.convert_to_tensor(labels)
    shape = logits.shape
    if not logits.dtype.is_floating or not shape.rank or shape[-1] is None:
        raise ValueError(
            "`logits` must be floating, [..., classes] with a known number of "
            "classes. Give what the network returns before any softmax. "
            f"Received: logits {shape} of {logits.dtype.name}"
        )
    return logits, labels
