"""The examples of a batch, along one axis of its tensors."""

from typing import Any

import tensorflow as tf


def number_of_examples(leaf: Any, axis: int) -> Any:
    """How many examples a tensor holds: an integer, or a tensor if that is not known.

    Args:
        leaf: a dense, sparse or ragged tensor.
        axis: the axis of the examples.
    """
    if leaf.shape[axis] is not None:
        return leaf.shape[axis]
    if isinstance(leaf, tf.SparseTensor):
        return leaf.dense_shape[axis]
    if isinstance(leaf, tf.RaggedTensor):
        return leaf.bounding_shape(axis)
    return tf.shape(leaf)[axis]


def sparse_examples(
    leaf: tf.SparseTensor, axis: int, begin: Any, size: Any
) -> tf.SparseTensor:
    """The examples begin, ..., begin + size - 1 of a sparse tensor."""
    before = [tf.zeros([], tf.int64)] * axis
    after = [tf.zeros([], tf.int64)] * (leaf.shape.rank - axis - 1)
    sizes = tf.unstack(leaf.dense_shape, leaf.shape.rank)
    sizes[axis] = tf.cast(size, tf.int64)
    first = tf.stack([*before, tf.cast(begin, tf.int64), *after])
    return tf.sparse.slice(leaf, first, tf.stack(sizes))
