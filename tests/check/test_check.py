"""`tb.check_hypergradient` catches wrong methods and passes right ones."""

import dataclasses
import math
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from method_table import METHODS, Row
from problems import ORACLES, Oracle, flat, quadratic
from suites import fast_where

import tfbilevel as tb
from tfbilevel._check.hypergradient import _dense_implicit

# Whose objectives are functions of their own: the contract suite has the gradients of
# all methods and linear solvers, against NumPy.
KINDS = {"unroll-replay", "forward-unroll", "implicit-cg", "value-gap"}
KINDS |= {"gradient-norm", "augmented-lagrangian", "finite-difference"}
KINDS |= {"unroll-replay-last", "unroll-first-order", "unroll-pessimistic"}
KINDS |= {"unroll-bda", "rank-one", "stocbio", "ttsa", "bamm", "value-gap-constant"}


@pytest.mark.parametrize(
    ("row", "oracle"),
    [
        pytest.param(
            row,
            oracle,
            id=f"{row.name}-{oracle.name}",
            marks=[pytest.mark.slow] * (oracle.name == "nested"),
        )
        for row in METHODS
        for oracle in ORACLES
        if oracle.name in row.oracles
        and (
            oracle.name == "quadratic"
            and row.name in KINDS
            or oracle.name == "nested"
            and (row.name == "unroll-replay" or "quadratic" not in row.oracles)
        )
    ],
)
def test_right_methods_pass(row: Row, oracle: Oracle) -> None:
    x, y, batches = oracle.at("float64")
    report = tb.check_hypergradient(
        oracle.problem, row.build(oracle), x, y, batches, probes=2
    )
    if row.heuristic:
        assert report.error > 1e-3
    else:
        assert report.error < (row.tolerance or {"float64": 1e-7})["float64"]
    assert report.noise < 1e-7
    assert len(report.claimed) == len(report.differences) == 2


@dataclasses.dataclass(frozen=True, eq=False)
class Wrong(tb.Method):
    """A right method with its upper gradient spoiled, its objective unchanged."""

    method: tb.Method
    spoil: Any

    def init(self, problem: tb.Problem, upper: Any, lower: Any) -> Any:
        return self.method.init(problem, upper, lower)

    def step(self, *arguments: Any) -> tb.Step:
        step = self.method.step(*arguments)
        gradient = tf.nest.map_structure(self.spoil, step.upper_gradient)
        return step._replace(upper_gradient=gradient)

    def objective(self, *arguments: Any) -> Any:
        return self.method.objective(*arguments)


SPOILS = {
    "sign": lambda g: -g,
    "scale": lambda g: 1.001 * g,
    "shift": lambda g: g + 1e-3,
    "order": lambda g: tf.reverse(g, [0]),
    "zero": lambda g: tf.zeros_like(g),
    # One number broadcast to all entries (defect D14).
    "broadcast": lambda g: tf.fill(tf.shape(g), tf.reduce_sum(g)),
}


# A spoil does not know its method: one method has all of them.
@pytest.mark.parametrize(
    ("row", "name"),
    [
        pytest.param(row, name, id=f"{row.name}-{name}")
        for row in (METHODS[0], METHODS[3], METHODS[-1])
        for name in SPOILS
        if row is METHODS[0] or name == "scale"
    ],
)
def test_wrong_gradients_are_caught(row: Row, name: str) -> None:
    oracle, spoil = quadratic(), SPOILS[name]
    x, y, batches = oracle.at("float64")
    wrong = Wrong(row.build(oracle), spoil)
    report = tb.check_hypergradient(oracle.problem, wrong, x, y, batches)
    assert report.error > 3e-5 > 100 * report.noise


def test_a_missing_direct_term_is_caught() -> None:
    """f_x forgotten: the response alone."""
    oracle = quadratic()
    x, y, batches = oracle.at("float64")
    partial = oracle.f_x(
        flat(x),
        flat(tb.Unroll(_few(oracle)).step(oracle.problem, x, y, batches, {})[1]),
    )
    wrong = Wrong(tb.Unroll(_few(oracle)), lambda g: g - tf.constant(partial))
    report = tb.check_hypergradient(oracle.problem, wrong, x, y, batches)
    assert report.error > 1e-2


