"""Unrolling against plain loops under a gradient tape, written here from formulas."""

import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import references
import tensorflow as tf
from problems import cast, flat, quadratic
from suites import fast_where

import tfbilevel as tb

MEMORY = ["replay", "checkpoint", "tape"]
STEPS = 7
GENERATOR = np.random.default_rng(7)
INPUTS = GENERATOR.normal(size=(7, 5))
ANSWERS = GENERATOR.normal(size=7)
SLICES = GENERATOR.normal(size=(4, 7, 5))
X = cast({"penalty": GENERATOR.normal(size=3), "shift": np.array(0.2)}, "float64")
Y = cast([GENERATOR.normal(size=5), np.array([[0.3, -0.4]])], "float64")
GROUP = [0, 1, 2, 0, 1]


def upper_loss(x: Any, y: Any, batch: Any) -> tf.Tensor:
    del batch
    return (
        tf.reduce_sum(tf.sin(y[0])) + tf.reduce_sum(y[1] ** 3) * x["shift"] + x["shift"]
    )


def lower_loss(x: Any, y: Any, batch: Any) -> tf.Tensor:
    """Neither quadratic nor convex; every leaf meets every other."""
    w, v = y
    residual = tf.tanh(tf.linalg.matvec(batch, w)) - ANSWERS + x["shift"]
    penalties = tf.reduce_sum(tf.gather(tf.exp(x["penalty"]), GROUP) * w**2)
    return (
        tf.reduce_mean(residual**2)
        + 0.1 * penalties
        + tf.reduce_sum(tf.cos(v * x["shift"] + w[0]) + 0.5 * v**2)
    )


NO_DATA = tb.Batches(None, None)
BATCHES = tb.Batches(upper=None, lower=tf.constant(INPUTS))
PROBLEM = tb.Problem(upper_loss, lower_loss)


def gradients(x: Any, y: list, batch: Any) -> list:
    with tf.GradientTape() as tape:
        tape.watch(y)
        value = lower_loss(x, y, batch)
    return tape.gradient(value, y)


# One optimizer step from its formula: (y, slots, gradients, t, rate) -> (y, slots).
# Slots are pairs of lists, zero at first. Keras rounds momentum and betas to float32
# also for float64 variables, so they are numbers that float32 holds exactly.
MU, BETA_1, BETA_2 = 0.875, 0.875, 0.96875


def sgd(y: list, slots: tuple, g: list, t: int, rate: Any) -> tuple:
    return [a - rate * b for a, b in zip(y, g, strict=True)], slots


def momentum(y: list, slots: tuple, g: list, t: int, rate: Any) -> tuple:
    velocity = [MU * m - rate * b for m, b in zip(slots[0], g, strict=True)]
    return [a + m for a, m in zip(y, velocity, strict=True)], (velocity, slots[1])


def nesterov(y: list, slots: tuple, g: list, t: int, rate: Any) -> tuple:
    velocity = [MU * m - rate * b for m, b in zip(slots[0], g, strict=True)]
    moved = [a + MU * m - rate * b for a, m, b in zip(y, velocity, g, strict=True)]
    return moved, (velocity, slots[1])


def adam(y: list, slots: tuple, g: list, t: int, rate: Any) -> tuple:
    m = [BETA_1 * a + (1 - BETA_1) * b for a, b in zip(slots[0], g, strict=True)]
    v = [BETA_2 * a + (1 - BETA_2) * b**2 for a, b in zip(slots[1], g, strict=True)]
    factor = rate * np.sqrt(1 - BETA_2 ** (t + 1)) / (1 - BETA_1 ** (t + 1))
    moved = [
        a - factor * b / (tf.sqrt(c) + 1e-7) for a, b, c in zip(y, m, v, strict=True)
    ]
    return moved, (m, v)


