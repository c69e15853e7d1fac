"""Batches that resume, and the loss that most scripts have."""

import tensorflow as tf


def index_batches(count: int, size: int, seed: int, first: int = 0) -> tf.data.Dataset:
    """Batches of `size` indices below `count` without end, from the `first` one on.

    One random permutation after the other, each cut into batches; what is left of one
    is dropped. Batch n depends on the arguments and n alone, so that a resumed run goes
    on where it was.
    """
    if not 0 < size <= count:
        raise ValueError(
            "`size` must be from 1 to `count`. Use smaller batches or more examples. "
            f"Received: size={size}, count={count}"
        )
    per_permutation = count // size
    permutations, rest = divmod(first, per_permutation)

    def batches(number: tf.Tensor) -> tf.data.Dataset:
        key = tf.stack([tf.constant(seed, tf.int64), number])
        order = tf.random.experimental.stateless_shuffle(tf.range(count), key)
        order = order[: per_permutation * size]
        return tf.data.Dataset.from_tensor_slices(tf.reshape(order, [-1, size]))

    return tf.data.Dataset.counter(permutations).flat_map(batches).skip(rest)


def cross_entropy(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """Cross-entropy of integer labels, one value per example.

    Twice differentiated, TensorFlow's fused operation makes a tiny matrix product for
    every example; this form makes none.
    """
    targets = tf.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return -tf.reduce_sum(targets * tf.nn.log_softmax(logits), axis=-1)
