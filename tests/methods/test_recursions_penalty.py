"""F3SA, BVFSM and GAFFA against their recursions in NumPy, and where they end."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from suites import fast_where
from test_recursions import (
    MOMENTUM,
    RATE,
    STEPS,
    UPPER_RATE,
    Slices,
    assert_follows,
    assert_unbiased,
    momentum,
    rate,
)
from test_stochastic import BATCHES, PROBLEM, SGD, TARGET, X, Y

import tfbilevel as tb
from tfbilevel._methods.penalty.value_penalties import BARRIERS, PENALTIES

Vector = np.ndarray
INNER = tb.InnerSolver(SGD(0.3), 2)
NOTHING = tb.Batches(None, None)


def test_penalties_are_those_of_the_docstring() -> None:
    """Their values, and their slopes by central differences."""
    values = {
        "log": lambda q, s: -s * np.log(-q),
        "inverse": lambda q, s: -s / q,
        "quadratic": lambda q, s: np.maximum(q, 0) ** 2 / (2 * s),
    }
    assert set(values) == set(PENALTIES)
    for name, wanted in values.items():
        q = np.array([-2.0, -0.3] if name in BARRIERS else [-2.0, 0.7, 3.0])
        value, slope = PENALTIES[name]
        np.testing.assert_allclose(value(tf.constant(q), 0.6), wanted(q, 0.6))
        differences = (wanted(q + 1e-5, 0.6) - wanted(q - 1e-5, 0.6)) / 2e-5
        np.testing.assert_allclose(slope(tf.constant(q), 0.6), differences, rtol=1e-6)


class Smoothed:
    """Estimates with recursive momentum, by their names."""

    def __init__(self) -> None:
        self.kept: dict[str, Vector] = {}

    def __call__(self, k: int, name: str, now: Vector, old: Vector) -> Vector:
        if k:
            now = now + momentum(k) * (self.kept[name] - old)
        self.kept[name] = now
        return now


def f3sa() -> Any:
    x = x_old = X
    y = y_old = z = z_old = Y
    smoothed = Smoothed()
    for k in range(STEPS):
        at, weight = Slices(k), 0.5 + k
        c = min(1 / weight, 1)
        of_z = smoothed(k, "z", at.g_y(0, x, z), at.g_y(0, x_old, z_old))
        f_y = smoothed(k, "fy", y - TARGET, y_old - TARGET)
        g_y = smoothed(k, "gy", at.g_y(1, x, y), at.g_y(1, x_old, y_old))
        y_new = y - 0.2 * c * (f_y + weight * g_y)
        z_new = z - 0.3 * of_z
        f_x = smoothed(k, "fx", 2 * x, 2 * x_old)
        of_y = smoothed(k, "gxy", at.g_x(2, y_new), at.g_x(2, y))
        at_z = smoothed(k, "gxz", at.g_x(2, z_new), at.g_x(2, z))
        x_old, y_old, z_old = x, y, z
        x = x - UPPER_RATE * c * (f_x + weight * (of_y - at_z))
        y, z = y_new, z_new
        yield x, y


SLOPES = {
    "log": lambda q, s: s / -q,
    "inverse": lambda q, s: s / q**2,
    "quadratic": lambda q, s: max(q, 0) / s,
}
SLACK = {"log": 0.5, "inverse": 0.5, "quadratic": 0.02}
SIGMA = {"log": 0.4, "inverse": 0.4, "quadratic": 8.0}


def bvfsm(penalty: str) -> Callable:
    def steps() -> Any:
        x, y, z, velocity = X, Y, Y, 0 * Y
        inside, outside = 0, 0
        for k in range(STEPS):
            at, mu, theta = Slices(k), 0.3 / (k + 1), 0.2 / (k + 1)
            slack, sigma = SLACK[penalty] / (k + 1), SIGMA[penalty] * 0.9**k
            for t in range(2):
                z = z - 0.3 * (at.g_y(t, x, z) + mu * z)

            def gap(draw: int, y: Vector) -> Any:
                value = at.g(draw, x, y) - at.g(draw, x, z)  # noqa: B023
                return value - mu / 2 * z @ z - slack  # noqa: B023

            for t in range(2, 5):
                q = gap(t, y)
                if penalty == "quadratic" or q < 0:
                    weight = SLOPES[penalty](q, sigma)
                    along = y - TARGET + weight * at.g_y(t, x, y) + theta * y
                    velocity = 0.5 * velocity - 0.1 * along
                    y, inside = y + velocity, inside + 1
                else:
                    y, outside = (y + z) / 2, outside + 1
            if penalty != "quadratic" and gap(5, y) >= 0:
                y, outside = z, outside + 1
            weight = SLOPES[penalty](gap(5, y), sigma)
            x = x - UPPER_RATE * (2 * x + weight * (at.g_x(5, y) - at.g_x(5, z)))
            yield x, y
        assert inside >= 4 and (outside >= 2 or penalty == "quadratic")

    return steps


# h = (|y|^2 - 0.2 + x_1, y_1 - x_2, y_2 - x_1), in a nest; or C' y - x of the batch.
def constraints(x: Any, y: Any) -> Any:
    return {"ball": tf.reduce_sum(y**2) - 0.2 + x[0], "rows": y[:2] - x[::-1]}


def of_batch(x: Any, y: Any, batch: Any) -> Any:
    return tf.linalg.matvec(batch[1], y, transpose_a=True) - x


class Rows:
    """h, and the derivatives of <m, h>, of `constraints`."""

    size, most = 3, 1.0

    def h(self, at: Slices, x: Vector, y: Vector) -> Vector:
        return np.array([y @ y - 0.2 + x[0], y[0] - x[1], y[1] - x[0]])

    def h_y(self, at: Slices, draw: int, y: Vector, m: Vector) -> Vector:
        return 2 * m[0] * y + np.array([m[1], m[2], 0])

    def h_x(self, m: Vector) -> Vector:
        return np.array([m[0] - m[2], -m[1]])


class RowsOfBatch(Rows):
    size, most = 2, 0.3

    def h(self, at: Slices, x: Vector, y: Vector) -> Vector:
        return at.coupling(1).T @ y - x

    def h_y(self, at: Slices, draw: int, y: Vector, m: Vector) -> Vector:
        return at.coupling(draw) @ m

    def h_x(self, m: Vector) -> Vector:
        return -m


def gaffa(rows: Rows) -> Callable:
    def steps() -> Any:
        x, y, theta, z = X, Y, Y, np.full(rows.size, 0.2)
        a, b, cut, free = 0.8, 0.6, 0, 0
        for k in range(STEPS):
            at, w = Slices(k), rate(k)
            slope = at.g_y(0, x, theta) + rows.h_y(at, 0, theta, z) + (theta - y) / a
            theta = theta - 0.3 * slope
            raised = np.maximum(z + b * rows.h(at, x, y), 0)
            d_x = w * 2 * x + at.g_x(1, y) - at.g_x(1, theta)
            d_x = d_x + rows.h_x(raised) - rows.h_x(z)
            d_y = w * (y - TARGET) + at.g_y(1, x, y) + rows.h_y(at, 1, y, raised)
            d_z = (raised - z) / b - rows.h(at, x, theta)
            x, y = x - UPPER_RATE * d_x, y - 0.2 * (d_y - (y - theta) / a)
            moved = z - 0.5 * d_z
            z = np.clip(moved, 0, rows.most)
            cut, free = cut + np.sum(z != moved), free + np.sum(z == moved)
            yield x, y
        assert cut >= 2 and free >= 2

    return steps


def of_gaffa(function: Callable, rows: Rows, **options: Any) -> tb.GAFFA:
    return tb.GAFFA(
        SGD(0.2),
        function,
        auxiliary_optimizer=SGD(0.3),
        multiplier_optimizer=SGD(0.5),
        smoothing=0.8,
        multiplier_smoothing=0.6,
        largest_multiplier=rows.most,
        upper_weight=RATE,
        **options,
    )


def of_bvfsm(penalty: str) -> tb.BVFSM:
    return tb.BVFSM(
        INNER,
        SGD(0.1, momentum=0.5),  # exact in float32, in which Keras keeps it
        3,
        penalty=penalty,
        relaxation=tb.Geometric(SIGMA[penalty], 0.9),
        slack=tb.InversePower(SLACK[penalty], 1.0),
        auxiliary_ridge=tb.InversePower(0.3, 1.0),
        lower_ridge=tb.InversePower(0.2, 1.0),
    )


def of_f3sa() -> tb.F3SA:
    weight = tb.LinearRamp(0.5, 9.5, 9)
    return tb.F3SA(SGD(0.2), weight, MOMENTUM, SGD(0.3))


CASES = {
    "f3sa": (of_f3sa, f3sa),
    "log": (lambda: of_bvfsm("log"), bvfsm("log")),
    "inverse": (lambda: of_bvfsm("inverse"), bvfsm("inverse")),
    "quadratic": (lambda: of_bvfsm("quadratic"), bvfsm("quadratic")),
    "gaffa": (
        lambda: of_gaffa(constraints, Rows(), initial_multiplier=0.2),
        gaffa(Rows()),
    ),
    "gaffa-batch": (
        lambda: of_gaffa(of_batch, RowsOfBatch(), initial_multiplier=np.full([2], 0.2)),
        gaffa(RowsOfBatch()),
    ),
}


@pytest.mark.parametrize(
    ("name", "xla"),
    fast_where(
        lambda name, xla: not xla and name in ("f3sa", "log", "gaffa", "gaffa-batch"),
        [*((name, False) for name in CASES), ("log", True)],
    ),
)
def test_steps_are_those_of_the_paper(name: str, xla: bool) -> None:
    build, wanted = CASES[name]
    assert_follows(build(), wanted, xla)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["f3sa", "gaffa"])
def test_estimates_are_unbiased(name: str) -> None:
    """BVFSM's are not: its penalty is not linear in the loss."""
    assert_unbiased(CASES[name][0]())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["log", "gaffa"])
def test_the_check_agrees(name: str) -> None:
    """The gradient is that of `objective`, where more than one term of it is active."""
    method, x, y = CASES[name][0](), tf.constant(X), tf.constant(Y)
    report = tb.check_hypergradient(PROBLEM, method, x, y, BATCHES, probes=2)
    assert report.error < 1e-7 and report.noise < 1e-7


def test_the_check_of_f3sa_agrees_in_later_steps() -> None:
    """What the momentum of the steps before adds to d_x counts as constant."""
    method, x, y = of_f3sa(), tf.constant(X), tf.constant(Y)
    first = method.step(PROBLEM, x, y, BATCHES, method.init(PROBLEM, x, y))
    report = tb.check_hypergradient(
        PROBLEM, method, x + 1, first.lower, BATCHES, probes=2, state=first.state
    )
    assert report.error < 1e-7 and report.noise < 1e-7