def test_another_truncation_is_caught() -> None:
    """The gradient of the whole loop is not that of the truncated objective."""
    oracle = quadratic()
    x, y, batches = oracle.at("float64")
    whole, truncated = tb.Unroll(_few(oracle)), tb.Unroll(_few(oracle), last=1)

    class Mixed(Wrong):
        def objective(self, *arguments: Any) -> Any:
            return truncated.objective(*arguments)

    report = tb.check_hypergradient(
        oracle.problem, Mixed(whole, lambda g: g), x, y, batches
    )
    assert report.error > 1e-2


def _few(oracle: Oracle) -> tb.InnerSolver:
    return tb.InnerSolver(keras.optimizers.SGD(oracle.rate), 3)


def test_implicit_at_an_unsolved_lower_problem() -> None:
    """Not the derivative of f(x, y_T(x)), but the dense implicit gradient at y_T."""
    oracle = quadratic()
    x, y, batches = oracle.at("float64")
    method = tb.Implicit(_few(oracle), tb.ConjugateGradient(10, rtol=1e-13))
    report = tb.check_hypergradient(oracle.problem, method, x, y, batches)
    assert report.error > 1e-3
    assert report.implicit_error is not None and report.implicit_error < 1e-10
    end = flat(method.step(oracle.problem, x, y, batches, method.init(*_at(x, y)))[1])
    want = np.linalg.norm(oracle.g_y(flat(x), end))
    assert report.stationarity == pytest.approx(want, rel=1e-9)


def _at(x: Any, y: Any) -> tuple:
    return quadratic().problem, x, y


def test_unrolling_approaches_the_implicit_gradient() -> None:
    oracle = quadratic()
    x, y, batches = oracle.at("float64")
    errors = []
    for steps in (2, 6, 12):
        inner = tb.InnerSolver(keras.optimizers.SGD(oracle.rate), steps)
        report = tb.check_hypergradient(
            oracle.problem, tb.Unroll(inner), x, y, batches, probes=1
        )
        errors.append(report.implicit_error)
    assert errors[0] > 10 * errors[1] > 100 * errors[2] > 0


def test_singular_lower_hessian_has_no_implicit_gradient() -> None:
    problem = tb.Problem(
        upper_loss=lambda x, y, b: tf.reduce_sum(y**2),
        lower_loss=lambda x, y, b: 0.5 * tf.reduce_sum(y - x) ** 2,
    )
    x = y = tf.constant([1.0, 0.5], tf.float64)
    inner = tb.InnerSolver(keras.optimizers.SGD(0.1), 2)
    report = tb.check_hypergradient(
        problem, tb.Unroll(inner), x + 1.0, y, tb.Batches(None, None)
    )
    assert report.implicit_error is None
    assert report.error < 1e-8


def test_float32_report_is_noisy_but_right() -> None:
    oracle = quadratic()
    x, y, batches = oracle.at("float32")
    report = tb.check_hypergradient(
        oracle.problem, tb.Unroll(_few(oracle)), x, y, batches
    )
    assert report.error < 1e-3 and report.noise > 0


def test_an_objective_too_rough_for_differences_shows_as_noise() -> None:
    class Rough(Wrong):
        def objective(self, *arguments: Any) -> Any:
            smooth = self.method.objective(*arguments)
            return lambda x: smooth(x) + 0.5 * tf.sin(1e9 * tf.reduce_sum(x))

    oracle = quadratic()
    x, y, batches = oracle.at("float64")
    rough = Rough(tb.Unroll(_few(oracle)), lambda g: g)
    report = tb.check_hypergradient(oracle.problem, rough, x, y, batches)
    assert report.noise > 0.1


@pytest.mark.parametrize("kind", [tb.Implicit, tb.RankOne])
def test_the_objective_of_a_pessimistic_end_is_f_there(kind: Any) -> None:
    """f = -(y - 1)^2 is largest where the steps pass 1, in the middle."""
    problem = tb.Problem(
        lambda x, y, batch: x * y - 9.0 * (y - 1.0) ** 2,
        lambda x, y, batch: 0.5 * (y - x) ** 2,
    )
    x, y = tf.constant(2.0, tf.float64), tf.constant(0.0, tf.float64)
    method = kind(tb.InnerSolver(keras.optimizers.SGD(0.3), 6), end="pessimistic")
    state, data = method.init(problem, x, y), tb.Batches(None, None)
    step = method.step(problem, x, y, data, state)
    assert 1 < int(step.metrics["truncation"]) < 6
    value = method.objective(problem, x, y, data, state)(x)
    assert float(value) == pytest.approx(float(step.metrics["upper_loss"]), rel=1e-12)