OPTIMIZERS: dict[str, tuple[Callable, Callable]] = {
    "sgd": (sgd, lambda: keras.optimizers.SGD(0.1)),
    "momentum": (momentum, lambda: keras.optimizers.SGD(0.1, momentum=MU)),
    "nesterov": (
        nesterov,
        lambda: keras.optimizers.SGD(0.1, momentum=MU, nesterov=True),
    ),
    "adam": (adam, lambda: keras.optimizers.Adam(0.1, beta_1=BETA_1, beta_2=BETA_2)),
}


def plain_loop(
    rule: Callable,
    x: Any,
    start: list,
    steps: int = STEPS,
    last: int | None = None,
    batch_at: Callable[[int], Any] = lambda t: INPUTS,
    project: Callable[[list], list] = lambda y: y,
    rate: Any = 0.1,
    f: Callable = upper_loss,
) -> tuple[tf.Tensor, list]:
    """f after all steps; everything before the last `last` of them held constant."""
    y = start
    slots = tuple([tf.zeros_like(leaf) for leaf in y] for _ in range(2))
    for t in range(steps):
        if last is not None and t == steps - last:
            y, slots = tf.nest.map_structure(tf.stop_gradient, (y, slots))
        y, slots = rule(y, slots, gradients(x, y, batch_at(t)), t, rate)
        y = project(y)
    return f(x, y, None), y


def automatic(x: Any, function: Callable[[Any], tuple]) -> tuple[Any, list]:
    """The derivative of the loop in x by one tape, and its end."""
    with tf.GradientTape() as tape:
        tape.watch(x)
        value, end = function(x)
    return tape.gradient(value, x), end


def assert_step(
    method: tb.Method,
    problem: tb.Problem,
    batches: tb.Batches,
    function: Callable[[Any], tuple],
    x: Any = X,
    y: Any = Y,
    rtol: float = 1e-10,
) -> tb.Step:
    """The step equals the tape over the plain loop.

    Eager, because test_contract.py shows that compiled steps are the same.
    """
    step = method.step(problem, x, y, batches, method.init(problem, x, y))
    gradient, end = automatic(x, function)
    for got, want in ((step.upper_gradient, gradient), (step.lower, end)):
        tf.nest.assert_same_structure(got, want)
        error = np.linalg.norm(flat(got) - flat(want)) / np.linalg.norm(flat(want))
        assert error < rtol
    return step


@pytest.mark.parametrize(
    ("memory", "last"),
    fast_where(
        lambda memory, last: memory == "replay" or last == 4,
        [(memory, last) for memory in MEMORY for last in (None, 1, 4)],
    ),
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_automatic_differentiation(
    name: str, memory: str, last: int | None
) -> None:
    rule, make = OPTIMIZERS[name]
    method = tb.Unroll(tb.InnerSolver(make(), STEPS), last=last, memory=memory)
    assert_step(method, PROBLEM, BATCHES, lambda x: plain_loop(rule, x, Y, last=last))


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 9, 10])
def test_checkpoints_fit_every_length(steps: int) -> None:
    """Segments of unequal length, a single one, a perfect square."""
    method = tb.Unroll(
        tb.InnerSolver(keras.optimizers.SGD(0.1), steps), memory="checkpoint"
    )
    assert_step(method, PROBLEM, BATCHES, lambda x: plain_loop(sgd, x, Y, steps=steps))


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("last", [None, 3])
def test_projection_is_part_of_the_map(memory: str, last: int | None) -> None:
    """A box that is active in some coordinates, and a ball around all."""

    def project(y: list) -> list:
        w = tf.clip_by_value(y[0], -0.5, 0.4)
        return [w / tf.maximum(tf.norm(w), 1.0), y[1]]

    problem = tb.Problem(upper_loss, lower_loss, project_lower=project)
    method = tb.Unroll(
        tb.InnerSolver(keras.optimizers.SGD(0.1), STEPS), last=last, memory=memory
    )
    step = assert_step(
        method,
        problem,
        BATCHES,
        lambda x: plain_loop(sgd, x, Y, last=last, project=project),
    )
    unprojected, _ = automatic(X, lambda x: plain_loop(sgd, x, Y, last=last))
    assert abs(flat(step.upper_gradient) - flat(unprojected)).max() > 1e-3


