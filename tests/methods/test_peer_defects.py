"""Defects found in other libraries, each passing its own project's tests.

One test per defect that concerns what this library has. Elsewhere: D7
(test_model.py::test_callbacks_work), D9 (test_differentiable.py: AdamW is Keras's),
D13 (test_stochastic.py), D16 and D17 (test_data_prep.py, test_data_hyper_cleaning.py),
D5 and D6 (test_recursions_penalty.py, test_penalty_ends.py: multipliers, a barrier that
is tested), D18 (FiniteDifference in test_contract.py). Of D12 and D20 there is nothing
here: zero-order estimators, configuration files. D22 (tests that accept 60
percent) is the tolerances of all files here.
"""

from typing import Any

import keras
import numpy as np
import pytest
import references
import tensorflow as tf
from problems import cast, flat, nested, quadratic
from suites import fast_where

import tfbilevel as tb

SGD = keras.optimizers.SGD
NO_DATA = tb.Batches(None, None)


def test_d1_warm_up_steps_use_the_current_iterate_and_leave_no_gradient() -> None:
    """D1: the truncated warm-up steps all took the gradient at the initial point, and
    their upper gradients were added to the hypergradient."""
    oracle = quadratic()
    x, y, batches = oracle.at("float64")
    method = tb.Unroll(tb.InnerSolver(SGD(0.2), 6), last=2)
    step = method.step(oracle.problem, x, y, batches, {})
    path = references.descend(oracle, flat(x), flat(y), 0.2, 6)
    np.testing.assert_allclose(step.lower, path[6], rtol=1e-12)
    np.testing.assert_allclose(
        step.upper_gradient,
        references.unroll(oracle, flat(x), path, 0.2, last=2),
        rtol=1e-11,
    )
    # What the defect gives: four equal steps first.
    stuck = [flat(y) - 0.2 * 4 * oracle.g_y(flat(x), flat(y))]
    stuck = references.descend(oracle, flat(x), stuck[0], 0.2, 2)
    wrong = references.unroll(oracle, flat(x), stuck, 0.2)
    assert np.linalg.norm(step.upper_gradient - wrong) > 0.1


def test_d2_the_gradient_norm_penalty_is_differentiated() -> None:
    """D2: without a second-order graph the penalty had a zero derivative."""
    oracle = quadratic()
    x, y, batches = oracle.at("float64")
    gradients = {}
    for weight in (0.0, 0.5):
        method = tb.GradientNorm(SGD(0.1), weight)
        state = method.init(oracle.problem, x, y)
        step = method.step(oracle.problem, x, y, batches, state)
        gradients[weight] = step.upper_gradient.numpy()
        d_x, d_y = references.gradient_norm(oracle, flat(x), flat(y), weight)
        np.testing.assert_allclose(step.upper_gradient, d_x, rtol=1e-12)
        np.testing.assert_allclose(step.lower, flat(y) - 0.1 * d_y, rtol=1e-12)
    assert np.linalg.norm(gradients[0.5] - gradients[0.0]) > 0.1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_d3_cg_returns_the_iterate_that_converged(dtype: str) -> None:
    """D3: on convergence the iterate before was returned.

    Zeros for a system that one step solves, so that the implicit term vanished; and
    0 / 0 for a zero right-hand side.
    """
    b = tf.constant([2.0, -6.0], dtype)
    found = tb.ConjugateGradient(10).solve(tb.LinearSystem(lambda v: 4.0 * v), b)
    np.testing.assert_allclose(found.value, [0.5, -1.5], rtol=1e-6)
    zero = tb.ConjugateGradient(10).solve(tb.LinearSystem(lambda v: 4.0 * v), 0 * b)
    assert zero.value.numpy().tolist() == [0.0, 0.0]
    # The same inside a hypergradient: f = y^2/2, g = 2 (y - 3x)^2, dF/dx = 9x.
    problem = tb.Problem(
        upper_loss=lambda x, y, b: 0.5 * y**2,
        lower_loss=lambda x, y, b: 2.0 * (y - 3.0 * x) ** 2,
    )
    method = tb.Implicit(tb.InnerSolver(SGD(0.25), 1), tb.ConjugateGradient(10))
    for start, want in ((2.0, 18.0), (0.0, 0.0)):
        x, y = tf.constant(start, dtype), tf.constant(1.0, dtype)
        step = method.step(problem, x, y, NO_DATA, method.init(problem, x, y))
        assert float(step.upper_gradient) == pytest.approx(want, rel=1e-6, abs=1e-6)


