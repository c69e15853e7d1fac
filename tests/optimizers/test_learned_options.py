"""Options of the inner optimizer as functions of the upper variables.

The expected numbers come from the optimizers' own formulas in NumPy loops, and from
central differences of these loops in float64.
"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import optimizers
from suites import fast_where

import tfbilevel as tb

STEPS = 5
A, B = np.array([1.0, 0.4, 2.0]), np.array([0.5, -1.0, 0.8])
START, GOAL = np.array([0.3, -0.8, 1.1]), np.array([0.2, -0.5, 0.4])
X = np.array([0.4, -0.7, 0.2])
NO_DATA = tb.Batches(None, None)


def slope(y: Any, b: Any = B) -> Any:
    """Of g(y) = sum(a y^2 / 2 + y^4 / 4 - b y)."""
    return A * y + y**3 - b


def sigmoid(v: Any) -> Any:
    return 1 / (1 + np.exp(-v))


# Each loop is (y, slots, t, options) -> (y, slots), the formulas of Keras's
# documentation; each `options` is the same function of x for NumPy and TensorFlow.


def sgd(nesterov: bool = False) -> Callable:
    def step(y: Any, slots: Any, t: int, o: dict, b: Any = B) -> tuple:
        (v,) = slots or (np.zeros(3),)
        g = slope(y, b)
        y = y - o["rate"] * o.get("decay", 0.0) * y
        v = o["momentum"] * v - o["rate"] * g
        y = y + o["momentum"] * v - o["rate"] * g if nesterov else y + v
        return y, (v,)

    return step


def adam(y: Any, slots: Any, t: int, o: dict, b: Any = B) -> tuple:
    m, v = slots or (np.zeros(3), np.zeros(3))
    g = slope(y, b)
    y = y - o["rate"] * o.get("decay", 0.0) * y
    m = o["beta_1"] * m + (1 - o["beta_1"]) * g
    v = o["beta_2"] * v + (1 - o["beta_2"]) * g**2
    right = np.sqrt(1 - o["beta_2"] ** (t + 1)) / (1 - o["beta_1"] ** (t + 1))
    return y - o["rate"] * right * m / (np.sqrt(v) + o["epsilon"]), (m, v)


def rmsprop(y: Any, slots: Any, t: int, o: dict, b: Any = B) -> tuple:
    v, mean, d = slots or (np.zeros(3),) * 3
    g = slope(y, b)
    v = o["rho"] * v + (1 - o["rho"]) * g**2
    mean = o["rho"] * mean + (1 - o["rho"]) * g
    d = o["momentum"] * d + o["rate"] * g / np.sqrt(v - mean**2 + o["epsilon"])
    return y - d, (v, mean, d)


KERAS = {  # names of the loops' options
    "rate": "learning_rate",
    "decay": "weight_decay",
}
ROWS: dict[str, tuple] = {
    "sgd": (
        lambda: optimizers.SGD(9.0),
        sgd(),
        lambda x, s, e: {"momentum": s(x[0]), "rate": 0.1 * e(x[1])},
    ),
    "sgd nesterov": (
        lambda: optimizers.SGD(9.0, momentum=0.3, nesterov=True),
        sgd(nesterov=True),
        lambda x, s, e: {
            "momentum": s(x[0]),
            "rate": 0.1 * e(x[1]),
            "decay": 0.1 * e(x[2]),
        },
    ),
    "adam": (
        lambda: optimizers.Adam(0.1),
        adam,
        lambda x, s, e: {
            "beta_1": s(x[0]),
            "beta_2": s(1 + x[1]),
            "epsilon": 0.1 * e(x[2]),
            "rate": 0.1,
        },
    ),
    "adamw": (
        lambda: optimizers.AdamW(9.0, beta_2=0.5, epsilon=0.25),
        adam,
        lambda x, s, e: {
            "decay": e(x[0]),
            "rate": 0.2 * s(x[1]),
            "beta_1": s(x[2]),
            "beta_2": 0.5,
            "epsilon": 0.25,
        },
    ),
    "rmsprop": (
        lambda: optimizers.RMSprop(0.05, centered=True),
        rmsprop,
        lambda x, s, e: {
            "momentum": s(x[0]),
            "rho": s(x[1]),
            "epsilon": e(x[2]),
            "rate": 0.05,
        },
    ),
}
FAST = ("sgd nesterov", "adam", "adamw", "rmsprop")


def learned(name: str) -> Callable:
    """The options as tensors; those that do not depend on x stay the optimizer's."""

    def options(x: Any) -> dict:
        made = ROWS[name][2](x, tf.sigmoid, tf.exp)
        made = {KERAS.get(k, k): v for k, v in made.items()}
        return {k: v for k, v in made.items() if tf.is_tensor(v)}

    return options