def _lower_from_shift(x: Any) -> list:
    return [tf.sin(x["shift"] * tf.ones([5], tf.float64)), x["penalty"][None, :2]]


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("last", [None, 4])
def test_learned_start(memory: str, last: int | None) -> None:
    """Differentiated through when every step is, a constant otherwise."""
    problem = tb.Problem(upper_loss, lower_loss, lower_start=_lower_from_shift)
    method = tb.Unroll(
        tb.InnerSolver(keras.optimizers.SGD(0.1), STEPS), last=last, memory=memory
    )
    assert_step(
        method,
        problem,
        BATCHES,
        lambda x: plain_loop(sgd, x, _lower_from_shift(x), last=last),
    )


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("last", [None, 2])
def test_maml_start_is_the_upper_variables_themselves(
    memory: str, last: int | None
) -> None:
    """x and y are the same tensors: derivatives in one must not mix into the other.

    g = |y - b|^4 / 4 + |x|^2 <y, 1>, y_0 = x, so the true derivative has a part
    through the start and a part through every step.
    """
    b = tf.constant([0.5, -0.2, 0.1], tf.float64)

    def g(x: Any, y: Any, batch: Any) -> Any:
        return tf.reduce_sum((y - b) ** 4) / 4 + tf.reduce_sum(x**2) * tf.reduce_sum(y)

    def f(x: Any, y: Any, batch: Any) -> Any:
        return tf.reduce_sum(tf.exp(y)) + tf.reduce_sum(x * y)

    def function(x: Any) -> tuple:
        y = x
        for t in range(4):
            if last is not None and t == 4 - last:
                y = tf.stop_gradient(y)
            y = y - 0.1 * ((y - b) ** 3 + tf.reduce_sum(x**2))
        return f(x, y, None), y

    x = tf.constant([0.3, 0.9, -0.4], tf.float64)
    problem = tb.Problem(f, g, lower_start=lambda x: x)
    method = tb.Unroll(
        tb.InnerSolver(keras.optimizers.SGD(0.1), 4), last=last, memory=memory
    )
    for y in (x, tf.zeros_like(x)):
        step = assert_step(method, problem, NO_DATA, function, x=x, y=y)
        if memory != "replay":
            continue
        compiled = tf.function(method.step, autograph=False)
        np.testing.assert_allclose(
            compiled(problem, x, y, NO_DATA, {}).upper_gradient,
            step.upper_gradient,
            rtol=1e-10,
        )


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("last", [None, 3])
def test_prepare_is_differentiated(memory: str, last: int | None) -> None:
    """Features of a shared encoder: x reaches f and g directly and through them."""

    def prepare(x: Any, batches: tb.Batches) -> tb.Batches:
        scale = tf.exp(x["shift"]) + x["penalty"][0] * x["penalty"][2]
        return tb.Batches(
            upper=tf.sin(x["penalty"][1]) * batches.upper,
            lower=(scale * batches.lower[0], batches.lower[1]),
        )

    def f(x: Any, y: Any, batch: Any) -> Any:
        return upper_loss(x, y, None) + batch * tf.reduce_sum(y[0])

    def g(x: Any, y: Any, batch: Any) -> Any:
        inputs, index = batch
        return lower_loss(x, y, tf.gather(inputs, index))

    index = np.array([6, 5, 4, 3, 2, 1, 0])
    data = tb.Batches(
        upper=tf.constant(2.0, tf.float64),
        lower=(tf.constant(INPUTS), tf.constant(index)),
    )

    def function(x: Any) -> tuple:
        scale = tf.exp(x["shift"]) + x["penalty"][0] * x["penalty"][2]
        return plain_loop(
            sgd,
            x,
            Y,
            last=last,
            batch_at=lambda t: scale * INPUTS[index],
            f=lambda x, y, _: (
                upper_loss(x, y, None)
                + 2.0 * tf.sin(x["penalty"][1]) * tf.reduce_sum(y[0])
            ),
        )

    problem = tb.Problem(f, g, prepare=prepare)
    method = tb.Unroll(
        tb.InnerSolver(keras.optimizers.SGD(0.1), STEPS), last=last, memory=memory
    )
    assert_step(method, problem, data, function)