def test_d4_norms_over_several_tensors_are_global() -> None:
    """D4: a sum of per-tensor norms, squared, stood for a squared global norm."""
    rhs = [tf.constant([3.0], tf.float64), tf.constant([[4.0]], tf.float64)]

    def product(v: Any) -> Any:
        return [2.0 * v[0] + 0.5 * v[1][0], 1.0 * v[1] + 0.5 * v[0][None]]

    matrix, b = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([3.0, 4.0])
    found = tb.ConjugateGradient(1).solve(tb.LinearSystem(product), rhs)
    length = (b @ b) / (b @ matrix @ b)
    np.testing.assert_allclose(flat(found.value), length * b, rtol=1e-14)
    want = np.linalg.norm(b - matrix @ (length * b)) / 5.0
    assert float(found.residual) == pytest.approx(want, rel=1e-12)


def test_d8_damped_cg_is_cg_on_the_damped_system() -> None:
    """D8: a factor on the curvature, missing in the residual's update."""
    matrix, b = np.diag([1.0, 3.0, 7.0]), np.array([1.0, -2.0, 0.5])
    solver = tb.ConjugateGradient(3, damping=0.7, rtol=1e-12)
    found = solver.solve(
        tb.LinearSystem(lambda v: tf.linalg.matvec(tf.constant(matrix), v)),
        tf.constant(b),
    )
    np.testing.assert_allclose(
        found.value, np.linalg.solve(matrix + 0.7 * np.eye(3), b), rtol=1e-10
    )


def test_d10_and_d21_the_optimizer_keeps_its_options() -> None:
    """D10: momentum and weight decay silently set to zero. D21: per-option settings
    lost when the optimizer was rebuilt."""
    oracle = quadratic()
    x, y, batches = oracle.at("float64")
    optimizer = SGD(0.125, momentum=0.5, nesterov=True, weight_decay=0.25)
    step = tb.Unroll(tb.InnerSolver(optimizer, 3)).step(
        oracle.problem, x, y, batches, {}
    )
    end, velocity = flat(y), np.zeros(5)
    for _ in range(3):
        gradient = oracle.g_y(flat(x), end)
        end = end * (1 - 0.125 * 0.25)  # Keras decays before the update
        velocity = 0.5 * velocity - 0.125 * gradient
        end = end + 0.5 * velocity - 0.125 * gradient
    np.testing.assert_allclose(step.lower, end, rtol=1e-12)
    assert optimizer.momentum == 0.5 and optimizer.weight_decay == 0.25


def test_d14_every_entry_has_its_own_hypergradient() -> None:
    """D14: one number was broadcast to all entries of a non-scalar leaf."""
    oracle = nested()
    x, y, batches = oracle.at("float64")
    inner = tb.InnerSolver(SGD(oracle.rate), 28)

    def gradient(method: tb.Method) -> Any:
        state = method.init(oracle.problem, x, y)
        step = method.step(oracle.problem, x, y, batches, state)
        return flat(step.upper_gradient)

    want = oracle.hypergradient(flat(oracle.x))
    assert len(np.unique(np.round(want, 6))) == 6
    for method in (tb.Unroll(inner), tb.Implicit(inner)):
        np.testing.assert_allclose(gradient(method), want, rtol=1e-5)
    # Differences of the last step's gradient.
    last = gradient(tb.Unroll(inner, last=1))
    assert len(np.unique(np.round(last, 6))) == 6
    np.testing.assert_allclose(gradient(tb.FiniteDifference(inner)), last, rtol=1e-5)


@pytest.mark.parametrize("memory", ["replay", "checkpoint", "tape"])
def test_d15_a_nan_stays_a_nan(memory: str) -> None:
    """D15: a gradient with a NaN in it was replaced by zeros, silently."""
    problem = tb.Problem(
        upper_loss=lambda x, y, b: tf.reduce_sum(y),
        # sqrt of zero: an infinite derivative times zero.
        lower_loss=lambda x, y, b: tf.reduce_sum(tf.sqrt(0.0 * x) * y + y**2),
    )
    x, y = tf.constant([1.0, 2.0]), tf.constant([0.5, 0.5])
    method = tb.Unroll(tb.InnerSolver(SGD(0.1), 2), memory=memory)
    step = method.step(problem, x, y, NO_DATA, {})
    assert np.isnan(step.upper_gradient).all()
    with pytest.raises(tb.NonFiniteError, match="the upper gradient"):
        tb.minimize(problem, method, x, y, SGD(0.1), NO_DATA, steps=3)


