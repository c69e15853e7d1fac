"""The outer loop over plain tensors."""

import copy
import gc
import pickle
import weakref
from typing import Any

import keras
import numpy as np
import pytest
import references
import tensorflow as tf
from problems import flat, quadratic
from suites import fast_where

import tfbilevel as tb

NO_DATA = tb.Batches(None, None)
SGD = keras.optimizers.SGD


def inner(steps: int = 3, rate: float = 0.5) -> tb.InnerSolver:
    return tb.InnerSolver(SGD(rate), steps)


def numpy_run(oracle: Any, steps: int, outer: float, inner: float, t: int) -> list:
    """Warm-started unrolling with plain outer steps: [(x, y) after each step]."""
    x, y, points = flat(oracle.x), flat(oracle.y), []
    for _ in range(steps):
        path = references.descend(oracle, x, y, inner, t)
        x, y = x - outer * references.unroll(oracle, x, path, inner), path[-1]
        points.append((x, y))
    return points


@pytest.mark.parametrize("jit_compile", [False, True])
def test_equals_a_numpy_loop(jit_compile: bool) -> None:
    oracle = quadratic()
    x, y, batches = oracle.at("float64")
    result = tb.minimize(
        oracle.problem,
        tb.Unroll(inner()),
        x,
        y,
        SGD(0.125),
        batches,
        steps=6,
        trace=lambda point: {"x": point.upper, "k": point.step},
        jit_compile=jit_compile,
    )
    points = numpy_run(oracle, 6, 0.125, 0.5, 3)
    np.testing.assert_allclose(result.upper, points[-1][0], rtol=1e-10)
    np.testing.assert_allclose(result.lower, points[-1][1], rtol=1e-10)
    np.testing.assert_allclose(result.trace["x"], [p[0] for p in points], rtol=1e-10)
    assert result.trace["k"].numpy().tolist() == [1, 2, 3, 4, 5, 6]
    assert int(result.steps) == 6 and not bool(result.stopped)
    np.testing.assert_array_equal(x, flat(oracle.x))


def test_finds_the_solution_of_the_bilevel_problem() -> None:
    """The hypergradient of the quadratic is affine: NumPy solves for its zero."""
    oracle = quadratic()
    x, y, batches = oracle.at("float64")
    offset = oracle.hypergradient(np.zeros(3))
    slope = np.stack([oracle.hypergradient(e) - offset for e in np.eye(3)], 1)
    assert np.linalg.eigvalsh(0.5 * (slope + slope.T)).min() > 0
    result = tb.minimize(
        oracle.problem,
        tb.Implicit(inner(10, oracle.rate), tb.ConjugateGradient(10, rtol=1e-12)),
        x,
        y,
        SGD(1.0 / np.linalg.eigvalsh(slope).max()),
        batches,
        steps=2000,
        stop=lambda before, after: (
            tf.reduce_max(tf.abs(after.upper - before.upper)) < 1e-12
        ),
    )
    assert bool(result.stopped) and int(result.steps) < 2000
    np.testing.assert_allclose(result.upper, np.linalg.solve(slope, -offset), rtol=1e-8)


def test_stop_ends_the_loop_at_that_step() -> None:
    """x halves each step from 1; stop at the first below 0.1: the fourth."""
    problem = tb.Problem(
        upper_loss=lambda x, y, b: 0.5 * y**2, lower_loss=lambda x, y, b: (y - x) ** 2
    )
    seen = []

    def stop(before: tb.Point, after: tb.Point) -> tf.Tensor:
        seen.append((before.metrics, sorted(after.metrics)))
        return after.upper < 0.1

    result = tb.minimize(
        problem,
        tb.Unroll(inner(1, 0.5)),
        1.0,
        0.0,
        SGD(0.5),
        NO_DATA,
        steps=50,
        stop=stop,
        trace=lambda point: point.upper,
    )
    assert float(result.upper) == 0.0625
    assert int(result.steps) == 4 and bool(result.stopped)
    assert result.trace.numpy().tolist() == [0.5, 0.25, 0.125, 0.0625]
    assert seen[0] == ({}, ["lower_loss", "upper_loss"])