def test_prepare_alone_may_connect_an_upper_variable() -> None:
    """An encoder's weights appear in no loss, only in the prepared batches."""
    problem = tb.Problem(
        upper_loss=lambda x, y, batch: tf.reduce_sum((y - batch) ** 2),
        lower_loss=lambda x, y, batch: 0.5 * tf.reduce_sum((y - batch) ** 2),
        prepare=lambda x, batches: tb.Batches(x**2, x * batches.lower),
    )
    method = tb.Unroll(tb.InnerSolver(keras.optimizers.SGD(1.0), 1))
    x, data = tf.constant([2.0, -1.0]), tf.constant([3.0, 5.0])
    step = method.step(problem, x, 0 * x, tb.Batches(data, data), {})
    # y_1 = 3 x: f = (dx - x^2)^2, f' = 2 (dx - x^2)(d - 2x)
    want = 2 * (data * x - x**2) * (data - 2 * x)
    np.testing.assert_allclose(step.upper_gradient, want, rtol=1e-6)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("last", [None, 3])
def test_inner_step_t_takes_slice_t(memory: str, last: int | None) -> None:
    """Four slices for seven steps: the fifth step starts over."""
    method = tb.Unroll(
        tb.InnerSolver(keras.optimizers.SGD(0.1), STEPS), last=last, memory=memory
    )
    assert_step(
        method,
        PROBLEM,
        tb.StackedBatches(upper=None, lower=tf.constant(SLICES)),
        lambda x: plain_loop(sgd, x, Y, last=last, batch_at=lambda t: SLICES[t % 4]),
    )


@pytest.mark.parametrize("memory", fast_where("replay".__eq__, MEMORY))
@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
def test_hypergradient_in_the_inner_learning_rate(name: str, memory: str) -> None:
    """The rate exp(shift) enters the steps only; central differences agree."""
    rule, make = OPTIMIZERS[name]
    inner = tb.InnerSolver(
        make(), STEPS, learned_rate=lambda x: 0.1 * tf.exp(x["shift"])
    )
    method = tb.Unroll(inner, memory=memory)
    step = assert_step(
        method,
        PROBLEM,
        BATCHES,
        lambda x: plain_loop(rule, x, Y, rate=0.1 * tf.exp(x["shift"])),
    )

    def value(shift: float) -> float:
        x = {**X, "shift": tf.constant(shift, tf.float64)}
        return float(plain_loop(rule, x, Y, rate=0.1 * tf.exp(x["shift"]))[0])

    h = 1e-5
    difference = (value(0.2 + h) - value(0.2 - h)) / (2 * h)
    assert float(step.upper_gradient["shift"]) == pytest.approx(difference, rel=1e-7)


@pytest.mark.parametrize("memory", MEMORY)
def test_a_rate_that_is_an_upper_variable_of_its_own(memory: str) -> None:
    """It reaches no loss, only the steps: not "unconnected".

    y_2 = (1 - r)^2 y_0 for g = y^2 / 2, f = y: dF/dr = -2 (1 - r) y_0.
    """
    problem = tb.Problem(
        upper_loss=lambda x, y, batch: y, lower_loss=lambda x, y, batch: 0.5 * y**2
    )
    inner = tb.InnerSolver(keras.optimizers.SGD(0.5), 2, learned_rate=lambda x: x)
    method = tb.Unroll(inner, memory=memory)
    x, y = tf.constant(0.3, tf.float64), tf.constant(2.0, tf.float64)
    step = method.step(problem, x, y, NO_DATA, {})
    assert float(step.lower) == pytest.approx(0.7**2 * 2.0, rel=1e-14)
    assert float(step.upper_gradient) == pytest.approx(-2 * 0.7 * 2.0, rel=1e-14)


