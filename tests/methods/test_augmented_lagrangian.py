"""The augmented Lagrangian: its gradients, its schedule, boxes and several starts."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from problems import ORACLES, flat, unflat

import tfbilevel as tb

SGD = keras.optimizers.SGD
NOTHING = tb.Batches(None, None)


def f_y_matrix(oracle, x):
    """f_y is affine in y: its matrix and its value at 0."""
    zero = np.zeros_like(flat(oracle.y))
    at_zero = oracle.f_y(x, zero)
    columns = [oracle.f_y(x, unit) - at_zero for unit in np.eye(len(zero))]
    return np.stack(columns, axis=1), at_zero


@pytest.mark.parametrize("oracle", ORACLES, ids=lambda oracle: oracle.name)
@pytest.mark.parametrize("rho, nu", [(0.3, 0.0), (7.0, -1.3)])
@pytest.mark.parametrize("lower_weight", [0.0, 0.6])
def test_the_upper_gradient_at_the_minimiser_is_the_implicit_one(
    oracle, rho, nu, lower_weight
):
    """Whatever rho and nu are, up to the bias of lambda g: g_xy H^-1 lambda g_y."""
    x = flat(oracle.x)
    matrix, at_zero = f_y_matrix(oracle, x)
    hessian, linear = oracle.hessian(x), oracle.linear(x)
    # f_y + H (nu + rho g_y) + lambda g_y = 0 with g_y = H y - q, solved for y.
    system = matrix + rho * hessian @ hessian + lower_weight * hessian
    rest = -at_zero - nu * hessian.sum(axis=1)
    rest += rho * hessian @ linear + lower_weight * linear
    y = np.linalg.solve(system, rest)
    exact = oracle.f_x(x, y) - oracle.g_xy(
        x, y, np.linalg.solve(hessian, oracle.f_y(x, y))
    )
    bias = oracle.g_xy(x, y, np.linalg.solve(hessian, lower_weight * oracle.g_y(x, y)))

    upper, _, batches = oracle.at("float64")
    lower = tf.nest.map_structure(
        lambda leaf: tf.constant(leaf, tf.float64), unflat(y, oracle.y)
    )
    method = tb.AugmentedLagrangian(
        SGD(1e-3), 1, weight=rho, lower_weight=lower_weight, initial_multiplier=nu
    )
    state = method.init(oracle.problem, upper, lower)
    step = method.step(oracle.problem, upper, lower, batches, state)
    np.testing.assert_allclose(flat(step.lower), y, rtol=1e-9)  # stationary
    np.testing.assert_allclose(
        flat(step.upper_gradient), exact - bias, rtol=1e-7, atol=1e-9
    )


def small_network():
    """Weights of the examples above, a two-layer network below."""
    generator = np.random.default_rng(2)
    inputs = tf.constant(generator.normal(size=(7, 3)))
    answers = tf.constant(generator.normal(size=(7, 2)))
    check = tf.constant(generator.normal(size=(6, 3)))
    wanted = tf.constant(generator.normal(size=(6, 2)))

    def predict(y, points):
        return tf.tanh(points @ y[0] + y[1]) @ y[2]

    problem = tb.Problem(
        lambda x, y, batch: (
            tf.reduce_mean((predict(y, check) - wanted) ** 2)
            + 0.1 * tf.reduce_sum(x**2)
        ),
        lambda x, y, batch: tf.reduce_mean(
            tf.sigmoid(x) * tf.reduce_sum((predict(y, inputs) - answers) ** 2, axis=1)
        ),
    )
    x = tf.constant(generator.normal(size=7))
    y = [
        tf.constant(generator.normal(size=shape) * 0.5)
        for shape in [(3, 4), (4,), (4, 2)]
    ]
    return problem, x, y


def numeric_gradient(function, at, step=1e-5):
    """Central differences of a scalar function of a nest."""
    vector = flat(at)
    made = np.zeros_like(vector)
    for i in range(len(vector)):
        for sign in (1, -1):
            moved = vector.copy()
            moved[i] += sign * step
            leaves = tf.nest.map_structure(tf.constant, unflat(moved, at))
            made[i] += sign * float(function(leaves)) / (2 * step)
    return made


def g_y_of(problem, x, y):
    """g_y by central differences of g alone."""
    return numeric_gradient(lambda at: problem.lower_loss(x, at, None), y, 1e-4)


@pytest.mark.slow
def test_both_directions_are_those_of_the_objective_on_a_network():
    problem, x, y = small_network()
    rho, lam, nu = 2.5, 0.7, 0.4

    def h(x, y, with_lower):
        g_y = g_y_of(problem, x, y)
        value = float(problem.upper_loss(x, y, None))
        value += nu * g_y.sum() + rho / 2 * g_y @ g_y
        return value + with_lower * lam * float(problem.lower_loss(x, y, None))

    method = tb.AugmentedLagrangian(
        SGD(0.01), 1, weight=rho, lower_weight=lam, initial_multiplier=nu
    )
    step = method.step(problem, x, y, NOTHING, method.init(problem, x, y))
    along = numeric_gradient(lambda at: h(x, at, 1.0), y, 1e-3)
    moved = (flat(y) - flat(step.lower)) / 0.01
    np.testing.assert_allclose(moved, along, rtol=2e-4, atol=2e-5)
    up = numeric_gradient(lambda at: h(at, step.lower, 0.0), x, 1e-3)
    np.testing.assert_allclose(flat(step.upper_gradient), up, rtol=2e-4, atol=2e-5)
    report = tb.check_hypergradient(problem, method, x, y, NOTHING, probes=4)
    assert report.error < 1e-7


def line():
    """f = (y - 1)^2 / 2 + x^2 / 2, g = (y - x)^2 / 2."""
    return tb.Problem(
        lambda x, y, batch: 0.5 * tf.reduce_sum((y - 1.0) ** 2 + x**2),
        lambda x, y, batch: 0.5 * tf.reduce_sum((y - x) ** 2),
    )


def by_hand(x, y, steps, outer, rates, **options):
    """The whole method on `line`, one number per variable; its state at the end."""
    rho, lam, eps, nu = (
        options[k] for k in ("weight", "lower_weight", "atol", "initial_multiplier")
    )
    growth, decay, eps_decay, rate_decay = options["factors"]
    scale, updates, mean = 1.0, 0, None
    for _ in range(outer):
        for _ in range(steps):
            w = nu + rho * (y - x)
            y -= scale * rates[0] * ((y - 1) + w + lam * (y - x))
        w = nu + rho * (y - x)
        d_x, d_y = x - w, (y - 1) + w + lam * (y - x)
        size = d_x**2 + d_y**2
        share = options.get("smoothing", 0.0) if mean is not None else 0.0
        mean = share * (mean or 0.0) + (1 - share) * size
        gap = y - x
        x -= scale * rates[1] * d_x
        if mean < eps**2:
            nu += rho * gap
            rho, lam, eps = rho * growth, lam * decay, eps * eps_decay
            scale *= rate_decay
            updates, mean = updates + 1, None
    return x, y, {
        "weight": rho, "lower_weight": lam, "tolerance": eps, "multiplier": nu,
        "rate_scale": scale,
    }, updates  # fmt: skip


OPTIONS = {
    "weight": 0.8, "lower_weight": 2.0, "atol": 0.9, "initial_multiplier": 0.1,
}  # fmt: skip
FACTORS = (1.25, 0.75, 0.875, 0.9375)
SCHEDULE = tb.PenaltySchedule(
    growth=1.25, decay=0.75, tolerance_decay=0.875, rate_decay=0.9375
)


@pytest.mark.parametrize("smoothing", [0.0, 0.5, 0.9])
def test_schedule_arithmetic(smoothing):
    """Multipliers with the rho of before the update; every factor in its place."""
    options = OPTIONS | {"smoothing": smoothing}
    x, y, want, updates = by_hand(
        2.0, -1.0, 3, 60, (0.1, 0.2), factors=FACTORS, **options
    )
    assert 5 < updates < 55
    method = tb.AugmentedLagrangian(SGD(0.1), 3, schedule=SCHEDULE, **options)
    start = tf.constant(2.0, tf.float64), tf.constant(-1.0, tf.float64)
    result = tb.minimize(line(), method, *start, SGD(0.2), NOTHING, 60)
    state, _ = result.state
    for name, value in want.items():
        assert float(state[name]) == pytest.approx(value, rel=1e-7), name
    assert float(state["weight"]) == pytest.approx(0.8 * 1.25**updates)
    assert float(result.upper) == pytest.approx(x, rel=1e-6)
    assert float(result.lower) == pytest.approx(y, rel=1e-6)


def test_metrics_are_what_the_step_used():
    method = tb.AugmentedLagrangian(SGD(0.1), 1, schedule=SCHEDULE, **OPTIONS)
    x, y = tf.constant(2.0, tf.float64), tf.constant(-1.0, tf.float64)
    step = method.step(line(), x, y, NOTHING, method.init(line(), x, y))
    after, x = float(step.lower), 2.0
    g_y = after - x
    w = 0.1 + 0.8 * g_y
    d_y = (after - 1) + w + 2.0 * g_y
    want = {
        "upper_loss": 0.5 * ((after - 1) ** 2 + x**2),
        "lower_loss": 0.5 * g_y**2,
        "stationarity": abs(g_y),
        "penalty": 0.4 * g_y**2,
        "multiplier_term": 0.1 * g_y,
        "kkt_residual": np.hypot(x - w, d_y),
        "weight": 0.8,
        "lower_weight": 2.0,
        "tolerance": 0.9,
        "rate_scale": 1.0,
    }
    assert set(step.metrics) == set(want)
    for name, value in want.items():
        assert float(step.metrics[name]) == pytest.approx(value), name


def test_the_schedule_moves_at_an_active_bound():
    """x >= 1.5 is active: d_x never vanishes there, the projected gradient does."""
    problem = tb.Problem(
        line().upper_loss,
        line().lower_loss,
        project_upper=lambda x: tf.maximum(x, 1.5),
    )
    method = tb.AugmentedLagrangian(
        SGD(0.1), 5, atol=0.5, schedule=tb.PenaltySchedule(rate_decay=1.0)
    )
    start = tf.constant(2.0, tf.float64), tf.constant(0.0, tf.float64)
    result = tb.minimize(problem, method, *start, SGD(0.1), NOTHING, 300)
    assert float(result.upper) == 1.5
    assert float(result.lower) == pytest.approx(1.5, abs=1e-3)
    assert float(result.state[0]["weight"]) > 100


def test_the_schedule_moves_at_an_active_lower_bound():
    """y <= 0.3 is active: d_y never vanishes there, the projected gradient does."""
    problem = tb.Problem(
        line().upper_loss,
        line().lower_loss,
        project_lower=lambda y: tf.minimum(y, 0.3),
    )
    method = tb.AugmentedLagrangian(
        SGD(0.05),
        5,
        weight=1.0,
        atol=0.05,
        schedule=tb.PenaltySchedule(growth=1.001, rate_decay=1.0),
    )
    start = tf.constant(2.0, tf.float64), tf.constant(0.0, tf.float64)
    result = tb.minimize(problem, method, *start, SGD(0.05), NOTHING, 600)
    assert float(result.lower) == 0.3
    state = result.state[0]
    x, rho, nu = float(result.upper), float(state["weight"]), float(state["multiplier"])
    # d_y = y - 1 + lambda (y - x) + nu + rho (y - x) is not small.
    factor = float(state["lower_weight"]) + rho
    assert abs(0.3 - 1 + factor * (0.3 - x) + nu) > 0.2
    assert rho > 1.05


@pytest.mark.parametrize("kind", [SGD, keras.optimizers.Adam])
def test_boxes_hold_at_every_step(kind):
    box = {"project_upper": 0.4, "project_lower": 0.3}
    problem = tb.Problem(
        line().upper_loss,
        line().lower_loss,
        **{
            name: lambda z, c=bound: tf.clip_by_value(z, -c, c)
            for name, bound in box.items()
        },
    )
    method = tb.AugmentedLagrangian(kind(0.3), 4)
    start = tf.constant([0.2, -0.4]), tf.constant([0.3, 0.0])
    result = tb.minimize(
        problem,
        method,
        *start,
        kind(0.3),
        NOTHING,
        40,
        trace=lambda point: (point.upper, point.lower),
    )
    upper, lower = (np.abs(leaf) for leaf in result.trace)
    assert upper.max() <= np.float32(0.4) and lower.max() <= np.float32(0.3)
    assert lower.max() == np.float32(0.3)  # the bound was reached


def test_starts_are_problems_of_their_own():
    """Three starts in one run: the schedules, the points and the rates of three."""
    points = np.array([[2.0, -1.0], [0.4, 0.3], [-3.0, 5.0]])

    def run(x, y, **options):
        method = tb.AugmentedLagrangian(
            keras.optimizers.Adam(0.05), 3, **OPTIONS, **options
        )
        x, y = tf.constant(x), {"y": tf.constant(y)}
        problem = tb.Problem(
            lambda x, y, batch: line().upper_loss(x, y["y"], batch),
            lambda x, y, batch: line().lower_loss(x, y["y"], batch),
        )
        rate = keras.optimizers.Adam(0.1)
        result = tb.minimize(problem, method, x, y, rate, NOTHING, 80)
        return result.upper, result.lower["y"], result.state[0]

    together = run(points[:, :1], points[:, 1:], independent_starts=3)
    alone = [run(point[:1], point[1:]) for point in points]
    weights = together[2]["weight"].numpy()
    assert len(set(weights)) > 1  # they did not move together
    for i, (x, y, state) in enumerate(alone):
        np.testing.assert_allclose(together[0][i], x, rtol=1e-9)
        np.testing.assert_allclose(together[1][i], y, rtol=1e-9)
        for name in ("weight", "lower_weight", "tolerance", "rate_scale"):
            np.testing.assert_allclose(together[2][name][i], state[name], rtol=1e-12)
        np.testing.assert_allclose(
            together[2]["multiplier"]["y"][i], state["multiplier"]["y"], rtol=1e-9
        )


@pytest.mark.slow
def test_the_upper_rate_decays_under_every_optimizer_in_fit():
    """A scaled gradient would leave Adam's step as it is."""

    def last_move(rate_decay):
        weights = tb.ExampleWeights(3)
        network = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        network.set_weights([np.ones((2, 1)), np.zeros(1)])

        def squared(network, batch):
            return tf.square(network(batch[0])[:, 0] - batch[1])

        model = tb.BilevelModel(
            weights,
            network,
            lambda upper, lower, batch: tf.reduce_mean(squared(lower, batch)),
            lambda upper, lower, batch: tf.reduce_mean(
                upper(None) * squared(lower, batch)
            ),
        )
        method = tb.AugmentedLagrangian(
            SGD(1e-6),
            1,
            atol=1e6,
            schedule=tb.PenaltySchedule(tolerance_decay=1.0, rate_decay=rate_decay),
        )
        model.compile(method, keras.optimizers.Adam(0.1), jit_compile=False)
        generator = np.random.default_rng(0)
        data = tf.data.Dataset.from_tensors(
            (generator.normal(size=(3, 2)), generator.normal(size=3))
        ).map(lambda *batch: tuple(tf.cast(part, tf.float32) for part in batch))
        batches = tb.pair(data, data)
        for _ in range(4):
            before = weights.logits.numpy()
            model.fit(batches, verbose=0)
        return weights.logits.numpy() - before

    # The gradient hardly changes, so Adam's move is its rate: 0.1 and 0.1 / 8.
    np.testing.assert_allclose(np.abs(last_move(1.0)), 0.1, rtol=0.1)
    np.testing.assert_allclose(np.abs(last_move(0.5)), 0.1 / 8, rtol=0.1)