STARTS = np.array([[0.3, -0.2], [1.0, 2.0], [-1.5, 0.7], [0.0, 0.05]])


def many() -> tb.Problem:
    """One start per row: losses are sums over rows, f of a quartic kind."""
    return tb.Problem(
        upper_loss=lambda x, y, b: tf.reduce_sum(0.25 * y**4 + 0.5 * y**2),
        lower_loss=lambda x, y, b: tf.reduce_sum(0.5 * (y - x) ** 2),
    )


@pytest.mark.parametrize("jit_compile", fast_where(lambda jit: not jit, [False, True]))
def test_stop_per_start_freezes_what_has_stopped(jit_compile: bool) -> None:
    """Every row ends as a run of its own would: values and number of steps."""

    def run(start: np.ndarray) -> tb.Result:
        return tb.minimize(
            many(),
            tb.Unroll(inner(2, 0.5)),
            tf.constant(start),
            tf.zeros_like(start),
            SGD(0.25, momentum=0.5),
            NO_DATA,
            steps=60,
            stop=lambda before, after: tf.norm(after.upper, axis=1) < 0.05,
            jit_compile=jit_compile,
        )

    together = run(STARTS)
    alone = [run(STARTS[row : row + 1]) for row in range(4)]
    steps = [int(result.steps[0]) for result in alone]
    assert len(set(steps)) > 2  # so that freezing happens
    assert together.steps.numpy().tolist() == steps
    assert together.stopped.numpy().tolist() == [True] * 4
    for row, result in enumerate(alone):
        np.testing.assert_allclose(together.upper[row], result.upper[0], rtol=1e-12)
        np.testing.assert_allclose(together.lower[row], result.lower[0], rtol=1e-12)
        assert tf.norm(together.upper[row]) < 0.05


def test_starts_that_never_stop_are_told() -> None:
    result = tb.minimize(
        many(),
        tb.Unroll(inner(2, 0.5)),
        tf.constant(STARTS),
        tf.zeros_like(STARTS),
        SGD(0.25),
        NO_DATA,
        steps=3,
        stop=lambda before, after: tf.norm(after.upper, axis=1) < 0.3,
    )
    assert result.stopped.numpy().tolist() == [True, False, False, True]
    assert result.steps.numpy()[1:3].tolist() == [3, 3]


def test_projection_holds_after_every_step() -> None:
    problem = tb.Problem(
        upper_loss=lambda x, y, b: tf.reduce_sum((y - 5.0) ** 2),
        lower_loss=lambda x, y, b: 0.5 * tf.reduce_sum((y - x) ** 2),
        project_upper=lambda x: tf.clip_by_value(x, -1.0, 1.5),
    )
    result = tb.minimize(
        problem,
        tb.Unroll(inner(1, 1.0)),
        tf.constant([0.0, -1.0]),
        tf.zeros([2]),
        SGD(0.05),
        NO_DATA,
        steps=40,
        trace=lambda point: point.upper,
    )
    assert result.upper.numpy().tolist() == [1.5, 1.5]
    assert result.trace.numpy().max() == 1.5