@pytest.mark.parametrize(
    ("memory", "dtype"),
    fast_where(
        lambda memory, dtype: memory == "replay",
        [("replay", "float32"), ("checkpoint", "float64"), ("tape", "float32")],
    ),
)
def test_adam_where_a_gradient_is_always_zero(memory: str, dtype: str) -> None:
    """A pixel that is always black: the other derivatives are those without it."""
    steps = 4
    rule, make = OPTIMIZERS["adam"]

    def loss_of(inputs: np.ndarray) -> Callable:
        def g(x: Any, y: Any, batch: Any) -> Any:
            fit = tf.linalg.matvec(tf.constant(inputs, dtype), y) - x[0]
            return tf.reduce_mean(tf.sin(tf.exp(x[1]) * fit) ** 2)

        return g

    black = INPUTS.copy()
    black[:, 3] = 0.0
    kept = [0, 1, 2, 4]

    def step(inputs: np.ndarray, y: np.ndarray) -> tb.Step:
        problem = tb.Problem(lambda x, y, batch: tf.reduce_sum(y**2), loss_of(inputs))
        method = tb.Unroll(tb.InnerSolver(make(), steps), memory=memory)
        x = tf.constant([0.4, -0.3], dtype)
        # XLA: TensorFlow's own kernel takes 0 / 0 for 0 in the derivative of a root.
        compiled = tf.function(method.step, autograph=False, jit_compile=True)
        return compiled(problem, x, tf.constant(y, dtype), NO_DATA, {})

    y = np.array([0.3, -0.2, 0.5, 0.7, 0.1])
    with_zero, without = step(black, y), step(black[:, kept], y[kept])
    exact = {"float64": 1e-12, "float32": 1e-5}[dtype]
    np.testing.assert_allclose(
        with_zero.upper_gradient, without.upper_gradient, rtol=exact
    )
    np.testing.assert_allclose(with_zero.lower.numpy()[kept], without.lower, rtol=exact)
    # The nudge moves the dead weight by at most 1e-10 of a step, and there are 4.
    moved = abs(float(with_zero.lower[3]) - float(tf.constant(0.7, dtype)))
    assert moved <= steps * 0.1 * 1e-9


def test_truncation_error_decays_like_the_contraction() -> None:
    """|T-RHG(K) - RHG| <= C (1 - rate * smallest curvature)^K; here 0.34."""
    oracle = quadratic()
    x, y, batches = oracle.at("float64")
    steps, errors = 24, []
    exact = oracle.hypergradient(flat(oracle.x))
    for last in (2, 4, 8, 16):
        inner = tb.InnerSolver(keras.optimizers.SGD(oracle.rate), steps)
        step = tb.Unroll(inner, last=last).step(oracle.problem, x, y, batches, {})
        errors.append(np.linalg.norm(flat(step.upper_gradient) - exact))
    for shorter, longer, power in zip(errors, errors[1:], (2, 4, 8), strict=False):
        assert 0 < longer < 1.05 * shorter * 0.34**power


