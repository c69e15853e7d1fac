"""Which slice of stacked lower batches every method takes where, in NumPy.

f = |y - TARGET|^2 / 2 + |x|^2; draw j has the Hessian H_j and the coupling C_j:
g_y = H_j y - C_j x, g_x = -C_j' y.
"""

from collections.abc import Callable

import numpy as np
import pytest
import tensorflow as tf
from test_stochastic import (
    BATCHES,
    COUPLINGS,
    HESSIANS,
    PROBLEM,
    SGD,
    TARGET,
    X,
    Y,
    run,
)

import tfbilevel as tb

RATE, STEPS = 0.3, 4
INNER = tb.InnerSolver(SGD(RATE), STEPS)
Pair = tuple[np.ndarray, np.ndarray]


def slope(draw: int, y: np.ndarray) -> np.ndarray:
    return HESSIANS[draw] @ y - COUPLINGS[draw] @ X


def unrolled(steps: int = STEPS, weights: list | None = None) -> tuple:
    """y and dy / dx after so many steps on slices 0, 1, ...; f mixed in or not."""
    y, tangent = Y, np.zeros((len(Y), len(X)))
    for t in range(steps):
        a = 0.0 if weights is None else weights[t]
        along = (1 - a) * slope(t, y) + a * (y - TARGET)
        turned = (1 - a) * (HESSIANS[t] @ tangent - COUPLINGS[t]) + a * tangent
        y, tangent = y - RATE * along, tangent - RATE * turned
    return y, tangent


def through_steps() -> Pair:
    y, tangent = unrolled()
    return 2 * X + tangent.T @ (y - TARGET), y


def mixed_in() -> Pair:
    y, tangent = unrolled(weights=[0.4 * 0.5**t for t in range(STEPS)])
    return 2 * X + tangent.T @ (y - TARGET), y


def implicit() -> Pair:
    y, _ = unrolled()
    v = np.linalg.solve(HESSIANS[STEPS], y - TARGET)
    return 2 * X + COUPLINGS[STEPS].T @ v, y


def rank_one() -> Pair:
    y, _ = unrolled()
    g, f = slope(STEPS, y), y - TARGET
    return 2 * X + (g @ f) / (g @ g) * COUPLINGS[STEPS].T @ y, y


def value_gap() -> Pair:
    z, _ = unrolled()
    weight = 1.7
    d_x = 2 * X - weight * COUPLINGS[STEPS].T @ (Y - z)
    d_y = Y - TARGET + weight * slope(STEPS, Y)
    return d_x / weight, Y - 0.1 * d_y / weight


def gradient_norm() -> Pair:
    weight, g = 1.7, slope(0, Y)
    d_x = 2 * X - weight * COUPLINGS[0].T @ g
    return d_x / weight, Y - 0.1 * (Y - TARGET + weight * HESSIANS[0] @ g) / weight


def bamm() -> Pair:
    """v is zero still."""
    return 2 * X, Y - 0.1 * slope(0, Y)


def multipliers() -> Pair:
    y, rho, lam, nu = Y, 1.7, 0.6, 0.3
    for t in range(STEPS):
        g = slope(t, y)
        y = y - 0.1 * (y - TARGET + lam * g + HESSIANS[t] @ (nu + rho * g))
    return 2 * X - COUPLINGS[STEPS].T @ (nu + rho * slope(STEPS, y)), y


METHODS: dict[str, tuple[tb.Method, Callable[[], Pair]]] = {
    "unroll": (tb.Unroll(INNER), through_steps),
    "unroll-checkpoint": (tb.Unroll(INNER, memory="checkpoint"), through_steps),
    "unroll-tape": (tb.Unroll(INNER, memory="tape"), through_steps),
    "forward": (tb.ForwardUnroll(INNER), through_steps),
    "bda": (tb.Unroll(INNER, aggregate=tb.Aggregation(0.4, 0.5)), mixed_in),
    "implicit": (tb.Implicit(INNER, tb.Direct()), implicit),
    "implicit-map": (tb.Implicit(INNER, tb.Direct(), "optimizer"), implicit),
    "rank-one": (tb.RankOne(INNER), rank_one),
    "value-gap": (tb.ValueGap(INNER, SGD(0.1), 1.7), value_gap),
    "gradient-norm": (tb.GradientNorm(SGD(0.1), 1.7), gradient_norm),
    "bamm": (tb.BAMM(SGD(0.1)), bamm),
    "augmented-lagrangian": (
        tb.AugmentedLagrangian(
            SGD(0.1), STEPS, weight=1.7, lower_weight=0.6, initial_multiplier=0.3
        ),
        multipliers,
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_draws(name: str) -> None:
    method, expected = METHODS[name]
    gradient, lower = expected()
    found = run(method)
    np.testing.assert_allclose(found.upper_gradient, gradient, rtol=1e-7)
    np.testing.assert_allclose(found.lower, lower, rtol=1e-7)


def products(y: np.ndarray, first: int, most: int) -> list[np.ndarray]:
    """The hypergradient for each number of factors, on draws first, first + 1, ...;
    the mixed product is of the draw after all that there may be."""
    made, term = [], y - TARGET
    for j in range(most):
        made.append(2 * X + COUPLINGS[first + most - 1].T @ (most * 0.4 * term))
        term = term - 0.4 * HESSIANS[first + j] @ term
    return made


@pytest.mark.parametrize("name", ["bsa", "ttsa"])
def test_draws_of_random_products(name: str) -> None:
    if name == "bsa":
        method, first = tb.BSA(INNER, max_steps=3, rate=0.4), STEPS
    else:
        method, first = tb.TTSA(SGD(RATE), max_steps=3, rate=0.4), 1
    assert method.draws == first + 3
    state = method.init(PROBLEM, tf.constant(X), tf.constant(Y))
    lengths = []
    for k in range(10):
        y = unrolled()[0] if name == "bsa" else Y - RATE * (k + 1) ** -0.4 * slope(0, Y)
        found = run(method, state)
        state = found.state
        np.testing.assert_allclose(found.lower, y, rtol=1e-7)
        gradient = found.upper_gradient.numpy()
        errors = [np.abs(gradient - one).max() for one in products(y, first, 3)]
        assert min(errors) < 1e-6
        lengths.append(int(np.argmin(errors)))
    assert set(lengths) == {0, 1, 2}


@pytest.mark.parametrize(
    "inner",
    [
        tb.InnerSolver(SGD(RATE), 3, accelerated=True),
        tb.InnerSolver(SGD(1.0, 0.5), 3, learned_rate=lambda x: 0.2 + 0.05 * x[0]),
        tb.InnerSolver(SGD(1.0), 3, learned_rate=lambda x: 0.1 + 0.05 * x[:1] ** 2),
        tb.InnerSolver(SGD(RATE), 1),
    ],
    ids=["accelerated", "learned-rate", "rate-per-entry", "one-step"],
)
def test_finite_differences_of_any_last_step(inner: tb.InnerSolver) -> None:
    """The derivative of the last step, its rate's part and a start's included; of a
    loss whose second derivatives depend on where they are taken."""
    problem = tb.Problem(
        PROBLEM.upper_loss,
        lambda x, y, batch: (
            PROBLEM.lower_loss(x, y, batch) + x[0] ** 2 * tf.reduce_sum(y**4)
        ),
        lower_start=lambda x: tf.stack([x[0], x[1] ** 2, x[0] * x[1]]),
    )
    report = tb.check_hypergradient(
        problem,
        tb.FiniteDifference(inner),
        tf.constant(X),
        tf.constant(Y),
        BATCHES,
    )
    assert report.error < 1e-4
