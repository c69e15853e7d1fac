"""Functions around the losses that read upper variables: differentiated, or refused.

The example is a proximal step whose strength is learned,

    y <- soft(y - rate * g_y, rate * exp(x)),    g = mean (X y - X w)^2 / 2,

whose derivative is taken by central differences of the same loop in NumPy.
"""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from suites import fast_where

import tfbilevel as tb

RATE, STEPS = 0.1, 30
generator = np.random.default_rng(0)
X, V = generator.normal(size=(8, 3)), generator.normal(size=(6, 3))
W, START = np.array([1.0, -0.5, 0.2]), np.array([0.3, -0.8, 0.1])
L = -2.0
SGD = keras.optimizers.SGD


def loop(x: float, steps: int = STEPS, rate: Any = None) -> float:
    y = START
    for _ in range(steps):
        step = RATE if rate is None else rate(x)
        y = y - step * (X.T @ (X @ y - X @ W) / len(X) + 0.02 * np.exp(x) * y)
        if rate is None:
            y = np.sign(y) * np.maximum(np.abs(y) - RATE * np.exp(x), 0.0)
    return float(np.mean((V @ y - V @ W) ** 2))


def slope(**keywords: Any) -> float:
    return (loop(L + 1e-5, **keywords) - loop(L - 1e-5, **keywords)) / 2e-5


class Strength(keras.layers.Layer):
    def __init__(self) -> None:
        super().__init__(dtype="float64")
        initializer = keras.initializers.Constant(L)
        self.log = self.add_weight(shape=(), initializer=initializer)
        self.built = True

    def call(self, inputs: Any) -> Any:
        return tf.exp(self.log)


def soft(y: Any, threshold: Any) -> Any:
    return tf.sign(y) * tf.nn.relu(tf.abs(y) - threshold)


def upper_loss(x: Any, y: Any, batch: Any) -> Any:
    return tf.reduce_mean((tf.linalg.matvec(V, y) - V @ W) ** 2)


def lower_loss(x: Any, y: Any, batch: Any) -> Any:
    fit = tf.reduce_mean((tf.linalg.matvec(X, y) - X @ W) ** 2)
    return 0.5 * fit + 0.01 * tf.exp(x) * tf.reduce_sum(y**2)


def model(project: Any = None, **options: Any) -> tb.BilevelModel:
    upper = Strength()
    lower = keras.layers.Dense(1, use_bias=False, dtype="float64")
    lower.build((None, 3))
    lower.kernel.assign(START[:, None])
    return tb.BilevelModel(
        upper,
        lower,
        lambda u, low, batch: tf.reduce_mean((low(V)[:, 0] - V @ W) ** 2),
        lambda u, low, batch: (
            0.5 * tf.reduce_mean((low(X)[:, 0] - X @ W) ** 2)
            + 0.01 * u(None) * tf.reduce_sum(tf.square(low.kernel))
        ),
        project_lower=project and project(upper),
        **options,
    )


# By closure, handed to it, through the variable, by a function of another function.
PROJECTIONS = {
    "closure": lambda upper: lambda ys: [soft(y, RATE * upper(None)) for y in ys],
    "argument": lambda _: lambda upper, ys: [soft(y, RATE * upper(None)) for y in ys],
    "variable": lambda upper: (
        lambda ys: [soft(y, RATE * tf.exp(upper.trainable_variables[0])) for y in ys]
    ),
    "default": lambda upper: (
        lambda ys, rate=RATE: [soft(y, rate * tf.exp(upper.log)) for y in ys]
    ),
}
METHODS = {
    "replay": lambda inner: tb.Unroll(inner),
    "checkpoint": lambda inner: tb.Unroll(inner, memory="checkpoint"),
    "tape": lambda inner: tb.Unroll(inner, memory="tape"),
    "forward": lambda inner: tb.ForwardUnroll(inner),
}


def gradient(problem: tb.Problem, method: tb.Method, x: Any, y: Any) -> Any:
    def step() -> Any:
        state = method.init(problem, x, y)
        return problem.step(method, x, y, tb.Batches(0.0, 0.0), state).upper_gradient

    return float(tf.nest.flatten(tf.function(step, autograph=False)())[0])


