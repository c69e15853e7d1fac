"""Loops that keep one iteration's memory."""

from collections.abc import Callable

import tensorflow as tf


def serial_loop(unfinished: Callable, body: Callable, begin: tuple, most: int) -> tuple:
    """`tf.while_loop` of at most so many iterations, one after the other.

    TensorFlow would start ten of them before the first one's results are used, and
    keep what they all computed: many times the memory for no speed.
    """
    return tf.while_loop(
        unfinished, body, begin, maximum_iterations=most, parallel_iterations=1
    )