def inner(name: str, steps: int = STEPS, **keywords: Any) -> tb.InnerSolver:
    return tb.InnerSolver(
        ROWS[name][0](), steps, hyperparameters=learned(name), **keywords
    )


def problem() -> tb.Problem:
    return tb.Problem(
        lambda x, y, batch: 0.5 * tf.reduce_sum((y - GOAL) ** 2) + 0.1 * x[0] ** 2,
        lambda x, y, batch: tf.reduce_sum(
            0.5 * A * y**2 + 0.25 * y**4 - (B if batch is None else batch) * y
        ),
    )


def loop(
    name: str,
    x: Any,
    first: int = 0,
    start: tuple = (START, ()),
    at: int = 0,
    b: Any = B,
) -> tuple:
    """(upper loss, y, slots): the first steps use X, the others x."""
    _, step, options = ROWS[name]
    y, slots = start
    for t in range(STEPS):
        o = options(X if t < first else x, sigmoid, np.exp)
        y, slots = step(y, slots, at + t, o, b)
    return 0.5 * np.sum((y - GOAL) ** 2) + 0.1 * x[0] ** 2, y, slots


def differences(value: Callable, h: float = 1e-5) -> np.ndarray:
    return np.array(
        [(value(X + h * e) - value(X - h * e)) / (2 * h) for e in np.eye(len(X))]
    )


def step_of(method: tb.Method, at: Any = None, y: Any = START) -> tb.Step:
    made = problem() if at is None else at
    x, y = tf.constant(X), tf.constant(y)
    return made.step(method, x, y, NO_DATA, method.init(made, x, y))


@pytest.mark.parametrize("name", fast_where(FAST.__contains__, ROWS))
def test_steps_and_hypergradient_are_those_of_a_loop(name: str) -> None:
    for method in (
        tb.Unroll(inner(name)),
        tb.Unroll(inner(name), memory="tape"),
        tb.ForwardUnroll(inner(name)),
    ):
        step = step_of(method)
        np.testing.assert_allclose(step.lower, loop(name, X)[1], rtol=1e-6)
        expected = differences(lambda x: loop(name, x)[0])
        assert np.abs(expected).min() > 1e-4 or name == "sgd"
        np.testing.assert_allclose(
            step.upper_gradient, expected, rtol=1e-5, atol=1e-9, err_msg=repr(method)
        )


@pytest.mark.parametrize("name", fast_where("adamw".__eq__, ["adamw", "sgd nesterov"]))
def test_a_truncated_unroll_sees_the_options_in_its_last_steps(name: str) -> None:
    step = step_of(tb.Unroll(inner(name), last=2))
    expected = differences(lambda x: loop(name, x, first=STEPS - 2)[0])
    np.testing.assert_allclose(step.upper_gradient, expected, rtol=1e-5)


def test_graph_and_xla_give_the_eager_numbers() -> None:
    method = tb.Unroll(inner("sgd nesterov"))
    made = problem()

    def gradient(x: Any) -> Any:
        y = tf.constant(START)
        step = made.step(method, x, y, NO_DATA, method.init(made, x, y))
        return step.upper_gradient

    eager = gradient(tf.constant(X))
    for jit in (False, True):
        compiled = tf.function(gradient, jit_compile=jit, autograph=False)
        np.testing.assert_allclose(compiled(tf.constant(X)), eager, rtol=1e-12)


@pytest.mark.parametrize(
    "name", fast_where("sgd nesterov".__eq__, ["sgd nesterov", "adam"])
)
def test_carried_momentum_goes_on(name: str) -> None:
    method = tb.Unroll(inner(name, optimizer_state="carry"))
    made, x = problem(), tf.constant(X)
    first = step_of(method)
    second = made.step(method, x, first.lower, NO_DATA, first.state)
    _, *start = loop(name, X)

    def again(x: Any) -> tuple:
        return loop(name, x, start=tuple(start), at=STEPS)

    np.testing.assert_allclose(second.lower, again(X)[1], rtol=1e-6)
    expected = differences(lambda x: again(x)[0])
    np.testing.assert_allclose(second.upper_gradient, expected, rtol=1e-5)


