"""Windows of a running inner loop: warm `Unroll`, its bias, and learned schedules."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from suites import fast_where
from test_recursions import STEPS, UPPER_RATE, Slices, assert_follows
from test_stochastic import COUPLINGS, HESSIANS, PROBLEM, SGD, TARGET, X, Y

import tfbilevel as tb

RATE, WINDOW = 0.3, 2
ONE = tb.Batches(
    tf.constant(TARGET), (tf.constant(HESSIANS[0]), tf.constant(COUPLINGS[0]))
)


def windows() -> Any:
    """Momentum goes on from window to window, its derivative does not."""
    x, y, v = X, Y, np.zeros_like(Y)
    for k in range(STEPS):
        at = Slices(k)
        dy, dv = np.zeros([3, 2]), np.zeros([3, 2])
        for t in range(WINDOW):
            dv = 0.5 * dv - RATE * (at.hessian(t) @ dy - at.coupling(t))
            v = 0.5 * v - RATE * at.g_y(t, x, y)
            y, dy = y + v, dy + dv
        x = x - UPPER_RATE * (2 * x + dy.T @ (y - TARGET))
        yield x, y


@pytest.mark.slow
def test_a_window_goes_on_from_where_the_last_one_ended() -> None:
    inner = tb.InnerSolver(SGD(RATE, momentum=0.5), WINDOW, optimizer_state="carry")
    assert_follows(tb.Unroll(inner), windows)


def test_the_bias_is_what_came_before_the_window() -> None:
    """window - exact = - f_y' A^K dy_{T-K}/dx, at a constant x."""
    x, y, count = tf.constant(X), tf.constant(Y), 3
    method = tb.Unroll(tb.InnerSolver(SGD(RATE), WINDOW))
    for _ in range(count):
        window = PROBLEM.step(method, x, y, ONE, {})
        y = window.lower
    whole = tb.Unroll(tb.InnerSolver(SGD(RATE), count * WINDOW))
    exact = PROBLEM.step(whole, x, tf.constant(Y), ONE, {})
    np.testing.assert_allclose(exact.lower, y, rtol=1e-12)
    step, before = np.eye(3) - RATE * HESSIANS[0], np.zeros([3, 2])
    for _ in range((count - 1) * WINDOW):
        before = step @ before + RATE * COUPLINGS[0]
    left_out = before.T @ np.linalg.matrix_power(step, WINDOW) @ (y.numpy() - TARGET)
    bias = window.upper_gradient - exact.upper_gradient
    np.testing.assert_allclose(bias, -left_out, rtol=1e-10)
    assert np.linalg.norm(left_out) > 0.1 * np.linalg.norm(exact.upper_gradient)


@pytest.mark.parametrize(
    "memory", fast_where("replay".__eq__, ["replay", "checkpoint", "tape"])
)
def test_a_rate_of_the_inner_step_is_learned(memory: str) -> None:
    """r_t = 0.3 exp(x_0 - x_1 t), and t goes on in the second window."""
    problem = tb.Problem(
        lambda x, y, batch: 0.5 * tf.reduce_sum((y - TARGET) ** 2),
        lambda x, y, batch: PROBLEM.lower_loss(tf.constant(X), y, ONE.lower),
    )
    inner = tb.InnerSolver(
        SGD(9.0),
        4,
        optimizer_state="carry",
        learned_rate=lambda x, t: 0.3 * tf.exp(x[0] - x[1] * tf.cast(t, x.dtype)),
    )
    method = tb.Unroll(inner, memory=memory)
    x, y, expected = tf.constant([0.2, 0.3], tf.float64), tf.constant(Y), Y
    state = method.init(problem, x, y)
    step = tf.function(problem.step, autograph=False)
    for first in (0, 4):
        slope = np.zeros([3, 2])
        for t in range(first, first + 4):
            r = 0.3 * np.exp(0.2 - 0.3 * t)
            g = HESSIANS[0] @ expected - COUPLINGS[0] @ X
            slope = slope - r * (HESSIANS[0] @ slope + np.outer(g, [1.0, -t]))
            expected = expected - r * g
        made = step(method, x, y, tb.Batches(None, None), state)
        np.testing.assert_allclose(made.lower, expected, rtol=1e-12)
        np.testing.assert_allclose(
            made.upper_gradient, slope.T @ (expected - TARGET), rtol=1e-10
        )
        y, state = made.lower, made.state


def test_steps_of_several_numbers_have_no_rate() -> None:
    """Tasks that stop at different steps: t would be one number per task."""
    tasks = tb.over_tasks(
        tb.Problem(
            lambda x, y, batch: tf.reduce_sum(y**2) + 0 * batch,
            lambda x, y, batch: tf.reduce_sum((y - x) ** 2) + 0 * batch,
        )
    )
    inner = tb.InnerSolver(
        keras.optimizers.Adam(9.0), 2, atol=0.1, learned_rate=lambda x, t: x / 9
    )
    x, y, method = tf.constant(0.3), tf.zeros([2, 2]), tb.Implicit(inner)
    batches = tb.Batches(tf.zeros([2]), tf.zeros([2]))
    with pytest.raises(ValueError, match="`learned_rate` must be .*Received: atol"):
        tasks.step(method, x, y, batches, method.init(tasks, x, y))
