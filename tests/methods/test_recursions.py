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
from suites import fast_where
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

    def g(self, draw: int, x: Vector, y: Vector) -> Any:
        return 0.5 * y @ self.hessian(draw) @ y - y @ self.coupling(draw) @ x

    def g_y(self, draw: int, x: Vector, y: Vector) -> Vector:
        return self.hessian(draw) @ y - self.coupling(draw) @ x

    def g_x(self, draw: int, y: Vector) -> Vector:
        return -self.coupling(draw).T @ y


def assert_follows(
    method: tb.Method, wanted: Callable[[], Any], xla: bool = False
) -> None:
    """`wanted()` yields (x, y) after every step."""
    step = tf.function(
        lambda x, y, batches, state: PROBLEM.step(method, x, y, batches, state),
        autograph=False,
        jit_compile=xla,
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


FULL = tb.Batches(
    BATCHES.upper, tf.nest.map_structure(lambda a: tf.reduce_mean(a[:3], 0), BATCHES[1])
)
# Independent slices enter every product once, so on a quadratic problem the mean over
# all of them is the step with the mean loss.
UNBIASED = {
    **{name: build for name, (build, _) in CASES.items() if name not in ("sustain",)},
    "stocbio": lambda: tb.StocBiO(tb.InnerSolver(SGD(0.3), 1), 2, 0.35),
    "amigo": lambda: tb.AmIGO(tb.InnerSolver(SGD(0.3), 1), 2, RATE),
    "f2sa": lambda: tb.F2SA(tb.InnerSolver(SGD(0.3), 1), SGD(0.2), 1.7),
}


@pytest.mark.parametrize(
    "name",
    fast_where("soba".__eq__, [name for name in UNBIASED if name[:4] != "bome"]),
)
def test_the_mean_over_all_batches_is_the_step_of_the_mean_loss(name: str) -> None:
    assert_unbiased(UNBIASED[name]())


def assert_unbiased(method: Any) -> None:
    """Exact enumeration of three minibatches, from a state with momentum in it."""
    x, y = tf.constant(X), tf.constant(Y)
    begun = PROBLEM.step(method, x, y, FULL, method.init(PROBLEM, x, y))
    x, y = x - UPPER_RATE * begun.upper_gradient, begun.lower

    def step(batches: tb.Batches) -> Any:
        made = PROBLEM.step(method, x, y, batches, begun.state)
        return made.upper_gradient, made.lower

    @tf.function(autograph=False)
    def mean() -> Any:
        choices = np.indices([3] * method.draws).reshape(method.draws, -1).T

        def one(rows: tf.Tensor) -> Any:
            lower = tf.nest.map_structure(lambda a: tf.gather(a, rows), BATCHES.lower)
            return step(tb.StackedBatches(BATCHES.upper, lower))

        made = tf.map_fn(one, tf.constant(choices), fn_output_signature=(x.dtype,) * 2)
        return [tf.reduce_mean(each, 0) for each in made]

    wanted = step(FULL)
    for found, want, start in zip(mean(), wanted, (0 * x, y), strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-10)
        assert np.abs(want - start).max() > 1e-3


@pytest.mark.slow
def test_the_weight_of_a_barrier_is_not_linear_in_the_batches() -> None:
    """What the test above can see: BOME's weight is a ratio, so its mean is another."""
    method = tb.BOME(tb.InnerSolver(SGD(0.3), 1), SGD(0.1), 0.7)
    x, y = tf.constant(X), tf.constant(Y)
    state = method.init(PROBLEM, x, y)
    gradients = []
    for first in range(3):
        for second in range(3):
            rows = [first, second]
            lower = tf.nest.map_structure(
                lambda a, rows=rows: tf.gather(a, rows), BATCHES.lower
            )
            batches = tb.StackedBatches(BATCHES.upper, lower)
            made = PROBLEM.step(method, x, y, batches, state)
            gradients.append(made.upper_gradient)
    wanted = PROBLEM.step(method, x, y, FULL, state).upper_gradient
    assert np.abs(np.mean(gradients, axis=0) - wanted).max() > 1e-3


LARGEST = max(np.linalg.eigvalsh(each).max() for each in HESSIANS)
FEW = tb.InnerSolver(SGD(0.1), 2)
# A step size -> the method; above 2 / (largest eigenvalue) something of it grows.
GROWING = {
    "SOBA": lambda rate: tb.SOBA(SGD(0.1), rate),
    "SRBA": lambda rate: tb.SRBA(SGD(0.1), rate, period=4),
    "FSLA": lambda rate: tb.FSLA(SGD(0.1), rate),
    "AmIGO": lambda rate: tb.AmIGO(FEW, 4, rate),
    "MRBO": lambda rate: tb.MRBO(SGD(0.1), 8, rate),
    "VRBO": lambda rate: tb.VRBO(SGD(0.1), 8, rate),
    "F2SA": lambda rate: tb.F2SA(FEW, SGD(rate), 100.0),
    "MEHA": lambda rate: tb.MEHA(SGD(rate), SGD(0.1), upper_weight=0.01),
}


@pytest.mark.parametrize("name", fast_where({"SOBA", "F2SA"}.__contains__, GROWING))
def test_divergence_is_reported(name: str, recwarn: Any) -> None:
    x, y = tf.constant(X), tf.constant(Y)

    def follow(rate: float) -> None:
        method = GROWING[name](rate)
        tb.minimize(PROBLEM, method, x, y, SGD(1e-6), FULL, steps=40)

    follow(0.4 / LARGEST)
    assert not [w for w in recwarn if w.category is tb.DivergenceWarning]
    with pytest.warns(tb.DivergenceWarning, match=f"{name} diverged at outer step"):
        follow(8 / LARGEST)


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (tb.SOBA, {"rate": 0.0}, "`rate` must be above 0"),
        (tb.SOBA, {"rate": tb.LinearRamp(0.1, -0.1, 5)}, "`rate` must be above 0"),
        (tb.SOBA, {"rate": "fast"}, "`rate` must be a finite number, or a sch"),
        (tb.SOBA, {"rate": np.nan}, "`rate` must be a finite number, or a sch"),
        (tb.FSLA, {"momentum": 1.0}, "`momentum` must be from 0 to below 1"),
        (tb.FSLA, {"momentum": -0.1}, "`momentum` must be from 0 to below 1"),
        (tb.FSLA, {"momentum": tb.Constant(1.1)}, "`momentum` must be from 0"),
        (tb.MRBO, {"lower_momentum": 1.0}, "`lower_momentum` must be from 0"),
        (tb.SUSTAIN, {"upper_momentum": 2.0}, "`upper_momentum` must be from 0"),
        (tb.MRBO, {"terms": 0}, "`terms` must be"),
        (tb.SUSTAIN, {"max_steps": 0}, "`max_steps` must be"),
        (tb.SUSTAIN, {"seed": -1}, "`seed` must be"),
        (tb.MRBO, {"scale": -1.0}, "`scale` must be above 0"),
        (tb.MEHA, {"smoothing": 0.0}, "`smoothing` must be"),
        (tb.MEHA, {"upper_weight": -1.0}, "`upper_weight` must not be negative"),
    ],
)
def test_ranges(build: Callable, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message + r"(.|\n)*Received: "):
        build(SGD(0.1), **options)


def test_ranges_of_methods_with_inner_steps() -> None:
    cold = tb.InnerSolver(SGD(0.1), 2, start="cold")
    for build, message in (
        (lambda: tb.AmIGO(FEW, 0), "`steps` must be"),
        (lambda: tb.AmIGO(None), "`inner` must be a tb.InnerSolver"),
        (lambda: tb.F2SA(cold, SGD(0.1), 1.0), "`inner.start` must be 'warm'"),
        (lambda: tb.F2SA(FEW, SGD(0.1), -1.0), "`weight` must not be negative"),
        (lambda: tb.BOME(cold, SGD(0.1)), "`inner.start` must be 'warm'"),
        (lambda: tb.BOME(FEW, SGD(0.1), 0.0), "`barrier` must be"),
        (lambda: tb.BOME(FEW, SGD(0.1), 1.0, "norm"), "`control` must be one of"),
    ):
        with pytest.raises(ValueError, match=message + r"(.|\n)*Received: "):
            build()
