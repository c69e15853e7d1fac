"""PersistentES: its steps against NumPy, and its expectation without any sampling."""

import copy
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from suites import fast_where
from test_recursions import STEPS, UPPER_RATE, Slices, assert_follows
from test_stochastic import PROBLEM, SGD, TARGET, X, Y

import tfbilevel as tb

NO_DATA = tb.Batches(None, None)
PAIRS, SCALE, WINDOW, WINDOWS = 2, 0.3, 2, 2


def learned(x: Any, t: Any) -> Any:
    """A rate of x and of the inner step."""
    return 0.2 * tf.exp(0.3 * x[0]) / (1 + tf.cast(t, x.dtype))


def schedule(end: str, **options: Any) -> tb.PersistentES:
    inner = tb.InnerSolver(
        SGD(9.0, momentum=0.5), WINDOW, start="cold", learned_rate=learned, **options
    )
    return tb.PersistentES(inner, WINDOW * WINDOWS, PAIRS, SCALE, end, seed=7)


def particles(end: str) -> Any:
    """Five particles of two windows, then two windows, then one."""

    def steps() -> Any:
        x, lasts = X, np.zeros(PAIRS)
        ys: list = []
        vs: list = []
        s = np.zeros([PAIRS, 2])
        for k in range(STEPS):
            at, window = Slices(k), k % WINDOWS
            e = SCALE * np.array(
                tf.random.stateless_normal([PAIRS, 2], [7, k], dtype=tf.float64)
            )
            if window == 0:
                ys, vs = [Y] * (2 * PAIRS + 1), [np.zeros(3)] * (2 * PAIRS + 1)
                s, lasts = np.zeros([PAIRS, 2]), np.zeros(PAIRS)
            xs, f = [*(x + e), *(x - e), x], []
            for i, x_i in enumerate(xs):
                for draw in range(WINDOW):
                    t = WINDOW * window + draw
                    rate = 0.2 * np.exp(0.3 * x_i[0]) / (1 + t)
                    vs[i] = 0.5 * vs[i] - rate * at.g_y(draw, x_i, ys[i])
                    ys[i] = ys[i] + vs[i]
                f.append(0.5 * np.sum((ys[i] - TARGET) ** 2) + np.sum(x_i**2))
            s = s + e
            now = (np.array(f[:PAIRS]) - np.array(f[PAIRS:-1])) / 2
            used = WINDOWS * (now - lasts) if end == "final" else now
            lasts = now
            x = x - UPPER_RATE * np.mean(s * used[:, None], axis=0) / SCALE**2
            yield x, ys[-1]

    return steps


@pytest.mark.parametrize("end", fast_where("final".__eq__, ["final", "mean"]))
def test_steps_are_those_of_the_paper(end: str) -> None:
    """Slots and y go on within a horizon, and begin again after it."""
    assert_follows(schedule(end), particles(end))


def with_noise(method: tb.PersistentES, noise: Any, name: Any = None) -> Any:
    """The method with this noise, [windows, pairs, ...], of x or of x[name]."""

    def of_window(upper: Any, step: tf.Tensor) -> Any:
        row = tf.gather(noise, step)
        return row if name is None else {name: row}

    made = copy.copy(method)
    object.__setattr__(made, "_noise", of_window)
    return made


def follow(problem: tb.Problem, method: Any, x: Any, y: Any, steps: int) -> list:
    """The steps at a constant x, with y and the state handed on."""
    state, made = method.init(problem, x, y), []
    step = tf.function(
        lambda y, state: problem.step(method, x, y, NO_DATA, state), autograph=False
    )
    for _ in range(steps):
        made.append(step(y, state))
        y, state = made[-1].lower, made[-1].state
    return made


