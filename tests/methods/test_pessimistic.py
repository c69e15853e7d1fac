"""Pessimistic ends, learned starts, aggregation and first order: closed forms."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbilevel as tb

SGD = keras.optimizers.SGD
NONE = tb.Batches(None, None)
T = 0.3  # inner rate


def tracking(target: float) -> tb.Problem:
    """f = (y - target)^2 / 2, g = (y - x)^2 / 2, the start z an upper variable.

    y_k = x + (1 - T)^k (z - x), so everything is known.
    """
    return tb.Problem(
        upper_loss=lambda u, y, batch: 0.5 * (y - target) ** 2 + 0.0 * u["x"],
        lower_loss=lambda u, y, batch: 0.5 * (y - u["x"]) ** 2,
        lower_start=lambda u: u["z"],
    )


def step(problem: tb.Problem, method: tb.Method, x: float, z: float) -> tb.Step:
    upper = {"x": tf.constant(x, tf.float64), "z": tf.constant(z, tf.float64)}
    y = tf.constant(0.0, tf.float64)
    return method.step(problem, upper, y, NONE, method.init(problem, upper, y))


@pytest.mark.parametrize("memory", ["replay", "checkpoint", "tape"])
@pytest.mark.parametrize(
    ("x", "z", "target", "k"),
    [
        (0.0, 1.0, 0.0, 1),  # F falls along the way: the first iterate
        (0.0, 1.0, 1.0, 9),  # F rises: the last one
        (2.0, 0.5, 2.0, 1),
    ],
)
def test_iaptt_gradients_in_closed_form(memory, x, z, target, k) -> None:
    inner = tb.InnerSolver(SGD(T), steps=9)
    method = tb.Unroll(inner, end="pessimistic", memory=memory)
    found = step(tracking(target), method, x, z)
    kept = (1 - T) ** k
    y = x + kept * (z - x)
    assert int(found.metrics["truncation"]) == k
    assert float(found.upper_gradient["x"]) == pytest.approx((1 - kept) * (y - target))
    assert float(found.upper_gradient["z"]) == pytest.approx(kept * (y - target))
    assert float(found.metrics["upper_loss"]) == pytest.approx(0.5 * (y - target) ** 2)
    assert float(found.lower) == pytest.approx(x + (1 - T) ** 9 * (z - x))


def test_the_first_of_equal_iterates_is_taken() -> None:
    """At the solution nothing moves: all iterates tie."""
    method = tb.Unroll(tb.InnerSolver(SGD(T), steps=5), end="pessimistic")
    assert int(step(tracking(3.0), method, 1.0, 1.0).metrics["truncation"]) == 1


def test_the_start_itself_is_never_the_end() -> None:
    """F is largest at z; k* = 1 all the same."""
    method = tb.Unroll(tb.InnerSolver(SGD(T), steps=5), end="pessimistic")
    found = step(tracking(0.0), method, 0.0, 10.0)
    assert int(found.metrics["truncation"]) == 1
    assert float(found.metrics["upper_loss"]) == pytest.approx(0.5 * 7.0**2)


def test_a_nan_on_the_way_is_seen() -> None:
    """At y_2 = 0.75 alone."""
    problem = tb.Problem(
        upper_loss=lambda x, y, batch: (
            tf.where(tf.abs(y - 0.75) < 0.01, float("nan"), y) + 0 * x
        ),
        lower_loss=lambda x, y, batch: 0.5 * (y - x) ** 2,
    )
    method = tb.Unroll(tb.InnerSolver(SGD(0.5), steps=4), end="pessimistic")
    x, y = tf.constant(1.0), tf.constant(0.0)
    found = method.step(problem, x, y, NONE, method.init(problem, x, y))
    assert np.isnan(float(found.metrics["upper_loss"]))
    assert int(found.metrics["truncation"]) == 2


def test_first_order_maml_is_the_gradient_at_the_end() -> None:
    """FOMAML: d_z = f_y(y_T). FO-ITD-BiO: x gets f_x alone."""
    inner = tb.InnerSolver(SGD(T), steps=4)
    found = step(tracking(0.7), tb.Unroll(inner, first_order=True), 0.2, 1.5)
    y = 0.2 + (1 - T) ** 4 * 1.3
    assert float(found.upper_gradient["z"]) == pytest.approx(y - 0.7)
    assert float(found.upper_gradient["x"]) == 0.0
    report = tb.check_hypergradient(
        tracking(0.7),
        tb.Unroll(inner, first_order=True),
        {"x": tf.constant(0.2, tf.float64), "z": tf.constant(1.5, tf.float64)},
        tf.constant(0.0, tf.float64),
        NONE,
    )
    assert report.error < 1e-8


def test_first_order_keeps_the_rate() -> None:
    """y_T = z - r sum g_t: its derivative in r with constant gradients."""
    problem = tb.Problem(
        upper_loss=lambda r, y, batch: 0.5 * (y - 0.7) ** 2,
        lower_loss=lambda r, y, batch: 0.5 * y**2,
    )
    inner = tb.InnerSolver(SGD(0.1), steps=3, learned_rate=lambda r: r)
    method = tb.Unroll(inner, first_order=True)
    r, y = tf.constant(0.3, tf.float64), tf.constant(2.0, tf.float64)
    found = method.step(problem, r, y, NONE, method.init(problem, r, y))
    iterates = [2.0 * 0.7**t for t in range(4)]
    want = (iterates[3] - 0.7) * -sum(iterates[:3])
    assert float(found.upper_gradient) == pytest.approx(want, rel=1e-7)


def test_first_order_equals_second_order_where_the_lower_hessian_is_zero() -> None:
    problem = tb.Problem(
        upper_loss=lambda u, y, batch: 0.5 * (y - 1.0) ** 2 + u["x"] ** 2,
        lower_loss=lambda u, y, batch: (3.0 + 0.0 * u["x"]) * y,
        lower_start=lambda u: u["z"],
    )
    inner = tb.InnerSolver(SGD(T), steps=4)
    first, second = (
        step(problem, tb.Unroll(inner, first_order=value), 0.5, 2.0).upper_gradient
        for value in (True, False)
    )
    for name in ("x", "z"):
        assert float(first[name]) == pytest.approx(float(second[name]), rel=1e-12)


def test_a_first_order_unroll_that_reaches_nothing_says_so() -> None:
    problem = tb.Problem(
        upper_loss=lambda x, y, batch: y**2, lower_loss=lambda x, y, batch: (y - x) ** 2
    )
    method = tb.Unroll(tb.InnerSolver(SGD(T), steps=2), first_order=True)
    x = tf.constant(1.0)
    with pytest.raises(tb.UnconnectedGradientError, match="first-order unroll"):
        method.step(problem, x, x, NONE, method.init(problem, x, x))


def test_skipped_steps_pass_the_adjoint_on_or_stop_it() -> None:
    inner = tb.InnerSolver(SGD(T), steps=6)
    y = 0.2 + (1 - T) ** 6 * 1.3
    identity = tb.Unroll(inner, last=4, skipped="identity")
    found = step(tracking(0.7), identity, 0.2, 1.5).upper_gradient
    assert float(found["x"]) == pytest.approx((1 - 0.7**4) * (y - 0.7))
    assert float(found["z"]) == pytest.approx(0.7**4 * (y - 0.7))
    # Stopped, nothing would ever move the start: said, not computed as zero.
    message = r"the last 4 steps\) does not depend on the upper variable upper\['z'\]"
    with pytest.raises(tb.UnconnectedGradientError, match=message):
        step(tracking(0.7), tb.Unroll(inner, last=4), 0.2, 1.5)


# Aggregation.


def test_without_weight_on_the_upper_loss_nothing_changes() -> None:
    """alpha -> 0 is the plain unroll."""
    inner = tb.InnerSolver(SGD(T), steps=5)
    plain = step(tracking(0.7), tb.Unroll(inner), 0.2, 1.5)
    tiny = tb.Aggregation(1e-12)
    mixed = step(tracking(0.7), tb.Unroll(inner, aggregate=tiny), 0.2, 1.5)
    for name in ("x", "z"):
        a, b = plain.upper_gradient[name], mixed.upper_gradient[name]
        assert float(a) == pytest.approx(float(b), rel=1e-9)


class Harmonic(tb.Schedule):
    """1 / (2 (t + 1))."""

    def __call__(self, t: tf.Tensor) -> tf.Tensor:
        return 0.5 / (tf.cast(t, tf.float64) + 1.0)


@pytest.mark.parametrize(
    ("aggregation", "weights"),
    [
        (tb.Aggregation(0.5), [(0.5, 0.5)] * 3),
        (tb.Aggregation(0.4, 0.5), [(0.6, 0.4), (0.8, 0.2), (0.9, 0.1)]),
        (tb.Aggregation(Harmonic()), [(1 / 2, 1 / 2), (3 / 4, 1 / 4), (5 / 6, 1 / 6)]),
        # The authors' own code: only the upper weight decays.
        (
            tb.Aggregation(0.4, 0.5, constant_lower=True),
            [(0.6, 0.4), (0.6, 0.2), (0.6, 0.1)],
        ),
    ],
)
def test_aggregation_rules(aggregation, weights) -> None:
    """y <- y - T (w_g (y - x) + w_f (y - target)), unrolled by hand."""
    x, z, target = 0.2, 1.5, 0.7
    y, to_x, to_z = z, 0.0, 1.0
    for w_g, w_f in weights:
        y = y - T * (w_g * (y - x) + w_f * (y - target))
        shrink = 1 - T * (w_g + w_f)
        to_x, to_z = shrink * to_x + T * w_g, shrink * to_z
    inner = tb.InnerSolver(SGD(T), steps=3)
    found = step(tracking(target), tb.Unroll(inner, aggregate=aggregation), x, z)
    assert float(found.lower) == pytest.approx(y, rel=1e-7)
    assert float(found.upper_gradient["x"]) == pytest.approx((y - target) * to_x)
    assert float(found.upper_gradient["z"]) == pytest.approx((y - target) * to_z)


def test_bda_solves_the_counter_example_and_plain_unrolling_does_not() -> None:
    """Liu et al. 2020: y_2 is free in g; x = 1 is right, x = 1/2 is what RHG finds."""
    problem = tb.Problem(
        upper_loss=lambda x, y, batch: 0.5 * (x - y[1]) ** 2 + 0.5 * (y[0] - 1.0) ** 2,
        lower_loss=lambda x, y, batch: 0.5 * y[0] ** 2 - x * y[0] + 0.0 * y[1],
    )
    inner = tb.InnerSolver(SGD(0.5), steps=40, start="cold")
    ends = {}
    for name, aggregate in (("rhg", None), ("bda", tb.Aggregation(0.5, 0.98))):
        result = tb.minimize(
            problem,
            tb.Unroll(inner, aggregate=aggregate),
            tf.constant(0.0, tf.float64),
            tf.zeros([2], tf.float64),
            SGD(0.3),
            NONE,
            steps=300,
        )
        ends[name] = float(result.upper)
    assert ends["rhg"] == pytest.approx(0.5, abs=1e-3)
    assert ends["bda"] == pytest.approx(1.0, abs=0.05)


def test_combinations_that_exclude_each_other() -> None:
    inner = tb.InnerSolver(SGD(T), steps=5)
    with pytest.raises(ValueError, match="exclude each other"):
        tb.Unroll(inner, last=3, end="pessimistic")
    with pytest.raises(ValueError, match="`end` must be one of"):
        tb.Unroll(inner, end="worst")
    with pytest.raises(ValueError, match="`aggregate` must be a tb.Aggregation"):
        tb.Unroll(inner, aggregate=0.5)
    for alpha in (0.0, -0.1, 1.5):
        with pytest.raises(ValueError, match="`alpha` must be above 0"):
            tb.Aggregation(alpha)
    for decay in (0.0, 1.1):
        with pytest.raises(
            ValueError, match="`decay` must be a finite number, above 0"
        ):
            tb.Aggregation(0.5, decay)
    with pytest.raises(ValueError, match="`alpha` must be above 0"):
        tb.Aggregation(tb.LinearRamp(0.5, 3.0, 5))
    with pytest.raises(ValueError, match="decays by itself"):
        tb.Aggregation(Harmonic(), 0.9)
    early = tb.InnerSolver(SGD(T), steps=5, atol=1e-3)
    for build in (tb.Unroll, tb.ForwardUnroll, tb.FiniteDifference):
        with pytest.raises(ValueError, match="`inner.atol` must be None"):
            build(early)
    with pytest.raises(ValueError, match="`radius` must be a finite number, above 0"):
        tb.FiniteDifference(inner, radius=0.0)
    for build in (tb.Implicit, tb.RankOne):
        with pytest.raises(ValueError, match="`inner.atol` must be None"):
            build(early, end="pessimistic")
        with pytest.raises(ValueError, match="`inner.atol` must be None"):
            build(early, aggregate=tb.Aggregation(0.5))
        with pytest.raises(ValueError, match="`end` must be one of"):
            build(inner, end="worst")
    with pytest.raises(ValueError, match="`through` must be 'gradient'"):
        tb.Implicit(inner, tb.Direct(), through="optimizer", end="pessimistic")


# Nesterov's sequence.


def test_accelerated_iterates_are_those_of_the_t_sequence() -> None:
    """Against the recursion by hand, projection included, and its derivative."""
    curvature = np.array([1.0, 0.05])

    def descend(x: float, steps: int) -> np.ndarray:
        y = ahead = np.array([2.0, -1.0])
        t = 1.0
        for _ in range(steps):
            moved = np.minimum(ahead - 0.9 * curvature * (ahead - x), 1.5)
            after = (1 + np.sqrt(1 + 4 * t * t)) / 2
            ahead = moved + (t - 1) / after * (moved - y)
            y, t = moved, after
        return y

    problem = tb.Problem(
        upper_loss=lambda x, y, batch: tf.reduce_sum(y * [1.0, 2.0]),
        lower_loss=lambda x, y, batch: 0.5 * tf.reduce_sum(curvature * (y - x) ** 2),
        project_lower=lambda y: tf.minimum(y, tf.constant(1.5, tf.float64)),
    )
    inner = tb.InnerSolver(SGD(0.9), steps=7, accelerated=True)
    x, y = tf.constant(0.3, tf.float64), tf.constant([2.0, -1.0], tf.float64)
    for method in (tb.Unroll(inner), tb.Unroll(inner, memory="checkpoint")):
        found = method.step(problem, x, y, NONE, method.init(problem, x, y))
        np.testing.assert_allclose(found.lower, descend(0.3, 7), rtol=1e-7)
        h = 1e-6
        slope = (descend(0.3 + h, 7) - descend(0.3 - h, 7)) / (2 * h)
        want = slope @ np.array([1.0, 2.0])
        assert float(found.upper_gradient) == pytest.approx(want, rel=1e-6)


def test_accelerated_state_is_carried() -> None:
    """Ten steps in two halves equal ten steps."""
    problem = tb.Problem(
        lambda x, y, batch: tf.reduce_sum(y) + x, lambda x, y, batch: tf.reduce_sum(
            tf.constant([1.0, 0.1], tf.float64) * (y - x) ** 2
        )
    )  # fmt: skip
    x, y = tf.constant(0.3, tf.float64), tf.constant([2.0, -1.0], tf.float64)
    whole = tb.InnerSolver(SGD(0.3), 10, accelerated=True)
    half = tb.InnerSolver(SGD(0.3), 5, accelerated=True, optimizer_state="carry")
    here = problem.prepared(x, NONE)
    at_once, _, _ = whole.solve(here, y, whole.init(problem, x, y))
    state = half.init(problem, x, y)
    for _ in range(2):
        y, state, _ = half.solve(here, y, state)
    np.testing.assert_allclose(y, at_once, rtol=1e-12)