def test_truncation_starts_at_the_right_iterate() -> None:
    """The published T-RHG code takes w_0 for w_{T-K}; these numbers need w_{T-K}.

    g = exp(x) y^4 / 4, whose map's derivatives depend on the iterate strongly.
    """
    rate, x, start = 0.1, 0.2, 1.5
    iterates = [start]
    for _ in range(6):
        iterates.append(iterates[-1] - rate * np.exp(x) * iterates[-1] ** 3)

    def recursion(points: list) -> float:
        adjoint, total = 2 * iterates[-1], 0.0
        for y in reversed(points):
            total -= rate * np.exp(x) * y**3 * adjoint
            adjoint *= 1 - 3 * rate * np.exp(x) * y**2
        return total

    problem = tb.Problem(
        upper_loss=lambda x, y, batch: y**2,
        lower_loss=lambda x, y, batch: tf.exp(x) * y**4 / 4,
    )
    right = recursion(iterates[3:6])
    published = recursion([iterates[0], *iterates[4:6]])
    assert abs(right - published) > 0.1 * abs(right)
    for memory in MEMORY:
        inner = tb.InnerSolver(keras.optimizers.SGD(rate), 6)
        step = tb.Unroll(inner, last=3, memory=memory).step(
            problem,
            tf.constant(x, tf.float64),
            tf.constant(start, tf.float64),
            NO_DATA,
            {},
        )
        assert float(step.upper_gradient) == pytest.approx(right, rel=1e-12)


def _two_steps(inner: tb.InnerSolver, problem: tb.Problem, oracle: Any) -> list:
    x, y, batches = oracle.at("float64")
    method = tb.Unroll(inner)
    state, ends = method.init(problem, x, y), []
    for _ in range(2):
        step = method.step(problem, x, y, batches, state)
        y, state = step.lower, step.state
        ends.append(flat(y))
    return ends


def test_warm_goes_on_and_cold_starts_over() -> None:
    oracle = quadratic()
    x, y = flat(oracle.x), flat(oracle.y)
    path = references.descend(oracle, x, y, 0.1, 6)
    for start, second in (("warm", path[6]), ("cold", path[3])):
        inner = tb.InnerSolver(keras.optimizers.SGD(0.1), 3, start=start)
        ends = _two_steps(inner, oracle.problem, oracle)
        np.testing.assert_allclose(ends[0], path[3], rtol=1e-12)
        np.testing.assert_allclose(ends[1], second, rtol=1e-12)


@pytest.mark.parametrize("start", ["warm", "cold"])
def test_lower_start_wins(start: str) -> None:
    oracle = quadratic()
    problem = tb.Problem(
        oracle.problem.upper_loss,
        oracle.problem.lower_loss,
        lower_start=lambda x: tf.concat([x, x[:2]], 0),
    )
    x = flat(oracle.x)
    want = references.descend(oracle, x, np.concatenate([x, x[:2]]), 0.1, 3)[-1]
    inner = tb.InnerSolver(keras.optimizers.SGD(0.1), 3, start=start)
    for end in _two_steps(inner, problem, oracle):
        np.testing.assert_allclose(end, want, rtol=1e-12)


def test_optimizer_state_is_reset_or_carried() -> None:
    """Momentum carried over two calls of three steps is six steps in a row."""
    oracle = quadratic()
    x, y = flat(oracle.x), flat(oracle.y)

    def run(steps: int, start: np.ndarray) -> np.ndarray:
        return references.momentum(lambda y: oracle.g_y(x, y), start, 0.1, steps, MU)

    expected = {"carry": run(6, y), "reset": run(3, run(3, y))}
    assert np.linalg.norm(expected["carry"] - expected["reset"]) > 0.1
    for choice, want in expected.items():
        inner = tb.InnerSolver(
            keras.optimizers.SGD(0.1, momentum=MU), 3, optimizer_state=choice
        )
        np.testing.assert_allclose(
            _two_steps(inner, oracle.problem, oracle)[1], want, rtol=1e-12
        )


