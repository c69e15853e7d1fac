"""How the choice between a plain graph and XLA is made."""

import numpy as np
import pytest
import tensorflow as tf

from tfbilevel._compilation import faster_with_xla


def test_many_small_operations_are_left_to_xla():
    """Five hundred kernels in a plain graph, one after fusion."""

    def function(x, data):
        for _ in range(250):
            x = tf.sin(x) + data
        return x

    assert faster_with_xla(function, (tf.zeros([4]),), tf.range(4.0)) is True


def test_what_xla_compiles_for_every_value_is_left_to_the_graph():
    """A shape out of the data: XLA's program is for that shape alone."""

    def function(x, shape):
        for _ in range(50):
            x = tf.reshape(x + 1.0, shape)
        return x

    turned = tf.constant([6, 1, 1, 1, 1, 1, 1])  # another one in every call
    assert faster_with_xla(function, (tf.zeros([6]),), turned) is False


def test_what_xla_cannot_run_is_left_to_the_graph():
    def function(x, data):
        return tf.numpy_function(np.cos, [x + data], tf.float32)

    assert faster_with_xla(function, (tf.zeros([4]),), tf.range(4.0)) is False


def test_an_error_of_the_function_itself_is_raised():
    def function(x, data):
        with tf.control_dependencies([tf.debugging.assert_positive(x)]):
            return x + data

    with pytest.raises(tf.errors.InvalidArgumentError, match="assertion failed"):
        faster_with_xla(function, (tf.zeros([4]),), tf.range(4.0))