@pytest.mark.slow
@pytest.mark.parametrize("end", ["final", "mean"])
def test_the_expectation_is_the_gradient_of_the_smoothed_loss(end: str) -> None:
    """A learned rate x: y <- (1 - x h) y, two steps in each of three windows.

    f_w = y0^2 / 2 prod_{j <= w} (1 - (x + e_j) h)^4, a polynomial of degree 5 in every
    e_j with the factor s, so three Gauss-Hermite nodes are exact. The e_j are
    independent: E f_w is a power of one mean, whose derivative is below.
    """
    h, x, y0, windows = 0.7, 0.4, 1.3, 3
    a, h2, s2 = 1 - x * h, h**2, SCALE**2
    mean = a**4 + 6 * a**2 * h2 * s2 + 3 * h2**2 * s2**2
    slope = -h * (4 * a**3 + 12 * a * h2 * s2)
    wanted = [
        0.5 * y0**2 * (w + 1) * mean**w * slope for w in range(windows)
    ]  # gradients of E f_w
    truncated = [0.5 * y0**2 * mean**w * slope for w in range(windows)]

    problem = tb.Problem(
        upper_loss=lambda x, y, batch: 0.5 * y**2,
        lower_loss=lambda x, y, batch: 0.5 * h * y**2,
    )
    inner = tb.InnerSolver(SGD(9.0), 2, start="cold", learned_rate=lambda x: x)
    method = tb.PersistentES(inner, 2 * windows, 1, SCALE, end)
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    choices = np.stack(np.meshgrid(*[range(3)] * windows, indexing="ij"), -1)
    choices = choices.reshape(-1, windows)
    weights = np.prod((weights / weights.sum())[choices], axis=1)

    @tf.function(autograph=False)
    def every(noise: tf.Tensor) -> Any:
        def one(e: tf.Tensor) -> Any:
            x, y = tf.constant(0.4, tf.float64), tf.constant(y0, tf.float64)
            made = follow(problem, with_noise(method, e[:, None]), x, y, windows)
            short = [e[w] * s.state["difference"][0] for w, s in enumerate(made)]
            return tf.stack([s.upper_gradient for s in made]), tf.stack(short) / s2

        return tf.map_fn(one, noise, fn_output_signature=(noise.dtype,) * 2)

    found, short = every(tf.constant(SCALE * nodes[choices]))
    found = weights @ found.numpy()
    if end == "final":
        np.testing.assert_allclose(found.mean(), wanted[-1], rtol=1e-10)
        wanted = windows * np.diff([0.0, *wanted])
    np.testing.assert_allclose(found, wanted, rtol=1e-10)
    # One window's own noise gives a share of it: the bias of what is truncated.
    np.testing.assert_allclose(weights @ short.numpy(), truncated, rtol=1e-10)


SIZE, COUPLING, STEPS_OF_CHAIN = 12, 0.45, 40
CHAIN = COUPLING * (np.eye(SIZE, k=1) + np.eye(SIZE, k=-1))
PUSH = np.where(np.arange(SIZE) < 1, 1.0, -1.0)


def balance() -> tb.Problem:
    """The paper's kind of toy: y <- CHAIN y + x PUSH. The entry that f reads is pushed
    up, all others down, and after some steps these count more."""
    matrix, push = tf.constant(np.eye(SIZE) - CHAIN), tf.constant(PUSH)

    def lower_loss(x: Any, y: Any, batch: Any) -> Any:
        curved = tf.reduce_sum(y * tf.linalg.matvec(matrix, y))
        return 0.5 * curved - x * tf.reduce_sum(push * y)

    return tb.Problem(lambda x, y, batch: 0.5 * (y[0] - 1.0) ** 2, lower_loss)


@pytest.mark.slow
def test_short_windows_have_the_wrong_sign_and_this_has_not() -> None:
    """Noise e_i = scale sqrt(W) in window i of pair i alone: the second moments are
    those of independent noise, and f is quadratic, so the mean is the expectation."""
    windows, x = STEPS_OF_CHAIN // 2, -0.2
    problem = balance()
    inner = tb.InnerSolver(SGD(1.0), 2, start="cold")
    method = tb.PersistentES(inner, STEPS_OF_CHAIN, windows, SCALE, "mean")
    noise = SCALE * np.sqrt(windows) * np.eye(windows)
    start = tf.zeros([SIZE], tf.float64)
    known = with_noise(method, tf.constant(noise))
    made = follow(problem, known, tf.constant(x, tf.float64), start, windows)
    unit, exact = np.zeros(SIZE), []  # y = x unit
    short = PUSH[0] + (CHAIN @ PUSH)[0]  # of two steps from a constant y
    for t in range(STEPS_OF_CHAIN):
        unit = CHAIN @ unit + PUSH
        if t % 2:
            exact.append((x * unit[0] - 1) * unit[0])
    found = np.array([step.upper_gradient for step in made])
    np.testing.assert_allclose(found, exact, rtol=1e-9)
    np.testing.assert_allclose(made[-1].lower, x * unit, rtol=1e-12)

    one_window = (x * unit[0] - 1) * short
    assert exact[-1] > 0.1 and one_window < -0.1
    last = noise[-1] @ made[-1].state["difference"].numpy() / windows / SCALE**2
    assert last == pytest.approx(one_window)  # ES with the noise of one window
    warm = tb.Unroll(tb.InnerSolver(SGD(1.0), 2))
    step = problem.step(
        warm,
        tf.constant(x, tf.float64),
        made[-2].lower,
        NO_DATA,
        warm.init(problem, x, start),
    )
    assert float(step.upper_gradient) == pytest.approx(one_window)