def values(made: tb.BilevelModel) -> tuple[list, list]:
    x = [tf.convert_to_tensor(v) for v in made.upper_variables]
    return x, [tf.convert_to_tensor(v) for v in made.lower.trainable_variables]


@pytest.mark.parametrize(
    "way, name",
    [*((way, "replay") for way in PROJECTIONS), *(("closure", m) for m in METHODS)],
)
def test_a_projection_that_reads_the_upper_model_is_differentiated(way, name):
    made = model(PROJECTIONS[way])
    method = METHODS[name](tb.InnerSolver(SGD(RATE), STEPS))
    assert gradient(made.problem, method, *values(made)) == pytest.approx(
        slope(), rel=1e-6
    )


def test_fit_differentiates_it_too_compiled_and_saved(tmp_path):
    for jit in (False, True):
        made = model(PROJECTIONS["argument"])
        made.compile(
            tb.Unroll(tb.InnerSolver(SGD(RATE), STEPS)), SGD(1.0), jit_compile=jit
        )
        made.fit(tf.data.Dataset.from_tensors(tb.Batches(0.0, 0.0)), verbose=0)
        assert float(made.upper.log) == pytest.approx(L - slope(), rel=1e-6)


def test_a_plain_problem_hands_x_to_a_projection_of_two_parameters():
    def project(x: Any, y: Any) -> Any:
        return soft(y, RATE * tf.exp(x))

    method = tb.Unroll(tb.InnerSolver(SGD(RATE), STEPS))
    problem = tb.Problem(upper_loss, lower_loss, project_lower=project)
    x, y = tf.constant(L, tf.float64), tf.constant(START)
    assert gradient(problem, method, x, y) == pytest.approx(slope(), rel=1e-6)
    with_prepare = tb.Problem(
        upper_loss,
        lower_loss,
        project_lower=project,
        prepare=lambda x, batches: batches,
    )
    assert gradient(with_prepare, method, x, y) == pytest.approx(slope(), rel=1e-6)
    for mapping in ("vectorized", "sequential"):
        tasks = tb.over_tasks(problem, mapping)
        stacked = tf.stack([y, y])
        state = method.init(tasks, x, stacked)
        batches = tb.Batches(tf.zeros([2]), tf.zeros([2]))
        # Compiled: eagerly every inner step would trace its mapping again.
        step = tf.function(tasks.step, autograph=False)
        found = step(method, x, stacked, batches, state).upper_gradient
        assert float(found) == pytest.approx(slope(), rel=1e-6)


INNER = tb.InnerSolver(SGD(RATE), 3)
WITHOUT = {
    "Implicit": tb.Implicit(INNER),
    "RankOne": tb.RankOne(INNER),
    "StocBiO": tb.StocBiO(INNER),
    "BSA": tb.BSA(INNER),
    "TTSA": tb.TTSA(SGD(RATE)),
    "BAMM": tb.BAMM(SGD(RATE)),
    "SOBA": tb.SOBA(SGD(RATE)),
    "SRBA": tb.SRBA(SGD(RATE)),
    "FSLA": tb.FSLA(SGD(RATE)),
    "AmIGO": tb.AmIGO(INNER),
    "MRBO": tb.MRBO(SGD(RATE)),
    "VRBO": tb.VRBO(SGD(RATE)),
    "F2SA": tb.F2SA(INNER, SGD(RATE), 1.0),
    "BOME": tb.BOME(INNER, SGD(RATE)),
    "MEHA": tb.MEHA(SGD(RATE)),
    "F3SA": tb.F3SA(SGD(RATE), 1.0),
    "BVFSM": tb.BVFSM(INNER, SGD(RATE), 1),
    "GAFFA": tb.GAFFA(SGD(RATE), lambda upper, lower: lower.kernel - upper(None)),
    "ValueGap": tb.ValueGap(INNER, SGD(RATE), 1.0),
    "GradientNorm": tb.GradientNorm(SGD(RATE), 1.0),
    "AugmentedLagrangian": tb.AugmentedLagrangian(SGD(RATE), 2),
}


@pytest.mark.parametrize(
    "name", fast_where(lambda name: name not in {"SRBA", "VRBO"}, WITHOUT)
)
def test_methods_that_do_not_differentiate_projections_refuse_it(name):
    made = model(PROJECTIONS["closure"])
    with pytest.raises(ValueError, match=rf"`project_lower` must not.*tb\.{name}"):
        gradient(made.problem, WITHOUT[name], *values(made))


