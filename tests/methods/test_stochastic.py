"""StocBiO, BSA and TTSA against NumPy, draw by draw; divergence that is reported."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbilevel as tb

SGD = keras.optimizers.SGD
SIZE, DRAWS = 3, 9
generator = np.random.default_rng(0)


def spd(low: float, high: float) -> np.ndarray:
    basis, _ = np.linalg.qr(generator.normal(size=(SIZE, SIZE)))
    return basis @ np.diag(np.linspace(low, high, SIZE)) @ basis.T


# One Hessian, one coupling and one offset per draw.
HESSIANS = np.stack([spd(0.5, 1.5) for _ in range(DRAWS)])
COUPLINGS = generator.normal(size=(DRAWS, SIZE, 2))
TARGET = generator.normal(size=SIZE)
X, Y = generator.normal(size=2), generator.normal(size=SIZE)
BATCHES = tb.StackedBatches(
    upper=tf.constant(TARGET), lower=(tf.constant(HESSIANS), tf.constant(COUPLINGS))
)


def lower_loss(x, y, batch):
    hessian, coupling = batch
    linear = tf.linalg.matvec(coupling, x)
    return 0.5 * tf.reduce_sum(y * tf.linalg.matvec(hessian, y)) - tf.reduce_sum(
        linear * y
    )


PROBLEM = tb.Problem(
    upper_loss=lambda x, y, batch: (
        0.5 * tf.reduce_sum((y - batch) ** 2) + tf.reduce_sum(x**2)
    ),
    lower_loss=lower_loss,
)


def descend(y: np.ndarray, rate: float, steps: int) -> np.ndarray:
    for t in range(steps):
        y = y - rate * (HESSIANS[t] @ y - COUPLINGS[t] @ X)
    return y


def hypergradient(y: np.ndarray, v: np.ndarray, draw: int) -> np.ndarray:
    """f_x - g_xy v; g_xy of draw j is minus the transposed coupling."""
    return 2 * X + COUPLINGS[draw].T @ v


def run(method: tb.Method, state=None, batches=BATCHES) -> tb.Step:
    x, y = tf.constant(X), tf.constant(Y)
    if state is None:
        state = method.init(PROBLEM, x, y)
    return method.step(PROBLEM, x, y, batches, state)


@pytest.mark.parametrize("factors", ["fresh", "shared"])
def test_stocbio_takes_every_draw_once(factors: str) -> None:
    """v = eta sum_{j <= Q} prod (I - eta H_j) f_y: inner steps on draws 0 to 3,
    factors on the next ones, the mixed product on the one after."""
    inner = tb.InnerSolver(SGD(0.3), steps=4)
    method = tb.StocBiO(inner, terms=3, rate=0.4, factors=factors)
    y = descend(Y, 0.3, 4)
    term = total = y - TARGET
    for j in range(3):
        draw = 4 + (j if factors == "fresh" else 0)
        term = term - 0.4 * HESSIANS[draw] @ term
        total = total + term
    last = 7 if factors == "fresh" else 5
    assert method.draws == last + 1
    found = run(method)
    np.testing.assert_allclose(found.lower, y, rtol=1e-7)
    want = hypergradient(y, 0.4 * total, last)
    np.testing.assert_allclose(found.upper_gradient, want, rtol=1e-7)
    growth = np.linalg.norm(term) / np.linalg.norm(y - TARGET)
    assert float(found.metrics["growth"]) == pytest.approx(growth, rel=1e-7)
    assert float(found.metrics["diverged"]) == 0.0


def test_d13_stocbio_tends_to_the_inverse_and_the_published_helper_does_not() -> None:
    """v -> H^{-1} f_y as Q grows. With eta on the last term only (the published
    helper, peers.md D13) it would tend to about H^{-1} f_y / eta - f_y."""
    one = tb.Batches(BATCHES.upper, tf.nest.map_structure(lambda a: a[0], BATCHES[1]))
    inner = tb.InnerSolver(SGD(0.3), steps=1)
    found = run(tb.StocBiO(inner, terms=400, rate=0.4), batches=one)
    y = descend(Y, 0.3, 1)
    v = np.linalg.solve(HESSIANS[0], y - TARGET)
    want = hypergradient(y, v, 0)
    np.testing.assert_allclose(found.upper_gradient, want, rtol=1e-7)
    legacy = hypergradient(y, v / 0.4 - (y - TARGET), 0)
    assert np.linalg.norm(legacy - want) > 0.1 * np.linalg.norm(want)


def test_draws_beyond_the_last_slice_begin_again() -> None:
    few = tb.StackedBatches(
        BATCHES.upper, tf.nest.map_structure(lambda a: a[:4], BATCHES.lower)
    )
    inner = tb.InnerSolver(SGD(0.3), steps=4)
    found = run(tb.StocBiO(inner, terms=1, rate=0.4), batches=few)
    y = descend(Y, 0.3, 4)
    term = y - TARGET
    total = 2 * term - 0.4 * HESSIANS[0] @ term  # draw 4 is draw 0
    want = hypergradient(y, 0.4 * total, 1)
    np.testing.assert_allclose(found.upper_gradient, want, rtol=1e-7)


def test_bsa_averages_to_the_series() -> None:
    """Every length p has its product, each length comes up, and the mean over p is
    the Neumann series with Q terms."""
    terms = 3
    one = tb.Batches(BATCHES.upper, tf.nest.map_structure(lambda a: a[0], BATCHES[1]))
    method = tb.BSA(tb.InnerSolver(SGD(0.3), steps=1), max_steps=terms, rate=0.4)
    y = descend(Y, 0.3, 1)
    term, products = y - TARGET, []
    for _ in range(terms):
        products.append(hypergradient(y, terms * 0.4 * term, 0))
        term = term - 0.4 * HESSIANS[0] @ term
    step = tf.function(lambda s: run(method, s, one), autograph=False)
    state, counts = method.init(PROBLEM, tf.constant(X), tf.constant(Y)), [0] * terms
    for _ in range(300):
        found = step(state)
        state = found.state
        errors = [np.abs(found.upper_gradient - p).max() for p in products]
        assert min(errors) < 1e-6
        counts[int(np.argmin(errors))] += 1
    # Binomial with mean 100 and deviation 8.2.
    assert min(counts) > 60 and max(counts) < 140
    v = 0.4 * sum(
        np.linalg.matrix_power(np.eye(SIZE) - 0.4 * HESSIANS[0], j) @ (y - TARGET)
        for j in range(terms)
    )
    np.testing.assert_allclose(np.mean(products, 0), hypergradient(y, v, 0), rtol=1e-9)


def test_bsa_draws_differ_with_the_seed() -> None:
    inner = tb.InnerSolver(SGD(0.3), steps=1)
    gradients = {
        tuple(run(tb.BSA(inner, 4, 0.4, seed=seed)).upper_gradient.numpy())
        for seed in range(12)
    }
    assert len(gradients) == 4


def test_ttsa_moves_on_two_time_scales() -> None:
    method = tb.TTSA(SGD(0.3), max_steps=1, rate=0.4)
    assert method.draws == 2
    state = method.init(PROBLEM, tf.constant(X), tf.constant(Y))
    for k in range(3):
        found = run(method, state)
        state = found.state
        y = Y - 0.3 * (k + 1) ** -0.4 * (HESSIANS[0] @ Y - COUPLINGS[0] @ X)
        np.testing.assert_allclose(found.lower, y, rtol=1e-7)
        want = hypergradient(y, 0.4 * (y - TARGET), 1)
        np.testing.assert_allclose(found.upper_gradient, want, rtol=1e-7)
        assert float(found.upper_scale) == pytest.approx((k + 1) ** -0.6)


@pytest.mark.parametrize("level, power", [("upper", 0.6), ("lower", 0.4)])
@pytest.mark.parametrize("dtype", [tf.float32, tf.float64])
def test_ttsa_slows_every_optimizer_down(level: str, power: float, dtype: Any) -> None:
    """Adam's steps for a constant gradient are all of its rate."""
    problem = tb.Problem(
        upper_loss=lambda x, y, batch: x + y,
        lower_loss=lambda x, y, batch: y + 0.0 * x * y,
    )
    zero = tf.constant(0.0, dtype)
    result = tb.minimize(
        problem,
        tb.TTSA(keras.optimizers.Adam(0.1, epsilon=1e-12), max_steps=1, rate=0.5),
        zero,
        zero,
        keras.optimizers.Adam(0.1, epsilon=1e-12),
        tb.Batches(None, None),
        steps=4,
        trace=lambda point: getattr(point, level),
    )
    moved = -np.diff(np.concatenate([[0.0], result.trace.numpy()]))
    np.testing.assert_allclose(moved, 0.1 * np.arange(1.0, 5.0) ** -power, rtol=1e-4)


