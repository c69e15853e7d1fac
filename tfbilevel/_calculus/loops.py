"""Loops that hold only one iteration in memory."""

from collections.abc import Callable

import tensorflow as tf


def serial_loop(unfinished: Callable, body: Callable, begin: tuple, most: int) -> tuple:
    """`tf.while_loop` with at most `most` iterations, run one after the other.

    By default TensorFlow runs up to ten iterations in parallel and keeps the results
    of all of them: many times the memory, and no faster here.
    """
    return tf.while_loop(
        unfinished, body, begin, maximum_iterations=most, parallel_iterations=1
    )
