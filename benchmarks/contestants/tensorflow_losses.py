"""The two losses, and what else the TensorFlow contestants share."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf


def logits(variables: list, images: tf.Tensor) -> tf.Tensor:
    hidden = images
    for kernel, bias in zip(variables[:-2:2], variables[1:-2:2], strict=True):
        hidden = tf.sigmoid(tf.matmul(hidden, kernel) + bias)
    # On CPUs the gradient of a kernel with ten columns is a slow product; that of its
    # transpose is fast.
    last = tf.transpose(variables[-2])
    return tf.matmul(hidden, last, transpose_b=True) + variables[-1]


def cross_entropy(variables: list, images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    # As in JAX, because the fused operation's second derivative makes 5,000 products.
    log_probabilities = tf.nn.log_softmax(logits(variables, images))
    return -tf.reduce_sum(tf.one_hot(labels, 10) * log_probabilities, axis=1)


def upper_loss(x: tf.Tensor, y: list, batch: tuple) -> tf.Tensor:
    """f: cross-entropy of the clean validation set."""
    del x
    return tf.reduce_mean(cross_entropy(y, *batch))


def lower_loss(x: tf.Tensor, y: list, batch: tuple) -> tf.Tensor:
    """g: weighted cross-entropy of the training set."""
    return tf.reduce_mean(tf.sigmoid(x) * cross_entropy(y, *batch))


def minibatch_loss(x: tf.Tensor, y: list, batch: tuple) -> tf.Tensor:
    """g on some training images, which come with their indices."""
    images, labels, indices = batch
    return lower_loss(tf.gather(x, indices), y, (images, labels))


def compiled_ahead(step: Callable, variant: str, *arguments: Any) -> Callable:
    """A step compiled for such arguments, by XLA in the variant "xla".

    The concrete function, because a `tf.function` looks at its arguments in every call,
    which takes a fifth of stocBiO's small step.
    """
    function = tf.function(step, autograph=False, jit_compile=variant == "xla")
    return function.get_concrete_function(*arguments)


def use_threads(threads: int) -> None:
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)


def wait(result: object) -> None:
    """Eager CPU calls are synchronous. A read waits for all that a GPU was given."""
    tf.nest.flatten(result)[0].numpy()


def device_peak() -> int:
    return tf.config.experimental.get_memory_info("GPU:0")["peak"]
