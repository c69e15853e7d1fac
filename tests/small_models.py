"""A small model of weights per example, and a small problem, for tests of edges."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

import tfbilevel as tb

SGD = keras.optimizers.SGD


EXAMPLES, FEATURES = 6, 3


def network(*layers: Any, seed: int = 1) -> keras.Model:
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [keras.Input((FEATURES,)), *layers, keras.layers.Dense(2, name="last")]
    )


def mean_square(model: keras.Model, batch: tuple) -> tf.Tensor:
    inputs, targets = batch
    outputs = model(inputs, training=True)
    return tf.reduce_mean((tf.cast(outputs, tf.float32) - targets) ** 2)


def upper_loss(upper: Any, lower: keras.Model, batch: tuple) -> tf.Tensor:
    return mean_square(lower, batch)


def lower_loss(upper: Any, lower: keras.Model, batch: tuple) -> tf.Tensor:
    inputs, targets = batch
    outputs = tf.cast(lower(inputs, training=True), tf.float32)
    weights = tf.cast(upper(None), tf.float32)
    return tf.reduce_mean(weights * tf.reduce_mean((outputs - targets) ** 2, 1))


def full_batch(bad: int | None = None, repeat: int = 1) -> tf.data.Dataset:
    """Elements that are all alike, but for a NaN in the one numbered `bad`."""
    generator = np.random.default_rng(0)

    def part() -> tuple:
        return (
            generator.normal(size=(repeat, EXAMPLES, FEATURES)).astype("float32")[:1],
            generator.normal(size=(repeat, EXAMPLES, 2)).astype("float32")[:1],
        )

    inputs, targets = (np.repeat(a, repeat, axis=0) for a in part())
    if bad is not None:
        inputs[bad] = np.nan
    upper = tf.data.Dataset.from_tensor_slices((inputs, targets))
    (inputs,), (targets,) = part()
    return tb.pair(upper, tf.data.Dataset.from_tensors((inputs, targets)))


def unroll(**options: Any) -> tb.Unroll:
    return tb.Unroll(tb.InnerSolver(SGD(0.2), 3), **options)


def value_gap() -> tb.ValueGap:
    inner = tb.InnerSolver(SGD(0.1), 1)
    return tb.ValueGap(inner, SGD(0.1), tb.LinearRamp(0.0, 1.0, 9))


def make(*layers: Any, method: Any = None, **options: Any) -> tb.BilevelModel:
    lower = network(*layers)
    model = tb.BilevelModel(tb.ExampleWeights(EXAMPLES), lower, upper_loss, lower_loss)
    model.compile(method or unroll(), SGD(0.5), jit_compile=False, **options)
    return model


def quadratic(**options: Any) -> tb.Problem:
    return tb.Problem(
        lambda x, y, batch: 0.5 * tf.reduce_sum((y - 1.0) ** 2),
        lambda x, y, batch: 0.5 * tf.reduce_sum((y - x) ** 2),
        **options,
    )


def simplex(logits: list) -> list:
    """A projection that divides by zero where all entries are negative."""
    positive = [tf.nn.relu(v) for v in logits]
    return [v / tf.reduce_sum(v) for v in positive]