@pytest.mark.slow
def test_the_schedule_survives_saving(tmp_path):
    def build():
        keras.utils.set_random_seed(0)  # a model has a seed of its own
        weights = tb.ExampleWeights(4)
        network = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        network.set_weights([np.ones((2, 1)), np.zeros(1)])
        model = tb.BilevelModel(
            weights,
            network,
            lambda upper, lower, batch: tf.reduce_mean(lower(batch) ** 2),
            lambda upper, lower, batch: tf.reduce_mean(
                upper(None)[:, None] * (lower(batch) - 1.0) ** 2
            ),
        )
        method = tb.AugmentedLagrangian(keras.optimizers.Adam(0.01), 2, atol=100.0)
        model.compile(method, keras.optimizers.Adam(0.1), jit_compile=False)
        return model

    points = tf.constant([[1.0, 2.0], [0.5, -1.0], [0.0, 1.0], [-1.0, 0.3]])
    data = tf.data.Dataset.from_tensors(points)
    batches = tb.pair(data, data).repeat(5)
    whole, first, second = build(), build(), build()
    whole.fit(batches, epochs=2, verbose=0)
    first.fit(batches, verbose=0)
    first.save_weights(str(tmp_path / "x.weights.h5"))
    second.load_weights(str(tmp_path / "x.weights.h5"))
    history = second.fit(batches, verbose=0).history
    for a, b in zip(whole.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    # A schedule update at every step: steps 5 to 9.
    mean = np.mean([1.1**k for k in range(5, 10)])
    assert history["weight"][0] == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("kind", ["cold", "drawn", "lower_start"])
def test_every_outer_step_may_start_anew(kind):
    """Multipliers and slots go on; y starts where it is told to."""
    starts = {"cold": [-1.0, -1.0], "drawn": [5.0, 6.0], "lower_start": [4.0, 1.0]}
    options = {
        "cold": {"start": "cold"},
        "drawn": {"start": lambda step: 5.0 + tf.cast(step, tf.float64)},
        "lower_start": {},
    }[kind]
    problem = tb.Problem(
        line().upper_loss,
        line().lower_loss,
        lower_start=(lambda x: 2.0 * x) if kind == "lower_start" else None,
    )
    method = tb.AugmentedLagrangian(SGD(0.1), 1, initial_multiplier=0.3, **options)
    y = tf.constant(-1.0, tf.float64)
    state = method.init(problem, tf.constant(2.0, tf.float64), y)
    for x, start in zip((2.0, 0.5), starts[kind], strict=True):
        step = method.step(problem, tf.constant(x, tf.float64), y, NOTHING, state)
        w = float(state["multiplier"]) + float(state["weight"]) * (start - x)
        along = (start - 1) + w + float(state["lower_weight"]) * (start - x)
        assert float(step.lower) == pytest.approx(start - 0.1 * along)
        y, state = step.lower, step.state
    assert int(state["inner"]["optimizer"].iteration) == 2


@pytest.mark.parametrize(
    "argument, value",
    [
        ("weight", 0.0),
        ("weight", "much"),
        ("lower_weight", -1.0),
        ("atol", float("nan")),
        ("initial_multiplier", float("inf")),
        ("multiplier_state", "keep"),
        ("schedule", 1.1),
        ("smoothing", 1.0),
        ("steps", 0),
        ("independent_starts", 0),
        ("start", "hot"),
    ],
)
def test_arguments_out_of_range(argument, value):
    arguments = {"steps": 1, argument: value}
    with pytest.raises(ValueError, match=f"`{argument}` must be .*Received"):
        tb.AugmentedLagrangian(SGD(0.1), **arguments)


@pytest.mark.parametrize(
    "argument, value",
    [("growth", 0.9), ("decay", 1.5), ("tolerance_decay", 0.0), ("rate_decay", True)],
)
def test_factors_out_of_range(argument, value):
    with pytest.raises(ValueError, match=f"`{argument}` must be .*Received"):
        tb.PenaltySchedule(**{argument: value})


def test_starts_must_be_the_leading_axis():
    method = tb.AugmentedLagrangian(SGD(0.1), 1, independent_starts=3)
    with pytest.raises(ValueError, match=r"leading axis.*lower of shape \(2,\)"):
        method.init(line(), tf.zeros([3]), tf.zeros([2]))
