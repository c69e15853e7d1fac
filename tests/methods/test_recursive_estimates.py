"""SRBA and VRBO against their recursions in NumPy, their expectations and limits.

f = mean_j |y - t_j|^2 / 2 + (1 + t_j0) |x|^2 over the rows t_j of the upper batch; the
lower losses are those of test_stochastic.py: slice i has the Hessian H_i and the
coupling C_i.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import tensorflow as tf
from suites import fast_where
from test_recursions import RATE, UPPER_RATE, rate
from test_stochastic import (
    BATCHES,
    COUPLINGS,
    DRAWS,
    HESSIANS,
    SGD,
    TARGET,
    X,
    Y,
    lower_loss,
)

import tfbilevel as tb
from tfbilevel._core.batches import successive_lower
from tfbilevel._methods.stochastic.slices import Slices

ROWS, PARTS, STEPS, SEED = 6, 3, 7, 5
Vector = np.ndarray
TARGETS = TARGET + np.arange(ROWS)[:, None] * np.array([0.3, -0.2, 0.1])


def upper_loss(x: Any, y: Any, targets: Any) -> Any:
    fit = 0.5 * tf.reduce_mean(tf.reduce_sum((y - targets) ** 2, 1))
    return fit + (1 + tf.reduce_mean(targets[:, 0])) * tf.reduce_sum(x**2)


PROBLEM = tb.Problem(upper_loss, lower_loss)


class Data(NamedTuple):
    """What one choice of slices and parts has: means over those."""

    hessian: np.ndarray
    coupling: np.ndarray
    targets: np.ndarray

    def g_y(self, x: Vector, y: Vector) -> Vector:
        return self.hessian @ y - self.coupling @ x

    def f_y(self, y: Vector) -> Vector:
        return y - self.targets.mean(0)

    def f_x(self, x: Vector) -> Vector:
        return 2 * (1 + self.targets[:, 0].mean()) * x

    def directions(self, x: Vector, y: Vector, v: Vector) -> list[Vector]:
        """Of x, y and v."""
        along = self.hessian @ v - self.f_y(y)
        return [self.f_x(x) + self.coupling.T @ v, self.g_y(x, y), along]


class Stack:
    """The lower slices of outer step k, which are rolled by k, and the upper parts."""

    def __init__(self, k: int):
        self.rows = (np.arange(DRAWS) + k) % DRAWS

    def at(self, slices: Any, part: int | None) -> Data:
        rows = self.rows[np.asarray(slices) % DRAWS].reshape(-1)
        targets = TARGETS if part is None else TARGETS[part::PARTS]
        return Data(HESSIANS[rows].mean(0), COUPLINGS[rows].mean(0), targets)

    def all(self) -> Data:
        return self.at(np.arange(DRAWS), None)


def chosen(k: int) -> tuple[int, int]:
    """The random slice and part of outer step k."""
    free = tf.random.stateless_uniform(
        [2], tf.constant([SEED, k], tf.int64), 0, 2**31 - 1, tf.int32
    ).numpy()
    return int(free[0] % DRAWS), int(free[1] % PARTS)


RADIUS = 1.8


def srba() -> Any:
    now = before = made = [X, Y, np.zeros_like(Y)]
    held = 0
    for k in range(STEPS):
        stack = Stack(k)
        if k % 3 == 0:
            made = stack.all().directions(*now)
        else:
            one = stack.at(*chosen(k))
            both = zip(one.directions(*now), one.directions(*before), made, strict=True)
            made = [new - old + last for new, old, last in both]
        before, (x, y, v) = now, now
        v = v - rate(k) * made[2]
        if np.linalg.norm(v) > RADIUS:
            v, held = v * RADIUS / np.linalg.norm(v), held + 1
        now = [x - UPPER_RATE * made[0], y - 0.3 * made[1], v]
        yield now[:2]
    assert 0 < held < STEPS - 1  # the ball did something, and not always


TERMS, ETA, INNER = 2, 0.35, 2


def series(data: list[Data], last: Data, x: Vector, y: Vector) -> Vector:
    """One factor per entry of `data`, the mixed product on `last`."""
    term = total = last.f_y(y)
    for one in data:
        term = term - ETA * one.hessian @ term
        total = total + term
    return last.f_x(x) + ETA * last.coupling.T @ total


def vrbo() -> Any:
    x, y, x_before, u, w = X, Y, X, 0 * Y, 0 * X
    for k in range(STEPS):
        stack, (first, part) = Stack(k), chosen(k)
        y_before = y
        for t in range(INNER + 1) if k else ():
            begin = first + t * (TERMS + 2)
            data = [stack.at(begin + j, (part + t) % PARTS) for j in range(TERMS + 2)]
            u = u + data[0].g_y(x, y) - data[0].g_y(x_before, y_before)
            w = w + series(data[1:-1], data[-1], x, y)
            w = w - series(data[1:-1], data[-1], x_before, y_before)
            x_before, y_before = x, y
            if t < INNER:
                y = y - 0.3 * u
        if k % 2 == 0:
            full = stack.all()
            u, w = full.g_y(x, y), series([full] * TERMS, full, x, y)
        x_before, x = x, x - UPPER_RATE * w
        yield x, y


CASES: dict[str, tuple[Callable[[], tb.Method], Callable[[], Any]]] = {
    "srba": (
        lambda: tb.SRBA(
            SGD(0.3), RATE, period=3, upper_parts=PARTS, radius=RADIUS, seed=SEED
        ),
        srba,
    ),
    "vrbo": (
        lambda: tb.VRBO(
            SGD(0.3), TERMS, ETA, INNER, period=2, upper_parts=PARTS, seed=SEED
        ),
        vrbo,
    ),
}
MODES: dict[str, Callable] = {
    "eager": lambda step: step,
    "graph": lambda step: tf.function(step, autograph=False),
    "xla": lambda step: tf.function(step, autograph=False, jit_compile=True),
}


@pytest.mark.parametrize(
    ("name", "mode"),
    fast_where(
        lambda name, mode: mode == "graph", [(n, m) for n in CASES for m in MODES]
    ),
)
def test_steps_are_those_of_the_paper(name: str, mode: str) -> None:
    build, wanted = CASES[name]
    method = build()
    step = MODES[mode](lambda *arguments: PROBLEM.step(method, *arguments))
    x, y = tf.constant(X), tf.constant(Y)
    state = method.init(PROBLEM, x, y)
    for k, (x_wanted, y_wanted) in enumerate(wanted()):
        lower = tf.nest.map_structure(lambda a, k=k: tf.roll(a, -k, 0), BATCHES.lower)
        made = step(x, y, tb.StackedBatches(tf.constant(TARGETS), lower), state)
        x, y, state = x - UPPER_RATE * made.upper_gradient, made.lower, made.state
        np.testing.assert_allclose(x, x_wanted, rtol=1e-10, err_msg=f"x, step {k}")
        np.testing.assert_allclose(y, y_wanted, rtol=1e-10, err_msg=f"y, step {k}")
    assert k == STEPS - 1
    if mode != "eager":
        assert step.experimental_get_tracing_count() == 1


def one_slice(i: int, part: int) -> tb.Batches:
    """A minibatch of each level."""
    targets = tf.constant(TARGETS[part::PARTS])
    return tb.Batches(targets, (tf.constant(HESSIANS[i]), tf.constant(COUPLINGS[i])))


SMALL = tb.StackedBatches(
    tf.constant(TARGETS), (tf.constant(HESSIANS[:3]), tf.constant(COUPLINGS[:3]))
)
MEAN = Data(HESSIANS[:3].mean(0), COUPLINGS[:3].mean(0), TARGETS)


@pytest.mark.slow
def test_estimates_of_srba_are_unbiased() -> None:
    """After a large batch, the mean over all choices of a slice and a part is the full
    direction at the new point, for all three variables."""
    method = tb.SRBA(SGD(0.3), 0.4, period=9)
    x, y = tf.constant(X), tf.constant(Y)
    begun = PROBLEM.step(method, x, y, SMALL, method.init(PROBLEM, x, y))
    wanted = MEAN.directions(X, Y, 0 * Y)
    for made, want in zip(begun.state["directions"], wanted, strict=True):
        np.testing.assert_allclose(made, want, rtol=1e-12)
    x, y = x - UPPER_RATE * begun.upper_gradient, begun.lower
    step = tf.function(PROBLEM.step, autograph=False)
    found = [
        [
            each.numpy()
            for each in step(method, x, y, one_slice(i, part), begun.state).state[
                "directions"
            ]
        ]
        for i in range(3)
        for part in range(PARTS)
    ]
    wanted = MEAN.directions(x.numpy(), y.numpy(), begun.state["solution"].numpy())
    for number, want in enumerate(wanted):
        made = np.stack([each[number] for each in found])
        np.testing.assert_allclose(made.mean(0), want, rtol=1e-11)
        assert made.std(0).max() > 1e-3  # they differ


@pytest.mark.slow
def test_estimates_of_vrbo_are_unbiased() -> None:
    """The mean over all choices of independent slices (and no more than one inner step,
    so that no slice comes in twice) is the step with the mean loss."""
    method = tb.VRBO(SGD(0.3), 1, ETA, steps=1, period=9)
    x, y = tf.constant(X), tf.constant(Y)
    begun = PROBLEM.step(method, x, y, SMALL, method.init(PROBLEM, x, y))
    full = series([MEAN], MEAN, X, Y)
    np.testing.assert_allclose(begun.upper_gradient, full, rtol=1e-12)
    x, y = x - UPPER_RATE * begun.upper_gradient, begun.lower
    choices = np.indices([3] * method.draws).reshape(method.draws, -1).T

    def one(rows: tf.Tensor) -> Any:
        lower = tf.nest.map_structure(lambda a: tf.gather(a, rows), SMALL.lower)
        batches = tb.StackedBatches(SMALL.upper, lower)
        made = PROBLEM.step(method, x, y, batches, begun.state)
        return made.upper_gradient, made.lower, made.state["lower_direction"]

    run = tf.function(
        lambda rows: tf.map_fn(one, rows, fn_output_signature=(x.dtype,) * 3),
        autograph=False,
    )
    made = run(tf.constant(choices))
    moved = Y - 0.3 * MEAN.g_y(x.numpy(), Y)
    wanted = (
        series([MEAN], MEAN, x.numpy(), moved),
        moved,
        MEAN.g_y(x.numpy(), moved),
    )
    for found, want in zip(made, wanted, strict=True):
        np.testing.assert_allclose(np.mean(found, 0), want, rtol=1e-10)
        assert np.std(found, 0).max() > 1e-3


@pytest.mark.slow
def test_every_slice_and_every_part_is_chosen_equally_often() -> None:
    slices = Slices(PROBLEM, SMALL, PARTS)
    many = tf.function(
        lambda: tf.map_fn(
            lambda k: slices.chosen(0, k),
            tf.range(900, dtype=tf.int64),
            fn_output_signature=(tf.int32, tf.int32),
        ),
        autograph=False,
    )
    counts = np.zeros((3, PARTS))
    np.add.at(counts, tuple(each.numpy() for each in many()), 1)
    # Binomial with mean 100 and deviation 9.4.
    assert counts.min() > 60 and counts.max() < 140


def hypergradient(x: Vector, data: Data) -> Vector:
    y = np.linalg.solve(data.hessian, data.coupling @ x)
    v = np.linalg.solve(data.hessian, data.f_y(y))
    return data.f_x(x) + data.coupling.T @ v


@pytest.mark.slow
@pytest.mark.parametrize("large", [True, False])
def test_noise_vanishes_with_constant_rates(large: bool) -> None:
    """All data as one stack. Without a second large batch the estimates drift."""
    method = tb.SRBA(
        SGD(0.3), 0.3, period=6 if large else 10**6, upper_parts=PARTS, seed=1
    )
    everything = tb.StackedBatches(tf.constant(TARGETS), BATCHES.lower)
    found = tb.minimize(
        PROBLEM,
        method,
        tf.constant(X),
        tf.constant(Y),
        SGD(0.05),
        everything,
        steps=1200,
    )
    data = Stack(0).all()
    left = np.linalg.norm(hypergradient(found.upper.numpy(), data))
    begun = np.linalg.norm(hypergradient(X, data))
    assert left < 1e-8 * begun if large else left > 1e-6 * begun


@pytest.mark.slow
def test_noise_of_vrbo_vanishes() -> None:
    """It ends where the series' gradient with all data is zero."""
    build, _ = CASES["vrbo"]
    everything = tb.StackedBatches(tf.constant(TARGETS), BATCHES.lower)
    x, y = tf.constant(X), tf.constant(Y)
    found = tb.minimize(PROBLEM, build(), x, y, SGD(0.1), everything, steps=150)
    data, end = Stack(0).all(), found.upper.numpy()
    solution = np.linalg.solve(data.hessian, data.coupling @ end)
    np.testing.assert_allclose(found.lower, solution, atol=1e-6)
    left = series([data] * TERMS, data, end, solution)
    assert np.linalg.norm(left) < 1e-6 * np.linalg.norm(data.f_x(X))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_both_points_have_the_same_samples(name: str) -> None:
    """Where nothing moves, both evaluations of a random loss are equal, so that the
    estimate of the first step stays."""

    def noisy(x: Any, y: Any, batch: Any) -> Any:
        factor = 1 + 0.3 * tf.random.normal([3], dtype=y.dtype)
        return lower_loss(x, y, batch) + tf.reduce_sum(factor * y**2)

    problem = tb.Problem(upper_loss, noisy)
    build = {
        "srba": lambda: tb.SRBA(SGD(0.0), 0.3, period=9),
        "vrbo": lambda: tb.VRBO(SGD(0.0), 2, 0.3, 2, period=9),
    }[name]
    method, x, y = build(), tf.constant(X), tf.constant(Y)
    state, found = method.init(problem, x, y), []
    for k in range(3):
        made = problem.seeded(k).step(method, x, y, SMALL, state)
        state = made.state
        found.append(
            state["directions"][1] if name == "srba" else state["lower_direction"]
        )
    for each in found[1:]:
        np.testing.assert_allclose(each, found[0], rtol=1e-12)
    other = problem.seeded(1).step(method, x, y, SMALL, method.init(problem, x, y))
    key = "directions" if name == "srba" else "lower_direction"
    first = other.state[key][1] if name == "srba" else other.state[key]
    assert np.abs(first - found[0]).max() > 1e-3  # it is a random loss


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_features_are_prepared_for_the_slices_in_use(name: str) -> None:
    """`prepare` makes the same as the same function within the losses."""

    def prepare(x: Any, batches: tb.Batches) -> tb.Batches:
        hessian, coupling = batches.lower
        scaled = (hessian, coupling * (1 + 0.1 * tf.reduce_sum(x)))
        return batches._replace(upper=batches.upper * x[0], lower=scaled)

    def inside(x: Any, y: Any, batch: Any) -> Any:
        hessian, coupling = batch
        return lower_loss(x, y, (hessian, coupling * (1 + 0.1 * tf.reduce_sum(x))))

    outside = tb.Problem(upper_loss, lower_loss, prepare=prepare)
    within = tb.Problem(lambda x, y, t: upper_loss(x, y, t * x[0]), inside)
    build, _ = CASES[name]
    batches = tb.StackedBatches(tf.constant(TARGETS), BATCHES.lower)
    ends = []
    for problem in (outside, within):
        method, x, y = build(), tf.constant(X), tf.constant(Y)
        state = method.init(problem, x, y)
        step = tf.function(problem.step, autograph=False)
        for _ in range(3):
            made = step(method, x, y, batches, state)
            x, y, state = x - 0.1 * made.upper_gradient, made.lower, made.state
        ends.append((x, y))
    for a, b in zip(*ends, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11)