@pytest.mark.parametrize(
    "build",
    [
        lambda rate: tb.StocBiO(tb.InnerSolver(SGD(0.3), 2), 30, rate, "shared"),
        lambda rate: tb.Implicit(tb.InnerSolver(SGD(0.3), 2), tb.Neumann(30, rate)),
        lambda rate: tb.Implicit(tb.InnerSolver(SGD(0.3), 2), tb.FixedPoint(30, rate)),
    ],
    ids=["stocbio", "neumann", "fixed-point"],
)
def test_too_large_an_eta_is_reported(build) -> None:
    """Largest eigenvalue 1.5: 2 / 1.5 is the limit."""
    for rate, diverged in ((1.2, 0.0), (1.5, 1.0)):
        found = run(build(rate))
        assert float(found.metrics["diverged"]) == diverged


@pytest.mark.slow
def test_minimize_and_fit_warn_of_a_diverging_solve(recwarn) -> None:
    bad = tb.StocBiO(tb.InnerSolver(SGD(0.3), 2), 30, 1.5, "shared")
    good = tb.StocBiO(tb.InnerSolver(SGD(0.3), 2), 30, 0.4, "shared")

    def solve(method: tb.Method) -> None:
        tb.minimize(PROBLEM, method, X, Y, SGD(1e-9), BATCHES, steps=3)

    solve(good)
    assert not [w for w in recwarn if w.category is tb.DivergenceWarning]
    with pytest.warns(tb.DivergenceWarning, match="StocBiO diverged at outer step 0"):
        solve(bad)
    network = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])

    def errors(lower, batch):
        return tf.square(lower(batch[0])[:, 0] - batch[1])

    model = tb.BilevelModel(
        tb.ExampleWeights(4),
        network,
        lambda upper, lower, batch: tf.reduce_mean(errors(lower, batch)),
        lambda upper, lower, batch: tf.reduce_mean(upper(None) * errors(lower, batch)),
    )
    data = tf.data.Dataset.from_tensors((tf.ones([4, 2]), tf.zeros([4])))
    model.compile(tb.StocBiO(tb.InnerSolver(SGD(0.01), 1), 20, 5.0), SGD(1e-6))
    with pytest.warns(tb.DivergenceWarning) as caught:
        history = model.fit(tb.pair(data, data).repeat(4), epochs=2, verbose=0)
    assert len(caught) == 1  # once, not at every step
    assert history.history["diverged"] == [1.0, 1.0]


def test_ranges() -> None:
    inner = tb.InnerSolver(SGD(0.3), 2)
    for kind, name in ((tb.StocBiO, "terms"), (tb.BSA, "max_steps")):
        with pytest.raises(ValueError, match=f"`{name}` must be an integer"):
            kind(inner, 0)
        for rate in (0.0, -1.0, float("nan")):
            with pytest.raises(
                ValueError, match=r"`rate` must be a finite number, above 0 \(eta\)"
            ):
                kind(inner, 3, rate)
    with pytest.raises(ValueError, match="`factors` must be one of"):
        tb.StocBiO(inner, factors="new")
    with pytest.raises(ValueError, match="`lower_power` and `upper_power`"):
        tb.TTSA(SGD(0.1), lower_power=0.7, upper_power=0.3)
    with pytest.raises(ValueError, match="`lower_power` must be a finite number"):
        tb.TTSA(SGD(0.1), lower_power="0.4")
    with pytest.raises(ValueError, match="`seed` must be an integer"):
        tb.TTSA(SGD(0.1), seed=0.5)
    with pytest.raises(ValueError, match="`seed` must be an integer"):
        tb.BSA(tb.InnerSolver(SGD(0.1), 1), seed="a")
