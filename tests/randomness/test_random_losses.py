"""Losses that sample are fixed functions within an outer step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from suites import fast_where

import tfbilevel as tb

SGD = keras.optimizers.SGD
NOTHING = tb.Batches(None, None)
MANY = 200_000  # samples: mean squares are within a percent of their limits

generator = keras.random.SeedGenerator(3)
stateful = tf.random.Generator.from_seed(1)
drop = keras.layers.Dropout(0.5)


def spread(shuffle: Callable) -> Callable:
    """A shuffled grid with the mean square 1 (+ 3 / MANY)."""
    return lambda: shuffle(tf.linspace(-(3.0**0.5), 3.0**0.5, MANY))


# Samples with the mean square 1.
SOURCES: dict[str, Callable[[], tf.Tensor]] = {
    "tf.random": lambda: tf.random.normal([MANY]),
    "uniform": lambda: tf.random.uniform([MANY], -(3.0**0.5), 3.0**0.5),
    "integers": lambda: tf.cast(
        2 * tf.random.uniform([MANY], 0, 2, tf.int32) - 1, tf.float32
    ),
    "gamma": lambda: tf.random.gamma([MANY], 0.618034),  # a (a + 1) = 1
    "poisson": lambda: tf.random.poisson([MANY], 0.618034),  # likewise
    "categorical": lambda: tf.cast(
        2 * tf.random.categorical([[0.0, 0.0]], MANY)[0] - 1, tf.float32
    ),
    "shuffle": spread(tf.random.shuffle),
    "tf.nn.dropout": lambda: tf.nn.dropout(tf.ones([MANY]), 0.5) / 2**0.5,
    "keras.random": lambda: keras.random.normal([MANY]),
    "SeedGenerator": lambda: keras.random.normal([MANY], seed=generator),
    "Dropout": lambda: drop(tf.ones([MANY]), training=True) / 2**0.5,
    "tf.random.Generator": lambda: stateful.normal([MANY]),
}


def one_step(sample: Callable[[], tf.Tensor]) -> tb.Problem:
    """y = x n / 2 after one step, and F = mean (x n / 2)^2 / 2: dF/dx = x / 4."""

    def lower_loss(x: Any, y: Any, batch: Any) -> tf.Tensor:
        return tf.reduce_sum((y - x * sample()) ** 2) / 2

    return tb.Problem(lambda x, y, batch: tf.reduce_mean(y**2) / 2, lower_loss)


def compiled(function: Callable, mode: str) -> Callable:
    if mode == "eager":
        return function
    return tf.function(function, autograph=False, jit_compile=mode == "xla")


def gradient_of(method: tb.Method, problem: tb.Problem, mode: str = "graph") -> float:
    def gradient(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        step = problem.step(method, x, y, NOTHING, method.init(problem, x, y))
        return step.upper_gradient

    return float(compiled(gradient, mode)(tf.constant(1.0), tf.zeros([MANY])))


INNER = tb.InnerSolver(SGD(0.5), 1)
UNROLLED = {
    "replay": tb.Unroll(INNER),
    "checkpoint": tb.Unroll(INNER, memory="checkpoint"),
    "tape": tb.Unroll(INNER, memory="tape"),
    "forward": tb.ForwardUnroll(INNER),
}


@pytest.mark.parametrize(
    ("memory", "mode"),
    fast_where(
        lambda memory, mode: memory == "replay" or mode == "graph",
        [(memory, mode) for memory in UNROLLED for mode in ("eager", "graph", "xla")],
    ),
)
def test_every_memory(memory: str, mode: str) -> None:
    problem = one_step(SOURCES["tf.random"])
    found = gradient_of(UNROLLED[memory], problem, mode)
    assert found == pytest.approx(0.25, rel=0.01)
    twice = dataclasses.replace(UNROLLED[memory], inner=tb.InnerSolver(SGD(0.5), 2))
    # The same noise at both steps: y = 3/4 x n. With its own, it would be 5/16.
    found = gradient_of(twice, problem, mode)
    assert found == pytest.approx(9 / 16, rel=0.01)


ALSO_EAGER = {"tf.random", "Dropout"}


@pytest.mark.parametrize(
    ("source", "mode"),
    fast_where(
        lambda source, mode: mode == "graph" or source in ALSO_EAGER,
        [(source, mode) for source in SOURCES for mode in ("eager", "graph")],
    ),
)
def test_every_source(source: str, mode: str) -> None:
    """Two steps, as above: sampled again, they would give 5/16 or less."""
    problem = one_step(SOURCES[source])
    found = gradient_of(tb.Unroll(tb.InnerSolver(SGD(0.5), 2)), problem, mode)
    assert found == pytest.approx(9 / 16, rel=0.02)
    # Outside of the library's evaluations they are what they were.
    one, other = SOURCES[source](), SOURCES[source]()
    assert not np.array_equal(one, other)


@pytest.mark.parametrize(
    "source", fast_where("Dropout".__eq__, ["keras.random", "Dropout", "shuffle"])
)
def test_sources_under_xla(source: str) -> None:
    found = gradient_of(UNROLLED["replay"], one_step(SOURCES[source]), "xla")
    assert found == pytest.approx(0.25, rel=0.02)


SOLVERS = {
    "cg": tb.ConjugateGradient(20),
    "normal-cg": tb.NormalConjugateGradient(20),
    "neumann": tb.Neumann(40, rate=0.5),
    "fixed-point": tb.FixedPoint(40, rate=0.5),
    "gradient": tb.GradientSolver(SGD(0.5), 40),
}


@pytest.mark.parametrize(
    ("solver", "mode"),
    fast_where(
        lambda solver, mode: mode == "graph",
        [
            *((solver, "graph") for solver in SOLVERS),
            ("cg", "xla"),
            ("gradient", "xla"),
        ],
    ),
)
def test_every_linear_solver(solver: str, mode: str) -> None:
    """y*(x) = x n, F = mean (x n)^2 / 2, dF/dx = x."""
    method = tb.Implicit(tb.InnerSolver(SGD(0.5), 30), SOLVERS[solver])
    found = gradient_of(method, one_step(SOURCES["tf.random"]), mode)
    assert found == pytest.approx(1.0, rel=0.01)


# Central differences in float64, several inner steps.


def noisy_problem() -> tb.Problem:
    """Noise in every function, its scale and a rate of dropout learned."""
    data = tf.constant(np.random.default_rng(0).normal(size=(6, 4)))

    def upper_loss(x: Any, y: Any, batch: Any) -> tf.Tensor:
        made = tf.linalg.matvec(batch + tf.exp(x[0]) * normal([6, 4]), y)
        return tf.reduce_mean((made - x[1]) ** 2)

    def normal(shape: list) -> tf.Tensor:
        return tf.random.normal(shape, dtype=tf.float64)

    def lower_loss(x: Any, y: Any, batch: Any) -> tf.Tensor:
        mask = tf.nn.dropout(tf.ones([4], tf.float64), 0.5)
        kept = tf.sigmoid(8 * (tf.random.uniform([6], dtype=tf.float64) - x[2]))
        made = tf.linalg.matvec(batch * (1 + x[1] * mask), y)
        made += tf.exp(x[0]) * normal([6])
        fit = tf.reduce_mean(kept * (made - tf.random.shuffle(batch[:, 0])) ** 2)
        return fit + 0.5 * tf.reduce_sum(y**2)

    def prepare(x: Any, batches: tb.Batches) -> tb.Batches:
        turned = data + x[3] * normal([6, 4])
        if isinstance(batches, tb.StackedBatches):
            return batches._replace(upper=turned, lower=turned + batches.lower)
        return tb.Batches(turned, turned * normal([6, 4]))

    return tb.Problem(
        upper_loss,
        lower_loss,
        prepare=prepare,
        lower_start=lambda x: x[:1] * normal([4]),
        project_lower=lambda y: y * tf.random.uniform([4], 0.9, 1.0, tf.float64),
    )


STEPS = tb.InnerSolver(SGD(0.1), 4)
STACKED = tb.StackedBatches(
    None, tf.constant(np.random.default_rng(1).normal(size=(5, 6, 4)))
)
CHECKED = {
    "replay": tb.Unroll(STEPS),
    "pessimistic": tb.Unroll(STEPS, end="pessimistic"),
    "aggregated": tb.Unroll(STEPS, aggregate=tb.Aggregation(0.5)),
    "gap": tb.ValueGap(STEPS, SGD(0.1), 0.5),
    "norm": tb.GradientNorm(SGD(0.1), 0.5),
}


@pytest.mark.parametrize(
    ("name", "batches"),
    fast_where(
        lambda name, batches: batches is STACKED and name in ("replay", "gap", "norm"),
        # Where the steps are kept is looked at above.
        [(name, STACKED) for name in CHECKED] + [("replay", NOTHING)],
    ),
)
def test_central_differences(name: str, batches: tb.Batches) -> None:
    x = tf.constant([-1.0, 0.5, 0.4, 0.3], tf.float64)
    y = tf.constant([0.1, -0.2, 0.3, 0.2], tf.float64)
    report = tb.check_hypergradient(
        noisy_problem(), CHECKED[name], x, y, batches, probes=1
    )
    assert report.error < 1e-6, report


# Between steps and draws.


def last_noise(steps: int = 1, size: int = 3) -> tuple[tb.Problem, tb.Method]:
    """After every inner step y is the noise that it saw."""
    problem = tb.Problem(
        upper_loss=lambda x, y, batch: tf.reduce_sum(x * y),
        lower_loss=lambda x, y, batch: (
            tf.reduce_sum((y - tf.random.normal([size]) - 0 * x) ** 2) / 2
        ),
    )
    return problem, tb.Unroll(tb.InnerSolver(SGD(1.0), steps))


def run(problem: tb.Problem, method: tb.Method, steps: int, **keywords: Any) -> Any:
    return tb.minimize(
        problem,
        method,
        keywords.pop("upper", 0.0),
        tf.zeros([3]),
        SGD(0.1),
        keywords.pop("batches", NOTHING),
        steps,
        trace=lambda point: point.lower,
        **keywords,
    )


def test_noise_differs_between_outer_steps_and_goes_on() -> None:
    problem, method = last_noise()
    whole = run(problem, method, 6)
    assert len(np.unique(whole.trace)) == 18
    np.testing.assert_array_equal(run(problem, method, 6).trace, whole.trace)
    first = run(problem, method, 2)
    rest = run(problem, method, 4, upper=first.upper, state=first.state)
    np.testing.assert_array_equal(
        np.concatenate([first.trace, rest.trace]), whole.trace
    )
    other = run(problem.seeded(1), method, 6)
    assert len(np.unique([other.trace, whole.trace])) == 36
    chosen = tb.Problem(problem.upper_loss, problem.lower_loss, seed=1)
    assert not np.isin(run(chosen, method, 6).trace, whole.trace).any()


def test_stacked_batches_have_noise_of_their_own() -> None:
    stacked = tb.StackedBatches(None, tf.zeros([2, 1]))
    seen = {}
    for count in (1, 3):
        for kind, batches in (("one", NOTHING), ("stacked", stacked)):
            problem, method = last_noise(count)
            seen[kind, count] = run(problem, method, 1, batches=batches).lower.numpy()
    np.testing.assert_array_equal(seen["one", 1], seen["one", 3])
    # By the number of the draw, not by the slice, which starts again.
    assert len(np.unique([seen["stacked", count] for count in (1, 3)])) == 6


def test_every_pass_of_a_loop_samples_its_own() -> None:
    passes = {
        "map_fn": lambda: tf.map_fn(lambda _: tf.random.normal([]), tf.zeros([50])),
        "nested": lambda: tf.reshape(
            tf.map_fn(
                lambda _: tf.map_fn(lambda _: tf.random.normal([]), tf.zeros([10])),
                tf.zeros([5]),
            ),
            [50],
        ),
        "vectorized_map": lambda: tf.vectorized_map(
            lambda _: tf.random.normal([]), tf.zeros([50])
        ),
    }
    for name, sample in passes.items():
        problem = tb.Problem(
            lambda x, y, batch: tf.reduce_sum(x * y),
            lambda x, y, batch, sample=sample: (
                tf.reduce_sum((y - sample() - 0 * x) ** 2) / 2
            ),
        )
        method = tb.Unroll(tb.InnerSolver(SGD(1.0), 2))

        @tf.function(autograph=False)
        def solved(method=method, problem=problem) -> tf.Tensor:
            x, y = tf.constant(0.0), tf.zeros([50])
            return problem.step(method, x, y, NOTHING, method.init(problem, x, y)).lower

        made = solved().numpy()
        assert len(np.unique(made)) == 50, name
        np.testing.assert_array_equal(solved(), made)


# Over tasks.

TASKS, SIZE = 3, 4
TASK_BATCHES = {
    "one": tb.Batches(tf.zeros([TASKS, 1]), tf.zeros([TASKS, 1])),
    "stacked": tb.StackedBatches(tf.zeros([TASKS, 1]), tf.zeros([5, TASKS, 1])),
}


def task_problem(prepared: bool) -> tb.Problem:
    def noise() -> tf.Tensor:
        return tf.random.normal([SIZE], dtype=tf.float64)

    def lower_loss(x: Any, y: Any, batch: Any) -> tf.Tensor:
        seeded = tf.cast(keras.random.normal([SIZE], seed=generator), tf.float64)
        target = x * noise() + seeded + tf.cast(tf.reduce_sum(batch), tf.float64)
        return tf.reduce_sum((y - target) ** 2) / 2

    def prepare(x: Any, batches: tb.Batches) -> tb.Batches:
        upper = x * tf.random.normal([1], dtype=tf.float64)
        return batches._replace(upper=upper)

    return tb.Problem(
        upper_loss=lambda x, y, batch: (
            tf.reduce_sum(noise() * y) + tf.cast(tf.reduce_sum(batch), tf.float64)
        ),
        lower_loss=lower_loss,
        lower_start=lambda x: x * noise(),
        prepare=prepare if prepared else None,
    )


@pytest.mark.parametrize(
    ("kind", "prepared"),
    fast_where(
        lambda kind, prepared: not prepared, [("stacked", True), ("one", False)]
    ),
)
def test_tasks_have_noise_of_their_own_whichever_the_mapping(
    kind: str, prepared: bool
) -> None:
    x, y = tf.constant(0.7, tf.float64), tf.zeros([TASKS, SIZE], tf.float64)
    methods = {
        "unroll": tb.Unroll(tb.InnerSolver(SGD(0.5), 2)),
        "implicit": tb.Implicit(tb.InnerSolver(SGD(0.5), 2), tb.ConjugateGradient(3)),
    }
    for name, method in methods.items():
        found = []
        for mapping in ("vectorized", "sequential"):
            problem = tb.over_tasks(task_problem(prepared), mapping)

            @tf.function(autograph=False)
            def stepped(method=method, problem=problem) -> tb.Step:
                state = method.init(problem, x, y)
                return problem.step(method, x, y, TASK_BATCHES[kind], state)

            found.append(stepped())
        assert len(np.unique(found[0].lower)) == TASKS * SIZE
        for a, b in zip(found[0][:2], found[1][:2], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, err_msg=name)


def test_no_two_steps_tasks_and_draws_share_their_noise() -> None:
    """Each has a multiple of its own: draw 1 of task 0 is not draw 0 of task 1."""
    problem = tb.over_tasks(last_noise()[0])
    batches = tb.StackedBatches(tf.zeros([2, 1]), tf.zeros([3, 2, 1]))
    x, y = tf.constant(0.0), tf.zeros([2, 3])
    methods = [last_noise(count)[1] for count in (1, 2, 3)]

    @tf.function(autograph=False)
    def ends(number: tf.Tensor) -> list[tf.Tensor]:
        here = problem.seeded(number)
        return [  # y is the noise of the last draw
            here.step(method, x, y, batches, method.init(here, x, y)).lower
            for method in methods
        ]

    seen = [ends(tf.constant(number)) for number in (0, 1)]
    assert len(np.unique(np.round(seen, 5))) == 2 * 3 * 2 * 3


# A Keras model of two.


class Scale(keras.layers.Layer):
    def __init__(self) -> None:
        super().__init__()
        self.scale = self.add_weight(shape=(), initializer="ones", name="scale")
        self.built = True

    def call(self, inputs: Any) -> Any:
        return self.scale * inputs


class Point(keras.layers.Layer):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.point = self.add_weight(shape=(size,), initializer="zeros", name="point")
        self.built = True

    def call(self, inputs: Any = None) -> Any:
        return tf.convert_to_tensor(self.point)


DATA = tf.data.Dataset.from_tensors(tf.zeros([1]))


def model_of(
    sample: Callable, size: int, method: tb.Method, **keywords: Any
) -> tb.BilevelModel:
    model = tb.BilevelModel(
        Scale(),
        Point(size),
        upper_loss=lambda upper, lower, batch: (
            tf.reduce_mean(lower(None) ** 2) / 2 + 0 * upper(tf.zeros([]))
        ),
        lower_loss=lambda upper, lower, batch: (
            tf.reduce_sum((lower(None) - upper(sample())) ** 2) / 2
        ),
    )
    model.compile(method, SGD(1.0), **{"jit_compile": False, **keywords})
    return model


@pytest.mark.parametrize(
    ("source", "mode"),
    fast_where(
        lambda source, mode: mode == "graph",
        [
            ("tf.random", "graph"),
            ("SeedGenerator", "graph"),
            ("keras.random", "eager"),
            ("SeedGenerator", "xla"),
        ],
    ),
)
def test_bilevel_model(source: str, mode: str) -> None:
    model = model_of(
        SOURCES[source],
        MANY,
        UNROLLED["replay"],
        jit_compile=mode == "xla",
        run_eagerly=mode == "eager",
    )
    model.fit(tb.pair(DATA, DATA), verbose=0)
    assert float(model.upper.scale) == pytest.approx(1 - 0.25, rel=0.01)


def points(seed: int, sample: Callable, epochs: int = 3) -> list:
    keras.utils.set_random_seed(seed)
    model = model_of(sample, 3, tb.Unroll(tb.InnerSolver(SGD(1.0), 2)))
    seen = []
    for _ in range(epochs):
        model.fit(tb.pair(DATA, DATA), verbose=0)
        seen.append(model.lower.point.numpy() / 1.0)
    return seen


@pytest.mark.slow
def test_a_models_noise_follows_set_random_seed_and_differs_between_steps() -> None:
    def sample() -> tf.Tensor:
        return tf.random.normal([3])

    first, again, other = (points(seed, sample) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert len(np.unique([first, other])) == 18


@pytest.mark.slow
def test_noise_with_a_seed_of_its_own_needs_no_other() -> None:
    for make in (
        lambda: SeededNoise(5),
        lambda: lambda: tf.random.normal([3], seed=5),
    ):
        first, other = points(1, make()), points(2, make())
        np.testing.assert_array_equal(first, other)
        assert len(np.unique(first)) == 9


class SeededNoise:
    def __init__(self, seed: int):
        self.seed = keras.random.SeedGenerator(seed)

    def __call__(self) -> tf.Tensor:
        return keras.random.normal([3], seed=self.seed)


def test_a_resumed_run_samples_what_the_uninterrupted_one_does(tmp_path: Any) -> None:
    def new() -> tb.BilevelModel:
        return model_of(
            lambda: tf.random.normal([3]), 3, tb.Unroll(tb.InnerSolver(SGD(1.0), 2))
        )

    data = tb.pair(DATA, DATA).repeat(3)
    through = new()
    through.fit(data, verbose=0)
    through.save_weights(tmp_path / "half.weights.h5")
    through.fit(data, verbose=0)
    resumed = new()  # whose base is another one until the weights are loaded
    resumed.load_weights(tmp_path / "half.weights.h5")
    resumed.fit(data, verbose=0)
    np.testing.assert_array_equal(resumed.lower.point, through.lower.point)
    np.testing.assert_array_equal(resumed.upper.scale, through.upper.scale)


@pytest.mark.usefixtures("no_dense_gradient")
def test_layers_in_a_problem() -> None:
    """Dropout and GaussianNoise in `tb.functional`, one with a seed, one without."""
    network = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.GaussianNoise(0.5),
            keras.layers.Dense(8, "tanh"),
            keras.layers.Dropout(0.5, seed=1),
            keras.layers.Dense(1),
        ]
    )
    called = tb.functional(network)
    inputs = np.random.default_rng(0).normal(size=(6, 4)).astype("float32")

    def lower_loss(x: Any, y: Any, batch: Any) -> tf.Tensor:
        outputs = called(y, inputs, training=True)[:, 0]
        return tf.reduce_mean((outputs - x) ** 2)

    problem = tb.Problem(
        lambda x, y, batch: tf.reduce_mean(called(y, inputs)[:, 0] ** 2), lower_loss
    )
    x, y = tf.linspace(-1.0, 1.0, 6), called.initial()
    before = [np.array(v) for v in network.variables]
    report = tb.check_hypergradient(
        problem, tb.Unroll(tb.InnerSolver(SGD(0.3), 3)), x, y, NOTHING, probes=2
    )
    assert report.error < 5e-3  # float32
    for variable, value in zip(network.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)


# A learned rate of dropout.


@pytest.mark.slow
def test_a_learned_dropout_rate_is_the_same_by_tf_and_by_keras() -> None:
    """Ridge regression in the mean: the rate that the validation data want."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=8)
    train, check = (rng.normal(size=(40, 8)).astype("float32") for _ in range(2))
    labels = (train @ truth + 2 * rng.normal(size=40)).astype("float32")
    right = (check @ truth).astype("float32")

    def ends_at(uniform: Callable) -> float:
        def lower_loss(x: Any, y: Any, batch: Any) -> tf.Tensor:
            # A relaxed mask per repeat, divided by its mean.
            rate = tf.sigmoid(x)
            mask = tf.sigmoid(20 * (uniform([64, 40, 8]) - rate)) / (1 - rate)
            made = tf.einsum("rnd,d->rn", train * mask, y)
            return tf.reduce_mean((made - labels) ** 2)

        problem = tb.Problem(
            lambda x, y, batch: tf.reduce_mean(
                (tf.linalg.matvec(check, y) - right) ** 2
            ),
            lower_loss,
        )
        inner = tb.InnerSolver(SGD(0.1), 20)
        result = tb.minimize(
            problem, tb.Unroll(inner), 0.0, tf.zeros([8]), SGD(0.3), NOTHING, 60
        )
        return float(tf.sigmoid(result.upper))

    ends = [ends_at(tf.random.uniform), ends_at(keras.random.uniform)]
    assert ends[0] == pytest.approx(ends[1], abs=0.02), ends
    assert abs(ends[0] - 0.5) > 0.05  # and it moved