def test_parts_of_sparse_upper_batches() -> None:
    dense = np.arange(36.0).reshape(6, 2, 3) * (np.arange(36).reshape(6, 2, 3) % 5 > 1)
    number = tf.constant(2)
    for problem, axis in ((PROBLEM, 0), (tb.over_tasks(PROBLEM), 1)):
        values = np.swapaxes(dense, 0, axis)
        both = (tf.constant(values), tf.sparse.from_dense(values), None)
        slices = Slices(problem, tb.Batches(both, None), 3)
        made = tuple(slices._part(leaf, number) for leaf in both)
        wanted = np.swapaxes(dense[2::3], 0, axis)
        np.testing.assert_array_equal(made[0], wanted)
        np.testing.assert_array_equal(tf.sparse.to_dense(made[1]), wanted)
        assert made[1].shape == wanted.shape and made[2] is None


def test_successive_slices_of_sparse_batches() -> None:
    values = np.arange(24.0).reshape(4, 2, 3) * (np.arange(24).reshape(4, 2, 3) % 3 > 0)
    dense, sparse = tf.constant(values), tf.sparse.from_dense(values)
    both = tb.StackedBatches(None, (dense, sparse, None))
    for first in (0, 3):
        rows = np.arange(first, first + 3) % 4
        made = successive_lower(both, tf.constant(first), 3)
        np.testing.assert_array_equal(made[0], values[rows])
        np.testing.assert_array_equal(tf.sparse.to_dense(made[1]), values[rows])
        assert made[2] is None


