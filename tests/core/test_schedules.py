"""Schedules against the formulas, for integer tensors of either size."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from suites import fast_where

import tfbilevel as tb


@pytest.mark.parametrize("dtype", [tf.int32, tf.int64])
@pytest.mark.parametrize(
    "schedule, formula",
    [
        (tb.Constant(0.3), lambda k: 0.3),
        (tb.LinearRamp(0.1, 0.7, 30), lambda k: 0.1 + 0.6 * min(k / 30, 1)),
        (tb.LinearRamp(2.0, -1.0, 4), lambda k: 2 - 3 * min(k / 4, 1)),
        (
            tb.CosineDecay(0.3, 0.1, 30),
            lambda k: 0.2 + 0.1 * math.cos(math.pi * min(k / 30, 1)),
        ),
        (tb.InversePower(0.5, 0.3), lambda k: 0.5 * (k + 1) ** -0.3),
        (tb.Geometric(3.0, 0.9), lambda k: 3 * 0.9**k),
        (tb.Geometric(1e-3, 1.5), lambda k: 1e-3 * 1.5**k),
    ],
)
def test_values(schedule: tb.Schedule, formula, dtype: tf.DType) -> None:
    steps = [0, 1, 2, 3, 4, 5, 29, 30, 31, 60]
    compiled = tf.function(schedule, autograph=False)
    for k in steps:
        for made in (schedule(tf.constant(k, dtype)), compiled(tf.constant(k, dtype))):
            assert made.dtype == tf.float64 and made.shape.rank == 0
            assert float(made) == pytest.approx(formula(k), rel=1e-13)


def test_ramp_of_the_published_penalty() -> None:
    """gamma_{k+1} = min(gamma_max, gamma_k + (max - init) / steps), by addition."""
    ramp, gamma = tb.LinearRamp(0.0, 0.2, steps=30), 0.0
    for k in range(40):
        assert float(ramp(tf.constant(k))) == pytest.approx(gamma, abs=1e-14)
        gamma = min(0.2, gamma + 0.2 / 30)


def test_a_schedule_of_ones_own() -> None:
    class Root(tb.Schedule):
        def __call__(self, step: tf.Tensor) -> tf.Tensor:
            return tf.sqrt(tf.cast(step, tf.float64) + 1.0)

    problem = tb.Problem(lambda x, y, b: x * y, lambda x, y, b: (y - x) ** 2)
    method = tb.GradientNorm(keras.optimizers.SGD(0.1), Root())
    x = y = tf.constant(1.0)
    state = method.init(problem, x, y)
    for k in range(3):
        step = method.step(problem, x, y, tb.Batches(None, None), state)
        state = step.state
        assert float(step.metrics["weight"]) == pytest.approx(math.sqrt(k + 1))


def test_the_weight_moves_with_the_outer_steps_and_is_scaled() -> None:
    """d_x of the value gap for gamma = 0, 2, 4: c = 1, 1/2, 1/4 of each.

    f = 0.5 (y - 1)^2 + x, g = 0.5 (y - x)^2, v constant: f_x = 1, g_x = x - y.
    """
    problem = tb.Problem(
        lambda x, y, b: 0.5 * (y - 1) ** 2 + x, lambda x, y, b: 0.5 * (y - x) ** 2
    )
    method = tb.ValueGap(None, keras.optimizers.SGD(0.0), tb.LinearRamp(0.0, 4.0, 2))
    x, y = tf.constant(3.0, tf.float64), tf.constant(1.0, tf.float64)
    state = method.init(problem, x, y)
    gradients = []
    for _ in range(4):
        step = method.step(problem, x, y, tb.Batches(None, None), state)
        gradients.append(float(step.upper_gradient))
        state = step.state
    want = [1.0, (1 + 2 * 2) / 2, (1 + 4 * 2) / 4, (1 + 4 * 2) / 4]
    np.testing.assert_allclose(gradients, want, rtol=1e-7)


# Schedules of Keras, which go wherever ours do.

SGD = keras.optimizers.SGD(0.1)
HALVED = keras.optimizers.schedules.ExponentialDecay(0.4, 1, 0.5)  # 0.4 * 0.5^k
OURS = tb.Geometric(0.4, 0.5)
TAKERS = {
    "gap weight": lambda s: tb.ValueGap(tb.InnerSolver(SGD, 2), SGD, s),
    "norm weight": lambda s: tb.GradientNorm(SGD, s),
    "inner rate": lambda s: tb.Unroll(tb.InnerSolver(SGD, 2, learning_rate=s)),
    "atol": lambda s: tb.Implicit(tb.InnerSolver(SGD, 60, "cold", atol=s)),
    "rtol": lambda s: tb.Implicit(
        tb.InnerSolver(SGD, 9), tb.FixedPoint(60, rate=0.1, rtol=s)
    ),
    "alpha": lambda s: tb.Unroll(tb.InnerSolver(SGD, 4), aggregate=tb.Aggregation(s)),
}


@pytest.mark.parametrize(
    "name", fast_where({"gap weight", "inner rate", "rtol"}.__contains__, TAKERS)
)
def test_a_schedule_of_keras_is_called_with_the_outer_step(name: str) -> None:
    """As ours of the same values, which differ from those of a constant."""
    problem = tb.Problem(
        lambda x, y, b: 0.5 * tf.reduce_sum((y - 1.0) ** 2 + x**2),
        lambda x, y, b: 0.5 * tf.reduce_sum(tf.constant([1.0, 3.0]) * (y - x) ** 2),
    )

    def run(schedule) -> np.ndarray:
        start, none = tf.constant([2.0, -1.0]), tb.Batches(None, None)
        method = TAKERS[name](schedule)
        result = tb.minimize(problem, method, start, 2 * start, SGD, none, 4)
        return np.stack([result.upper, result.lower])

    found, want = run(HALVED), run(OURS)
    np.testing.assert_allclose(found, want, rtol=1e-6)
    assert np.abs(run(tb.Constant(0.4)) - want).max() > 1e-3


def test_a_schedule_of_keras_that_falls_below_zero_is_refused() -> None:
    falling = keras.optimizers.schedules.PolynomialDecay(0.1, 3, -1.0)
    with pytest.raises(ValueError, match="`weight` must not be negative"):
        tb.GradientNorm(SGD, falling)
    with pytest.raises(ValueError, match="`rtol` must not be negative"):
        tb.ConjugateGradient(3, rtol=falling)


def test_the_schedules_have_a_module_of_their_own() -> None:
    schedules = {
        name
        for name, value in vars(tb).items()
        if isinstance(value, type) and issubclass(value, tb.Schedule)
    }
    assert set(tb.schedules.__all__) == schedules and len(schedules) == 6
    for name in schedules:
        assert getattr(tb.schedules, name) is getattr(tb, name)
    for name in ("Dynamic", "DynamicResult", "DynamicState"):
        assert getattr(tb.compat, name) is getattr(tb, name)
