"""How the choice between a plain graph and XLA is made."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from small_models import full_batch, lower_loss, network, unroll, upper_loss
from suites import fast_where

import tfbilevel as tb
from tfbilevel._keras import compilation as _compilation
from tfbilevel._keras.compilation import faster_with_xla


@pytest.fixture
def xla_fails(monkeypatch):
    """Every function that is to be compiled with XLA raises; the list counts them."""
    made, original = [], tf.function

    def function(*arguments, jit_compile=None, **keywords):
        if not jit_compile:
            return original(*arguments, **keywords)

        def fail(*_):
            made.append(1)
            raise tf.errors.ResourceExhaustedError(None, None, "out of memory\nmore")

        return fail

    monkeypatch.setattr(_compilation.tf, "function", function)
    return made


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

    with pytest.warns(UserWarning, match="runs the outer step as a plain graph"):
        assert faster_with_xla(function, (tf.zeros([4]),), tf.range(4.0)) is False


def test_any_error_of_xla_is_said_in_one_line(xla_fails):
    with pytest.warns(UserWarning, match="ResourceExhaustedError: out of memory$"):
        assert faster_with_xla(tf.add, (tf.zeros([4]),), tf.range(4.0)) is False
    assert xla_fails == [1]


@pytest.mark.parametrize("inside_loop", [False, True])
def test_convolutions_on_a_cpu_are_not_tried(xla_fails, recwarn, inside_loop):
    kernel = tf.ones([3, 3, 1, 1])

    def step(x, data):
        return tf.nn.conv2d(x + data, kernel, 1, "SAME")

    def loop(x, data):
        return tf.while_loop(
            lambda k, y: k < 2, lambda k, y: (k + 1, step(y, data)), (0, x)
        )[1]

    function = loop if inside_loop else step
    images = tf.ones([1, 8, 8, 1])
    assert faster_with_xla(function, (images,), images) is False
    assert not xla_fails and not recwarn


@pytest.mark.parametrize("limit", ["MOST_OPERATIONS", "LONGEST_STEP"])
def test_what_would_take_long_is_not_tried(xla_fails, monkeypatch, limit):
    monkeypatch.setattr(_compilation, limit, 0)
    assert faster_with_xla(tf.add, (tf.zeros([4]),), tf.range(4.0)) is False
    assert not xla_fails


def _model(method):
    model = tb.BilevelModel(tb.ExampleWeights(6), network(), upper_loss, lower_loss)
    model.compile(method, keras.optimizers.SGD(0.1))
    return model


def test_fit_falls_back_once_and_remembers_it_for_the_method(xla_fails):
    method = unroll()
    model = _model(method)
    with pytest.warns(UserWarning, match="out of memory"):
        model.fit(full_batch(), verbose=0)
    model.compile(method, keras.optimizers.SGD(0.2))
    model.fit(full_batch(), verbose=0)  # pytest makes a second warning an error
    assert model.jit_compile is False and xla_fails == [1]
    model.compile(unroll(), keras.optimizers.SGD(0.2))
    with pytest.warns(UserWarning, match="out of memory"):
        model.fit(full_batch(), verbose=0)
    assert xla_fails == [1, 1]


def test_what_xla_would_take_off_the_host_is_not_tried(xla_fails):
    inner = tb.InnerSolver(keras.optimizers.SGD(0.1), 2)
    model = _model(tb.Unroll(inner, memory="host"))
    model.fit(full_batch(), verbose=0)
    assert model.jit_compile is False and not xla_fails


@pytest.mark.parametrize(
    ("verbose", "lines"), fast_where(lambda verbose, lines: lines, [(0, 0), (2, 1)])
)
def test_a_long_trial_is_announced(monkeypatch, capsys, verbose, lines):
    monkeypatch.setattr(_compilation, "PATIENCE", 0.0)
    _model(unroll()).fit(full_batch(), verbose=verbose)
    assert capsys.readouterr().out.count("XLA compiles the outer step") == lines


def test_an_error_of_the_function_itself_is_raised():
    def function(x, data):
        with tf.control_dependencies([tf.debugging.assert_positive(x)]):
            return x + data

    with pytest.raises(tf.errors.InvalidArgumentError, match="assertion failed"):
        faster_with_xla(function, (tf.zeros([4]),), tf.range(4.0))
