"""Hypergradients on a small network, against differences of a loop written here.

The reference is an unrolled Python loop that shares nothing with the library but
TensorFlow's first derivative of one loss.
"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from suites import fast_where

import tfbilevel as tb

SGD = keras.optimizers.SGD
RATE, STEPS, SKIPPED = 0.4, 6, 2
ALPHA, DECAY = 0.3, 0.8

generator = np.random.default_rng(5)
TRAIN = generator.normal(size=(7, 3)), generator.normal(size=(7, 2))
VALID = generator.normal(size=(8, 3)), generator.normal(size=(8, 2))


def network(seed: int = 0) -> keras.Sequential:
    """3 -> 4 -> 2 with tanh, float64."""
    generator = np.random.default_rng(seed)
    layers = [
        keras.layers.Dense(4, activation="tanh", dtype="float64"),
        keras.layers.Dense(2, dtype="float64"),
    ]
    model = keras.Sequential([keras.Input((3,), dtype="float64"), *layers])
    model.set_weights([0.5 * generator.normal(size=w.shape) for w in model.weights])
    return model


class Coefficients(keras.layers.Layer):
    """Upper model: one log coefficient per network weight tensor and one per row."""

    def __init__(self) -> None:
        super().__init__(dtype="float64")
        self.rows = self.add_weight(name="rows", shape=(7,), initializer="zeros")
        self.decay = self.add_weight(name="decay", shape=(), initializer="zeros")
        self.rows.assign(np.linspace(-0.5, 0.5, 7))
        self.decay.assign(-1.5)
        self.built = True


def lower_objective(state: Any) -> tf.Tensor:
    errors = tf.reduce_sum((state.lower_model(state.data) - state.target) ** 2, axis=1)
    rows, decay = (v.value for v in state.upper_model.trainable_variables)
    size = [tf.reduce_sum(v.value**2) for v in state.lower_model.trainable_variables]
    return tf.reduce_mean(tf.sigmoid(rows) * errors) + tf.exp(decay) * tf.add_n(size)


def upper_objective(state: Any) -> tf.Tensor:
    errors = tf.reduce_sum((state.lower_model(state.data) - state.target) ** 2, axis=1)
    # A direct term, so that a forgotten partial derivative shows.
    return tf.reduce_mean(errors) + 0.1 * state.upper_model.trainable_variables[1] ** 2


def losses() -> tuple[Callable, Callable]:
    """f and g as plain formulas over (rows, decay) and (W, b, V, c)."""

    def errors(y: list, batch: tuple) -> tf.Tensor:
        inputs, targets = (tf.constant(part) for part in batch)
        hidden = tf.tanh(inputs @ y[0] + y[1])
        return tf.reduce_sum((hidden @ y[2] + y[3] - targets) ** 2, axis=1)

    def f(x: list, y: list) -> tf.Tensor:
        return tf.reduce_mean(errors(y, VALID)) + 0.1 * x[1] ** 2

    def g(x: list, y: list) -> tf.Tensor:
        size = tf.add_n([tf.reduce_sum(leaf**2) for leaf in y])
        fit = tf.reduce_mean(tf.sigmoid(x[0]) * errors(y, TRAIN))
        return fit + tf.exp(x[1]) * size

    return f, g


F, G = losses()


@tf.function(autograph=False)  # the loop is eager, its one derivative traced once
def slope(x: list, y: list, a: tf.Tensor) -> list:
    with tf.GradientTape() as tape:
        tape.watch(y)
        loss = (1 - a) * G(x, y) + a * F(x, y)
    return tape.gradient(loss, y)


def descend(x: list, y: list, first: int, last: int, alpha: float) -> list:
    """The iterates after steps first, ..., last - 1."""
    iterates = []
    for t in range(first, last):
        a = tf.constant(alpha * DECAY**t, tf.float64)
        x, y = ([tf.convert_to_tensor(leaf) for leaf in part] for part in (x, y))
        y = [v - RATE * d for v, d in zip(y, slope(x, y, a), strict=True)]
        iterates.append(y)
    return iterates


def end_value(
    x: list, z: list, here: tuple, alpha: float, skip: int, pessimistic: bool
) -> tuple[float, int]:
    """F at the end point; what the method holds constant is taken at `here`."""
    x_0, z_0 = here
    stop = STEPS
    if pessimistic:
        along = [float(F(x_0, y)) for y in descend(x_0, z_0, 0, STEPS, alpha)]
        stop = 1 + int(np.argmax(along))
    start = z
    if skip:
        fixed = descend(x_0, z_0, 0, skip, alpha)[-1]
        start = [y + (a - b) for y, a, b in zip(fixed, z, z_0, strict=True)]
    return float(F(x, descend(x, start, skip, stop, alpha)[-1])), stop


def difference(function: Callable, point: list, direction: list) -> float:
    h = 1e-5
    ahead = [p + h * d for p, d in zip(point, direction, strict=True)]
    behind = [p - h * d for p, d in zip(point, direction, strict=True)]
    return (function(ahead) - function(behind)) / (2 * h)


def directions(like: list, count: int) -> list:
    generator = np.random.default_rng(11)
    return [[generator.normal(size=v.shape) for v in like] for _ in range(count)]


def along(gradient: list, direction: list) -> float:
    return sum(float(np.sum(g * d)) for g, d in zip(gradient, direction, strict=True))


COMBINATIONS = [
    pytest.param(alpha, options, learned, id=f"{kind}-{name}{'-ia' * learned}")
    for kind, alpha in (("rad", 0.0), ("bda", ALPHA))
    for name, options in (
        ("whole", {}),
        ("truncated", {"truncate_iters": SKIPPED}),
        ("pessimistic", {"acquire_max_loss": True}),
    )
    for learned in (False, True)
]


# The others, on an oracle, are in tests/keras/test_dynamic.py.
@pytest.mark.parametrize(
    ("alpha", "options", "learned"),
    fast_where(lambda alpha, options, learned: learned and alpha > 0, COMBINATIONS),
)
def test_all_twelve_dynamics_equal_central_differences(alpha, options, learned) -> None:
    # From here the upper loss is largest after the second step of six.
    upper, lower = Coefficients(), network(seed=7)
    lower.set_weights([3 * w for w in lower.get_weights()])
    x_0 = [tf.constant(w) for w in upper.get_weights()]
    z_0 = [tf.constant(w) for w in lower.get_weights()]
    dynamic = tb.Dynamic(
        lower_objective, STEPS, upper, upper_objective, lower, alpha=alpha,
        alpha_decay=DECAY, ll_opt=SGD(RATE), init_auxiliary=learned, **options,
    )  # fmt: skip
    result = dynamic.optimize(*TRAIN, validate_data=VALID[0], validate_target=VALID[1])
    skip = options.get("truncate_iters", 0)
    pessimistic = "acquire_max_loss" in options

    def value(point: list) -> float:
        x, z = point[:2], point[2:] or z_0
        return end_value(x, z, (x_0, z_0), alpha, skip, pessimistic)[0]

    reached, k = end_value(x_0, z_0, (x_0, z_0), alpha, skip, pessimistic)
    assert float(result.upper_loss) == pytest.approx(reached, rel=1e-12)
    assert result.max_loss_iter == (k if pessimistic else None)
    if pessimistic:
        assert 1 < k < STEPS  # else the test would not tell the ends apart
    for got, want in zip(
        result.lower, descend(x_0, z_0, 0, STEPS, alpha)[-1], strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-10)
    point = [*x_0, *z_0] if learned else x_0
    gradient = [*result.upper_gradients, *(result.start_gradients or [])]
    assert len(gradient) == len(point)
    probes = directions(point, 3)
    want = [difference(value, point, probe) for probe in probes]
    got = [along(gradient, probe) for probe in probes]
    assert np.linalg.norm(np.subtract(got, want)) < 1e-6 * np.linalg.norm(want)
    for variable, before in zip(lower.weights, z_0, strict=True):
        np.testing.assert_array_equal(variable, before)


# Implicit methods: the lower problem is solved, then everything equals df(x, y*(x)).


def problem() -> tuple[tb.Problem, list, list]:
    x = [tf.constant(w) for w in Coefficients().get_weights()]
    y = [tf.constant(w) for w in network().get_weights()]
    return tb.Problem(lambda x, y, _: F(x, y), lambda x, y, _: G(x, y)), x, y


@pytest.fixture(scope="module")
def differences() -> list[float]:
    """Of f(x, y*(x)), with y* by Newton steps on the dense Hessian."""
    _, x_0, y_0 = problem()
    sizes = [int(tf.size(v)) for v in y_0]

    def unflat(vector: tf.Tensor) -> list:
        parts = tf.split(vector, sizes)
        return [tf.reshape(p, v.shape) for p, v in zip(parts, y_0, strict=True)]

    @tf.function
    def newton(x: list, vector: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as outer:
            outer.watch(vector)
            with tf.GradientTape() as tape:
                tape.watch(vector)
                loss = G(x, unflat(vector))
            gradient = tf.convert_to_tensor(tape.gradient(loss, vector))
        hessian = outer.jacobian(gradient, vector)
        return vector - tf.linalg.solve(hessian, gradient[:, None])[:, 0]

    near = descend(x_0, y_0, 0, 300, 0.0)[-1]
    near = tf.concat([tf.reshape(v, [-1]) for v in near], 0)

    def value(x: list) -> float:
        vector = near
        for _ in range(6):
            vector = newton([tf.convert_to_tensor(v) for v in x], vector)
        return float(F(x, unflat(vector)))

    return [difference(value, x_0, d) for d in directions(x_0, 2)]


LONG = 700


def plain(steps: int = LONG) -> tb.InnerSolver:
    return tb.InnerSolver(SGD(RATE), steps)


def momentum(steps: int = LONG) -> tb.InnerSolver:
    return tb.InnerSolver(SGD(0.2, momentum=0.8), steps)


def adam(steps: int = LONG) -> tb.InnerSolver:
    return tb.InnerSolver(keras.optimizers.Adam(0.02, beta_2=0.99999), steps)


TIGHT = {"rtol": 1e-10}
SOLVED = {
    "unroll": lambda: tb.Unroll(plain()),
    "forward": lambda: tb.ForwardUnroll(plain(300)),
    "cg": lambda: tb.Implicit(plain(), tb.ConjugateGradient(60, **TIGHT)),
    "normal-cg": lambda: tb.Implicit(plain(), tb.NormalConjugateGradient(90, **TIGHT)),
    "neumann": lambda: tb.Implicit(plain(), tb.Neumann(400, **TIGHT)),
    "fixed-point": lambda: tb.Implicit(plain(), tb.FixedPoint(400, **TIGHT)),
    "direct": lambda: tb.Implicit(plain(), tb.Direct()),
    "gradient": lambda: tb.Implicit(plain(), tb.GradientSolver(SGD(0.4), 400, **TIGHT)),
    "approx-grad": lambda: tb.Implicit(
        plain(),
        tb.GradientSolver(SGD(0.1, momentum=0.9), 900, objective="residual", rtol=1e-9),
    ),
    "map-plain": lambda: tb.Implicit(
        plain(), tb.FixedPoint(400, **TIGHT), through="optimizer"
    ),
    "map-momentum-fixed-point": lambda: tb.Implicit(
        momentum(), tb.FixedPoint(400, **TIGHT), through="optimizer"
    ),
    "map-momentum-neumann": lambda: tb.Implicit(
        momentum(), tb.Neumann(400, **TIGHT), through="optimizer"
    ),
    "map-momentum-normal-cg": lambda: tb.Implicit(
        momentum(), tb.NormalConjugateGradient(300, **TIGHT), through="optimizer"
    ),
    "map-adam-direct": lambda: tb.Implicit(adam(), tb.Direct(), through="optimizer"),
    "map-adam-fixed-point": lambda: tb.Implicit(
        adam(), tb.FixedPoint(900, **TIGHT), through="optimizer"
    ),
}


# One of each kind of system and of map. XLA has them in the contract suite, and the
# map of Adam in test_the_map_of_adam.
FAST = {"cg", "gradient", "map-momentum-fixed-point", "map-adam-direct"}


# On one process: the differences take seconds.
@pytest.mark.xdist_group("differences")
@pytest.mark.parametrize("name", fast_where(FAST.__contains__, SOLVED))
def test_solved_methods_equal_central_differences(name, differences) -> None:
    """Of the true solution, found by another algorithm."""
    made, x, y = problem()
    method = SOLVED[name]()
    state = method.init(made, x, y)
    graph = tf.function(
        lambda x, y, s: method.step(made, x, y, tb.Batches(None, None), s),
        autograph=False,
    )
    gradient = graph(x, y, state).upper_gradient
    for direction, want in zip(directions(x, 2), differences, strict=True):
        assert along(gradient, direction) == pytest.approx(want, rel=1e-6)


def test_reverse_equals_forward() -> None:
    """Far from solved; with momentum, a learned rate and a start that depends on x."""
    _, x, y = problem()
    made = tb.Problem(
        lambda x, y, _: F(x, y),
        lambda x, y, _: G(x, y),
        lower_start=lambda x: [(1 + x[1]) * leaf for leaf in y],
        project_lower=lambda y: [tf.clip_by_value(leaf, -0.6, 0.6) for leaf in y],
    )
    inner = tb.InnerSolver(
        SGD(0.3, momentum=0.7), 12, learned_rate=lambda x: 0.3 * tf.exp(0.1 * x[1])
    )
    steps = [
        method.step(made, x, y, tb.Batches(None, None), {})
        for method in (tb.Unroll(inner), tb.ForwardUnroll(inner))
    ]
    for a, b in zip(*(step.upper_gradient for step in steps), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10)