@pytest.mark.parametrize(
    "name",
    fast_where("gap".__eq__, ["unroll", "implicit", "gap", "norm"]),
)
def test_going_on_with_the_state_equals_one_run(name: str) -> None:
    """Momenta, warm solutions, second copies and step counts included."""
    oracle = quadratic()
    x, y, batches = oracle.at("float64")
    carried = tb.InnerSolver(SGD(0.3, momentum=0.5), 2, optimizer_state="carry")
    method = {
        "unroll": tb.Unroll(carried),
        "implicit": tb.Implicit(carried, tb.FixedPoint(2, rate=0.3, warm_start=True)),
        "gap": tb.ValueGap(carried, SGD(0.1, momentum=0.5), tb.LinearRamp(0.1, 2.0, 5)),
        "norm": tb.GradientNorm(SGD(0.1, momentum=0.5), tb.LinearRamp(0.1, 2.0, 5)),
    }[name]

    def run(x: Any, y: Any, steps: int, state: Any = None) -> tb.Result:
        adam = keras.optimizers.Adam(0.05)
        return tb.minimize(
            oracle.problem, method, x, y, adam, batches, steps, state=state
        )

    whole = run(x, y, 7)
    part = run(x, y, 3)
    rest = run(part.upper, part.lower, 4, part.state)
    for a, b in zip(
        tf.nest.flatten((whole.upper, whole.lower, whole.state)),
        tf.nest.flatten((rest.upper, rest.lower, rest.state)),
        strict=True,
    ):
        # Two programs: on a busy machine TensorFlow may order a sum differently.
        np.testing.assert_allclose(a, b, rtol=1e-13)
    fresh = run(part.upper, part.lower, 4)
    assert np.abs(fresh.upper - whole.upper).max() > 1e-6


# Batches.


TARGETS = np.array([1.0, -2.0, 4.0, 0.5, 3.0])


def following() -> tb.Problem:
    """y_1 = x; x moves half way to the step's target."""
    return tb.Problem(
        upper_loss=lambda x, y, batch: 0.5 * (y - batch) ** 2,
        lower_loss=lambda x, y, batch: 0.5 * (y - x) ** 2 + 0.0 * batch,
    )


def half_way(targets: np.ndarray) -> list:
    points = [0.0]
    for target in targets:
        points.append(points[-1] - 0.5 * (points[-1] - target))
    return points[1:]


def source(kind: str) -> Any:
    if kind == "dataset":
        slices = tf.data.Dataset.from_tensor_slices(TARGETS)
        return tb.pair(slices, slices)
    table = tf.constant(TARGETS)

    def batch_at(k: tf.Tensor) -> tb.Batches:
        assert k.dtype == tf.int32
        return tb.Batches(upper=table[k], lower=table[k])

    return batch_at


@pytest.mark.parametrize("kind", ["dataset", "callable"])
def test_a_batch_for_every_step(kind: str) -> None:
    zero = tf.constant(0.0, tf.float64)
    result = tb.minimize(
        following(),
        tb.Unroll(inner(1, 1.0)),
        zero,
        zero,
        SGD(0.5),
        source(kind),
        steps=5,
        trace=lambda point: point.upper,
    )
    np.testing.assert_allclose(result.trace, half_way(TARGETS), rtol=1e-13)


def test_numbers_in_batches_are_of_the_variables_dtype() -> None:
    problem = tb.Problem(
        upper_loss=lambda x, y, batch: batch * (y - batch) ** 2,
        lower_loss=lambda x, y, batch: (y - batch * x) ** 2,
    )
    zero = tf.constant(0.0, tf.float64)
    once = tb.Unroll(tb.InnerSolver(SGD(0.5), 1))  # y = batch x, exactly
    batches = tb.Batches(upper=0.1, lower=0.3)
    result = tb.minimize(problem, once, zero, zero, SGD(1.0), batches, steps=1)
    # f = 0.1 (0.3 x - 0.1)^2, so f' = 0.06 (0.3 x - 0.1) = -0.006 at 0.
    assert result.upper.dtype == tf.float64
    assert float(result.upper) == pytest.approx(0.006, rel=1e-12)


def test_a_fixed_batch_with_ragged_rows() -> None:
    """x moves to the mean of what the rows sum to."""
    problem = tb.Problem(
        upper_loss=lambda x, y, rows: tf.reduce_mean(
            (y - tf.reduce_sum(rows, axis=1)) ** 2
        ),
        lower_loss=lambda x, y, batch: 0.5 * (y - x) ** 2,
    )
    zero = tf.constant(0.0, tf.float64)
    rows = tf.ragged.constant([[1.0, 2.0], [3.0, 1.0, 5.0]], dtype=tf.float64)
    method = tb.Unroll(inner(1, 1.0))
    batches = tb.Batches(rows, None)
    result = tb.minimize(problem, method, zero, zero, SGD(0.25), batches, steps=60)
    np.testing.assert_allclose(result.upper, 6.0, rtol=1e-12)


