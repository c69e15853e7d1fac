"""Normal equations, dense, gradient and preconditioned solvers; HOAG's tolerances."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import nested, quadratic, ridge
from test_linear_solvers import product_with, spd

import tfbilevel as tb

SGD = keras.optimizers.SGD
QUICK = settings(max_examples=15, deadline=None)


def system(matrix: np.ndarray, **keywords) -> tb.LinearSystem:
    transposed = None if np.allclose(matrix, matrix.T) else product_with(matrix.T)
    return tb.LinearSystem(product_with(matrix), transposed, **keywords)


def general(seed: int, size: int) -> np.ndarray:
    """Not symmetric, not definite; singular values 1 to 10."""
    generator = np.random.default_rng(seed)
    left, _ = np.linalg.qr(generator.normal(size=(size, size)))
    right, _ = np.linalg.qr(generator.normal(size=(size, size)))
    return left @ np.diag(np.geomspace(1.0, 10.0, size)) @ right


@QUICK
@given(seed=st.integers(0, 10**6), size=st.integers(1, 8))
def test_normal_cg_solves_any_invertible_system(seed: int, size: int) -> None:
    matrix = general(seed, size)
    b = np.random.default_rng(seed + 1).normal(size=size)
    solver = tb.NormalConjugateGradient(size + 4, rtol=1e-10)
    found = solver.solve(system(matrix), tf.constant(b))
    np.testing.assert_allclose(found.value, np.linalg.solve(matrix, b), rtol=1e-6)
    # The residual is that of the system itself, not of the normal equations.
    want = np.linalg.norm(b - matrix @ found.value.numpy()) / np.linalg.norm(b)
    assert float(found.residual) == pytest.approx(want, rel=1e-3, abs=1e-12)


def test_normal_cg_damps_the_system_and_its_transpose() -> None:
    matrix, b = general(3, 5), np.arange(1.0, 6.0)
    solver = tb.NormalConjugateGradient(12, rtol=1e-12, damping=0.3)
    found = solver.solve(system(matrix), tf.constant(b))
    want = np.linalg.solve(matrix + 0.3 * np.eye(5), b)
    np.testing.assert_allclose(found.value, want, rtol=1e-7)


def test_normal_cg_gives_least_squares_for_a_singular_matrix() -> None:
    matrix, b = np.diag([2.0, -1.0, 0.0]), np.array([2.0, 4.0, 5.0])
    found = tb.NormalConjugateGradient(10).solve(system(matrix), tf.constant(b))
    np.testing.assert_allclose(found.value, [1.0, -4.0, 0.0], atol=1e-12)


@QUICK
@given(seed=st.integers(0, 10**6), size=st.integers(1, 8))
def test_direct_is_numpy_solve(seed: int, size: int) -> None:
    matrix = general(seed, size)
    b = np.random.default_rng(seed + 1).normal(size=size)
    found = tb.Direct(damping=0.3).solve(system(matrix), tf.constant(b))
    want = np.linalg.solve(matrix + 0.3 * np.eye(size), b)
    np.testing.assert_allclose(found.value, want, rtol=1e-9)
    assert float(found.residual) < 1e-12


def test_direct_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(ValueError, match="Received: 5001 lower variables"):
        tb.Direct().solve(tb.LinearSystem(lambda v: v), tf.ones([5001]))


def test_direct_on_a_nest() -> None:
    like = {"a": tf.constant([[1.0, 2.0]]), "b": (tf.constant(3.0),)}
    matrix = spd(3, 3)
    found = tb.Direct().solve(
        tb.LinearSystem(product_with(matrix.astype("float32"), like)), like
    )
    tf.nest.assert_same_structure(found.value, like)
    flat = [found.value["a"][0, 0], found.value["a"][0, 1], found.value["b"][0]]
    np.testing.assert_allclose(flat, np.linalg.solve(matrix, [1, 2, 3]), rtol=1e-4)


# Gradient steps on the system.


@pytest.mark.parametrize("objective", ["quadratic", "residual"])
def test_gradient_solver_is_the_optimizer_on_the_named_objective(objective) -> None:
    """Momentum by hand on v'Av/2 - b'v or |(A + d) v - b|^2, of any A."""
    matrix = general(2, 4) / 4 if objective == "residual" else spd(2, 4, 3.0)
    b = np.array([1.0, -2.0, 0.5, 3.0])
    damped = matrix + 0.1 * np.eye(4)
    v, velocity = np.zeros(4), np.zeros(4)
    for _ in range(5):
        gradient = damped @ v - b
        if objective == "residual":
            gradient = 2 * damped.T @ gradient
        velocity = 0.5 * velocity - 0.02 * gradient
        v = v + velocity
    solver = tb.GradientSolver(
        SGD(0.02, momentum=0.5), 5, objective, damping=0.1, rtol=0.0
    )
    found = solver.solve(system(matrix), tf.constant(b))
    np.testing.assert_allclose(found.value, v, rtol=1e-7)


def test_gradient_solver_carries_its_solution_and_its_slots() -> None:
    """Two times five warm steps are ten; ApproxGrad never resets Adam."""
    matrix, b = spd(2, 4, 3.0), tf.constant([1.0, -2.0, 0.5, 3.0], tf.float64)
    made = system(matrix)

    def solver(steps: int) -> tb.GradientSolver:
        adam = keras.optimizers.Adam(0.05)
        return tb.GradientSolver(adam, steps, "residual", rtol=0.0)

    whole = solver(10).solve(made, b, solver(10).init(b))
    half = solver(5)
    first = half.solve(made, b, half.init(b))
    second = half.solve(made, b, first.state)
    np.testing.assert_allclose(second.value, whole.value, rtol=1e-12)
    cold = tb.GradientSolver(keras.optimizers.Adam(0.05), 5, warm_start=False)
    assert cold.init(b) == () and cold.solve(made, b).state == ()


def test_residual_objective_solves_an_indefinite_system() -> None:
    matrix, b = np.diag([2.0, -1.0]), np.array([2.0, 4.0])
    quadratic_solver, residual_solver = (
        tb.GradientSolver(SGD(0.1), 300, objective)
        for objective in ("quadratic", "residual")
    )
    found = residual_solver.solve(system(matrix), tf.constant(b))
    np.testing.assert_allclose(found.value, [1.0, -4.0], rtol=1e-4)
    assert float(quadratic_solver.solve(system(matrix), tf.constant(b)).residual) > 1


# Preconditioning.


def test_the_exact_inverse_as_preconditioner_needs_one_step() -> None:
    matrix, b = spd(4, 6, 1e4), np.arange(1.0, 7.0)
    inverse = np.linalg.inv(matrix)
    solver = tb.ConjugateGradient(
        20, preconditioner=lambda x, y, v: tf.linalg.matvec(tf.constant(inverse), v)
    )
    found = solver.solve(system(matrix), tf.constant(b))
    assert int(found.iterations) == 1
    np.testing.assert_allclose(found.value, np.linalg.solve(matrix, b), rtol=1e-6)


def test_a_diagonal_preconditioner_saves_steps() -> None:
    """A diagonal spread over four decades, and a little coupling."""
    generator = np.random.default_rng(0)
    scale = np.geomspace(1.0, 1e4, 30)
    low = generator.normal(size=(30, 2))
    matrix = np.diag(scale) + 0.1 * low @ low.T
    b = generator.normal(size=30)
    solvers = [
        tb.ConjugateGradient(200, rtol=1e-8),
        tb.ConjugateGradient(
            200, rtol=1e-8, preconditioner=lambda x, y, v: v / np.diag(matrix)
        ),
    ]
    plain, helped = (s.solve(system(matrix), tf.constant(b)) for s in solvers)
    for found in (plain, helped):
        np.testing.assert_allclose(found.value, np.linalg.solve(matrix, b), rtol=1e-5)
    assert int(helped.iterations) < 9 < 20 < int(plain.iterations)


def test_the_preconditioner_sees_the_variables() -> None:
    """On the ridge oracle: the penalty's diagonal exp(x), plus that of the data."""
    oracle = ridge()
    x, y, batches = oracle.at("float64")
    seen = []

    def jacobi(upper, lower, vector):
        seen.append((upper, lower))
        diagonal = np.diag(oracle.hessian(oracle.x))
        return vector / diagonal

    inner = tb.InnerSolver(SGD(oracle.rate), 40)
    method = tb.Implicit(inner, tb.ConjugateGradient(10, preconditioner=jacobi))
    found = method.step(
        oracle.problem, x, y, batches, method.init(oracle.problem, x, y)
    )
    want = oracle.hypergradient(oracle.x)
    np.testing.assert_allclose(found.upper_gradient, want, rtol=1e-6)
    np.testing.assert_array_equal(seen[0][0], oracle.x)
    np.testing.assert_array_equal(seen[0][1], found.lower)