@pytest.mark.parametrize("name", fast_where("Implicit".__eq__, WITHOUT))
def test_a_projection_that_does_not_read_x_is_none_of_their_business(name):
    made = model(lambda upper: lambda ys: [tf.clip_by_value(y, -1.0, 1.0) for y in ys])
    assert np.isfinite(gradient(made.problem, WITHOUT[name], *values(made)))


def test_the_fixed_point_of_the_projected_step_is_differentiated():
    made = model(PROJECTIONS["closure"])
    inner = tb.InnerSolver(SGD(RATE), 2000)
    solver = tb.NormalConjugateGradient(30, rtol=1e-12)
    method = tb.Implicit(inner, solver, through="optimizer")
    exact = slope(steps=2000)
    assert gradient(made.problem, method, *values(made)) == pytest.approx(
        exact, rel=1e-5
    )


def test_a_learned_rate_receives_the_upper_model():
    expected = slope(rate=lambda x: 0.4 * np.exp(x))
    rates = {
        "argument": lambda _: lambda upper: 0.4 * upper(None),
        "closure": lambda own: lambda upper: 0.4 * tf.exp(own.log),
        "per layer": lambda _: lambda upper: [0.4 * tf.exp(upper.log)],
    }
    for rate in rates.values():
        made = model()
        solver = tb.InnerSolver(SGD(9.0), STEPS, learned_rate=rate(made.upper))
        found = gradient(made.problem, tb.Unroll(solver), *values(made))
        assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "rate",
    [
        lambda x: 0.4 * tf.exp(x[0]),
        lambda x: 0.4 * sum(x),
        lambda x: tf.exp(tf.nest.flatten(x)[0]),
    ],
)
def test_a_rate_of_a_list_under_a_model_is_one_clear_line(rate):
    made = model()
    solver = tb.InnerSolver(SGD(9.0), STEPS, learned_rate=rate)
    with pytest.raises(ValueError, match="`learned_rate` is called with the upper"):
        gradient(made.problem, tb.Unroll(solver), *values(made))


def test_project_upper_reads_what_it_projects():
    """Not what the variables hold: there the optimizer has moved them already."""
    made = model(
        project_upper=lambda x: [tf.minimum(x[0], made.upper.log - 1.0)],
    )
    made.upper.log.assign(5.0)
    (projected,) = made.problem.projected_upper([tf.constant(L, tf.float64)])
    assert float(projected) == L - 1.0


def test_the_check_says_what_it_cannot_see():
    stored = tf.Variable(L, dtype=tf.float64, name="strength")
    x, y = tf.constant(L, tf.float64), tf.constant(START)
    method = tb.Unroll(tb.InnerSolver(SGD(RATE), 3))
    problem = tb.Problem(
        upper_loss, lower_loss, project_lower=lambda y: soft(y, tf.exp(stored))
    )
    report = tb.check_hypergradient(
        problem, method, x, y, tb.Batches(0.0, 0.0), probes=1
    )
    assert "strength" in str(report) and "constants" in str(report)
    plain = tb.Problem(upper_loss, lower_loss)
    report = tb.check_hypergradient(plain, method, x, y, tb.Batches(0.0, 0.0), probes=1)
    assert not report.notes
    made = model(PROJECTIONS["closure"])  # read at x: seen
    report = tb.check_hypergradient(
        made.problem, method, *values(made), tb.Batches(0.0, 0.0), probes=1
    )
    assert not report.notes and report.error < 1e-6


def test_the_check_says_that_differences_round_to_zero():
    """A float32 loss of float64 variables: no step is anything to 1e12 + y."""

    def rounded(x: Any, y: Any, batch: Any) -> Any:
        return tf.cast(1e12 + tf.reduce_sum(y), tf.float32)

    problem = tb.Problem(rounded, lambda x, y, batch: 0.5 * tf.reduce_sum((y - x) ** 2))
    x = y = tf.zeros([2], tf.float64)
    method = tb.Unroll(tb.InnerSolver(SGD(0.5), 3))
    report = tb.check_hypergradient(problem, method, x, y, tb.Batches(0.0, 0.0))
    (note,) = report.notes
    assert "exactly zero" in note and "float32" in note
    assert note in str(report)
