"""The linear solvers, on matrices whose solution NumPy knows."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Oracle, flat, nested, quadratic
from references import descend, implicit
from suites import fast_where

import tfbilevel as tb
from tfbilevel._linear_solvers import base

QUICK = settings(max_examples=25, deadline=None)


def product_with(matrix: np.ndarray, like: Any = None) -> Any:
    """v -> A v for flat vectors, or for nests shaped like `like`."""
    if like is None:
        return lambda v: tf.linalg.matvec(tf.constant(matrix, v.dtype), v)
    sizes = [int(tf.size(leaf)) for leaf in tf.nest.flatten(like)]

    def product(v: Any) -> Any:
        leaves = tf.nest.flatten(v)
        joined = tf.concat([tf.reshape(leaf, [-1]) for leaf in leaves], 0)
        parts = tf.split(tf.linalg.matvec(tf.constant(matrix), joined), sizes)
        return tf.nest.pack_sequence_as(
            v,
            [
                tf.reshape(part, leaf.shape)
                for part, leaf in zip(parts, leaves, strict=True)
            ],
        )

    return product


def spd(seed: int, size: int, condition: float = 100.0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(generator.normal(size=(size, size)))
    return basis @ np.diag(np.geomspace(1.0, condition, size)) @ basis.T


def solve(solver: tb.LinearSolver, matrix: np.ndarray, b: Any, start: Any = None):
    rhs = tf.constant(b, tf.float64)
    start = None if start is None else tf.constant(start, tf.float64)
    system = tb.LinearSystem(product_with(matrix))
    return solver.solve(system, rhs, () if start is None else start)


def residual(matrix: np.ndarray, b: np.ndarray, v: Any) -> float:
    return float(np.linalg.norm(b - matrix @ np.array(v)) / np.linalg.norm(b))


# Conjugate gradients.


@QUICK
@given(seed=st.integers(0, 10**6), size=st.integers(1, 8))
def test_cg_meets_its_tolerance(seed: int, size: int) -> None:
    """Within as many steps as there are unknowns, and a few for rounding."""
    matrix = spd(seed, size)
    b = np.random.default_rng(seed + 1).normal(size=size)
    found = solve(tb.ConjugateGradient(size + 3, rtol=1e-9), matrix, b)
    assert residual(matrix, b, found.value) <= 1.01e-9
    assert float(found.residual) <= 1e-9
    np.testing.assert_allclose(found.value, np.linalg.solve(matrix, b), rtol=1e-6)


@QUICK
@given(
    factor=st.floats(1e-3, 1e3),
    b=st.lists(st.floats(0.01, 100) | st.floats(-100, -0.01), min_size=1, max_size=8),
)
def test_cg_is_exact_in_one_step_for_multiples_of_the_identity(
    factor: float, b: list[float]
) -> None:
    """Also in one dimension. Copies that return the iterate before give zeros."""
    found = solve(tb.ConjugateGradient(5), factor * np.eye(len(b)), b)
    np.testing.assert_allclose(found.value, np.array(b) / factor, rtol=1e-12)
    assert int(found.iterations) == 1


@QUICK
@given(seed=st.integers(0, 10**6), size=st.integers(2, 8), steps=st.integers(1, 3))
def test_cg_minimises_the_energy_over_the_krylov_space(
    seed: int, size: int, steps: int
) -> None:
    """v_k = argmin v'Av/2 - b'v over span(b, Ab, ..., A^{k-1} b)."""
    steps = min(steps, size)
    matrix = spd(seed, size, 10.0)
    b = np.random.default_rng(seed + 1).normal(size=size)
    krylov = np.stack([np.linalg.matrix_power(matrix, j) @ b for j in range(steps)], 1)
    basis, _ = np.linalg.qr(krylov)
    want = basis @ np.linalg.solve(basis.T @ matrix @ basis, basis.T @ b)
    found = solve(tb.ConjugateGradient(steps, rtol=0.0), matrix, b)
    np.testing.assert_allclose(found.value, want, rtol=1e-6, atol=1e-9)
    assert int(found.iterations) == steps


def test_cg_reports_the_residual_of_what_it_returns() -> None:
    matrix, b = spd(3, 8, 1e3), np.arange(1.0, 9.0)
    for steps in (1, 2, 5):
        found = solve(tb.ConjugateGradient(steps), matrix, b)
        assert float(found.residual) == pytest.approx(
            residual(matrix, b, found.value), rel=1e-9
        )
        assert float(found.residual) > 1e-6
        assert int(found.iterations) == steps


def test_cg_stops_early() -> None:
    """Three distinct eigenvalues: three steps of the twenty allowed."""
    basis = spd(1, 8)
    _, vectors = np.linalg.eigh(basis)
    spectrum = np.array([1, 1, 1, 2, 2, 5, 5, 5.0])
    matrix = vectors @ np.diag(spectrum) @ vectors.T
    found = solve(tb.ConjugateGradient(20, rtol=1e-8), matrix, np.ones(8))
    assert int(found.iterations) == 3


def test_cg_of_several_tensors_uses_one_global_norm() -> None:
    """Ranks 0, 1 and 2 together, coupled by a dense matrix.

    With a sum of norms per tensor the step lengths, and so the result after two
    steps, would be others.
    """
    like = {
        "a": tf.constant(0.5, tf.float64),
        "b": [tf.constant([1.0, -2.0], tf.float64)],
        "c": tf.constant([[3.0, 1.0, 0.2], [0.1, -1.0, 2.0]], tf.float64),
    }
    matrix, b = spd(5, 9, 20.0), flat(like)
    for steps in (2, 12):
        solver = tb.ConjugateGradient(steps, rtol=1e-10)
        nest = solver.solve(tb.LinearSystem(product_with(matrix, like)), like)
        tf.nest.assert_same_structure(nest.value, like)
        krylov = np.stack([np.linalg.matrix_power(matrix, j) @ b for j in range(2)], 1)
        want = {
            2: krylov @ np.linalg.solve(krylov.T @ matrix @ krylov, krylov.T @ b),
            12: np.linalg.solve(matrix, b),
        }[steps]
        np.testing.assert_allclose(flat(nest.value), want, rtol=1e-8)
        assert float(nest.residual) == pytest.approx(
            residual(matrix, b, flat(nest.value)), rel=1e-6, abs=1e-12
        )


def test_cg_relative_tolerance_does_not_depend_on_the_scale() -> None:
    matrix, b = spd(4, 6), np.arange(1.0, 7.0)
    solver = tb.ConjugateGradient(20, rtol=1e-4)
    plain, tiny = solve(solver, matrix, b), solve(solver, matrix, 1e-9 * b)
    assert int(plain.iterations) == int(tiny.iterations) < 20
    np.testing.assert_allclose(1e-9 * plain.value.numpy(), tiny.value, rtol=1e-9)


@pytest.mark.parametrize("matrix", [-np.eye(3), np.diag([1.0, -2.0, 3.0])])
def test_cg_stops_at_negative_curvature(matrix: np.ndarray) -> None:
    """At the iterate reached: finite, its residual told, not "solved"."""
    b = np.array([1.0, 3.0, -0.5])
    found = solve(tb.ConjugateGradient(20), matrix, b)
    # b'Ab = -9.25 - ... < 0 for both: no step can be taken.
    assert b @ matrix @ b < 0
    np.testing.assert_array_equal(found.value, 0.0)
    assert float(found.residual) == 1.0
    assert int(found.iterations) == 1
    assert bool(found.diverged)
    solved = solve(tb.ConjugateGradient(20), np.diag([1.0, 2.0, 3.0]), b)
    assert not bool(solved.diverged)


def test_cg_keeps_the_steps_before_negative_curvature() -> None:
    matrix, b = np.diag([2.0, 1.0, -0.5]), np.array([3.0, 1.0, 0.1])
    length = (b @ b) / (b @ matrix @ b)
    found = solve(tb.ConjugateGradient(20), matrix, b)
    v, first = found.value.numpy(), length * b
    assert np.isfinite(v).all() and int(found.iterations) < 20
    energy = 0.5 * v @ matrix @ v - b @ v
    assert energy <= 0.5 * first @ matrix @ first - b @ first + 1e-12
    assert float(found.residual) == pytest.approx(
        residual(matrix, b, found.value), rel=1e-9
    )


def test_cg_of_a_singular_system_is_finite() -> None:
    matrix, b = np.diag([1.0, 0.0]), np.array([0.0, 2.0])
    found = solve(tb.ConjugateGradient(20), matrix, b)
    np.testing.assert_array_equal(found.value, 0.0)
    assert float(found.residual) == 1.0


def test_cg_in_float32_goes_past_its_precision_without_nan() -> None:
    matrix, b = spd(2, 8, 1e4).astype("float32"), np.ones(8, "float32")
    found = tb.ConjugateGradient(200, rtol=0.0).solve(
        tb.LinearSystem(product_with(matrix)), tf.constant(b)
    )
    want = np.linalg.solve(matrix.astype("float64"), b)
    error = np.linalg.norm(found.value - want) / np.linalg.norm(want)
    assert error < 1e-2  # condition number 1e4 times float32's 6e-8, with room


# Every solver.

SOLVERS = {
    "cg": tb.ConjugateGradient(60, rtol=1e-10),
    "neumann": tb.Neumann(400, rate=0.19, rtol=1e-10),
    "fixed point": tb.FixedPoint(400, rate=0.19, rtol=1e-10),
}
WARM = {
    "cg": tb.ConjugateGradient(60, warm_start=True, rtol=1e-8),
    "fixed point": tb.FixedPoint(400, rate=0.19, warm_start=True, rtol=1e-8),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_solves(name: str) -> None:
    matrix, b = spd(6, 7, 10.0), np.arange(1.0, 8.0)
    found = solve(SOLVERS[name], matrix, b)
    np.testing.assert_allclose(found.value, np.linalg.solve(matrix, b), rtol=1e-7)
    assert float(found.residual) <= 1e-10
    assert int(found.iterations) < SOLVERS[name].max_steps


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", SOLVERS)
def test_zero_right_hand_side(name: str, compiled: bool) -> None:
    def run(b: tf.Tensor) -> tb.LinearSolution:
        return SOLVERS[name].solve(tb.LinearSystem(product_with(spd(6, 5))), b)

    run = tf.function(run, jit_compile=True) if compiled else run
    found = run(tf.zeros([5], tf.float64))
    np.testing.assert_array_equal(found.value, 0.0)
    assert float(found.residual) == 0.0
    assert int(found.iterations) == 0


@pytest.mark.parametrize("name", WARM)
def test_zero_right_hand_side_from_a_warm_start(name: str) -> None:
    """The solution is zero, wherever the last outer step ended."""
    found = solve(WARM[name], spd(6, 5, 10.0), np.zeros(5), np.ones(5))
    np.testing.assert_allclose(found.value, 0.0, atol=1e-12)


@pytest.mark.parametrize("name", SOLVERS)
def test_damping_shifts_the_spectrum(name: str) -> None:
    matrix, b = spd(8, 6, 8.0), np.arange(1.0, 7.0)
    options = {"rtol": 1e-10, "damping": 2.0}
    solver = {
        "cg": lambda: tb.ConjugateGradient(60, **options),
        "neumann": lambda: tb.Neumann(400, rate=0.15, **options),
        "fixed point": lambda: tb.FixedPoint(400, rate=0.15, **options),
    }[name]()
    want = np.linalg.solve(matrix + 2.0 * np.eye(6), b)
    found = solve(solver, matrix, b)
    np.testing.assert_allclose(found.value, want, rtol=1e-7)


@pytest.mark.parametrize("name", WARM)
def test_warm_start_takes_fewer_iterations(name: str) -> None:
    matrix, b = spd(9, 8, 10.0), np.arange(1.0, 9.0)
    solution = np.linalg.solve(matrix, b)
    cold = solve(WARM[name], matrix, b)
    near = solve(WARM[name], matrix, b, solution * (1 + 1e-6))
    there = solve(WARM[name], matrix, b, solution)
    assert int(near.iterations) < int(cold.iterations)
    # The fixed point iteration needs one product to see that it has arrived.
    assert int(there.iterations) == {"cg": 0, "fixed point": 1}[name]
    for found in (near, there):
        np.testing.assert_allclose(found.value, solution, rtol=1e-6)


def test_warm_says_whether_the_solution_is_carried() -> None:
    b = tf.ones([2])
    for solver in (tb.ConjugateGradient(5), tb.Neumann(5), tb.FixedPoint(5)):
        assert solver.init(b) == ()
    for solver in (
        tb.ConjugateGradient(5, warm_start=True),
        tb.NormalConjugateGradient(5, warm_start=True),
        tb.FixedPoint(5, rate=0.1, warm_start=True),
    ):
        np.testing.assert_array_equal(solver.init(b), 0.0)
        found = solver.solve(tb.LinearSystem(lambda v: 2.0 * v), b, solver.init(b))
        np.testing.assert_array_equal(found.state, found.value)


@pytest.mark.parametrize(
    "build",
    [
        lambda rate, warm: tb.FixedPoint(20, rate=rate, warm_start=warm),
        lambda rate, warm: tb.GradientSolver(
            keras.optimizers.SGD(rate), 20, warm_start=warm
        ),
    ],
    ids=["fixed-point", "gradient"],
)
def test_a_warm_start_far_off_is_no_divergence(build) -> None:
    """Worse than zero after twenty steps, but nearer than it began."""
    matrix, b = np.diag([1.0, 5.0]), np.array([1e-3, 1e-3])
    far = np.array([100.0, 1.0])
    for rate, ends, diverged in ((0.1, True, False), (0.5, False, True)):
        solver = build(rate, True)
        state = solver.init(tf.constant(b))
        state = tf.nest.map_structure(
            lambda leaf: tf.constant(far) if leaf.shape == (2,) else leaf, state
        )
        found = solver.solve(
            tb.LinearSystem(product_with(matrix)), tf.constant(b), state
        )
        assert float(found.residual) > 1
        begun = np.linalg.norm(b - matrix @ far) / np.linalg.norm(b)
        assert (float(found.residual) < begun) == ends
        assert bool(found.diverged) == diverged
    cold = build(0.5, False)
    found = cold.solve(tb.LinearSystem(product_with(matrix)), tf.constant(b), ())
    assert bool(found.diverged)


def test_normal_conjugate_gradients_from_far_off_do_not_diverge() -> None:
    """Their residual never grows: what is left of it is the start's."""
    matrix, b = np.diag([1.0, 5.0]), np.array([1e-3, 1e-3])
    solver = tb.NormalConjugateGradient(1, warm_start=True)
    system = tb.LinearSystem(product_with(matrix), product_with(matrix))
    found = solver.solve(system, tf.constant(b), tf.constant([100.0, 1.0], tf.float64))
    assert float(found.residual) > 1 and not bool(found.diverged)


