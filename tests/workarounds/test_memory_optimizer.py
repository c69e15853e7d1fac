"""Loops within loops that TensorFlow's memory optimizer breaks by itself."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.eager import context

import tfbilevel as tb
from tfbilevel._keras.compilation import faster_with_xla
from tfbilevel._workarounds.memory_optimizer import without_memory_rewrites

SIZE = 4_000_000
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
PROBLEM = tb.Problem(
    lambda x, y, batch: upper_loss(x, y), lambda x, y, batch: lower_loss(x, y)
)
NOTHING = tb.Batches(None, None)


def by_minimize() -> Any:
    x, y = tf.ones([SIZE]), tf.zeros([SIZE])
    return tb.minimize(PROBLEM, METHOD, x, y, SGD(1e-9), NOTHING, steps=2).lower


def by_fit() -> Any:
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
    model.compile(METHOD, SGD(1e-9), jit_compile=False, steps_per_execution=2)
    one = tf.data.Dataset.from_tensors(0.0)
    model.fit(tb.pair(one, one).repeat(2), verbose=0)
    return levels[1].kernel.value


@pytest.mark.slow
@pytest.mark.parametrize("run", [by_minimize, by_fit])
def test_large_sums_in_a_loop_within_a_loop(run):
    """Without `without_memory_rewrites`: AlreadyExistsError in the second run, which
    finds what the first one has left."""
    run()
    found = run()
    np.testing.assert_allclose(found[:3], expected(2), rtol=1e-5)


@pytest.mark.slow
def test_the_choice_of_a_compilation_runs_them_too():
    """Two outer steps in one call, as where a step loops over its tasks."""

    def two_steps(x: Any, y: Any, data: Any) -> Any:
        def body(count: Any, x: Any, y: Any) -> Any:
            step = METHOD.step(PROBLEM, x, y, NOTHING, METHOD.init(PROBLEM, x, y))
            return count + 1, x - 1e-9 * step.upper_gradient, step.lower

        return tf.while_loop(lambda count, x, y: count < 2, body, (0, x, y))[1:]

    arguments = tf.ones([SIZE]), tf.zeros([SIZE])
    bare = tf.function(two_steps, autograph=False)
    with pytest.raises(tf.errors.AlreadyExistsError):  # the guard is needed here
        for _ in range(2):
            bare(*arguments, 0.0)
    assert faster_with_xla(two_steps, arguments, 0.0) in (True, False)


def test_options_are_as_they_were():
    before = context.context().function_call_options
    with pytest.raises(RuntimeError), without_memory_rewrites():
        now = context.context().function_call_options
        config = tf.compat.v1.ConfigProto.FromString(now.config_proto_serialized)
        assert config.graph_options.rewrite_options.memory_optimization == 1
        raise RuntimeError
    assert context.context().function_call_options is before