# What cannot be fixed.


def traced_before() -> Callable:
    function = tf.function(lambda: tf.random.normal([3]))
    return function.get_concrete_function()


REFUSED: dict[str, Callable] = {
    "LogUniformCandidateSampler": lambda: tf.cast(
        tf.random.log_uniform_candidate_sampler(
            tf.constant([[1]], tf.int64), 1, 3, True, 9
        )[0],
        tf.float32,
    ),
    "StatefulRandomBinomial": lambda: tf.cast(
        stateful.binomial([3], 4.0, 0.5, dtype=tf.int32), tf.float32
    ),
    "NonDeterministicInts": lambda: (
        tf.random.Generator.from_non_deterministic_state().normal([3])
    ),
    "RandomStandardNormal": lambda: tf.raw_ops.RandomStandardNormal(
        shape=[3], dtype=tf.float32
    ),
    "RandomUniform": lambda: tf.map_fn(
        lambda _: tf.raw_ops.RandomUniform(shape=tf.constant([1]), dtype=tf.float32)[0],
        tf.zeros([3]),
    ),
}


@pytest.mark.parametrize("level", ["lower", "upper"])
@pytest.mark.parametrize("operation", [*REFUSED, "traced"])
def test_what_cannot_be_fixed_is_refused_by_name(operation: str, level: str) -> None:
    sample = traced_before() if operation == "traced" else REFUSED[operation]

    def bad(x: Any, y: Any, batch: Any) -> tf.Tensor:
        return tf.reduce_sum((y - x * sample()) ** 2)

    def good(x: Any, y: Any, batch: Any) -> tf.Tensor:
        return tf.reduce_sum((y - x) ** 2)

    problem = tb.Problem(good, bad) if level == "lower" else tb.Problem(bad, good)
    name = "RandomStandardNormal" if operation == "traced" else operation
    with pytest.raises(ValueError, match=f"stateless_.*Received: {name}"):
        tb.minimize(
            problem, UNROLLED["replay"], 0.5, tf.zeros([3]), SGD(0.1), NOTHING, 2
        )


def test_a_seed_is_an_integer() -> None:
    with pytest.raises(ValueError, match="`seed` must be an integer of at least 0"):
        tb.Problem(lambda x, y, b: x, lambda x, y, b: y, seed=0.5)