@QUICK
@given(seed=st.integers(0, 10**6), size=st.integers(1, 8), terms=st.integers(1, 9))
def test_neumann_is_one_more_fixed_point_step(seed: int, size: int, terms: int) -> None:
    matrix = spd(seed, size, 5.0)
    b = np.random.default_rng(seed).normal(size=size)
    rate = 0.3
    series = solve(tb.Neumann(terms, rate=rate, rtol=0.0), matrix, b)
    fixed = solve(tb.FixedPoint(terms + 1, rate=rate, rtol=0.0), matrix, b)
    np.testing.assert_allclose(series.value, fixed.value, rtol=1e-12, atol=1e-14)
    decay = np.eye(size) - rate * matrix
    powers = [np.linalg.matrix_power(decay, j) @ b for j in range(terms + 1)]
    np.testing.assert_allclose(
        series.value, rate * np.sum(powers, 0), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("kind", [tb.Neumann, tb.FixedPoint])
def test_residual_is_that_of_the_iterate_before_the_last_update(kind: type) -> None:
    """As documented, and never smaller than that of what is returned."""
    matrix, b, rate = spd(10, 6, 5.0), np.arange(1.0, 7.0), 0.3
    found = solve(kind(4, rate=rate, rtol=0.0), matrix, b)
    assert int(found.iterations) == 4
    decay = np.eye(6) - rate * matrix
    updates = {tb.Neumann: 4, tb.FixedPoint: 3}[kind]
    want = np.linalg.norm(np.linalg.matrix_power(decay, updates) @ b)
    assert float(found.residual) == pytest.approx(want / np.linalg.norm(b), rel=1e-9)
    assert residual(matrix, b, found.value) < float(found.residual)


@pytest.mark.parametrize(
    ("solver", "products"),
    [
        (tb.ConjugateGradient(4, rtol=0.0), 4),
        (tb.NormalConjugateGradient(4, rtol=0.0), 9),  # A'b, then two a step
        (tb.Neumann(4, rate=0.3, rtol=0.0), 4),
        (tb.FixedPoint(4, rate=0.3, rtol=0.0), 3),
        (tb.FixedPoint(1, rate=0.3, rtol=0.0), 0),
    ],
)
def test_no_product_is_spent_on_zero(solver: tb.LinearSolver, products: int) -> None:
    vectors = []

    def product(vector: tf.Tensor) -> tf.Tensor:
        vectors.append(vector.numpy())
        return tf.linalg.matvec(spd(10, 6, 5.0), vector)

    b = tf.range(1.0, 7.0, delta=1.0, dtype=tf.float64)
    solver.solve(tb.LinearSystem(product, product), b)
    assert len(vectors) == products
    assert all(np.any(vector) for vector in vectors)


@pytest.mark.parametrize("kind", [tb.Neumann, tb.FixedPoint])
def test_rate_of_the_inner_solver_is_the_default(kind: type) -> None:
    matrix, b = spd(11, 4, 3.0), tf.constant([1.0, 2.0, 3.0, 4.0], tf.float64)
    own = kind(5, rate=0.25).solve(tb.LinearSystem(product_with(matrix), rate=0.1), b)
    given_rate = kind(5).solve(tb.LinearSystem(product_with(matrix), rate=0.25), b)
    other = kind(5).solve(tb.LinearSystem(product_with(matrix), rate=0.1), b)
    np.testing.assert_array_equal(own.value, given_rate.value)
    assert np.abs(own.value - other.value).max() > 0.01


# In `Implicit`: what is carried and what is reported.


def _implicit(solver: tb.LinearSolver) -> tuple[Oracle, tb.Implicit]:
    oracle = quadratic()
    inner = tb.InnerSolver(keras.optimizers.SGD(oracle.rate), 28)
    return oracle, tb.Implicit(inner, solver)


@pytest.mark.parametrize("name", WARM)
def test_implicit_hands_a_warm_solution_on(name: str) -> None:
    solver = {
        "cg": tb.ConjugateGradient(20, warm_start=True, rtol=1e-8),
        "fixed point": tb.FixedPoint(60, warm_start=True, rtol=1e-8),
    }[name]
    oracle, method = _implicit(solver)
    x, y, batches = oracle.at("float64")
    state = method.init(oracle.problem, x, y)
    first = method.step(oracle.problem, x, y, batches, state)
    second = method.step(oracle.problem, x, first.lower, batches, first.state)
    solution = oracle.solution(flat(oracle.x))
    v = np.linalg.solve(
        oracle.hessian(flat(oracle.x)), oracle.f_y(flat(oracle.x), solution)
    )
    np.testing.assert_allclose(first.state["solver"], v, rtol=1e-6)
    assert int(first.metrics["iterations"]) > 3
    assert int(second.metrics["iterations"]) <= 1
    for step in (first, second):
        assert float(step.metrics["residual"]) <= 1e-8
        error = flat(step.upper_gradient) - oracle.hypergradient(flat(oracle.x))
        assert np.linalg.norm(error) < 1e-6


def test_implicit_reports_stationarity() -> None:
    """The norm of the lower gradient at the y it used."""
    oracle = nested()
    inner = tb.InnerSolver(keras.optimizers.SGD(oracle.rate), 2)
    method = tb.Implicit(inner, tb.ConjugateGradient(20, rtol=1e-12))
    x, y, batches = oracle.at("float64")
    step = method.step(oracle.problem, x, y, batches, method.init(oracle.problem, x, y))
    end = descend(oracle, flat(oracle.x), flat(oracle.y), oracle.rate, 2)[-1]
    want = np.linalg.norm(oracle.g_y(flat(oracle.x), end))
    assert float(step.metrics["stationarity"]) == pytest.approx(want, rel=1e-7)
    # Far from solved, it is still the implicit formula at that y.
    np.testing.assert_allclose(
        flat(step.upper_gradient), implicit(oracle, flat(oracle.x), end), rtol=1e-6
    )


@pytest.mark.parametrize(
    "kind", fast_where("tasks".__eq__, ["definite", "indefinite", "solved", "tasks"])
)
@pytest.mark.parametrize(
    "solver",
    [
        tb.ConjugateGradient(4, rtol=0.0),
        tb.FixedPoint(4, rate=0.1, rtol=0.0),
        tb.Neumann(4, rate=0.1, rtol=0.0),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_unrolled_steps_are_those_of_the_loop(solver, kind, monkeypatch) -> None:
    """Without a tolerance, few of them: the same to the last digits, in every mode,
    also where a solve ends before: at negative curvature, at b = 0, tasks apart."""
    generator = np.random.default_rng(0)
    basis, _ = np.linalg.qr(generator.normal(size=(5, 5)))
    values = [-3.0, 1.0, 2.0, 3.0, 4.0] if kind == "indefinite" else [1, 1, 2, 3, 4]
    matrix = tf.constant(basis @ np.diag(values) @ basis.T)
    b = tf.constant(generator.normal(size=5)) * (0.0 if kind == "solved" else 1.0)
    system = tb.LinearSystem(lambda v: tf.linalg.matvec(matrix, v))
    if kind == "tasks":
        eigenvectors = tf.constant(basis[:, 2:].T)  # one step solves them
        b = tf.concat([tf.stack([b, 0 * b]), eigenvectors], axis=0)
        system = system._replace(leading=1)

    def solved() -> tuple:
        return tuple(solver.solve(system, b))[:3]

    found = [solved()]
    for jit in (False, True):
        found.append(tf.function(solved, autograph=False, jit_compile=jit)())
    monkeypatch.setattr(base, "UNROLLED", 0)
    loop = solved()
    assert kind in ("solved", "indefinite") or int(loop[2]) in (3, 4)
    for one in found:
        for a, c in zip(one, loop, strict=True):
            np.testing.assert_allclose(a, c, rtol=1e-10, atol=1e-13)