def test_tasks_have_the_same_options() -> None:
    name, b = "adamw", np.stack([B, -B, 2 * B])
    tasks = tb.over_tasks(problem())
    batches = tb.Batches(tf.constant(b), tf.constant(b))
    x, y = tf.constant(X), tf.constant(np.stack([START] * 3))
    method = tb.Unroll(inner(name))
    step = tasks.step(method, x, y, batches, method.init(tasks, x, y))
    expected = differences(lambda x: np.mean([loop(name, x, b=e)[0] for e in b]))
    np.testing.assert_allclose(step.upper_gradient, expected, rtol=1e-5)
    # Tasks that stop at different steps have a step count each.
    counted = inner(name, 12, atol=1.0)
    here = tasks.prepared(x, batches)
    state = counted.init(tasks, x, y)
    ends, _, _ = tf.function(lambda: counted.solve(here, y, state), autograph=False)()
    steps = []
    for end, one in zip(ends, b, strict=True):
        y, slots, t, size = START, (), 0, np.inf
        while size > 1.0 and t < 12:
            size = np.linalg.norm(slope(y, one))
            options = ROWS[name][2](X, sigmoid, np.exp)
            y, slots = adam(y, slots, t, options, one)
            t += 1
        steps.append(t)
        np.testing.assert_allclose(end, y, rtol=1e-7)
    assert len(set(steps)) > 1


CONSTANT: list[Any] = [
    optimizers.Adagrad(0.1, epsilon=0.2),
    optimizers.Adadelta(1.0, rho=0.9, epsilon=1e-2),
    optimizers.Adamax(0.05, beta_1=0.6, beta_2=0.7, epsilon=0.1),
    optimizers.Lion(0.01, weight_decay=0.3),
    optimizers.Adam(0.05, beta_2=0.9, amsgrad=True),
    optimizers.RMSprop(0.05, momentum=0.4),
    optimizers.Ftrl(
        0.1,
        learning_rate_power=-0.4,
        l1_regularization_strength=0.01,
        l2_regularization_strength=0.02,
        l2_shrinkage_regularization_strength=0.03,
        beta=0.1,
    ),
]


@pytest.mark.parametrize("optimizer", CONSTANT, ids=lambda o: type(o).__name__)
def test_every_option_that_can_be_learned_takes_its_constant_value(optimizer) -> None:
    """With other constants on the optimizer, Keras's trajectory of the given ones."""
    config = optimizer.get_config()
    names = [
        k
        for k, v in config.items()
        if isinstance(v, float)
        and k not in ("ema_momentum", "initial_accumulator_value")
    ]
    if isinstance(optimizer, optimizers.Lion):
        names = ["learning_rate", "weight_decay"]
    other = type(optimizer).from_config(
        config | {k: config[k] * 0.5 for k in names if k != "momentum"}
    )
    ends = []
    for made in (
        tb.InnerSolver(optimizer, 4),
        tb.InnerSolver(
            other, 4, hyperparameters=lambda x: {k: x * config[k] for k in names}
        ),
    ):
        x, y = tf.constant(1.0), tf.constant(START, tf.float32)
        at = tb.Problem(
            problem().upper_loss,
            lambda x, y, batch: tf.reduce_sum(0.5 * A * y**2 - B * y),
        )
        here = at.prepared(x, NO_DATA)
        ends.append(made.solve(here, y, made.init(at, x, y))[0])
    assert len(names) >= 2
    np.testing.assert_allclose(ends[0], ends[1], rtol=2e-6)
    assert np.abs(ends[0] - START).max() > 0.01


def test_a_learned_rate_per_entry_and_a_learned_momentum_together() -> None:
    rates = np.array([0.1, 0.2, 0.05])

    def end(x: Any) -> float:
        y, v = START, np.zeros(3)
        for _ in range(4):
            v = sigmoid(x[0]) * v - slope(y)
            y = y + rates * np.exp(x[1]) * v
        return 0.5 * np.sum((y - GOAL) ** 2) + 0.1 * x[0] ** 2 + 0 * x[2]

    solver = tb.InnerSolver(
        optimizers.SGD(1.0),
        4,
        learned_rate=lambda x: rates * tf.exp(x[1]),
        hyperparameters=lambda x: {"momentum": tf.sigmoid(x[0])},
    )
    step = step_of(tb.Unroll(solver))
    np.testing.assert_allclose(step.upper_gradient, differences(end), atol=1e-8)