# HOAG: tolerances that follow the outer step.


def test_inner_steps_end_where_the_gradient_is_small() -> None:
    """y_t = x + 0.5^t (y - x): |g_y| = 0.5^t |y - x|, seen one step late."""
    problem = tb.Problem(
        lambda x, y, batch: y**2, lambda x, y, batch: 0.5 * (y - x) ** 2
    )
    x, y = tf.constant(0.0, tf.float64), tf.constant(1.0, tf.float64)
    inner = tb.InnerSolver(SGD(0.5), steps=100, atol=0.07)
    here = problem.prepared(x, tb.Batches(None, None))
    end, _, _ = inner.solve(here, y, {})
    # 0.5^4 = 0.0625 is the first below: step 4 is made with it, and ends the loop.
    assert float(end) == pytest.approx(0.5**5)
    capped = tb.InnerSolver(SGD(0.5), steps=3, atol=1e-9)
    end, _, _ = capped.solve(here, y, {})
    assert float(end) == pytest.approx(0.5**3)


def test_hoag_tightens_both_tolerances_and_converges() -> None:
    oracle = quadratic()
    x, y, batches = oracle.at("float64")
    schedule = tb.Geometric(1.0, 0.5)
    method = tb.Implicit(
        tb.InnerSolver(SGD(0.3), 500, start="cold", atol=schedule),
        tb.ConjugateGradient(50, rtol=schedule),
    )
    state = method.init(oracle.problem, x, y)
    step = tf.function(
        lambda s: method.step(oracle.problem, x, y, batches, s), autograph=False
    )
    want = oracle.hypergradient(oracle.x)
    for k in range(24):
        found = step(state)
        state = found.state
        assert float(found.metrics["stationarity"]) <= 0.5**k
        assert float(found.metrics["residual"]) <= 0.5**k
        if k in (2, 23):
            error = np.linalg.norm(found.upper_gradient - want) / np.linalg.norm(want)
            assert (error > 1e-3) if k == 2 else (error < 1e-5)
    assert step.experimental_get_tracing_count() == 1