@pytest.mark.parametrize("memory", MEMORY)
def test_carried_momentum_is_a_constant_of_the_next_step(memory: str) -> None:
    """The second step's derivative starts from the carried velocity."""
    inner = tb.InnerSolver(
        keras.optimizers.SGD(0.1, momentum=MU), 3, optimizer_state="carry"
    )
    method = tb.Unroll(inner, memory=memory)
    first = method.step(PROBLEM, X, Y, BATCHES, method.init(PROBLEM, X, Y))
    second = method.step(PROBLEM, X, first.lower, BATCHES, first.state)

    def function(x: Any) -> tuple:
        y, slots = Y, ([tf.zeros_like(leaf) for leaf in Y], None)
        for t in range(6):
            if t == 3:
                y, slots = tf.nest.map_structure(tf.stop_gradient, (y, slots[:1]))
            y, slots = momentum(y, (*slots, None)[:2], gradients(x, y, INPUTS), t, 0.1)
        return upper_loss(x, y, None), y

    want, _ = automatic(X, function)
    np.testing.assert_allclose(flat(second.upper_gradient), flat(want), rtol=1e-10)


@pytest.mark.parametrize("name", ["momentum", "nesterov", "adam"])
def test_end_is_that_of_a_numpy_loop(name: str) -> None:
    """The forward trajectory against NumPy, without TensorFlow."""
    oracle = quadratic()
    x, y = flat(oracle.x), flat(oracle.y)

    def gradient(y: np.ndarray) -> np.ndarray:
        return oracle.g_y(x, y)

    want = {
        "momentum": lambda: references.momentum(gradient, y, 0.1, 20, MU),
        "nesterov": lambda: references.momentum(gradient, y, 0.1, 20, MU, True),
        "adam": lambda: references.adam(gradient, y, 0.1, 20, BETA_1, BETA_2),
    }[name]()
    inner = tb.InnerSolver(OPTIMIZERS[name][1](), 20)
    upper, lower, batches = oracle.at("float64")
    step = tb.Unroll(inner, last=1).step(oracle.problem, upper, lower, batches, {})
    np.testing.assert_allclose(step.lower, want, rtol=1e-12)


def test_metrics_are_the_losses() -> None:
    """Upper loss at the end, lower loss before the last step."""
    oracle = quadratic()
    x, y, batches = oracle.at("float64")
    path = references.descend(oracle, flat(oracle.x), flat(oracle.y), 0.1, 4)
    for memory in MEMORY:
        inner = tb.InnerSolver(keras.optimizers.SGD(0.1), 4)
        method = tb.Unroll(inner, memory=memory)
        metrics = method.step(oracle.problem, x, y, batches, {}).metrics
        f = oracle.problem.upper_loss(x, path[4], batches.upper)
        g = oracle.problem.lower_loss(x, path[3], batches.lower)
        assert float(metrics["upper_loss"]) == pytest.approx(float(f), rel=1e-12)
        assert float(metrics["lower_loss"]) == pytest.approx(float(g), rel=1e-12)


def test_a_start_may_be_drawn_anew_at_every_outer_step():
    """y_0 = k at outer step k: one step of rate r gives y_1 = k - r (k - x)."""
    problem = tb.Problem(
        lambda x, y, batch: 0.5 * (y - 2.0) ** 2,
        lambda x, y, batch: 0.5 * (y - x) ** 2,
    )
    inner = tb.InnerSolver(
        keras.optimizers.SGD(0.25),
        steps=1,
        start=lambda step: tf.cast(step, tf.float64),
    )
    method = tb.Unroll(inner)
    x, y = tf.constant(3.0, tf.float64), tf.constant(9.0, tf.float64)
    state = method.init(problem, x, y)
    for k in range(3):
        step = method.step(problem, x, y, tb.Batches(None, None), state)
        y, state = step.lower, step.state
        expected = k - 0.25 * (k - 3.0)
        assert float(y) == pytest.approx(expected, abs=1e-12)
        gradient = 0.25 * (expected - 2.0)
        assert float(step.upper_gradient) == pytest.approx(gradient, abs=1e-12)