def test_stacked_batches_from_a_dataset() -> None:
    """Each outer step's two inner steps see its two slices."""
    problem = tb.Problem(
        upper_loss=lambda x, y, batch: x + y,
        lower_loss=lambda x, y, batch: 0.5 * (y - batch) ** 2 + 0.0 * x * y,
    )
    lower = tf.data.Dataset.from_tensor_slices(np.array([8.0, 2.0, 4.0, 6.0]))
    upper = tf.data.Dataset.from_tensors(np.array(0.0))
    zero = tf.constant(0.0, tf.float64)
    result = tb.minimize(
        problem,
        tb.Unroll(inner(2, 0.5)),
        zero,
        zero,
        SGD(0.5),
        tb.pair(upper, lower, lower_batches=2),
        steps=2,
        trace=lambda point: point.lower,
    )
    # 0 -> 4 -> 3 | 3 -> 3.5 -> 4.75
    assert result.trace.numpy().tolist() == [3.0, 4.75]


def test_compiled_once() -> None:
    """Losses run in Python while tracing only: as often for 2 steps as for 200.

    Twice: tf.function traces anew inside the loop what the loop's types came from.
    """

    def calls(steps: int) -> int:
        counted = []

        def upper_loss(x: Any, y: Any, batch: Any) -> Any:
            counted.append(1)
            return 0.5 * y**2

        problem = tb.Problem(upper_loss, lambda x, y, b: 0.5 * (y - x) ** 2)
        tb.minimize(
            problem, tb.Unroll(inner(2)), 1.0, 0.0, SGD(0.1), NO_DATA, steps=steps
        )
        return len(counted)

    assert calls(2) == calls(200) <= 2


def test_going_on_counts_on() -> None:
    """For batches by the step number, what is traced, and what stops."""
    problem = tb.Problem(
        lambda x, y, batch: 0.5 * (y - batch) ** 2, lambda x, y, b: 0.5 * (y - x) ** 2
    )
    method, rate = tb.Unroll(inner(1, 1.0)), SGD(1.0)  # x becomes the batch
    options = {
        "batches": lambda k: tb.Batches(tf.cast(k, tf.float32) ** 2, None),
        "trace": lambda point: (point.step, point.upper),
        "stop": lambda before, after: after.step >= 7,
    }
    first = tb.minimize(problem, method, 0.0, 0.0, rate, steps=4, **options)
    then = tb.minimize(
        problem, method, first.upper, first.lower, rate, steps=9, state=first.state,
        **options,
    )  # fmt: skip
    assert first.trace[0].numpy().tolist() == [1, 2, 3, 4]
    assert then.trace[0].numpy().tolist() == [5, 6, 7]
    assert then.trace[1].numpy().tolist() == [16.0, 25.0, 36.0]
    assert bool(then.stopped) and int(then.steps) == 3


