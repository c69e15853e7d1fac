"""SAMA: the identity, and the optimizer's adaptation, against NumPy.

The problem and its batches are those of test_recursions.py.
"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from suites import fast_where
from test_recursions import STEPS, UPPER_RATE, Slices, assert_follows
from test_stochastic import PROBLEM, SGD, TARGET, X, Y, spd

import tfbilevel as tb

# Options that float32 holds exactly, because Keras keeps them in it.
RATE, BETA, RHO, EPSILON = 0.0625, 0.875, 0.75, 2.0**-20
# One update of an optimizer: (y, g, slots, t) -> (y after it, slots, d update / d g).


def momentum(y: Any, g: Any, slots: Any, t: int) -> tuple:
    (v,) = slots or (np.zeros(3),)
    v = BETA * v - RATE * g
    return y + v, (v,), np.full(3, RATE)


def adam(y: Any, g: Any, slots: Any, t: int) -> tuple:
    m, v = slots or (np.zeros(3),) * 2
    m, v = BETA * m + (1 - BETA) * g, RHO * v + (1 - RHO) * g**2
    rate = RATE * np.sqrt(1 - RHO ** (t + 1)) / (1 - BETA ** (t + 1))
    root = np.sqrt(v)
    adaptation = rate * (
        (1 - BETA) / (root + EPSILON)
        - m * (1 - RHO) * g / (root * (root + EPSILON) ** 2)
    )
    return y - rate * m / (root + EPSILON), (m, v), adaptation


def rmsprop(y: Any, g: Any, slots: Any, t: int) -> tuple:
    (v,) = slots or (np.zeros(3),)
    v = RHO * v + (1 - RHO) * g**2
    root = np.sqrt(v + EPSILON)
    return y - RATE * g / root, (v,), RATE * (1 / root - (1 - RHO) * g**2 / root**3)


CASES = {
    "momentum": (lambda: SGD(RATE, momentum=BETA), momentum),
    "adam": (
        lambda: keras.optimizers.Adam(RATE, BETA, RHO, epsilon=EPSILON),
        adam,
    ),
    "rmsprop": (
        lambda: keras.optimizers.RMSprop(RATE, RHO, epsilon=EPSILON),
        rmsprop,
    ),
}


@pytest.mark.parametrize("name", fast_where("adam".__eq__, CASES))
def test_the_adaptation_is_that_of_the_optimizer(name: str) -> None:
    """f_x - g_xy D f_y over five outer steps; moments continue from step to step."""
    optimizer, update = CASES[name]

    def steps() -> Any:
        x, y, slots, t = X, Y, None, 0
        for k in range(STEPS):
            at = Slices(k)
            for draw in range(2):
                y, slots, _ = update(y, at.g_y(draw, x, y), slots, t)
                t += 1
            _, _, adaptation = update(y, at.g_y(2, x, y), slots, t)
            assert np.ptp(adaptation) > 1e-3 or name == "momentum"
            v = adaptation * (y - TARGET)
            x = x - UPPER_RATE * (2 * x + at.coupling(2).T @ v)
            yield x, y

    inner = tb.InnerSolver(optimizer(), 2, optimizer_state="carry")
    method = tb.Implicit(inner, tb.Identity(), through="optimizer")
    assert_follows(method, steps)


def rated(scale: float) -> Callable:
    def steps() -> Any:
        x, y = X, Y
        for k in range(STEPS):
            at = Slices(k)
            for draw in range(2):
                y = y - 0.25 * at.g_y(draw, x, y)
            x = x - UPPER_RATE * (2 * x + scale * at.coupling(2).T @ (y - TARGET))
            yield x, y

    return steps


@pytest.mark.parametrize(
    ("solver", "scale"),
    [
        (tb.Identity(), 0.25),
        (tb.Identity(rate=0.8), 0.8),
        (tb.Identity(rate=0.8, damping=0.5), 0.8 / 1.4),
    ],
)
def test_without_the_optimizer_it_is_a_multiple_of_the_identity(
    solver: tb.LinearSolver, scale: float
) -> None:
    method = tb.Implicit(tb.InnerSolver(SGD(0.25), 2), solver)
    assert_follows(method, rated(scale))


def test_the_residual_is_measured_and_nothing_is_called_divergence() -> None:
    matrices = np.stack([spd(1.0, 5.0), spd(2.0, 90.0)])
    b = np.stack([TARGET, 2 * Y])
    system = tb.LinearSystem(
        lambda v: tf.linalg.matvec(tf.constant(matrices), v), leading=1
    )
    found = tb.Identity(rate=0.5).solve(system, tf.constant(b))
    np.testing.assert_allclose(found.value, 0.5 * b, rtol=1e-12)
    left = b - 0.5 * np.einsum("bij,bj->bi", matrices, b)
    want = np.linalg.norm(left, axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(found.residual, want, rtol=1e-12)
    assert want.max() > 1 and not np.any(found.diverged)


@pytest.mark.slow
def test_finite_differences_give_the_same_at_a_solution() -> None:
    """SAMA's published form: f_y there is the same before and after one more step."""
    inner = tb.InnerSolver(SGD(0.9), 60)
    batches = tb.Batches(tf.constant(TARGET), tuple(map(tf.constant, one())))
    x, y = tf.constant(X), tf.constant(Y)
    gradients = [
        PROBLEM.step(
            method, x, y, batches, method.init(PROBLEM, x, y)
        ).upper_gradient.numpy()
        for method in (
            tb.FiniteDifference(inner),
            tb.Implicit(inner, tb.Identity(), through="optimizer"),
        )
    ]
    np.testing.assert_allclose(*gradients, rtol=1e-8)


def one() -> tuple[np.ndarray, np.ndarray]:
    return Slices(0).hessian(0), Slices(0).coupling(0)


def test_rates() -> None:
    with pytest.raises(ValueError, match="`rate` must be .*above 0.*Received: "):
        tb.Identity(rate=0.0)
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
    inner = tb.InnerSolver(SGD(schedule), 2)
    with pytest.raises(ValueError, match=r"`solver` takes its rate from the inner"):
        tb.Implicit(inner, tb.Identity())
    tb.Implicit(inner, tb.Identity(), through="optimizer")