def test_ranges() -> None:
    for build, options, message in (
        (tb.SRBA, {"rate": 0.0}, "`rate` must be above 0"),
        (tb.SRBA, {"period": 0}, "`period` must be"),
        (tb.SRBA, {"upper_parts": 0}, "`upper_parts` must be"),
        (tb.SRBA, {"radius": 0.0}, "`radius` must be a finite number, above 0"),
        (tb.SRBA, {"radius": np.inf}, "`radius` must be a finite number, above 0"),
        (tb.SRBA, {"seed": -1}, "`seed` must be"),
        (tb.VRBO, {"terms": 0}, "`terms` must be"),
        (tb.VRBO, {"rate": -0.1}, "`rate` must be"),
        (tb.VRBO, {"steps": 0}, "`steps` must be"),
        (tb.VRBO, {"period": None}, "`period` must be"),
        (tb.VRBO, {"upper_parts": 1.5}, "`upper_parts` must be"),
        (tb.VRBO, {"seed": 0.5}, "`seed` must be"),
    ):
        with pytest.raises(ValueError, match=message + r"(.|\n)*Received: "):
            build(SGD(0.1), **options)


def test_upper_batches_that_cannot_be_cut() -> None:
    method, x, y = tb.SRBA(SGD(0.1), upper_parts=4), tf.constant(X), tf.constant(Y)
    state = method.init(PROBLEM, x, y)
    with pytest.raises(
        ValueError, match=r"a multiple of(.|\n)*Received: upper_parts=4"
    ):
        method.step(PROBLEM, x, y, SMALL, state)
    unknown = tf.TensorSpec([None, 3], tf.float64)
    step = tf.function(
        lambda upper: (
            method.step(PROBLEM, x, y, SMALL._replace(upper=upper), state).lower
        ),
        input_signature=[unknown],
        autograph=False,
    )
    with pytest.raises(
        ValueError, match=r"must be known(.|\n)*Received: upper_parts=4"
    ):
        step(tf.zeros([8, 3], tf.float64))
