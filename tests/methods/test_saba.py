"""SABA against SAGA in NumPy, its limit, and batches without numbers."""

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from suites import fast_where
from test_stochastic import COUPLINGS, HESSIANS, TARGET, X, Y

import tfbilevel as tb

SGD = keras.optimizers.SGD
LOWER, UPPER = 4, 3  # numbers of batches
TARGETS = TARGET + np.arange(UPPER)[:, None] * np.array([0.3, -0.2, 0.1])


def lower_loss(x: Any, y: Any, batch: Any) -> Any:
    hessian, coupling, _ = batch
    linear = tf.linalg.matvec(coupling, x)
    return 0.5 * tf.reduce_sum(y * tf.linalg.matvec(hessian, y)) - tf.reduce_sum(
        linear * y
    )


PROBLEM = tb.Problem(
    lambda x, y, batch: (
        0.5 * tf.reduce_sum((y - batch[0]) ** 2) + (1.0 + batch[0][0]) * tf.norm(x) ** 2
    ),
    lower_loss,
)


def batches(i: int, j: int) -> tb.Batches:
    lower = (tf.constant(HESSIANS[i]), tf.constant(COUPLINGS[i]), tf.constant(i))
    return tb.Batches((tf.constant(TARGETS[j]), tf.constant(j)), lower)


def method(**options: Any) -> tb.SABA:
    return tb.SABA(SGD(0.3), 0.25, lower_batches=LOWER, upper_batches=UPPER, **options)


def directions(i: int, j: int, x: Any, y: Any, v: Any) -> list:
    """g_y, g_yy v, g_xy v of batch i; f_y and f_x of batch j."""
    lower = HESSIANS[i] @ y - COUPLINGS[i] @ x, HESSIANS[i] @ v, -COUPLINGS[i].T @ v
    return [*lower, y - TARGETS[j], 2 * (1 + TARGETS[j, 0]) * x]


ORDER = [(2, 1), (0, 1), (2, 0), (3, 2), (1, 1), (2, 1), (0, 0)]


def saga() -> Iterator[tuple]:
    """x, y and the table of g_y after each step."""
    x, y, v = X, Y, np.zeros_like(Y)
    tables = [
        np.zeros((count, size))
        for count, size in zip(
            (LOWER,) * 3 + (UPPER,) * 2, (3, 3, 2, 3, 2), strict=True
        )
    ]
    for i, j in ORDER:
        corrected = []
        for table, row, now in zip(
            tables, (i, i, i, j, j), directions(i, j, x, y, v), strict=True
        ):
            corrected.append(now - table[row] + table.mean(axis=0))
            table[row] = now
        g_y, curved, mixed, f_y, f_x = corrected
        x, y, v = x - 0.1 * (f_x - mixed), y - 0.3 * g_y, v - 0.25 * (curved - f_y)
        yield x, y, tables[0]


@pytest.mark.parametrize("xla", fast_where(lambda xla: not xla, [False, True]))
def test_steps_are_those_of_saga(xla: bool) -> None:
    saba = method()
    upper, lower = tf.constant(X), tf.constant(Y)
    state = saba.init(PROBLEM, upper, lower)
    step = tf.function(
        lambda *a: PROBLEM.step(saba, *a), autograph=False, jit_compile=xla
    )
    for (i, j), (x, y, table) in zip(ORDER, saga(), strict=True):
        made = step(upper, lower, batches(i, j), state)
        upper, lower, state = upper - 0.1 * made.upper_gradient, made.lower, made.state
        np.testing.assert_allclose(upper, x, rtol=1e-10)
        np.testing.assert_allclose(lower, y, rtol=1e-10)
        np.testing.assert_allclose(state["lower_table"].rows[0], table, rtol=1e-10)
    assert step.experimental_get_tracing_count() == 1


@pytest.mark.slow
@pytest.mark.parametrize("xla", [False, True])
def test_steps_of_a_loop_are_those_of_saga(xla: bool) -> None:
    """There the tables are changed in place."""
    lower, upper = np.transpose(ORDER)

    def batch(k: Any) -> tb.Batches:
        i, j = tf.gather(lower, k), tf.gather(upper, k)
        data = tf.gather(HESSIANS, i), tf.gather(COUPLINGS, i), i
        return tb.Batches((tf.gather(TARGETS, j), j), data)

    saba, given, rate = method(), (tf.constant(X), tf.constant(Y)), SGD(0.1)
    found = tb.minimize(PROBLEM, saba, *given, rate, batch, len(ORDER), jit_compile=xla)
    *_, (x, y, table) = saga()
    np.testing.assert_allclose(found.upper, x, rtol=1e-10)
    np.testing.assert_allclose(found.lower, y, rtol=1e-10)
    made = found.state[0]["lower_table"].rows[0]
    np.testing.assert_allclose(made, table, rtol=1e-10)


