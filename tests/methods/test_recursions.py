"""Methods that carry much state, against their recursions in NumPy, step by step.

f = |y - TARGET|^2 / 2 + |x|^2; draw j has the Hessian H_j and the coupling C_j:
g_y = H_j y - C_j x, g_x = -C_j' y, g_xy v = -C_j' v. The slices of the stacked lower
batch are other ones in every step.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from test_stochastic import (
    BATCHES,
    COUPLINGS,
    DRAWS,
    HESSIANS,
    PROBLEM,
    SGD,
    TARGET,
    X,
    Y,
)

import tfbilevel as tb

STEPS, UPPER_RATE = 5, 0.2
Vector = np.ndarray


class Slices:
    """The lower batches of the outer step k."""

    def __init__(self, k: int):
        self.k = k

    def hessian(self, draw: int) -> np.ndarray:
        return HESSIANS[(draw + self.k) % DRAWS]

    def coupling(self, draw: int) -> np.ndarray:
        return COUPLINGS[(draw + self.k) % DRAWS]

    def g(self, draw: int, x: Vector, y: Vector) -> float:
        return 0.5 * y @ self.hessian(draw) @ y - y @ self.coupling(draw) @ x

    def g_y(self, draw: int, x: Vector, y: Vector) -> Vector:
        return self.hessian(draw) @ y - self.coupling(draw) @ x

    def g_x(self, draw: int, y: Vector) -> Vector:
        return -self.coupling(draw).T @ y


def assert_follows(method: tb.Method, wanted: Callable[[], Any]) -> None:
    """`wanted()` yields (x, y) after every step."""
    step = tf.function(
        lambda x, y, batches, state: PROBLEM.step(method, x, y, batches, state),
        autograph=False,
    )
    x, y = tf.constant(X), tf.constant(Y)
    state = method.init(PROBLEM, x, y)
    for k, (x_wanted, y_wanted) in enumerate(wanted()):
        lower = tf.nest.map_structure(lambda a, k=k: tf.roll(a, -k, 0), BATCHES.lower)
        made = step(x, y, tb.StackedBatches(BATCHES.upper, lower), state)
        moved = x - UPPER_RATE * made.upper_gradient
        x, y, state = made.scaled(x, moved), made.lower, made.state
        np.testing.assert_allclose(x, x_wanted, rtol=1e-10, err_msg=f"x, step {k}")
        np.testing.assert_allclose(y, y_wanted, rtol=1e-10, err_msg=f"y, step {k}")
    assert k == STEPS - 1
    assert step.experimental_get_tracing_count() == 1


def rate(k: int) -> float:
    """A step size that decays; so does the schedule of the methods."""
    return 0.4 / (k + 1) ** 0.3


RATE = tb.InversePower(0.4, 0.3)


def momentum(k: int) -> float:
    return 0.2 + 0.1 * min(k / 4, 1)


MOMENTUM = tb.LinearRamp(0.2, 0.3, 4)


def soba() -> Any:
    x, y, v = X, Y, np.zeros_like(Y)
    for k in range(STEPS):
        at = Slices(k)
        d_y, d_v = at.g_y(0, x, y), at.hessian(0) @ v - (y - TARGET)
        d_x = 2 * x + at.coupling(0).T @ v
        x, y, v = x - UPPER_RATE * d_x, y - 0.3 * d_y, v - rate(k) * d_v
        yield x, y


def fsla() -> Any:
    x, y, v = X, Y, np.zeros_like(Y)
    x_before, d = X, np.zeros_like(X)
    for k in range(STEPS):
        at = Slices(k)
        y_after = y - 0.3 * at.g_y(0, x, y)
        v_after = v - rate(k) * (at.hessian(1) @ v - (y_after - TARGET))
        h = 2 * x + at.coupling(2).T @ v_after
        old = 2 * x_before + at.coupling(2).T @ v
        d = h + (momentum(k) * (d - old) if k else 0)
        x_before, x, y, v = x, x - UPPER_RATE * d, y_after, v_after
        yield x, y


def amigo() -> Any:
    x, y, v = X, Y, np.zeros_like(Y)
    for k in range(STEPS):
        at = Slices(k)
        for t in range(2):
            y = y - 0.3 * at.g_y(t, x, y)
        for n in range(3):
            v = v - rate(k) * (at.hessian(2 + n) @ v - (y - TARGET))
        x = x - UPPER_RATE * (2 * x + at.coupling(5).T @ v)
        yield x, y


def double_momentum(hypergradient: Callable) -> Callable:
    def steps() -> Any:
        x, y = x_before, y_before = X, Y
        u, d = np.zeros_like(Y), np.zeros_like(X)
        for k in range(STEPS):
            at, m = Slices(k), momentum(k) if k else 0.0
            u = at.g_y(0, x, y) + m * (u - at.g_y(0, x_before, y_before))
            now, old = hypergradient(at, x, y), hypergradient(at, x_before, y_before)
            d = now + m * (d - old)
            x_before, y_before = x, y
            x, y = x - rate(k) * UPPER_RATE * d, y - rate(k) * 0.6 * u
            yield x, y

    return steps


def of_series(at: Slices, x: Vector, y: Vector) -> Vector:
    """Two terms after the first, on slices 1 and 2; the mixed product on slice 3."""
    term = total = y - TARGET
    for j in (1, 2):
        term = term - 0.35 * at.hessian(j) @ term
        total = total + term
    return 2 * x + 0.35 * at.coupling(3).T @ total


def of_one_term(at: Slices, x: Vector, y: Vector) -> Vector:
    """`max_steps=1` leaves no choice of the length."""
    return 2 * x + 0.35 * at.coupling(1).T @ (y - TARGET)


def f2sa() -> Any:
    x, y, z = X, Y, Y
    for k in range(STEPS):
        at, weight = Slices(k), 0.5 + k
        scale = min(1 / weight, 1)
        for t in range(2):
            z = z - 0.3 * at.g_y(t, x, z)
        for t in range(2):
            y = y - 0.2 * scale * (y - TARGET + weight * at.g_y(2 + t, x, y))
        d_x = 2 * x + weight * (at.g_x(4, y) - at.g_x(4, z))
        x = x - UPPER_RATE * scale * d_x
        yield x, y


def bome(control: str) -> Callable:
    def steps() -> Any:
        x, y, active = X, Y, 0
        for k in range(STEPS):
            at, z = Slices(k), y
            for t in range(2):
                z = z - 0.3 * at.g_y(t, x, z)
            f_x, f_y = 2 * x, y - TARGET
            q_x, q_y = at.g_x(2, y) - at.g_x(2, z), at.g_y(2, x, y)
            square = q_x @ q_x + q_y @ q_y
            gap = max(at.g(2, x, y) - at.g(2, x, z), 0)
            phi = 0.7 * (square if control == "gradient" else gap)
            weight = max(phi - f_x @ q_x - f_y @ q_y, 0) / square
            active += weight > 0
            x = x - UPPER_RATE * (f_x + weight * q_x)
            y = y - 0.1 * (f_y + weight * q_y)
            yield x, y
        assert active  # or the weight was not tried

    return steps


def meha() -> Any:
    x, y, z, gamma = X, Y, Y, 0.8
    for k in range(STEPS):
        at, w = Slices(k), rate(k)
        z = z - 0.3 * (at.g_y(0, x, z) + (z - y) / gamma)
        y = y - 0.2 * (w * (y - TARGET) + at.g_y(1, x, y) - (y - z) / gamma)
        x = x - UPPER_RATE * (w * 2 * x + at.g_x(2, y) - at.g_x(2, z))
        yield x, y


INNER = tb.InnerSolver(SGD(0.3), 2)
MOMENTA = {"scale": RATE, "lower_momentum": MOMENTUM, "upper_momentum": MOMENTUM}
CASES = {
    "soba": (lambda: tb.SOBA(SGD(0.3), RATE), soba),
    "fsla": (lambda: tb.FSLA(SGD(0.3), RATE, MOMENTUM), fsla),
    "amigo": (lambda: tb.AmIGO(INNER, 3, RATE), amigo),
    "mrbo": (lambda: tb.MRBO(SGD(0.6), 2, 0.35, **MOMENTA), double_momentum(of_series)),
    "sustain": (
        lambda: tb.SUSTAIN(SGD(0.6), 1, 0.35, **MOMENTA),
        double_momentum(of_one_term),
    ),
    "f2sa": (lambda: tb.F2SA(INNER, SGD(0.2), tb.LinearRamp(0.5, 9.5, 9)), f2sa),
    "bome-gradient": (lambda: tb.BOME(INNER, SGD(0.1), 0.7), bome("gradient")),
    "bome-gap": (lambda: tb.BOME(INNER, SGD(0.1), 0.7, "gap"), bome("gap")),
    "meha": (lambda: tb.MEHA(SGD(0.2), SGD(0.3), 0.8, RATE), meha),
}


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_the_paper(name: str) -> None:
    build, wanted = CASES[name]
    assert_follows(build(), wanted)