@pytest.mark.parametrize("fixed", fast_where(bool, [True, False]))
def test_going_on_is_not_traced_again(fixed: bool) -> None:
    """Four calls of 5 steps are one of 20, on other data too. A new run is traced: a
    loss may read what has changed in Python since, and the rate may be another."""
    counted = []

    def upper_loss(x: Any, y: Any, batch: Any) -> Any:
        counted.append(1)
        return 0.5 * (y - batch) ** 2

    problem = tb.Problem(upper_loss, lambda x, y, b: 0.5 * (y - x) ** 2)
    method, rate = tb.Unroll(inner(2)), keras.optimizers.Adam(0.1)
    target = tb.Batches(tf.constant(1.0), None)
    batches = target if fixed else lambda k: target

    def run(steps: int, x: Any = 0.0, y: Any = 0.0, **options: Any) -> tb.Result:
        batches = options.pop("batches", target if fixed else source)
        return tb.minimize(problem, method, x, y, rate, batches, steps, **options)

    source = batches
    whole = run(20)
    counted.clear()
    result = run(5)
    once = len(counted)
    for _ in range(3):
        result = run(5, result.upper, result.lower, state=result.state)
    assert len(counted) == once
    np.testing.assert_allclose(result.upper, whole.upper, rtol=1e-6)
    if fixed:
        far = tb.Batches(tf.constant(-100.0), None)
        other = run(5, result.upper, result.lower, state=result.state, batches=far)
        assert len(counted) == once and float(other.upper) < float(result.upper)
    slow = run(5)
    assert len(counted) == 2 * once
    rate.learning_rate.assign(0.01)
    assert abs(float(run(5).upper)) < 0.2 * abs(float(slow.upper))


@pytest.fixture(scope="module")
def in_two() -> tuple:
    """A run, and what a run of 10 steps and one of 5 end at.

    Adam and an inner schedule carry something.
    """
    problem = tb.Problem(
        lambda x, y, b: 0.5 * (y - 1.0) ** 2, lambda x, y, b: 0.5 * (y - x) ** 2
    )
    decay = tb.CosineDecay(0.5, 0.1, 8)
    method = tb.Unroll(tb.InnerSolver(SGD(0.1), 2, learning_rate=decay))
    rate = keras.optimizers.Adam(0.1)

    def run(x: Any, y: Any, steps: int, **options: Any) -> tb.Result:
        return tb.minimize(problem, method, x, y, rate, NO_DATA, steps, **options)

    return run, run(0.0, 0.0, 10), run(0.0, 0.0, 5)


@pytest.mark.parametrize(
    "restored",
    [
        lambda state: pickle.loads(pickle.dumps(state)),
        copy.deepcopy,
        lambda state: tf.nest.map_structure(np.asarray, state),
        tuple,
    ],
    ids=["pickle", "copy", "numpy", "tuple"],
)
def test_going_on_from_a_saved_state(restored: Any, in_two: tuple) -> None:
    """Two runs of 5 are one of 10."""
    run, whole, half = in_two
    state = restored(half.state)
    assert not hasattr(state, "loop") or state.loop is None
    end = run(half.upper, half.lower, 5, state=state)
    np.testing.assert_allclose(end.upper, whole.upper, rtol=1e-6)


def test_what_is_compiled_goes_with_the_result() -> None:
    problem = tb.Problem(
        lambda x, y, b: 0.5 * (y - 1.0) ** 2, lambda x, y, b: 0.5 * (y - x) ** 2
    )
    kept = weakref.ref(problem)
    gc.freeze()  # all that there is already: looking through it takes a second
    try:
        result = tb.minimize(
            problem, tb.Unroll(inner(2)), 0.0, 0.0, SGD(0.1), NO_DATA, 2
        )
        del problem
        gc.collect()
        assert kept() is not None
        del result
        gc.collect()
        assert kept() is None
    finally:
        gc.unfreeze()


def test_upper_optimizer_is_not_changed() -> None:
    optimizer = keras.optimizers.Adam(0.1)
    tb.minimize(many(), tb.Unroll(inner()), STARTS, STARTS, optimizer, NO_DATA, steps=2)
    assert not optimizer.built and int(optimizer.iterations.numpy()) == 0


# NaN and infinity.