@pytest.mark.parametrize("solver", ["cg", "neumann", "fixed point"])
def test_d15_a_nan_in_a_linear_solve_stays_a_nan(solver: str) -> None:
    """Nor does a linear solver hide it: `divide_no_nan` must not."""
    made = {
        "cg": tb.ConjugateGradient(5),
        "neumann": tb.Neumann(5, rate=0.1),
        "fixed point": tb.FixedPoint(5, rate=0.1),
    }[solver]
    b = tf.constant([1.0, np.nan])
    found = made.solve(tb.LinearSystem(lambda v: 2.0 * v), b)
    assert not np.isfinite(found.value).all() or not np.isfinite(found.residual)
    problem = tb.Problem(
        upper_loss=lambda x, y, b: tf.reduce_sum(y * tf.constant([1.0, np.nan])),
        lower_loss=lambda x, y, b: tf.reduce_sum((y - x) ** 2),
    )
    method = tb.Implicit(tb.InnerSolver(SGD(0.1), 2), made)
    x = tf.constant([1.0, 2.0])
    with pytest.raises(tb.NonFiniteError):
        tb.minimize(problem, method, x, x, SGD(0.1), NO_DATA, steps=3)


@pytest.mark.parametrize(
    "solver",
    [
        tb.ConjugateGradient(5),
        tb.NormalConjugateGradient(5),
        tb.GradientSolver(SGD(0.1), 5),
        tb.Neumann(5, rate=0.1),
        tb.FixedPoint(5, rate=0.1),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_d15_a_nan_in_the_matrix_of_a_linear_solve_stays_a_nan(solver: Any) -> None:
    """g and g_y are finite, the second derivative of |y|^1.5 at 0 is not."""
    problem = tb.Problem(
        upper_loss=lambda x, y, b: 0.5 * (y[0] - 1.0) ** 2,
        lower_loss=lambda x, y, b: 0.5 * (y[0] - x) ** 2 + tf.abs(y[1]) ** 1.5,
    )
    method = tb.Implicit(tb.InnerSolver(SGD(0.1), 2), solver)
    x, y = tf.constant(2.0), tf.zeros([2])
    with pytest.raises(tb.NonFiniteError):
        tb.minimize(problem, method, x, y, SGD(0.1), NO_DATA, steps=1)


@pytest.mark.parametrize(
    "mapping", fast_where("vectorized".__eq__, ["vectorized", "sequential"])
)
def test_d19_a_mean_over_tasks_is_a_mean(mapping: str) -> None:
    """D19: task gradients were summed though an average was meant: three copies of one
    task have that task's hypergradient."""
    problem = tb.over_tasks(
        tb.Problem(
            lambda x, y, batch: tf.reduce_sum((y - batch) ** 2),
            lambda x, y, batch: tf.reduce_sum((y - x * batch) ** 2),
        ),
        mapping,
    )
    x = tf.constant([0.5, 2.0], tf.float64)
    task = np.array([[1.0, -3.0]])
    gradients = []
    for count in (1, 3):
        data = cast(np.repeat(task, count, 0), "float64")
        method = tb.Unroll(tb.InnerSolver(SGD(0.25), 2))
        # Compiled: eagerly every inner step would trace its mapping again.
        step = tf.function(method.step, autograph=False)
        made = step(problem, x, 0 * data, tb.Batches(data, data), {})
        gradients.append(made.upper_gradient.numpy())
    # y_2 = (3/4) x d, so f = sum (3/4 x d - d)^2.
    d = task[0]
    want = 2 * 0.75 * d * (0.75 * flat(x) * d - d)
    for gradient in gradients:
        np.testing.assert_allclose(gradient, want, rtol=1e-13)


def test_published_rhg_trains_with_every_weight_not_with_the_first() -> None:
    """The published hyper-cleaning RHG built its trajectory from x[0] alone."""
    generator = np.random.default_rng(0)
    inputs, answers = generator.normal(size=(7, 5)), generator.normal(size=7)
    weights = generator.normal(size=7)

    def g(x: Any, y: Any, batch: Any) -> Any:
        residual = tf.linalg.matvec(tf.constant(inputs), y) - answers
        return 0.5 * tf.reduce_mean(tf.sigmoid(x) * residual**2)

    problem = tb.Problem(lambda x, y, b: 0.5 * tf.reduce_sum(y**2), g)
    inner = tb.InnerSolver(SGD(0.5), 4)
    step = tb.Unroll(inner).step(
        problem, tf.constant(weights), tf.zeros([5], tf.float64), NO_DATA, {}
    )
    s, y = 1 / (1 + np.exp(-weights)), np.zeros(5)
    path = [y]
    for _ in range(4):
        y = y - 0.5 * inputs.T @ (s * (inputs @ y - answers)) / 7
        path.append(y)
    np.testing.assert_allclose(step.lower, y, rtol=1e-12)
    total, adjoint = np.zeros(7), y
    for y in reversed(path[:-1]):
        residual = inputs @ y - answers
        total -= 0.5 * s * (1 - s) / 7 * residual * (inputs @ adjoint)
        adjoint = adjoint - 0.5 * inputs.T @ (s * (inputs @ adjoint)) / 7
    np.testing.assert_allclose(step.upper_gradient, total, rtol=1e-11)


def test_published_penalty_identities() -> None:
    """f = |y - a|^2 / 2, g = |y - x|^2 / 2: exact value gap gradients, end point
    x = y = a; and for g = |y - Ax|^2 / 2 both penalties have the same directions."""
    a = np.array([1.0, -2.0, 0.5])
    problem = tb.Problem(
        upper_loss=lambda x, y, b: 0.5 * tf.reduce_sum((y - a) ** 2),
        lower_loss=lambda x, y, b: 0.5 * tf.reduce_sum((y - x) ** 2),
    )
    x, y = tf.constant([0.3, 0.4, -0.1], tf.float64), tf.zeros([3], tf.float64)
    gap = tb.ValueGap(tb.InnerSolver(SGD(1.0), 1), SGD(0.25), weight=0.8)
    step = gap.step(problem, x, y, NO_DATA, gap.init(problem, x, y))
    np.testing.assert_allclose(step.upper_gradient, 0.8 * (x - y), rtol=1e-12)
    np.testing.assert_allclose(step.lower, y - 0.25 * (y - a + 0.8 * (y - x)))
    assert float(step.metrics["gap"]) == pytest.approx(
        0.5 * float(tf.reduce_sum((y - x) ** 2)), rel=1e-12
    )
    result = tb.minimize(problem, gap, x, y, SGD(0.5), NO_DATA, steps=400)
    np.testing.assert_allclose(result.upper, a, atol=1e-9)
    np.testing.assert_allclose(result.lower, a, atol=1e-9)

    matrix = tf.constant(np.random.default_rng(1).normal(size=(5, 3)))
    problem = tb.Problem(
        upper_loss=lambda x, y, b: tf.reduce_sum(tf.sin(y)) + tf.reduce_sum(x**3),
        lower_loss=lambda x, y, b: (
            0.5 * tf.reduce_sum((y - tf.linalg.matvec(matrix, x)) ** 2)
        ),
    )
    y = tf.constant(np.random.default_rng(2).normal(size=5))
    steps = [
        method.step(problem, x, y, NO_DATA, method.init(problem, x, y))
        for method in (
            tb.ValueGap(tb.InnerSolver(SGD(1.0), 1), SGD(0.25), 3.0),
            tb.GradientNorm(SGD(0.25), 3.0),
        )
    ]
    np.testing.assert_allclose(
        steps[0].upper_gradient, steps[1].upper_gradient, rtol=1e-10
    )
    np.testing.assert_allclose(steps[0].lower, steps[1].lower, rtol=1e-12)


def test_value_gap_auxiliary_persists_or_copies() -> None:
    """omega is warm started and never synchronised with y, unless asked."""
    oracle = quadratic()
    x, y, batches = oracle.at("float64")
    for choice in ("persistent", "copy"):
        method = tb.ValueGap(
            tb.InnerSolver(SGD(0.2), 2), SGD(0.1), 0.7, auxiliary=choice
        )
        state, lower, z = method.init(oracle.problem, x, y), y, flat(y)
        for _ in range(3):
            start = z if choice == "persistent" else flat(lower)
            z = references.descend(oracle, flat(x), start, 0.2, 2)[-1]
            d_x, d_y = references.value_gap(oracle, flat(x), flat(lower), z, 0.7)
            want = flat(lower) - 0.1 * d_y
            step = method.step(oracle.problem, x, lower, batches, state)
            state, lower = step.state, step.lower
            np.testing.assert_allclose(step.upper_gradient, d_x, rtol=1e-11)
            np.testing.assert_allclose(lower, want, rtol=1e-11)