# Through the optimizer's own map.


def test_conjugate_gradients_need_a_symmetric_map() -> None:
    heavy = tb.InnerSolver(SGD(0.1, momentum=0.5), 5)
    accelerated = tb.InnerSolver(SGD(0.1), 5, accelerated=True)
    for inner in (heavy, accelerated):
        with pytest.raises(ValueError, match="must not need a symmetric system"):
            tb.Implicit(inner, tb.ConjugateGradient(5), through="optimizer")
    tb.Implicit(tb.InnerSolver(SGD(0.1), 5), tb.ConjugateGradient(5), "optimizer")
    with pytest.raises(ValueError, match="`through` must be one of"):
        tb.Implicit(heavy, through="map")


def test_through_a_plain_step_is_through_the_gradient() -> None:
    """I - J = rate * H: the same v up to the rate, also far from solved."""
    oracle = nested()
    x, y, batches = oracle.at("float64")
    inner = tb.InnerSolver(SGD(oracle.rate), 3)
    gradients = []
    for through in ("gradient", "optimizer"):
        method = tb.Implicit(inner, tb.Direct(), through)
        state = method.init(oracle.problem, x, y)
        step = method.step(oracle.problem, x, y, batches, state)
        gradients.append(tf.nest.flatten(step.upper_gradient))
    for a, b in zip(*gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)


def test_the_residual_of_an_unsymmetric_map() -> None:
    """Momentum's: its products are with the transpose too."""
    oracle = quadratic()
    x, y, batches = oracle.at("float64")
    inner = tb.InnerSolver(SGD(0.3, momentum=0.4), 80)
    solver = tb.GradientSolver(SGD(0.1, momentum=0.8), 1500, "residual", rtol=1e-10)
    method = tb.Implicit(inner, solver, through="optimizer")
    state = method.init(oracle.problem, x, y)
    run = tf.function(method.step, autograph=False)
    found = run(oracle.problem, x, y, batches, state)
    np.testing.assert_allclose(
        found.upper_gradient, oracle.hypergradient(oracle.x), rtol=1e-6
    )


def test_wrong_tolerances() -> None:
    for tolerance in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="`atol` must be a finite number"):
            tb.InnerSolver(SGD(0.1), 5, atol=tolerance)
        with pytest.raises(ValueError, match="`rtol` must be a finite number"):
            tb.ConjugateGradient(5, rtol=tolerance)
