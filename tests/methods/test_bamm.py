"""BAMM against its recursion in NumPy, its exact line search and its limit."""

import keras
import numpy as np
import pytest
import references
import tensorflow as tf
from problems import flat, nested, quadratic

import tfbilevel as tb

SGD = keras.optimizers.SGD
RATE = 0.1  # s
TAU = 0.3  # large, so that a wrong power shows after a few steps


def recursion(oracle, upper_rate, steps, weights, eta, beta):
    """x, y and v after some steps of the published formulas."""
    x, y = flat(oracle.x), flat(oracle.y)
    v = np.zeros_like(y)
    for k in range(steps):
        mixed, curved = references.mixture_products(oracle, x, y, v, weights[k])
        f_x, f_y, g_y = oracle.f_x(x, y), oracle.f_y(x, y), oracle.g_y(x, y)
        along = (1 - weights[k]) * g_y + weights[k] * f_y
        against = curved - f_y
        y = y - RATE * along
        v = v - eta(k, against) * against
        x = x - upper_rate * beta(k) * (f_x - mixed)
    return x, y, v


def run(oracle, method, upper_rate, steps):
    x, y, batches = oracle.at("float64")
    result = tb.minimize(
        oracle.problem, method, x, y, SGD(upper_rate), batches, steps=steps
    )
    return flat(result.upper), flat(result.lower), flat(result.state[0]["multiplier"])


def assert_same(found, wanted) -> None:
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)


@pytest.mark.parametrize("strategy", [1, 2, 3])
def test_averaged_steps_follow_the_published_schedules(strategy: int) -> None:
    oracle, steps = quadratic(), 6
    mu = [0.9 * (k + 1) ** -0.2 for k in range(steps)]
    to_v = {1: 2, 2: 1, 3: 0}[strategy]
    to_x = {1: 7, 2: 5, 3: 3}[strategy]
    wanted = recursion(
        oracle,
        0.5,
        steps,
        mu,
        lambda k, r: (k + 1) ** (-TAU / 2) * RATE * mu[k] ** to_v,
        lambda k: (k + 1) ** (-1.5 * TAU) * RATE * mu[k] ** to_x,
    )
    method = tb.BAMM(
        SGD(RATE),
        multiplier_rate=1.0,
        decay=TAU,
        aggregate=tb.Aggregation(tb.InversePower(0.9, 0.2)),
        strategy=strategy,
    )
    assert_same(run(oracle, method, 0.5, steps), wanted)


def test_steps_without_averaging() -> None:
    oracle, steps = quadratic(), 6
    wanted = recursion(
        oracle,
        0.5,
        steps,
        [0.0] * steps,
        lambda k, r: 0.7 * (k + 1) ** (-TAU / 2) * RATE,
        lambda k: (k + 1) ** -TAU * RATE,
    )
    method = tb.BAMM(SGD(RATE), multiplier_rate=0.7, decay=TAU)
    assert_same(run(oracle, method, 0.5, steps), wanted)


def test_d4_the_exact_step_takes_one_norm_over_all_tensors() -> None:
    """D4: with norms added up over tensors the step is too long wherever y has more
    than one; this oracle's is a nest of several."""
    oracle, steps = nested(), 4
    assert len(tf.nest.flatten(oracle.y)) > 1

    def eta(k, r):
        return (r @ r) / (r @ oracle.hessian(now["x"]) @ r)

    # H depends on x: the recursion is made here, x first in every step.
    now = {"x": flat(oracle.x)}
    y, v = flat(oracle.y), np.zeros_like(flat(oracle.y))
    for k in range(steps):
        x = now["x"]
        against = oracle.hessian(x) @ v - oracle.f_y(x, y)
        d_x = oracle.f_x(x, y) - oracle.g_xy(x, y, v)
        y_next = y - RATE * oracle.g_y(x, y)
        v = v - eta(k, against) * against
        now["x"], y = x - 0.5 * RATE * (k + 1) ** -TAU * d_x, y_next
    method = tb.BAMM(SGD(RATE), decay=TAU, multiplier_step="exact")
    assert_same(run(oracle, method, 0.5, steps), (now["x"], y, v))


def test_curvature_that_is_not_positive_is_reported_and_moves_nothing() -> None:
    problem = tb.Problem(
        upper_loss=lambda x, y, batch: 0.5 * (y - 1.0) ** 2 + 0.5 * x**2,
        lower_loss=lambda x, y, batch: -0.5 * (y - x) ** 2,
    )
    x, y = tf.constant(0.3, tf.float64), tf.constant(2.0, tf.float64)
    none = tb.Batches(None, None)
    for choice, diverged in (("exact", 1.0), ("scheduled", 0.0)):
        method = tb.BAMM(SGD(0.1), multiplier_step=choice)
        step = method.step(problem, x, y, none, method.init(problem, x, y))
        assert float(step.metrics["diverged"]) == diverged
        assert (float(step.state["multiplier"]) == 0.0) == (choice == "exact")