def hypergradient(x: Any) -> Any:
    """Of the mean losses, in closed form."""
    hessian, coupling = HESSIANS[:LOWER].mean(0), COUPLINGS[:LOWER].mean(0)
    y = np.linalg.solve(hessian, coupling @ x)
    v = np.linalg.solve(hessian, y - TARGETS.mean(0))
    return 2 * (1 + TARGETS[:, 0].mean()) * x + coupling.T @ v


@pytest.mark.parametrize("reduced", fast_where(lambda reduced: reduced, [True, False]))
def test_noise_vanishes_with_constant_rates(reduced: bool) -> None:
    """And does not without the tables: the same random batches, the same rates."""
    chosen = method() if reduced else tb.SOBA(SGD(0.3), 0.25)
    data = tf.nest.map_structure(
        tf.constant, (HESSIANS[:LOWER], COUPLINGS[:LOWER], np.arange(LOWER))
    )
    targets = tf.constant(TARGETS), tf.range(UPPER)

    def rows(all_of: Any) -> Any:
        return lambda i: tf.nest.map_structure(lambda a: tf.gather(a, i[0]), all_of)

    dataset = tb.pair(
        tb.index_batches(UPPER, 1, seed=1).map(rows(targets)),
        tb.index_batches(LOWER, 1, seed=2).map(rows(data)),
    )
    found = tb.minimize(
        PROBLEM, chosen, tf.constant(X), tf.constant(Y), SGD(0.05), dataset, steps=800
    )
    left = np.linalg.norm(hypergradient(found.upper.numpy()))
    begun = np.linalg.norm(hypergradient(X))
    assert left < 1e-8 * begun if reduced else left > 1e-3 * begun


def test_tables_that_are_too_large_are_refused() -> None:
    x, y = tf.zeros([10]), tf.zeros([1000])
    small = tb.SABA(
        SGD(0.1), 0.1, lower_batches=50, upper_batches=20, most_bytes=400_000
    )
    # 4 (50 (2000 + 10) + 20 (1000 + 10)) bytes
    with pytest.raises(ValueError, match=r"fit into(.|\n)*Received: 482,800 bytes"):
        small.init(PROBLEM, x, y)


def test_batches_without_numbers() -> None:
    x, y = tf.constant(X), tf.constant(Y)
    saba = method()
    state = saba.init(PROBLEM, x, y)
    good = batches(0, 0)
    without = good.lower[:2]
    for bad, level in (
        (tb.Batches(good.upper, without), "lower"),
        (tb.Batches(good.upper[0], good.lower), "upper"),
    ):
        with pytest.raises(ValueError, match=f"Every {level} batch of tb.SABA must"):
            saba.step(PROBLEM, x, y, bad, state)
    for number in (LOWER, -1):
        beyond = tb.Batches(good.upper, (*without, tf.constant(number)))
        with pytest.raises(tb.NonFiniteError):
            tb.minimize(PROBLEM, saba, x, y, SGD(0.1), beyond, steps=1)


def test_tasks_are_refused() -> None:
    tasks = tb.over_tasks(PROBLEM)
    with pytest.raises(ValueError, match="tb.SABA takes no tasks(.|\n)*Received: "):
        method().init(tasks, tf.constant(X), tf.constant(Y[None]))


def test_ranges() -> None:
    for options, message in (
        ({"lower_batches": 0}, "`lower_batches` must be"),
        ({"upper_batches": 1.5}, "`upper_batches` must be"),
        ({"rate": 0.0}, "`rate` must be above 0"),
        ({"number": 3}, "`number` must be a function"),
        ({"most_bytes": 0}, "`most_bytes` must be"),
    ):
        arguments = {"rate": 0.1, "lower_batches": 2, "upper_batches": 2, **options}
        with pytest.raises(ValueError, match=message + r"(.|\n)*Received: "):
            tb.SABA(SGD(0.1), **arguments)


@pytest.mark.parametrize("of", ["SOBA", "SABA"])
def test_a_step_of_v_that_is_not_finite_is_seen_at_once(of: str) -> None:
    """g_yy is infinite, f_x - g_xy v is not: later v would be lost."""
    problem = tb.Problem(
        lambda x, y, batch: 0.5 * (y - 1) ** 2 + x**2,
        lambda x, y, batch: 0.5 * (y - x) ** 2 + tf.maximum(y, 0) ** 1.5,
    )
    x, y = tf.constant(1.0), tf.constant(0.0)
    rate = keras.optimizers.SGD(0.1)
    if of == "SOBA":
        method, batches = tb.SOBA(rate, 0.1), tb.Batches(None, None)
    else:
        method = tb.SABA(rate, 0.1, lower_batches=1, upper_batches=1)
        batches = tb.Batches((tf.constant(0),), (tf.constant(0),))
    step = method.step(problem, x, y, batches, method.init(problem, x, y))
    assert np.isnan(step.upper_gradient)
