"""Moving statistics advance as often as the lower variables; numbers by hand."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from suites import fast_where

import tfbilevel as tb

N, D, MOMENTUM, STEPS = 6, 3, 0.9, 5
SGD = keras.optimizers.SGD
generator = np.random.default_rng(0)
INPUTS = generator.normal(size=(4, N, D)).astype("float32")
TARGETS = generator.normal(size=(4, N, 2)).astype("float32")


@keras.saving.register_keras_serializable("test_batch_statistics")
class Average(keras.layers.Layer):
    """A moving average of one's own: of the mean of squares."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = self.add_weight(shape=(), initializer="zeros", trainable=False)
        self.built = True

    def call(self, inputs: Any) -> Any:
        new = tf.reduce_mean(tf.square(inputs))
        self.seen.assign(MOMENTUM * self.seen + (1 - MOMENTUM) * new)
        return inputs


def make(method: tb.Method, *layers: Any, training: bool = True, **options: Any) -> Any:
    keras.utils.set_random_seed(1)
    dense = keras.layers.Dense(4)
    norm = keras.layers.BatchNormalization(momentum=MOMENTUM)
    lower = keras.Sequential(
        [keras.Input((D,)), dense, norm, *layers, keras.layers.Dense(2)]
    )

    def loss(upper: Any, lower: Any, batch: tuple) -> Any:
        weight = tf.reduce_mean(upper(None))
        outputs = lower(batch[0], training=training)
        return weight * tf.reduce_mean((outputs - batch[1]) ** 2)

    def outer(upper: Any, lower: Any, batch: tuple) -> Any:
        return tf.reduce_mean((lower(batch[0], training=False) - batch[1]) ** 2)

    model = tb.BilevelModel(tb.ExampleWeights(N), lower, outer, loss)
    model.compile(method, SGD(0.1), **({"jit_compile": False} | options))
    return model, dense, norm


def unroll(steps: int = STEPS) -> tb.Unroll:
    return tb.Unroll(tb.InnerSolver(SGD(0.2), steps))


def one_batch() -> Any:
    data = tf.data.Dataset.from_tensors((INPUTS[0], TARGETS[0]))
    return tb.pair(data, data)


@pytest.mark.parametrize(
    "options",
    fast_where(
        lambda options: "jit_compile" not in options,
        [{}, {"jit_compile": True}, {"run_eagerly": True}],
    ),
)
def test_of_one_batch_they_are_the_geometric_mean(options):
    model, dense, norm = make(unroll(), **options)
    model.fit(one_batch(), verbose=0)
    hidden = dense(INPUTS[0]).numpy()  # at the new weights
    kept = MOMENTUM**STEPS
    np.testing.assert_allclose(
        norm.moving_mean, (1 - kept) * hidden.mean(0), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
        norm.moving_variance, kept + (1 - kept) * hidden.var(0), rtol=1e-4
    )


def test_of_stacked_batches_each_step_sees_its_own():
    data = tf.data.Dataset.from_tensor_slices((INPUTS, TARGETS))
    first = tf.data.Dataset.from_tensors((INPUTS[0], TARGETS[0]))
    model, dense, norm = make(unroll(STEPS))
    model.fit(tb.pair(first, data, lower_batches=4), verbose=0)
    mean, variance = np.zeros(4), np.ones(4)
    for t in range(STEPS):
        hidden = dense(INPUTS[t % 4]).numpy()
        mean = MOMENTUM * mean + (1 - MOMENTUM) * hidden.mean(0)
        variance = MOMENTUM * variance + (1 - MOMENTUM) * hidden.var(0)
    np.testing.assert_allclose(norm.moving_mean, mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(norm.moving_variance, variance, rtol=1e-4)


def test_a_moving_average_of_one_s_own_advances_too_and_seeds_once():
    layer, dropout = Average(), keras.layers.Dropout(0.5, seed=3)
    model, dense, norm = make(unroll(), layer, dropout)
    seed = dropout.seed_generator.state.numpy()
    model.fit(one_batch(), verbose=0)
    hidden = dense(INPUTS[0]).numpy()
    normal = (hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + norm.epsilon)
    squares = np.mean((norm.gamma.numpy() * normal + norm.beta.numpy()) ** 2)
    expected = (1 - MOMENTUM**STEPS) * squares
    assert float(layer.seen) == pytest.approx(expected, rel=1e-4)
    once = keras.random.SeedGenerator(3)
    once.next()
    assert np.array_equal(dropout.seed_generator.state.numpy(), once.state.numpy())
    assert not np.array_equal(seed, once.state.numpy())


def test_statistics_that_no_loss_moves_stay():
    model, _, norm = make(unroll(), training=False)
    model.fit(one_batch(), verbose=0)
    assert not norm.moving_mean.numpy().any()


def test_methods_say_how_often_they_step():
    inner = tb.InnerSolver(SGD(0.1), 7)
    assert unroll(7).lower_steps == tb.Implicit(inner).lower_steps == 7
    assert tb.AugmentedLagrangian(SGD(0.1), 6).lower_steps == 6
    # Here the inner solver moves a copy.
    assert tb.ValueGap(inner, SGD(0.1), 1.0).lower_steps == 1
    assert tb.GradientNorm(SGD(0.1), 1.0).lower_steps == 1