def breaking(what: str) -> tuple[tb.Problem, Any]:
    """A problem in which `what` stops being finite at outer step 3 (of 0, 1, ...)."""
    value = np.where(np.arange(6) == 3, np.nan, 0.0)
    table = tf.constant(value)
    # A finite loss with an infinite derivative: sqrt at zero.
    root = tf.constant(np.where(np.arange(6) == 3, 0.0, 1.0))
    losses = {
        "the upper loss": (lambda x, y, b: y + b[0], lambda x, y, b: (y - x) ** 2),
        "the lower loss": (
            lambda x, y, b: y,
            # The NaN is in the value, not in the gradient.
            lambda x, y, b: (y - x) ** 2 + b[0],
        ),
        "the upper gradient": (
            lambda x, y, b: y + tf.sqrt(b[1] * (x - x)),
            lambda x, y, b: (y - x) ** 2,
        ),
        "the lower variables": (
            lambda x, y, b: x,
            lambda x, y, b: (y - x) ** 2,
        ),
    }
    if what == "the upper gradient":
        # sqrt(x^2 s + (1 - s)) has value |x| or 1 and derivative 0/0 at x = 0, s = 1.
        table = tf.constant(np.where(np.arange(6) == 3, 1.0, 0.0))
        losses[what] = (
            lambda x, y, b: 0.0 * y + tf.sqrt((0.0 * x) ** 2 * b[0] + (1 - b[0])),
            lambda x, y, b: (y - x) ** 2,
        )
    problem = tb.Problem(*losses[what])
    return problem, lambda k: tb.Batches((table[k], root[k]), (table[k], root[k]))


@pytest.mark.parametrize(
    "what",
    fast_where(
        lambda what: what != "the lower loss",
        ["the upper loss", "the lower loss", "the upper gradient"],
    ),
)
def test_nonfinite_names_the_quantity_and_the_step(what: str) -> None:
    problem, batches = breaking(what)
    one = tf.constant(1.0, tf.float64)
    with pytest.raises(tb.NonFiniteError, match="outer step 3") as caught:
        tb.minimize(problem, tb.Unroll(inner(1)), one, one, SGD(0.01), batches, steps=6)
    assert caught.value.quantity == what
    assert caught.value.step == 3
    assert what in str(caught.value) and "Received: " in str(caught.value)
    # One step fewer is fine, and ends where the error's point is.
    method, rate = tb.Unroll(inner(1)), SGD(0.01)
    result = tb.minimize(problem, method, one, one, rate, batches, steps=3)
    assert np.isfinite(result.upper)
    point = caught.value.point
    assert (point.step, point.upper) == (3, result.upper)
    assert point.lower == result.lower
    # Steps are counted on where a run goes on.
    with pytest.raises(tb.NonFiniteError, match="outer step 3"):
        tb.minimize(
            problem,
            method,
            result.upper,
            result.lower,
            rate,
            batches,
            2,
            state=result.state,
        )


def test_nonfinite_lower_variables() -> None:
    """G-PBGD's y after the step overflows while all losses before it are finite."""
    problem = tb.Problem(
        upper_loss=lambda x, y, b: x + y * tf.constant(1e30),
        lower_loss=lambda x, y, b: 0.5 * (y - x) ** 2,
    )
    one = tf.constant(1.0)
    with pytest.raises(tb.NonFiniteError) as caught:
        tb.minimize(
            problem,
            tb.GradientNorm(SGD(1e20), 1.0),
            one,
            one,
            SGD(0.01),
            NO_DATA,
            steps=6,
        )
    assert caught.value.quantity == "the lower variables" and caught.value.step == 0


def test_nonfinite_in_one_of_many_starts() -> None:
    """Divergence of one row is not hidden by its neighbours."""
    problem = tb.Problem(
        upper_loss=lambda x, y, b: tf.reduce_sum(tf.math.log(y)),
        lower_loss=lambda x, y, b: 0.5 * tf.reduce_sum((y - x) ** 2),
    )
    starts = tf.constant([5.0, 1.5, 5.0])
    with pytest.raises(tb.NonFiniteError) as caught:
        tb.minimize(
            problem, tb.Unroll(inner(1, 1.0)), starts, starts, SGD(1.0), NO_DATA, 60
        )
    # x: 1.5 -> 1.5 - 1/1.5 = 0.8333 -> 0.8333 - 1.2 = -0.3667: log at step 2.
    assert caught.value.quantity == "the upper loss" and caught.value.step == 2


