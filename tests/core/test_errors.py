"""Bad input: one clear error that names the argument, the rule and what it got."""

import functools
import gc
import logging
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbilevel as tb

SGD = keras.optimizers.SGD
NO_DATA = tb.Batches(None, None)
SCHEDULE = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)
RANGE = tf.data.Dataset.range(3)


def inner(**options: Any) -> tb.InnerSolver:
    return tb.InnerSolver(SGD(0.1), **{"steps": 3, **options})


def square(x: Any, y: Any, batch: Any) -> Any:
    return tf.reduce_sum((y - x) ** 2)


PROBLEM = tb.Problem(square, square)


def minimize(**options: Any) -> tb.Result:
    arguments: dict[str, Any] = {
        "problem": PROBLEM,
        "method": tb.Unroll(inner()),
        "upper": 1.0,
        "lower": 0.0,
        "upper_optimizer": SGD(0.1),
        "batches": NO_DATA,
        "steps": 2,
    }
    return tb.minimize(**{**arguments, **options})


# What is called, and words that the message must contain.
BAD: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "upper loss": (lambda: tb.Problem(1.0, square), ["`upper_loss`", "callable"]),
    "lower loss": (lambda: tb.Problem(square, None), ["`lower_loss`", "callable"]),
    "lower start": (
        lambda: tb.Problem(square, square, lower_start=[0.0]),
        ["`lower_start`", "callable"],
    ),
    "project upper": (
        lambda: tb.Problem(square, square, project_upper=(0, 1)),
        ["`project_upper`", "callable"],
    ),
    "project lower": (
        lambda: tb.Problem(square, square, project_lower=1),
        ["`project_lower`", "callable"],
    ),
    "prepare": (
        lambda: tb.Problem(square, square, prepare="features"),
        ["`prepare`", "callable"],
    ),
    "steps 0": (lambda: inner(steps=0), ["`steps`", "at least 1"]),
    "steps float": (lambda: inner(steps=3.0), ["`steps`", "integer"]),
    "steps bool": (lambda: inner(steps=True), ["`steps`", "integer"]),
    "start": (lambda: inner(start="hot"), ["`start`", "'warm'", "'cold'", "'hot'"]),
    "optimizer state": (
        lambda: inner(optimizer_state="keep"),
        ["`optimizer_state`", "'reset'", "'carry'", "'keep'"],
    ),
    "learning rate": (
        lambda: inner(learning_rate=0.1),
        ["`learning_rate`", "schedule of the outer step", "0.1"],
    ),
    "learned rate": (
        lambda: inner(learned_rate=tb.Constant(0.1)),
        ["`learned_rate`", "function of the upper variables", "Constant"],
    ),
    "learning rate and learned rate": (
        lambda: inner(learning_rate=SCHEDULE, learned_rate=lambda x: x),
        ["`learning_rate` and `learned_rate`", "exclude"],
    ),
    "learning rate and schedule": (
        lambda: tb.InnerSolver(SGD(SCHEDULE), 3, learning_rate=tb.Constant(0.1)),
        ["`learning_rate`", "exclude"],
    ),
    "learned rate and schedule": (
        lambda: tb.InnerSolver(SGD(SCHEDULE), 3, learned_rate=lambda x: x),
        ["`learned_rate`", "exclude"],
    ),
    "optimizer": (lambda: tb.InnerSolver("sgdd", 3), ["`optimizer`", "'sgdd'"]),
    "last above steps": (
        lambda: tb.Unroll(inner(), last=4),
        ["`last`", "last=4", "steps=3"],
    ),
    "last 0": (lambda: tb.Unroll(inner(), last=0), ["`last`", "at least 1"]),
    "memory": (
        lambda: tb.Unroll(inner(), memory="disk"),
        ["`memory`", "'replay'", "'checkpoint'", "'tape'", "'disk'"],
    ),
    "solver": (lambda: tb.Implicit(inner(), "cg"), ["`solver`", "'cg'"]),
    "solver without rate": (
        lambda: tb.Implicit(tb.InnerSolver(SGD(SCHEDULE), 3), tb.Neumann(3)),
        ["`solver`", "rate"],
    ),
    "solver with learned rate": (
        lambda: tb.Implicit(inner(learned_rate=lambda x: x), tb.FixedPoint(3)),
        ["`solver`", "rate"],
    ),
    "max steps": (lambda: tb.ConjugateGradient(0), ["`max_steps`", "at least 1"]),
    "tolerance": (
        lambda: tb.ConjugateGradient(3, rtol=-1.0),
        ["`rtol`", "not negative"],
    ),
    "tolerance that falls below 0": (
        lambda: tb.ConjugateGradient(3, rtol=tb.LinearRamp(0.5, -1.0, 3)),
        ["`rtol`", "not be negative: it is compared", "from 0.5 to -1"],
    ),
    "tolerance nan": (
        lambda: tb.Neumann(3, rtol=float("nan")),
        ["`rtol`", "finite"],
    ),
    "damping": (
        lambda: tb.FixedPoint(3, damping=-0.1),
        ["`damping`", "not negative"],
    ),
    "rate": (lambda: tb.Neumann(3, rate=0.0), ["`rate`", "above 0"]),
    "rate inf": (lambda: tb.FixedPoint(3, rate=float("inf")), ["`rate`"]),
    "auxiliary": (
        lambda: tb.ValueGap(inner(), SGD(0.1), 1.0, auxiliary="new"),
        ["`auxiliary`", "'persistent'", "'copy'", "'new'"],
    ),
    "cold value gap": (
        lambda: tb.ValueGap(inner(start="cold"), SGD(0.1), 1.0),
        ["`inner.start`", "'cold'"],
    ),
    "weight": (lambda: tb.ValueGap(inner(), SGD(0.1), "1"), ["`weight`", "'1'"]),
    "weight bool": (lambda: tb.GradientNorm(SGD(0.1), True), ["`weight`", "True"]),
    "weight negative": (lambda: tb.GradientNorm(SGD(0.1), -1.0), ["`weight`", "-1.0"]),
    "gap weight negative": (
        lambda: tb.ValueGap(inner(), SGD(0.1), -0.5),
        ["`weight`", "-0.5"],
    ),
    "weight nan": (lambda: tb.GradientNorm(SGD(0.1), float("nan")), ["finite"]),
    "lower optimizer": (
        lambda: tb.GradientNorm(0.1, 1.0),
        ["`lower_optimizer`", "0.1"],
    ),
    "constant": (lambda: tb.Constant(float("inf")), ["`value`", "finite"]),
    "ramp": (lambda: tb.LinearRamp(0.0, 1.0, 0), ["`steps`", "at least 1"]),
    "ramp stop": (lambda: tb.LinearRamp(0.0, float("nan"), 3), ["`stop`", "finite"]),
    "ratio": (lambda: tb.Geometric(1.0, 0.0), ["`ratio`", "above 0"]),
    "tolerance of words": (
        lambda: tb.ConjugateGradient(5, rtol="tight"),
        ["`rtol`", "'tight'"],
    ),
    "radius of words": (
        lambda: tb.FiniteDifference(inner(), radius="small"),
        ["`radius`", "'small'"],
    ),
    "rate of words": (lambda: tb.Neumann(5, rate="0.1"), ["`rate`", "'0.1'"]),
    "damping of words": (lambda: tb.Direct(damping="1"), ["`damping`", "'1'"]),
    "start of words": (lambda: tb.LinearRamp("0", 1.0, 5), ["`start`", "'0'"]),
    "decay of words": (lambda: tb.Aggregation(0.5, "slow"), ["`decay`", "'slow'"]),
    "geometric start": (lambda: tb.Geometric(float("inf"), 0.5), ["`start`"]),
    "pair of nothing": (
        lambda: tb.pair(RANGE, RANGE.take(0)),
        ["`lower_dataset`", "empty"],
    ),
    "pair of too few": (
        lambda: tb.pair(RANGE, RANGE, lower_batches=4),
        ["`lower_batches`", "4", "3"],
    ),
    "pair with 0": (
        lambda: tb.pair(RANGE, RANGE, lower_batches=0),
        ["`lower_batches`", "at least 1"],
    ),
    "preconditioner": (
        lambda: tb.ConjugateGradient(3, preconditioner=np.eye(2)),
        ["`preconditioner`", "callable"],
    ),
    "problem of minimize": (
        lambda: minimize(problem=square),
        ["`problem`", "tb.Problem(", "function"],
    ),
    "problem of check": (
        lambda: tb.check_hypergradient(square, tb.Unroll(inner()), 1.0, 0.0, NO_DATA),
        ["`problem`", "tb.Problem("],
    ),
    "problem of tasks": (
        lambda: tb.over_tasks(square),
        ["`problem`", "tb.Problem("],
    ),
    "stop": (lambda: minimize(stop=1e-6), ["`stop`", "callable", "1e-06"]),
    "trace": (lambda: minimize(trace=["upper"]), ["`trace`", "callable"]),
    "minimize steps": (lambda: minimize(steps=0), ["`steps`", "at least 1"]),
    "integer upper": (
        lambda: minimize(upper=[tf.constant(1.0), tf.constant(2)]),
        ["`upper`", "floating-point", "upper[1]", "int32"],
    ),
    "integer lower": (
        lambda: minimize(lower={"w": tf.constant(2)}),
        ["`lower`", "floating-point", "lower['w']", "int32"],
    ),
    "no upper": (lambda: minimize(upper=[]), ["`upper`", "at least one"]),
    "upper optimizer": (
        lambda: minimize(upper_optimizer=keras.optimizers.Nadam(0.1)),
        ["Nadam", "Received: upper_optimizer="],
    ),
    "upper optimizer of words": (
        lambda: minimize(upper_optimizer="sgdd"),
        ["`upper_optimizer`", "'sgdd'"],
    ),
    **{
        f"lower optimizer of {make.__name__}": (
            functools.partial(make, lower_optimizer="sgdd", **options),
            ["`lower_optimizer`", "'sgdd'"],
        )
        for make, options in (
            (tb.ValueGap, {"inner": inner(), "weight": 1.0}),
            (tb.GradientNorm, {"weight": 1.0}),
            (tb.TTSA, {}),
            (tb.BAMM, {}),
            (tb.SOBA, {}),
            (tb.SRBA, {}),
            (tb.FSLA, {}),
            (tb.MRBO, {}),
            (tb.VRBO, {}),
            (tb.F2SA, {"inner": inner(), "weight": 1.0}),
            (tb.BOME, {"inner": inner()}),
            (tb.MEHA, {}),
            (tb.F3SA, {"weight": 1.0}),
            (tb.BVFSM, {"inner": inner(), "steps": 2}),
            (tb.GAFFA, {"constraints": lambda x, y: y}),
            (tb.AugmentedLagrangian, {"steps": 2}),
        )
    },
    "batches tuple": (
        lambda: minimize(batches=(1.0, 2.0)),
        ["`batches`", "tb.Batches", "tuple"],
    ),
    "batches dataset of others": (
        lambda: minimize(batches=RANGE.batch(1)),
        ["`batches`", "tb.Batches"],
    ),
    "dataset too short": (
        lambda: minimize(batches=tb.pair(RANGE, RANGE), steps=4),
        ["`batches`", "3 elements", "steps=4"],
    ),
    "probes": (
        lambda: tb.check_hypergradient(
            PROBLEM, tb.Unroll(inner()), 1.0, 0.0, NO_DATA, probes=0
        ),
        ["`probes`", "at least 1"],
    ),
    "check integer": (
        lambda: tb.check_hypergradient(
            PROBLEM, tb.Unroll(inner()), tf.constant(1), 0.0, NO_DATA
        ),
        ["`upper`", "int32"],
    ),
    "functional of a function": (
        lambda: tb.functional(lambda x: x),
        ["`model`", "Keras layer"],
    ),
    "functional not built": (
        lambda: tb.functional(keras.layers.Dense(2)),
        ["`model`", "built"],
    ),
    "functional without variables": (
        lambda: tb.functional(
            keras.Sequential([keras.Input((2,)), keras.layers.ReLU()])
        ),
        ["`model`", "trainable variables"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, words = BAD[name]
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    for word in [*words, "Received: "]:
        assert word in message, message
    assert len(message) < 700


# Errors that only a step can see, for every method, eager and compiled.

METHODS: dict[str, Callable[[], tb.Method]] = {
    "unroll replay": lambda: tb.Unroll(inner()),
    "unroll checkpoint": lambda: tb.Unroll(inner(), memory="checkpoint"),
    "unroll tape": lambda: tb.Unroll(inner(), memory="tape"),
    "unroll pessimistic": lambda: tb.Unroll(inner(), end="pessimistic"),
    "implicit": lambda: tb.Implicit(inner(), tb.ConjugateGradient(3)),
    "gap": lambda: tb.ValueGap(inner(), SGD(0.1), 1.0),
    "gap constant": lambda: tb.ValueGap(None, SGD(0.1), 1.0),
    "norm": lambda: tb.GradientNorm(SGD(0.1), 1.0),
}
X = {"rate": tf.constant([1.0, 2.0]), "unused": tf.constant(3.0)}
Y = (tf.constant([0.5, -1.0]), [tf.constant(0.1)])


def run(
    name: str, problem: tb.Problem, x: Any = X, y: Any = Y, compiled: bool = False
) -> tb.Step:
    method = METHODS[name]()
    step = tf.function(method.step, autograph=False) if compiled else method.step
    return step(problem, x, y, NO_DATA, method.init(problem, x, y))


def f(x: Any, y: Any, batch: Any) -> Any:
    return tf.reduce_sum(y[0] ** 2) + y[1][0]


def g(x: Any, y: Any, batch: Any) -> Any:
    size = tf.reduce_sum((y[0] - x["rate"]) ** 2)
    return size + (y[1][0] - x["unused"]) ** 2


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_upper_variable_that_the_lower_problem_lacks(name: str, compiled: bool) -> None:
    """Even if f has it: that a lower loss ignores an upper variable is a mistake."""

    def without(x: Any, y: Any, batch: Any) -> Any:
        return tf.reduce_sum((y[0] - x["rate"]) ** 2) + y[1][0] ** 2

    def direct(x: Any, y: Any, batch: Any) -> Any:
        return f(x, y, batch) + x["unused"]

    for upper_loss in (f, direct):
        problem = tb.Problem(upper_loss, without)
        with pytest.raises(tb.UnconnectedGradientError) as caught:
            run(name, problem, compiled=compiled)
        assert "upper['unused']" in str(caught.value)
        assert "Received: " in str(caught.value)
        assert caught.value.level == "upper" and caught.value.index == 1


@pytest.mark.parametrize("name", METHODS)
def test_lower_variable_that_no_loss_has(name: str) -> None:
    def without(x: Any, y: Any, batch: Any) -> Any:
        return tf.reduce_sum((y[0] - x["rate"]) ** 2) + x["unused"] ** 2

    def f_without(x: Any, y: Any, batch: Any) -> Any:
        return tf.reduce_sum(y[0] ** 2)

    with pytest.raises(tb.UnconnectedGradientError) as caught:
        run(name, tb.Problem(f_without, without))
    assert "lower[1][0]" in str(caught.value)
    assert caught.value.level == "lower" and caught.value.index == 1


@pytest.mark.parametrize("name", METHODS)
def test_a_gradient_cut_by_a_conversion_is_unconnected_not_zero(name: str) -> None:
    """NumPy in the loss, or stop_gradient: an error, never silent zeros."""

    def cut(x: Any, y: Any, batch: Any) -> Any:
        fixed = {k: tf.stop_gradient(v) for k, v in x.items()}
        return g(fixed, y, batch)

    with pytest.raises(tb.UnconnectedGradientError, match=r"upper\['rate'\]"):
        run(name, tb.Problem(f, cut))


@pytest.mark.parametrize("name", METHODS)
def test_upper_loss_without_x_is_fine(name: str) -> None:
    step = run(name, tb.Problem(f, g))
    assert all(np.isfinite(leaf).all() for leaf in tf.nest.flatten(step.upper_gradient))
    if "unroll" in name or name == "implicit":
        assert np.abs(step.upper_gradient["rate"]).min() > 1e-3


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("level", ["upper", "lower"])
def test_losses_must_be_scalars(name: str, level: str) -> None:
    def vector(x: Any, y: Any, batch: Any) -> Any:
        return (y[0] - x["rate"]) ** 2 + (y[1][0] - x["unused"]) ** 2

    losses = (vector, g) if level == "upper" else (f, vector)
    with pytest.raises(ValueError, match="scalar") as caught:
        run(name, tb.Problem(*losses))
    assert "(2,)" in str(caught.value) and "Received: " in str(caught.value)


@pytest.mark.parametrize("name", METHODS)
def test_batches_must_be_named(name: str) -> None:
    method = METHODS[name]()
    problem = tb.Problem(f, g)
    with pytest.raises(ValueError, match="tb.Batches") as caught:
        method.step(problem, X, Y, (1.0, 2.0), method.init(problem, X, Y))
    assert "Received: " in str(caught.value)


@pytest.mark.parametrize("name", METHODS)
def test_prepare_must_return_batches(name: str) -> None:
    problem = tb.Problem(f, g, prepare=lambda x, batches: (1.0, 2.0))
    with pytest.raises(ValueError, match="`prepare` must return.*Received: .*tuple"):
        run(name, problem)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "project, words",
    [
        (lambda y: y[0], ["`project_lower`", "Received: "]),
        (
            lambda y: (y[0][:1], y[1]),
            ["`project_lower`", "lower_[0]", "(1,)", "(2,)"],
        ),
        (
            lambda y: (tf.cast(y[0], tf.float64), y[1]),
            ["`project_lower`", "float64", "float32"],
        ),
    ],
    ids=["structure", "shape", "dtype"],
)
def test_projections_return_what_they_get(name: str, project, words: list) -> None:
    with pytest.raises(ValueError) as caught:
        run(name, tb.Problem(f, g, project_lower=project))
    for word in words:
        assert word.replace("lower_[0]", "[0]") in str(caught.value)


def test_upper_projection_returns_what_it_gets() -> None:
    problem = tb.Problem(square, square, project_upper=lambda x: [x])
    with pytest.raises(ValueError, match="`project_upper`"):
        minimize(problem=problem)


@pytest.mark.parametrize("name", ["unroll replay", "unroll tape", "implicit"])
def test_lower_start_is_like_the_lower_variables(name: str) -> None:
    problem = tb.Problem(f, g, lower_start=lambda x: (x["rate"][:1], [x["unused"]]))
    with pytest.raises(ValueError, match="`lower_start`") as caught:
        run(name, problem)
    assert "(1,)" in str(caught.value) and "(2,)" in str(caught.value)


def test_functional_wants_all_variables() -> None:
    dense = keras.layers.Dense(2)
    dense.build((None, 3))
    network = tb.functional(dense)
    with pytest.raises(ValueError, match="`variables`.*1 tensors for 2"):
        network(network.initial()[:1], tf.ones([1, 3]))


@pytest.mark.parametrize(
    "build",
    [
        lambda wrong: tb.Unroll(wrong),
        lambda wrong: tb.Implicit(wrong),
        lambda wrong: tb.ValueGap(wrong, keras.optimizers.SGD(0.1), 1.0),
    ],
)
@pytest.mark.parametrize("wrong", ["sgdd", keras.optimizers.SGD(0.1), 3])
def test_inner_must_be_an_inner_solver(build, wrong):
    with pytest.raises(ValueError, match="`inner` must be a tb.InnerSolver.*Received"):
        build(wrong)


@pytest.mark.parametrize("memory", ["replay", "checkpoint", "tape"])
def test_an_error_in_a_loss_is_all_that_is_said(memory, caplog):
    """TensorFlow logs one of its own for what the error left half-made in a loop."""

    def broken(x, y, batch):
        raise KeyError("labels")

    problem, method = tb.Problem(square, broken), tb.Unroll(inner(), memory=memory)
    x = tf.ones([2])
    state = method.init(problem, x, x)
    logger = tf.get_logger()
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.ERROR), pytest.raises(KeyError, match="labels"):
            method.step(problem, x, x, NO_DATA, state)
        gc.collect()
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records


def minimise(upper_loss, **options):
    problem = tb.Problem(upper_loss, lambda x, y, batch: (y - x) ** 2)
    method = tb.Unroll(tb.InnerSolver(keras.optimizers.SGD(0.1), 2))
    rule = keras.optimizers.SGD(0.1)
    nothing = tb.Batches(None, None)
    return tb.minimize(problem, method, 0.0, 0.0, rule, nothing, 2, **options)


def test_a_loss_that_forgets_to_return_is_told_so():
    with pytest.raises(ValueError, match="missing `return`"):
        minimise(lambda x, y, batch: None)


def test_stop_must_be_a_predicate():
    with pytest.raises(ValueError, match="`stop` must return a bool"):
        minimise(lambda x, y, batch: (y - 1.0) ** 2, stop=lambda a, b: b.upper)