def test_a_multiplier_that_grows_is_reported(recwarn) -> None:
    """eta times the largest eigenvalue above 2, and below."""
    oracle = quadratic()
    x, y, batches = oracle.at("float64")
    largest = np.linalg.eigvalsh(oracle.hessian(flat(oracle.x))).max()

    def follow(eta: float) -> None:
        method = tb.BAMM(SGD(RATE), multiplier_rate=eta / RATE, decay=0.0)
        tb.minimize(oracle.problem, method, x, y, SGD(1e-6), batches, steps=60)

    follow(1.9 / largest)
    assert not [w for w in recwarn if w.category is tb.DivergenceWarning]
    with pytest.warns(tb.DivergenceWarning, match="BAMM diverged at outer step"):
        follow(2.4 / largest)


def test_an_upper_slope_that_is_not_finite_stops_the_step_that_meets_it() -> None:
    """f is finite, f_y is not: v would be lost, and the error come a step later."""
    target = tf.constant([0.2, 0.3])
    problem = tb.Problem(
        lambda x, y, batch: tf.reduce_sum(x * x) + tf.norm(y),
        lambda x, y, batch: 0.5 * tf.reduce_sum((y - (x - target)) ** 2),
    )
    method, y = tb.BAMM(SGD(0.1)), tf.zeros([2])
    with pytest.raises(tb.NonFiniteError, match="the upper gradient.* outer step 0"):
        tb.minimize(problem, method, target, y, SGD(0.1), tb.Batches(None, None), 1)


def test_a_curvature_that_is_not_finite_stops_the_step_that_meets_it() -> None:
    """f_y and g_y are finite at y[1] = 0, the second derivative of |y|^1.5 is not."""
    problem = tb.Problem(
        lambda x, y, batch: 0.5 * (y[0] - 1.0) ** 2 + x**2,
        lambda x, y, batch: 0.5 * (y[0] - x) ** 2 + tf.abs(y[1]) ** 1.5,
    )
    x, y, nothing = tf.constant(2.0), tf.zeros([2]), tb.Batches(None, None)
    with pytest.raises(tb.NonFiniteError, match="the upper gradient.* outer step 0"):
        tb.minimize(problem, tb.BAMM(SGD(0.1)), x, y, SGD(0.1), nothing, 1)


@pytest.mark.parametrize("aggregate", [None, tb.Aggregation(0.3)])
def test_the_step_of_x_is_the_derivative_of_its_objective(aggregate) -> None:
    """Where v is not zero, on variables that are nests."""
    oracle = nested()
    x, y, batches = oracle.at("float64")
    method = tb.BAMM(SGD(RATE), aggregate=aggregate)
    state = method.init(oracle.problem, x, y)
    for _ in range(3):
        step = method.step(oracle.problem, x, y, batches, state)
        y, state = step.lower, step.state
    report = tb.check_hypergradient(
        oracle.problem, method, x, y, batches, state=state, probes=3
    )
    assert report.error < 1e-7


@pytest.mark.parametrize("choice", ["scheduled", "exact"])
def test_it_ends_where_the_true_hypergradient_vanishes(choice: str) -> None:
    oracle = quadratic()
    method = tb.BAMM(SGD(oracle.rate), multiplier_rate=1.0, multiplier_step=choice)
    x, y, v = run(oracle, method, 0.2, 4000)
    begun = np.linalg.norm(oracle.hypergradient(flat(oracle.x)))
    assert np.linalg.norm(oracle.hypergradient(x)) < 1e-3 * begun
    np.testing.assert_allclose(y, oracle.solution(x), atol=1e-3)
    system = np.linalg.solve(oracle.hessian(x), oracle.f_y(x, y))
    np.testing.assert_allclose(v, system, atol=1e-3)


def test_ranges() -> None:
    scheduled = SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5))
    for options, message in (
        ({"multiplier_rate": 0.0}, "`multiplier_rate` must be"),
        ({"decay": -1.0}, "`decay` must be"),
        ({"aggregate": 0.5}, "`aggregate` must be a tb.Aggregation"),
        ({"strategy": 4}, "`strategy` must be one of"),
        ({"strategy": 2}, "`strategy` must be 1 without"),
        ({"multiplier_step": "best"}, "`multiplier_step` must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            tb.BAMM(SGD(0.1), **options)
    with pytest.raises(ValueError, match="`lower_optimizer` must have a constant"):
        tb.BAMM(scheduled)
    with pytest.raises(ValueError, match="`power` must be"):
        tb.InversePower(1.0, -0.5)