def test_a_drawn_start_must_look_like_the_lower_variables():
    problem = tb.Problem(
        lambda x, y, batch: tf.reduce_sum(y**2),
        lambda x, y, batch: tf.reduce_sum((y - x) ** 2),
    )
    inner = tb.InnerSolver(
        keras.optimizers.SGD(0.25), 1, start=lambda step: tf.zeros([4])
    )
    x = y = tf.zeros([3])
    method = tb.Unroll(inner)
    with pytest.raises(ValueError, match="`start` must return variables like"):
        method.step(problem, x, y, tb.Batches(None, None), method.init(problem, x, y))


def test_rates_of_single_entries_in_a_tuple() -> None:
    """One rate for each of two lower variables, by hand."""
    problem = tb.Problem(
        upper_loss=lambda x, y, batch: y[0] * y[1],
        lower_loss=lambda x, y, batch: 0.5 * (y[0] ** 2 + 3.0 * y[1] ** 2),
    )
    inner = tb.InnerSolver(
        keras.optimizers.SGD(0.9), 1, learned_rate=lambda x: (x["a"], x["b"])
    )
    x = {"a": tf.constant(0.2, tf.float64), "b": tf.constant(0.1, tf.float64)}
    y = (tf.constant(2.0, tf.float64), tf.constant(5.0, tf.float64))
    method = tb.Unroll(inner)
    step = method.step(
        problem, x, y, tb.Batches(None, None), method.init(problem, x, y)
    )
    end = 2.0 * (1 - 0.2), 5.0 * (1 - 0.3)
    np.testing.assert_allclose(step.lower, end)
    np.testing.assert_allclose(step.upper_gradient["a"], -2.0 * end[1])
    np.testing.assert_allclose(step.upper_gradient["b"], end[0] * -15.0)


def stored_on(step: Any) -> set[str]:
    """The devices of all lists of tensors in a traced function and its loops."""
    definition = step.graph.as_graph_def()
    bodies = [definition.node, *(f.node_def for f in definition.library.function)]
    nodes = [node for body in bodies for node in body]
    return {node.device for node in nodes if node.op.startswith("TensorList")}


def test_host_is_replay_with_its_iterates_on_the_host() -> None:
    """The device is wherever the step is; only a second one shows the difference
    (tests/second_device.py)."""
    inner = tb.InnerSolver(keras.optimizers.SGD(0.1, momentum=0.5), STEPS)
    made, places = {}, {}
    for memory in ("replay", "host"):
        method = tb.Unroll(inner, memory=memory)
        state = method.init(PROBLEM, X, Y)
        run = functools.partial(method.step, PROBLEM, X, Y, BATCHES, state)
        traced = tf.function(run, autograph=False)
        made[memory] = flat(traced().upper_gradient)
        places[memory] = stored_on(traced.get_concrete_function())
        eager = flat(run().upper_gradient)
        np.testing.assert_allclose(eager, made[memory], rtol=1e-13)
    np.testing.assert_array_equal(made["host"], made["replay"])
    assert places == {"replay": {""}, "host": {"/device:CPU:0"}}


def test_host_is_refused_by_xla() -> None:
    method = tb.Unroll(tb.InnerSolver(keras.optimizers.SGD(0.1), 2), memory="host")
    x, y = tf.constant(0.3), tf.constant(2.0)
    problem = tb.Problem(lambda x, y, batch: y, lambda x, y, batch: x * y**2)
    step = tf.function(method.step, autograph=False, jit_compile=True)
    refusal = "`jit_compile` must be False for memory='host'.*Received: jit_compile"
    with pytest.raises(ValueError, match=refusal):
        step(problem, x, y, NO_DATA, {})
    with pytest.raises(ValueError, match=refusal):
        tb.minimize(
            problem,
            method,
            x,
            y,
            upper_optimizer=keras.optimizers.SGD(0.1),
            batches=NO_DATA,
            steps=1,
            jit_compile=True,
        )