@pytest.mark.parametrize("mapping", ["vectorized", "sequential"])
@pytest.mark.slow
def test_learned_starts_convolutions_and_both_mappings(
    mapping: str, monkeypatch: Any
) -> None:
    """A start that is x itself: all of f passes through it. XLA gives the same."""
    calls = []
    name = {"vectorized": "map_tasks", "sequential": "map_sequentially"}[mapping]
    module = tb.PersistentES.step.__globals__
    used = module[name]
    monkeypatch.setitem(module, name, lambda *a: (calls.append(1), used(*a))[1])
    extra = [1, 1] if mapping == "sequential" else []

    def spread(x: Any) -> Any:
        return tf.reshape(x["start"], [*extra, 2, 1])

    problem = tb.Problem(
        lambda x, y, batch: tf.reduce_sum((y - 1.0) ** 2),
        lambda x, y, batch: 0.5 * tf.reduce_sum(y**2),
        lower_start=spread,
    )
    inner = tb.InnerSolver(SGD(0.25), 2, start="cold", accelerated=True)
    e = SCALE * np.random.default_rng(0).normal(size=[3, 2]).astype("float32")
    method = tb.PersistentES(inner, 4, 3, SCALE, "final")
    method = with_noise(method, tf.constant(np.stack([e, -2 * e])), "start")
    x = {"start": tf.constant([0.5, -0.3])}
    y = spread(x)
    plain = follow(problem, method, x, y, 2)
    assert calls
    if mapping == "vectorized":
        xla = tf.function(
            lambda: follow(problem, method, x, y, 2), autograph=False, jit_compile=True
        )
        for a, b in zip(plain, xla(), strict=True):
            for u, v in zip(tf.nest.flatten(a), tf.nest.flatten(b), strict=True):
                np.testing.assert_allclose(u, v, rtol=2e-5, atol=1e-6)
    # Two accelerated steps from y_0 = x: y_1 = 3/4 y_0, u_1 = y_1 (s_0 = 1).
    ends = [(0.75**2 * (np.array([0.5, -0.3]) + sign * e) - 1) ** 2 for sign in (1, -1)]
    half = (ends[0].sum(1) - ends[1].sum(1)) / 2
    want = 2 * np.mean(e * half[:, None], axis=0) / SCALE**2
    np.testing.assert_allclose(plain[0].upper_gradient["start"], want, rtol=1e-4)


@pytest.mark.slow
def test_all_particles_have_the_same_samples() -> None:
    """f = x n with noise n: the difference of a pair is n e, and f is n at x = 1."""
    problem = tb.Problem(
        lambda x, y, batch: x * tf.random.normal([], dtype=x.dtype) + 0 * y,
        lambda x, y, batch: y**2 * tf.random.uniform([], dtype=y.dtype),
    )
    noise = np.array([[0.3, -0.7, 0.2]])
    inner = tb.InnerSolver(SGD(0.1), 2, start="cold")
    method = with_noise(tb.PersistentES(inner, 2, 3, SCALE), tf.constant(noise))
    one = tf.constant(1.0, tf.float64)
    (made,) = follow(problem, method, one, one, 1)
    want = made.metrics["upper_loss"] * np.mean(noise**2) / SCALE**2
    np.testing.assert_allclose(made.upper_gradient, want, rtol=1e-10)


