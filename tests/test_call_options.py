"""Loops within loops that TensorFlow's memory optimizer breaks by itself."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbilevel as tb

SIZE = 16_000_000
SGD = keras.optimizers.SGD


def upper_loss(x: Any, y: Any) -> Any:
    return 0.5 * tf.reduce_mean((y - x) ** 2)


def lower_loss(x: Any, y: Any) -> Any:
    """Its gradient in y is a sum of four terms, of which three are the same always."""
    moving = tf.reduce_sum(tf.sin(y) * x)
    first = tf.reduce_sum(y * tf.sin(x)) + tf.reduce_sum(y * tf.cos(x))
    return first + moving + tf.reduce_sum(y * x)


def expected(steps: int) -> float:
    """The same in NumPy, for one of the equal entries: y after so many outer steps."""
    y = 0.0
    for _ in range(3 * steps):
        y -= 0.1 * (np.sin(1.0) + np.cos(1.0) + 1.0 + np.cos(y))
    return y


METHOD = tb.Unroll(tb.InnerSolver(SGD(0.1), 3))


def by_minimize() -> Any:
    problem = tb.Problem(
        lambda x, y, batch: upper_loss(x, y), lambda x, y, batch: lower_loss(x, y)
    )
    ones, zeros = tf.ones([SIZE]), tf.zeros([SIZE])
    nothing = tb.Batches(None, None)
    return tb.minimize(problem, METHOD, ones, zeros, SGD(1e-9), nothing, steps=4).lower


def by_fit(jit_compile: bool | str = False) -> Any:
    levels = []
    for value in (1.0, 0.0):
        layer = keras.layers.Dense(1, use_bias=False)
        layer.build((None, SIZE))
        layer.kernel.assign(tf.fill([SIZE, 1], value))
        levels.append(layer)
    model = tb.BilevelModel(
        *levels,
        lambda upper, lower, batch: upper_loss(upper.kernel, lower.kernel.value),
        lambda upper, lower, batch: lower_loss(upper.kernel.value, lower.kernel.value),
    )
    model.compile(METHOD, SGD(1e-9), jit_compile=jit_compile, steps_per_execution=4)
    one = tf.data.Dataset.from_tensors(0.0)
    model.fit(tb.pair(one, one).repeat(4), verbose=0)
    return levels[1].kernel.value


def by_fit_that_chooses() -> Any:
    """Which times the compiled step by itself."""
    return by_fit("auto")


@pytest.mark.parametrize("run", [by_minimize, by_fit, by_fit_that_chooses])
def test_large_sums_in_a_loop_within_a_loop(run):
    """Without `without_memory_rewrites`: AlreadyExistsError in the second run, which
    finds what the first one has left."""
    run()
    found = run()
    np.testing.assert_allclose(found[:3], expected(4), rtol=1e-5)


def test_options_are_as_they_were():
    from tensorflow.python.eager import context

    from tfbilevel._call_options import without_memory_rewrites

    before = context.context().function_call_options
    with pytest.raises(RuntimeError), without_memory_rewrites():
        now = context.context().function_call_options
        config = tf.compat.v1.ConfigProto.FromString(now.config_proto_serialized)
        assert config.graph_options.rewrite_options.memory_optimization == 1
        raise RuntimeError
    assert context.context().function_call_options is before