def test_report_prints_every_probe() -> None:
    oracle = quadratic()
    x, y, batches = oracle.at("float64")
    method = tb.Unroll(_few(oracle))
    report = tb.check_hypergradient(oracle.problem, method, x, y, batches, probes=3)
    text = str(report)
    for number in (*report.claimed, *report.differences):
        assert f"{number: .10e}" in text
    again = tb.check_hypergradient(oracle.problem, method, x, y, batches, probes=3)
    other = tb.check_hypergradient(
        oracle.problem, method, x, y, batches, probes=3, seed=5
    )
    assert again.claimed == report.claimed != other.claimed


def test_the_dense_gradient_is_of_the_batch_that_the_system_is_of() -> None:
    problem = tb.Problem(
        upper_loss=lambda x, y, batch: 0.5 * (y - 1.0) ** 2,
        lower_loss=lambda x, y, batch: 0.5 * batch * (y - x) ** 2 + 0.5 * y**2,
    )
    method = tb.Implicit(tb.InnerSolver(keras.optimizers.SGD(0.2), 2), tb.Direct())
    data = tf.data.Dataset.from_tensor_slices(tf.constant([1.0, 2.0, 9.0], tf.float64))
    one = tf.data.Dataset.from_tensors(0.0)
    batches = next(iter(tb.pair(one, data, lower_batches=3)))
    x, y = tf.constant(0.5, tf.float64), tf.constant(0.4, tf.float64)
    report = tb.check_hypergradient(problem, method, x, y, batches)
    assert report.implicit_error is not None and report.implicit_error < 1e-9


@pytest.mark.parametrize("count", [6, 60])  # product by product, and in one trace
def test_the_dense_gradient_is_numpy_s(count: int) -> None:
    generator = np.random.default_rng(count)
    a, b = generator.normal(size=(count, count)), generator.normal(size=(count, 3))
    a = a @ a.T / count + np.eye(count)
    x, y, c = (generator.normal(size=n) for n in (3, count, count))
    problem = tb.Problem(
        lambda x, y, batch: 0.5 * tf.reduce_sum((y - c) ** 2) + tf.reduce_sum(x),
        lambda x, y, batch: (
            0.5 * tf.tensordot(y, tf.linalg.matvec(a, y), 1)
            - tf.tensordot(y, tf.linalg.matvec(b, x), 1)
        ),
    )
    gradient, stationarity = _dense_implicit(
        problem, tf.constant(x), tf.constant(y), tb.Batches(None, None), 0
    )
    np.testing.assert_allclose(gradient, 1 + b.T @ np.linalg.solve(a, y - c), 1e-9)
    assert stationarity == pytest.approx(np.linalg.norm(a @ y - b @ x), rel=1e-12)


def test_a_lower_loss_of_nan_is_reported_as_nan() -> None:
    problem = tb.Problem(
        lambda x, y, batch: tf.reduce_sum(y**2),
        lambda x, y, batch: tf.reduce_sum((y - x) ** 2) * float("nan"),
    )
    report = checked(problem, 1.0)
    assert math.isnan(report.error) and report.implicit_error is None


def logarithms(size: Any, cast: Any = lambda v: v, constant: float = 0.0) -> tb.Problem:
    """Its hypergradient depends on x / size alone; the inner solve is not the end."""
    return tb.Problem(
        lambda x, y, batch: constant + tf.reduce_sum((cast(y) - 1.0) ** 2),
        lambda x, y, batch: (
            0.5 * tf.reduce_sum((cast(y) - tf.math.log(cast(x / size))) ** 2)
        ),
    )


def checked(problem: tb.Problem, x: Any) -> tb.HypergradientReport:
    method = tb.Unroll(tb.InnerSolver(keras.optimizers.SGD(0.3), 3))
    x = tf.constant(x, tf.float64)
    return tb.check_hypergradient(
        problem, method, x, tf.zeros_like(x), tb.Batches(None, None)
    )