@pytest.mark.slow
def test_it_takes_no_second_derivatives() -> None:
    @tf.custom_gradient
    def square(y: Any) -> Any:
        def first(upstream: Any) -> Any:
            @tf.custom_gradient
            def slope(y: Any) -> Any:
                def second(*_: Any) -> Any:
                    raise AssertionError("a second derivative")

                return 2 * y, second

            return upstream * slope(y)

        return y**2, first

    problem = tb.Problem(
        lambda x, y, batch: (y - 1.0) ** 2, lambda x, y, batch: square(y) - x * y
    )
    x, y = tf.constant(0.3), tf.constant(0.1)
    made = follow(problem, schedule_free(), x, y, 1)
    assert np.isfinite(float(made[0].upper_gradient))
    with pytest.raises(AssertionError, match="a second derivative"):
        follow(problem, tb.Unroll(tb.InnerSolver(SGD(0.1), 2)), x, y, 1)


def schedule_free(**options: Any) -> tb.PersistentES:
    inner = tb.InnerSolver(SGD(0.1), 2, start="cold")
    return tb.PersistentES(inner, 4, **options)


@pytest.mark.slow
def test_a_run_is_saved_and_resumed(tmp_path: Any) -> None:
    """In the midst of a horizon: particles, noise and slots are part of the weights."""

    def build() -> tb.BilevelModel:
        keras.utils.set_random_seed(0)
        upper = tb.ExampleWeights(2)
        lower = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])

        def loss(network: Any, batch: Any) -> Any:
            return tf.reduce_mean((network(batch[0]) - batch[1]) ** 2)

        model = tb.BilevelModel(
            upper, lower, lambda u, v, b: loss(v, b), lambda u, v, b: loss(v, b)
        )
        inner = tb.InnerSolver(
            SGD(9.0, momentum=0.5),
            2,
            start="cold",
            learned_rate=lambda u, t: tf.exp(
                u.weights[0][0] - 3.0 - tf.cast(t, tf.float32) * 0.1
            ),
        )
        model.compile(tb.PersistentES(inner, 6), SGD(0.01), jit_compile=False)
        return model

    generator = np.random.default_rng(0)
    batch = generator.normal(size=(5, 5, 2)).astype("float32"), np.ones([5, 5, 1], "f4")
    dataset = tf.data.Dataset.from_tensor_slices(tb.Batches(batch, batch))
    model, ends = build(), []
    model.fit(dataset.take(2), verbose=0)
    model.save_weights(str(tmp_path / "run.weights.h5"))
    for _ in range(2):
        model.load_weights(str(tmp_path / "run.weights.h5"))
        begun = model.get_weights()
        model.fit(dataset.skip(2), verbose=0)
        ends.append(model.get_weights())
    assert min(np.abs(a - b).max() for a, b in zip(begun[:3], ends[0], strict=False))
    for a, b in zip(*ends, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


INNER = tb.InnerSolver(SGD(0.1), 2, start="cold")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inner": None}, "`inner` must be a tb.InnerSolver"),
        ({"inner": tb.InnerSolver(SGD(0.1), 2)}, "`inner.start` must be 'cold'"),
        (
            {"inner": tb.InnerSolver(SGD(0.1), 2, "cold", optimizer_state="carry")},
            "`inner.optimizer_state` must be 'reset'",
        ),
        (
            {"inner": tb.InnerSolver(SGD(0.1), 2, "cold", tb.Constant(0.1))},
            "`inner.learning_rate` must be None",
        ),
        ({"inner": tb.InnerSolver(SGD(0.1), 2, "cold", atol=0.1)}, "`inner.atol` must"),
        ({"horizon": 5}, "`horizon` must be a multiple of `inner.steps`"),
        ({"horizon": 0}, "`horizon` must be"),
        ({"pairs": 0}, "`pairs` must be"),
        ({"scale": 0.0}, "`scale` must be"),
        ({"end": "pessimistic"}, "`end` must be one of"),
        ({"seed": -1}, "`seed` must be"),
    ],
)
def test_ranges(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message + r"(.|\n)*Received: "):
        tb.PersistentES(**{"inner": INNER, "horizon": 4, **arguments})


def test_tasks_are_refused() -> None:
    method = tb.PersistentES(INNER, 4)
    with pytest.raises(ValueError, match="PersistentES takes no tasks.*Received: "):
        method.init(tb.over_tasks(PROBLEM), tf.constant(X), tf.constant(Y[None]))