def test_the_first_quantity_is_named_when_several_are_not_finite() -> None:
    """NaN in f spoils the hypergradient too; the loss is the cause."""
    problem = tb.Problem(
        lambda x, y, b: y * tf.constant(np.nan), lambda x, y, b: (y - x) ** 2
    )
    with pytest.raises(tb.NonFiniteError) as caught:
        tb.minimize(problem, tb.Unroll(inner(1)), 1.0, 1.0, SGD(0.1), NO_DATA, steps=2)
    assert caught.value.quantity == "the upper loss"


class Harmonic(keras.optimizers.schedules.LearningRateSchedule):
    """1 / (step + 1), which Keras could not write to a file."""

    def __call__(self, step: Any) -> Any:
        return 1.0 / (tf.cast(step, tf.float32) + 1.0)


def test_a_schedule_of_ones_own_at_the_upper_level() -> None:
    """f = x: the steps are 1, 1/2 and 1/3."""
    problem = tb.Problem(
        lambda x, y, batch: x + 0.0 * y, lambda x, y, batch: (y - x) ** 2
    )
    method = tb.GradientNorm(keras.optimizers.SGD(0.1), 0.0)
    zero, none = tf.constant(0.0, tf.float64), tb.Batches(None, None)
    upper = keras.optimizers.SGD(Harmonic())
    found = tb.minimize(problem, method, zero, zero, upper, none, steps=3)
    assert float(found.upper) == pytest.approx(-11 / 6, rel=1e-6)


def test_what_is_not_a_method_is_refused() -> None:
    zero, none = tf.constant(0.0), tb.Batches(None, None)
    with pytest.raises(ValueError, match="`method` must be a tb.Method"):
        tb.minimize(
            quadratic().problem,
            tb.InnerSolver(keras.optimizers.SGD(0.1), 2),
            zero,
            zero,
            keras.optimizers.SGD(0.1),
            none,
            steps=3,
        )
    with pytest.raises(ValueError, match="`method` must be a tb.Method"):
        tb.check_hypergradient(quadratic().problem, "unroll", zero, zero, none)


def test_going_on_takes_the_rate_of_today() -> None:
    problem = tb.Problem(
        upper_loss=lambda x, y, batch: 0.5 * (y - 1.0) ** 2,
        lower_loss=lambda x, y, batch: 0.5 * (y - x) ** 2,
    )
    method = tb.Unroll(tb.InnerSolver(keras.optimizers.SGD(1.0), 1))
    none = tb.Batches(None, None)
    rate = keras.optimizers.SGD(0.5)
    first = tb.minimize(problem, method, 0.0, 0.0, rate, none, 1)
    assert float(first.upper) == pytest.approx(0.5)
    rate.learning_rate = 0.1
    second = tb.minimize(
        problem, method, first.upper, first.lower, rate, none, 1, state=first.state
    )
    assert float(second.upper) == pytest.approx(0.5 + 0.1 * 0.5)


def test_the_trace_of_a_start_that_has_stopped_stays() -> None:
    result = tb.minimize(
        many(),
        tb.Unroll(inner(2, 0.5)),
        tf.constant(STARTS),
        tf.zeros_like(STARTS),
        SGD(0.25, momentum=0.5),
        NO_DATA,
        steps=60,
        stop=lambda before, after: tf.norm(after.upper, axis=1) < 0.05,
        trace=lambda point: (point.upper, point.lower),
    )
    assert len(set(result.steps.numpy().tolist())) > 2
    for rows, last in zip(result.trace, (result.upper, result.lower), strict=True):
        for start, made in enumerate(result.steps.numpy()):
            after = rows.numpy()[made - 1 :, start]
            np.testing.assert_array_equal(
                after, np.repeat(last[start][None], len(after), 0)
            )