def exact(x: np.ndarray, probe: np.ndarray) -> float:
    """y_3 = r log x with r = 1 - 0.7^3, the derivative of sum (y_3 - 1)^2 along it."""
    r = 1 - 0.7**3
    return float(probe @ (2 * (r * np.log(x) - 1) * r / x))


@pytest.mark.parametrize(
    "size",
    fast_where({1e8, 1e-8, 1e-30}.__contains__, [1e8, 1.0, 1e-4, 1e-8, 1e-30]),
)
def test_the_step_follows_the_size_of_the_variables(size: float) -> None:
    x = np.array([1.0, 2.0, 0.5])
    report = checked(logarithms(size), size * x)
    assert report.error < 1e-8 and report.noise < 1e-8
    # One unit vector is known: the differences are derivatives in x, not in x / size.
    [one] = checked(logarithms(size), size * x[:1]).differences[:1]
    want = exact(x[:1], np.ones(1)) / size
    assert abs(one) == pytest.approx(abs(want), rel=1e-7)


def test_every_tensor_moves_by_its_own_size() -> None:
    arrays = {"small": np.array([1e-6, 2e-6]), "large": np.float64(3e4)}
    x = {name: tf.constant(v) for name, v in (arrays | {"zero": np.zeros([2])}).items()}

    def residual(x: Any, y: Any) -> Any:
        made = tf.math.log(x["small"]) + tf.sin(x["large"] / 1e4) + tf.exp(x["zero"])
        return y - made

    problem = tb.Problem(
        lambda x, y, batch: tf.reduce_sum((y - 1.0) ** 2),
        lambda x, y, batch: 0.5 * tf.reduce_sum(residual(x, y) ** 2),
    )
    y, batches = tf.zeros([2], tf.float64), tb.Batches(None, None)
    method = tb.Unroll(tb.InnerSolver(keras.optimizers.SGD(0.3), 3))
    report = tb.check_hypergradient(problem, method, x, y, batches)
    assert report.error < 1e-8 and report.noise < 1e-8
    # And a fault shows, in the tensor of large entries and small derivatives too.
    wrong = Wrong(method, lambda g: g if g.shape.rank else 1.1 * g)
    assert tb.check_hypergradient(problem, wrong, x, y, batches).error > 1e-3


@pytest.mark.parametrize("constant", [1e4, 1e7])
def test_a_large_constant_shows_as_noise_above_the_error(constant: float) -> None:
    report = checked(logarithms(1.0, constant=constant), [1.0, 2.0, 0.5])
    assert report.error <= report.noise < 1e-3


@pytest.mark.parametrize("back", [False, True])
def test_losses_in_float32_show_as_noise_or_by_name(back: bool) -> None:
    def cast(v: Any) -> Any:
        return tf.cast(v, tf.float32)

    def lost(constant: float) -> tb.HypergradientReport:
        problem = made = logarithms(1.0, cast, constant)
        if back:
            problem = tb.Problem(
                lambda *a: tf.cast(made.upper_loss(*a), tf.float64),
                lambda *a: tf.cast(made.lower_loss(*a), tf.float64),
            )
        return checked(problem, [1.0, 2.0, 0.5])

    report = lost(0.0)
    assert report.error < 3 * report.noise < 0.05
    assert "exactly zero" not in str(report)
    report = lost(1e9)  # whose neighbours in float32 are 64 away
    assert report.noise == np.inf
    assert "every difference is exactly zero" in str(report)
    assert "float32" in str(report)


def test_an_index_out_of_range_is_said() -> None:
    weights = tb.functional(tb.ExampleWeights(3))
    problem = tb.Problem(
        lambda x, y, batch: tf.reduce_sum((y - 1.0) ** 2),
        lambda x, y, batch: tf.reduce_mean(weights([x], batch) * y**2),
    )
    method = tb.Unroll(tb.InnerSolver(keras.optimizers.SGD(0.3), 1))
    batches = tb.Batches(None, tf.constant([0, 3]))
    with pytest.raises(ValueError, match="index 3, out of range, n=3"):
        tb.check_hypergradient(problem, method, tf.zeros([3]), tf.ones([2]), batches)