def test_a_solution_depends_on_none_but_the_fixed_point_on_weight_decay() -> None:
    """Of SGD, it is where g'(y) + (1 - momentum) decay y = 0, at any rate."""
    made = inner("sgd nesterov", 200)
    with pytest.raises(tb.UnconnectedGradientError, match="the upper variable"):
        bare = tb.Problem(lambda x, y, batch: tf.reduce_sum(y), problem().lower_loss)
        step_of(tb.Implicit(made, tb.ConjugateGradient(20)), bare)
    method = tb.Implicit(made, tb.NormalConjugateGradient(12), through="optimizer")
    step = tf.function(lambda: step_of(method), autograph=False)()

    def solution(x: Any) -> float:
        y = START
        for _ in range(50):  # Newton
            decay = 0.1 * np.exp(x[2]) * (1 - sigmoid(x[0]))
            y = y - (slope(y) + decay * y) / (A + 3 * y**2 + decay)
        return 0.5 * np.sum((y - GOAL) ** 2) + 0.1 * x[0] ** 2

    np.testing.assert_allclose(step.upper_gradient, differences(solution), atol=1e-6)
    with pytest.raises(ValueError, match="must not need a symmetric system"):
        tb.Implicit(made, tb.ConjugateGradient(20), through="optimizer")
    with pytest.raises(ValueError, match="which has no constant one"):
        tb.Implicit(made, tb.Neumann(5))


def test_the_function_receives_the_upper_model() -> None:
    class Upper(keras.layers.Layer):
        def __init__(self) -> None:
            super().__init__(dtype="float64")
            self.own = self.add_weight(shape=(3,), initializer=lambda *a, **k: X)
            self.built = True

    layer = keras.layers.Dense(1, use_bias=False, dtype="float64")
    layer.build((None, 3))
    layer.kernel.assign(START[:, None])
    at = problem()
    upper = Upper()
    model = tb.BilevelModel(
        upper,
        layer,
        lambda up, low, batch: at.upper_loss(up.own, low.kernel[:, 0], None),
        lambda up, low, batch: at.lower_loss(up.own, low.kernel[:, 0], None),
    )
    options = learned("sgd nesterov")
    solver = tb.InnerSolver(
        ROWS["sgd nesterov"][0](),
        STEPS,
        hyperparameters=lambda own: options(tf.convert_to_tensor(own.own)),
    )
    model.compile(tb.Unroll(solver), optimizers.SGD(1.0), jit_compile=False)
    model.train_on_batch(tb.Batches(tf.zeros([1]), tf.zeros([1])))
    expected = differences(lambda x: loop("sgd nesterov", x)[0])
    np.testing.assert_allclose(X - upper.own.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: {"momentum": 0.5}, ["`hyperparameters` must be a function"]),
        (tb.Constant(0.1), ["`hyperparameters` must be a function"]),
        (
            lambda x: {"beta_1": x[0]},
            ["SGD has learning_rate, momentum, weight_decay", "'beta_1'"],
        ),
        (lambda x: {"nesterov": x[0]}, ["must name options", "'nesterov'"]),
        (lambda x: {"momentum": x}, ["floating scalars", r"shape \(3,\)"]),
        (lambda x: {"momentum": tf.constant(1)}, ["floating scalars", "int32"]),
        (lambda x: x[0], ["must return a dictionary"]),
        (None, ["exclude each other", "learned_rate"]),
    ],
)
def test_wrong_options_get_one_line_before_the_first_step(make: Any, words: list):
    more: dict = {}
    if make is None:
        more = {"learned_rate": lambda x: x[0]}
        make = lambda x: {"learning_rate": x[0]}  # noqa: E731
    with pytest.raises(ValueError, match=".*".join(words)):
        given = (
            make()
            if getattr(make, "__code__", None) and (make.__code__.co_argcount == 0)
            else make
        )
        solver = tb.InnerSolver(optimizers.SGD(0.1), 2, hyperparameters=given, **more)
        solver.init(problem(), tf.constant(X), tf.constant(START))


def test_the_betas_of_lion_have_no_derivative() -> None:
    solver = tb.InnerSolver(
        optimizers.Lion(0.1), 2, hyperparameters=lambda x: {"beta_1": x[0]}
    )
    with pytest.raises(ValueError, match="Lion has learning_rate, weight_decay. Rec"):
        solver.init(problem(), tf.constant(X), tf.constant(START))
