"""Many tasks as one problem: each task's part must be what it is alone."""

import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from suites import fast_where

import tfbilevel as tb

SGD, ADAM = keras.optimizers.SGD, keras.optimizers.Adam
TASKS, EXAMPLES, FEATURES = 3, 7, 4


def ridge() -> tb.Problem:
    """One task: weights y on data, a coefficient per feature in x."""

    def error(y: Any, batch: Any) -> Any:
        return tf.reduce_mean((tf.linalg.matvec(batch[0], y) - batch[1]) ** 2)

    return tb.Problem(
        upper_loss=lambda x, y, batch: error(y, batch) + 0.1 * tf.reduce_sum(x**2),
        lower_loss=lambda x, y, batch: (
            0.5 * error(y, batch) + 0.5 * tf.reduce_sum(tf.exp(x) * y**2)
        ),
    )


def data(seed: int = 0, dtype: str = "float64") -> tuple[Any, Any, tb.Batches]:
    generator = np.random.default_rng(seed)

    def batch() -> tuple:
        return (
            tf.constant(generator.normal(size=(TASKS, EXAMPLES, FEATURES)), dtype),
            tf.constant(generator.normal(size=(TASKS, EXAMPLES)), dtype),
        )

    x = tf.constant(0.3 * generator.normal(size=FEATURES), dtype)
    y = tf.constant(generator.normal(size=(TASKS, FEATURES)), dtype)
    return x, y, tb.Batches(upper=batch(), lower=batch())


def alone(batches: tb.Batches, task: int) -> tb.Batches:
    return tb.Batches(*tf.nest.map_structure(lambda leaf: leaf[task], tuple(batches)))


def first_step(problem: tb.Problem, method: tb.Method, *inputs: Any) -> tb.Step:
    """Compiled: eagerly every inner step would trace its mapping anew."""
    x, y, _ = inputs
    state = method.init(problem, x, y)
    run = tf.function(
        lambda *arguments: problem.step(method, *arguments, state), autograph=False
    )
    return run(*inputs)


def single_steps(one: tb.Problem, method: tb.Method, x: Any, *inputs: Any) -> list:
    """Every task's first step, without the others: one trace for all.

    `inputs` are the lower variables, and the batches or a list of every task's own.
    """
    y, batches = inputs
    run = tf.function(
        lambda *arguments: one.step(method, x, *arguments), autograph=False
    )
    steps = []
    for i in range(TASKS):
        row = tf.nest.map_structure(lambda leaf, i=i: leaf[i], y)
        own = batches[i] if isinstance(batches, list) else alone(batches, i)
        steps.append(run(row, own, method.init(one, x, row)))
    return steps


def inner(steps: int = 4, rate: float = 0.1, **options: Any) -> tb.InnerSolver:
    return tb.InnerSolver(SGD(rate), steps, **options)


def adam(steps: int = 4) -> tb.InnerSolver:
    return tb.InnerSolver(ADAM(0.1), steps)


def implicit(solver: tb.LinearSolver) -> tb.Method:
    return tb.Implicit(inner(), solver)


# Tolerances so loose that the tasks stop after different numbers of steps.
METHODS: dict[str, Callable[[], tb.Method]] = {
    "unroll": lambda: tb.Unroll(inner()),
    "unroll-momentum": lambda: tb.Unroll(tb.InnerSolver(SGD(0.05, 0.9), 4)),
    "unroll-accelerated": lambda: tb.Unroll(inner(accelerated=True)),
    "unroll-last": lambda: tb.Unroll(adam(), last=3),
    "pessimistic": lambda: tb.Unroll(adam(), end="pessimistic"),
    "pessimistic-checkpoint": lambda: tb.Unroll(
        adam(), end="pessimistic", memory="checkpoint"
    ),
    "pessimistic-tape": lambda: tb.Unroll(adam(), end="pessimistic", memory="tape"),
    "forward": lambda: tb.ForwardUnroll(inner()),
    "cg": lambda: implicit(tb.ConjugateGradient(10, rtol=1e-2)),
    "normal-cg": lambda: implicit(tb.NormalConjugateGradient(10, rtol=1e-2)),
    "neumann": lambda: implicit(tb.Neumann(40, rtol=1e-2)),
    "fixed-point": lambda: implicit(tb.FixedPoint(40, rtol=1e-2)),
    "gradient-solver": lambda: implicit(tb.GradientSolver(ADAM(0.05), 20, rtol=1e-1)),
    "gradient-solver-residual": lambda: implicit(
        tb.GradientSolver(SGD(0.02), 20, objective="residual", rtol=1e-1)
    ),
    "direct": lambda: implicit(tb.Direct()),
    "identity": lambda: tb.Implicit(adam(), tb.Identity(), through="optimizer"),
    "optimizer-map": lambda: tb.Implicit(
        tb.InnerSolver(SGD(0.1, 0.5), 30),
        tb.NormalConjugateGradient(40, rtol=1e-12),
        through="optimizer",
    ),
    "tolerance": lambda: tb.Implicit(inner(60, 0.3, atol=0.05)),
    "rank-one": lambda: tb.RankOne(inner()),
    "finite-difference": lambda: tb.FiniteDifference(inner()),
    "implicit-pessimistic": lambda: tb.Implicit(
        inner(),
        tb.ConjugateGradient(10),
        end="pessimistic",
        aggregate=tb.Aggregation(0.4, 0.5),
    ),
    "bamm": lambda: tb.BAMM(SGD(0.1), multiplier_step="exact"),
    "stocbio": lambda: tb.StocBiO(inner(), 3, 0.2),
    "bsa": lambda: tb.BSA(inner(), 3, 0.2),
    "ttsa": lambda: tb.TTSA(SGD(0.1), 2, 0.2),
    "soba": lambda: tb.SOBA(SGD(0.1), 0.2),
    "srba": lambda: tb.SRBA(SGD(0.1), 0.2, period=3, radius=0.7),
    "fsla": lambda: tb.FSLA(SGD(0.1), 0.2),
    "amigo": lambda: tb.AmIGO(inner(), 3, 0.2),
    "mrbo": lambda: tb.MRBO(SGD(0.1), 2, 0.2),
    "vrbo": lambda: tb.VRBO(SGD(0.1), 2, 0.2, steps=2),
    "sustain": lambda: tb.SUSTAIN(SGD(0.1), 2, 0.2),
    "f2sa": lambda: tb.F2SA(inner(), SGD(0.1), 1.7),
    "meha": lambda: tb.MEHA(SGD(0.1)),
    "f3sa": lambda: tb.F3SA(SGD(0.1), 1.7),
    # The tasks are inside, outside and left at different steps.
    "bvfsm": lambda: tb.BVFSM(inner(), SGD(0.1), 3, slack=0.5),
    "value-gap": lambda: tb.ValueGap(inner(), SGD(0.1), 1.7),
    "gradient-norm": lambda: tb.GradientNorm(SGD(0.1), 1.7),
    "augmented-lagrangian": lambda: tb.AugmentedLagrangian(
        SGD(0.1), 5, initial_multiplier=0.3, lower_weight=0.6
    ),
}

# The counter of a loop over all tasks is that of the slowest; the penalty method's
# measures are means of squares.
COUNTERS = {"iterations"}
MEANS = {"upper_loss", "lower_loss", "gap", "multiplier_term", "penalty"}
ROOTS = {"stationarity", "kkt_residual"}


# Relatives of others in what they do to tasks.
RELATIVES = {
    "unroll-accelerated",
    "pessimistic-checkpoint",
    "pessimistic-tape",
    "normal-cg",
    "fixed-point",
    "gradient-solver-residual",
    "tolerance",
    "bsa",
    "neumann",
    "unroll-last",
    "rank-one",
    "implicit-pessimistic",
    "gradient-solver",
    "direct",
    "identity",
    "ttsa",
    "mrbo",
    "vrbo",
    "sustain",
    "amigo",
    "srba",
    "fsla",
    "meha",
    "f3sa",
    "bvfsm",
}


@functools.cache
def at_once(name: str) -> tuple[tb.Problem, tb.Method, Any]:
    """All tasks, a method, and its compiled step: one trace for two tests."""
    tasks, method = tb.over_tasks(ridge()), METHODS[name]()
    run = tf.function(
        lambda *arguments: tasks.step(method, *arguments), autograph=False
    )
    return tasks, method, run


@pytest.mark.parametrize(
    "name", fast_where(lambda name: name not in RELATIVES, METHODS)
)
def test_every_method_does_to_a_task_what_it_does_to_it_alone(name):
    x, y, batches = data()
    tasks, method, run = at_once(name)
    step = run(x, y, batches, method.init(tasks, x, y))
    single = single_steps(ridge(), method, x, y, batches)
    gradient = np.mean([s.upper_gradient for s in single], axis=0)
    np.testing.assert_allclose(step.upper_gradient, gradient, rtol=1e-9)
    np.testing.assert_allclose(step.lower, np.stack([s.lower for s in single]), 1e-11)
    for key, value in step.metrics.items():
        parts = np.array([s.metrics[key] for s in single])
        if key in COUNTERS:
            assert value == parts.max()
        elif value.shape.rank == 1:
            np.testing.assert_allclose(value, parts, rtol=1e-6, atol=1e-9)
        elif key in MEANS:
            np.testing.assert_allclose(value, parts.mean(), rtol=1e-9)
        elif key == "stationarity":
            np.testing.assert_allclose(value, np.sqrt((parts**2).mean()), rtol=1e-9)
        else:
            assert key in {*ROOTS, "weight", "lower_weight", "tolerance", "rate_scale"}


# Sequential tasks are one task's steps, whatever these do: the methods with another
# loop, with more that they carry, and the one that meets all tasks together.
APART = [
    "unroll-momentum",
    "pessimistic",
    "cg",
    "gradient-solver",
    "stocbio",
    "bamm",
    "soba",  # and all others that follow the linear system's solution
    "srba",
    "f2sa",
    "meha",
    "bvfsm",
    "value-gap",
    "augmented-lagrangian",
]


# What each of them loops over: steps of y with slots, a system, several sequences.
LOOPED = {"unroll-momentum", "pessimistic", "cg", "stocbio", "value-gap"}


@pytest.mark.parametrize("name", fast_where(LOOPED.__contains__, APART))
def test_tasks_in_turn_are_the_tasks_at_once(name):
    """Two outer steps, so that what is carried is too."""
    x, y, batches = data()
    tasks, method, vectorized = at_once(name)
    each = tb.over_tasks(ridge(), "sequential")
    sequential = tf.function(
        lambda *arguments: each.step(method, *arguments), autograph=False
    )
    ends = []
    for problem, run in ((tasks, vectorized), (each, sequential)):
        first = run(x, y, batches, method.init(problem, x, y))
        ends.append(run(0.9 * x, first.lower, batches, first.state))
    together, in_turn = ends
    np.testing.assert_allclose(together.upper_gradient, in_turn.upper_gradient, 1e-9)
    np.testing.assert_allclose(together.lower, in_turn.lower, rtol=1e-10)
    assert set(together.metrics) == set(in_turn.metrics)
    for key, value in together.metrics.items():
        if value.shape == in_turn.metrics[key].shape:
            np.testing.assert_allclose(
                value, in_turn.metrics[key], rtol=1e-6, atol=1e-9
            )
        else:
            assert key in COUNTERS and value == np.max(in_turn.metrics[key])
    tf.nest.assert_same_structure(together.state, in_turn.state)
    for a, b in zip(
        tf.nest.flatten(together.state), tf.nest.flatten(in_turn.state), strict=True
    ):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("control", ["gradient", "gap"])
def test_one_barrier_for_all_tasks(control):
    """BOME over tasks is BOME on their sum, whose x-gradient is so many times the
    mean's. One task alone would get another weight."""
    x, y, batches = data()
    one, method = ridge(), tb.BOME(inner(), SGD(0.1), 60.0, control)
    rows = [alone(batches, i) for i in range(TASKS)]

    def total(loss: Callable, level: str) -> Callable:
        return lambda x, y, batch: tf.add_n(
            [loss(x, y[i], getattr(rows[i], level)) for i in range(TASKS)]
        )

    summed = tb.Problem(total(one.upper_loss, "upper"), total(one.lower_loss, "lower"))
    nothing = tb.Batches(None, None)
    wanted = summed.step(method, x, y, nothing, method.init(summed, x, y))
    assert wanted.metrics["weight"] > 0
    tasks = tb.over_tasks(one)
    for problem in (tasks, tb.over_tasks(one, "sequential")):
        made = problem.step(method, x, y, batches, method.init(problem, x, y))
        np.testing.assert_allclose(
            TASKS * made.upper_gradient, wanted.upper_gradient, rtol=1e-9
        )
        np.testing.assert_allclose(made.lower, wanted.lower, rtol=1e-10)
        np.testing.assert_allclose(
            made.metrics["weight"], wanted.metrics["weight"], rtol=1e-9
        )


def test_the_loose_tolerances_stop_the_tasks_at_different_steps():
    """What the test above is worth: no two tasks take equally many steps."""
    x, y, batches = data()
    for name in ("neumann", "fixed-point", "cg"):
        method = METHODS[name]()
        counts = {
            int(
                method.step(
                    ridge(), x, y[i], alone(batches, i), method.init(ridge(), x, y[i])
                ).metrics["iterations"]
            )
            for i in range(TASKS)
        }
        assert len(counts) > 1


@pytest.mark.parametrize(
    "memory", fast_where("replay".__eq__, ["replay", "checkpoint", "tape"])
)
def test_pessimistic_ends_are_each_task_s_own(memory):
    """IAPTT: k*_i is the first largest upper loss along task i's own iterates."""
    x, y, batches = data(3)
    tasks = tb.over_tasks(ridge())
    method = tb.Unroll(adam(8), end="pessimistic", memory=memory)
    step = first_step(tasks, method, x, y, batches)
    expected = []
    for i in range(TASKS):
        rule = tb.differentiable(ADAM(0.1))
        point, state, losses = y[i], rule.init(y[i]), []
        one = alone(batches, i)
        for _ in range(8):
            with tf.GradientTape() as tape:
                tape.watch(point)
                loss = ridge().lower_loss(x, point, one.lower)
            point, state = rule.update(tape.gradient(loss, point), state, point)
            losses.append(float(ridge().upper_loss(x, point, one.upper)))
        expected.append(1 + int(np.argmax(losses)))
    assert len(set(expected)) > 1
    assert step.metrics["truncation"].numpy().tolist() == expected


@pytest.mark.parametrize(
    "name",
    fast_where(
        {"cg"}.__contains__,
        # Every method's gradient is the mean of those of its tasks alone, above.
        ["unroll", "cg", "augmented-lagrangian"],
    ),
)
def test_central_differences(name):
    x, y, batches = data(1)
    report = tb.check_hypergradient(
        tb.over_tasks(ridge()), METHODS[name](), x, y, batches
    )
    assert report.error < (0.2 if name == "cg" else 1e-7)


def test_eager_steps_trace_the_losses_no_more_than_once_each():
    traces = []

    def counted(x, y, batch):
        traces.append(1)
        return ridge().lower_loss(x, y, batch)

    tasks = tb.over_tasks(tb.Problem(ridge().upper_loss, counted))
    x, y, batches = data()
    method = METHODS["unroll"]()
    for _ in range(2):
        tasks.step(method, x, y, batches, method.init(tasks, x, y))
    assert len(traces) == 1


@pytest.mark.slow
def test_the_pessimistic_first_order_objective_over_tasks():
    x, _, batches = data(1)
    x = {"rates": x, "start": tf.constant([0.2, -0.1, 0.4, 0.3], tf.float64)}
    one = ridge()
    tasks = tb.over_tasks(
        tb.Problem(
            lambda x, y, batch: one.upper_loss(x["rates"], y, batch),
            lambda x, y, batch: one.lower_loss(x["rates"], y, batch),
            lower_start=lambda x: x["start"],
        )
    )
    method = tb.Unroll(adam(), end="pessimistic", first_order=True)
    y = tf.zeros([TASKS, FEATURES], tf.float64)
    report = tb.check_hypergradient(tasks, method, x, y, batches)
    assert report.error < 1e-7


@pytest.mark.parametrize(
    ("name", "dtype"),
    fast_where(
        lambda name, dtype: (name, dtype) == ("unroll", "float64"),
        [
            ("unroll", "float64"),
            ("unroll", "float32"),
            ("pessimistic", "float64"),
            ("cg", "float32"),
            ("value-gap", "float64"),
        ],
    ),
)
def test_eager_is_graph_is_xla(name, dtype):
    x, y, batches = data(0, dtype)
    tasks, method = tb.over_tasks(ridge()), METHODS[name]()

    def step(x: Any, y: Any, batches: tb.Batches, state: Any) -> Any:
        made = tasks.step(method, x, y, batches, state)
        return made.upper_gradient, made.lower

    arguments = (x, y, batches, method.init(tasks, x, y))
    eager = step(*arguments)
    graph = tf.function(step, autograph=False)
    # Around the traced step: tracing it again would take longer than the rest.
    xla = tf.function(lambda *a: graph(*a), autograph=False, jit_compile=True)
    for compiled in (graph, xla):
        for got, want in zip(compiled(*arguments), eager, strict=True):
            rtol = 1e-11 if dtype == "float64" else 2e-5
            np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol)
        compiled(2 * x, *arguments[1:])
        assert compiled.experimental_get_tracing_count() == 1


# XLA cannot differentiate this loop's reductions from a tape.
COMPILED = [
    *(name for name in METHODS if name not in RELATIVES),
    *("pessimistic-checkpoint", "neumann", "tolerance", "rank-one"),
    *("implicit-pessimistic", "unroll-last"),
]
# One of each kind of loop.
LOOPS = {"unroll", "pessimistic", "cg", "neumann", "augmented-lagrangian", "stocbio"}


@pytest.mark.parametrize("name", fast_where(LOOPS.__contains__, COMPILED))
def test_xla_compiles_for_all_values_at_once(name):
    """TensorFlow hides an argument from the program that needs its value beforehand,
    and compiles anew for the next one."""
    x, y, batches = data(0, "float32")
    tasks, method = tb.over_tasks(ridge()), METHODS[name]()

    def step(x: Any, y: Any, batches: tb.Batches, state: Any) -> Any:
        made = tasks.step(method, x, y, batches, state)
        return made.upper_gradient, made.lower, made.state

    arguments = (x, y, batches, method.init(tasks, x, y))
    compiled = tf.function(step, autograph=False, jit_compile=True)
    program = compiled.experimental_get_compiler_ir(*arguments)(stage="hlo")
    parameters = program[program.index("ENTRY") :].count(" parameter(")
    assert parameters == sum(map(tf.is_tensor, tf.nest.flatten(arguments)))


def convolutional() -> tuple[Callable, list]:
    """A small network of a convolution and a dense layer as a function of weights."""
    network = keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            keras.layers.Conv2D(3, 3, activation="softplus"),
            keras.layers.Flatten(),
            keras.layers.Dense(2),
        ]
    )
    function = tb.functional(network)
    generator = np.random.default_rng(0)
    start = [
        tf.constant(0.3 * generator.normal(size=v.shape), tf.float32)
        for v in function.initial()
    ]

    def loss(weights: Any, batch: Any) -> Any:
        logits = function(weights, batch[0])
        return tf.reduce_mean(
            tf.nn.sparse_softmax_cross_entropy_with_logits(batch[1], logits)
        )

    return loss, start


def images(count: int = TASKS) -> tb.Batches:
    generator = np.random.default_rng(5)

    def batch() -> tuple:
        pixels = generator.normal(size=(count, 4, 6, 6, 1))
        return tf.constant(pixels, tf.float32), tf.constant([[0, 1, 1, 0]] * count)

    return tb.Batches(upper=batch(), lower=batch())


def maml() -> tuple[tb.Problem, list]:
    loss, start = convolutional()
    problem = tb.Problem(
        upper_loss=lambda x, y, batch: loss(y, batch),
        lower_loss=lambda x, y, batch: loss(y, batch),
        lower_start=lambda x: x,
    )
    return problem, start


@pytest.mark.parametrize("compiled", fast_where(bool, [False, True]))
def test_convolution_kernels_in_turn_are_the_tasks_alone(compiled):
    one, x = maml()
    batches, method = images(), tb.Unroll(inner(3))
    tasks = tb.over_tasks(one)
    y = [tf.zeros([TASKS, *leaf.shape]) for leaf in x]

    def step(x: Any, batches: tb.Batches) -> Any:
        made = tasks.step(method, x, y, batches, method.init(tasks, x, y))
        return made.upper_gradient, made.lower

    run = tf.function(step, autograph=False) if compiled else step
    gradient, lower = run(x, batches)
    single = single_steps(one, method, x, y, batches)
    for index, leaf in enumerate(gradient):
        mean = np.mean([s.upper_gradient[index] for s in single], axis=0)
        np.testing.assert_allclose(leaf, mean, rtol=1e-4, atol=1e-6)
        each = np.stack([s.lower[index] for s in single])
        np.testing.assert_allclose(lower[index], each, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_both_mappings_agree_and_auto_takes_kernels_in_turn(monkeypatch):
    one, x = maml()
    batches, method = images(), tb.Unroll(inner(2))
    y = [tf.zeros([TASKS, *leaf.shape]) for leaf in x]
    in_turn = []
    map_fn = tf.map_fn
    monkeypatch.setattr(
        tf, "map_fn", lambda *a, **k: in_turn.append(True) or map_fn(*a, **k)
    )

    def gradient(mapping: str) -> Any:
        tasks = tb.over_tasks(one, mapping)
        in_turn.clear()
        step = first_step(tasks, method, x, y, batches)
        return step.upper_gradient, bool(in_turn)

    turned, by_turns = gradient("sequential")
    auto, by_auto = gradient("auto")
    assert by_turns and by_auto
    vectorized, mapped = gradient("vectorized")
    assert not mapped
    for a, b, c in zip(turned, auto, vectorized, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(a, c, rtol=1e-4, atol=1e-6)


def test_prepare_sees_one_task_and_is_differentiated_through():
    """Features of a shared encoder, normalised by each task's own statistics."""

    def features(x: Any, inputs: Any) -> Any:
        made = tf.tanh(inputs * x)
        return made - tf.reduce_mean(made, axis=0)

    def prepare(x: Any, batches: tb.Batches) -> tb.Batches:
        (a, b), (c, d) = batches
        assert a.shape.rank == 2  # of one task
        return batches._replace(upper=(features(x, a), b), lower=(features(x, c), d))

    def error(y: Any, inputs: Any, answers: Any) -> Any:
        return tf.reduce_mean((tf.linalg.matvec(inputs, y) - answers) ** 2)

    once = tb.Problem(
        lambda x, y, batch: error(y, *batch),
        lambda x, y, batch: error(y, *batch) + 0.1 * tf.reduce_sum(y**2),
        prepare=prepare,
    )
    inside = tb.Problem(
        lambda x, y, batch: error(y, features(x, batch[0]), batch[1]),
        lambda x, y, batch: (
            error(y, features(x, batch[0]), batch[1]) + 0.1 * tf.reduce_sum(y**2)
        ),
    )
    x, y, batches = data()
    method = tb.Unroll(inner())
    results = [
        first_step(problem, method, x, y, batches)
        for problem in (tb.over_tasks(once), tb.over_tasks(inside))
    ]
    np.testing.assert_allclose(
        results[0].upper_gradient, results[1].upper_gradient, rtol=1e-11
    )
    single = single_steps(once, method, x, y, batches)
    mean = np.mean([s.upper_gradient for s in single], axis=0)
    np.testing.assert_allclose(results[0].upper_gradient, mean, rtol=1e-11)


@pytest.mark.parametrize(
    "mapping", fast_where("sequential".__eq__, ["vectorized", "sequential"])
)
@pytest.mark.parametrize("prepared", [False, True])
def test_every_inner_step_takes_its_slice_of_stacked_lower_batches(prepared, mapping):
    x, y, batches = data()
    slices = tf.nest.map_structure(  # four draws of three tasks
        lambda leaf: tf.stack([leaf, 2 * leaf, leaf[:, ::-1], 3 * leaf]), batches.lower
    )
    one = ridge()
    if prepared:
        one = tb.Problem(
            one.upper_loss,
            one.lower_loss,
            prepare=lambda x, b: b._replace(lower=(b.lower[0] * tf.exp(x), b.lower[1])),
        )
    method = tb.Unroll(inner(4))
    tasks = tb.over_tasks(one, mapping)
    stacked = tb.StackedBatches(batches.upper, slices)
    step = first_step(tasks, method, x, y, stacked)
    own = [
        tb.StackedBatches(
            *tf.nest.map_structure(lambda leaf, i=i: leaf[i], (batches.upper,)),
            tf.nest.map_structure(lambda leaf, i=i: leaf[:, i], slices),
        )
        for i in range(TASKS)
    ]
    single = single_steps(one, method, x, y, own)
    mean = np.mean([s.upper_gradient for s in single], axis=0)
    np.testing.assert_allclose(step.upper_gradient, mean, rtol=1e-11)


STARTED = {
    "unroll": lambda inner: tb.Unroll(inner),
    "implicit": lambda inner: tb.Implicit(inner),
    "rank-one": lambda inner: tb.RankOne(inner),
    "augmented-lagrangian": lambda inner: tb.AugmentedLagrangian(
        SGD(0.1), 4, weight=0.1, start=inner.start
    ),
}


@pytest.mark.parametrize(
    ("name", "mapping"),
    fast_where(
        lambda name, mapping: mapping == "vectorized" and name != "rank-one",
        # One of each mapping, where a method meets its tasks one by one; the
        # augmented Lagrangian meets all of them together, whatever the mapping.
        [
            *((name, "vectorized") for name in STARTED),
            *((name, "sequential") for name in ("unroll", "implicit")),
        ],
    ),
)
def test_a_start_drawn_by_a_function_is_that_of_every_task(name, mapping):
    """Other at every outer step, too: what a task does alone from there."""
    x, y, batches = data()

    def start(step):
        return tf.cast(step + 1, y.dtype) * tf.reverse(y, [1])

    build = STARTED[name]
    tasks = tb.over_tasks(ridge(), mapping)
    method = build(inner(4, start=start))
    state = method.init(tasks, x, y)
    run = tf.function(
        lambda state: tasks.step(method, x, y, batches, state), autograph=False
    )

    traced = []  # the task's row and the outer step, which are given here
    alike = build(
        inner(
            4,
            start=lambda k: (
                tf.cast(traced[-1][1] + 1, y.dtype) * tf.reverse(traced[-1][0], [0])
            ),
        )
    )

    @functools.partial(tf.function, autograph=False)
    def single(row: Any, own: tb.Batches, step: Any) -> Any:
        traced.append((row, step))
        at = alike.init(ridge(), x, row)
        if "step" in at:
            at = at | {"step": step}
        else:
            at = at | {"inner": at["inner"] | {"step": step}}
        return alike.step(ridge(), x, row, own, at).lower

    for step in range(2):
        found = run(state)
        state = found.state
        for i in range(TASKS):
            want = single(y[i], alone(batches, i), tf.constant(step, tf.int64))
            np.testing.assert_allclose(found.lower[i], want, rtol=1e-11)


def test_projections_see_one_task():
    """Every task's variables are brought to the unit ball, not all of them together."""
    x, y, batches = data()
    one = ridge()
    tasks = tb.over_tasks(
        tb.Problem(
            one.upper_loss,
            one.lower_loss,
            project_lower=lambda y: y / tf.maximum(tf.norm(y), 1.0),
        )
    )
    method = tb.Unroll(inner(1, 1e-9))
    step = first_step(tasks, method, x, 5 * y, batches)
    np.testing.assert_allclose(tf.norm(step.lower, axis=1), [1, 1, 1], rtol=1e-6)


def test_public_losses_are_means():
    x, y, batches = data()
    one = ridge()
    tasks = tb.over_tasks(one)
    for loss, single, part in (
        (tasks.upper_loss, one.upper_loss, 0),
        (tasks.lower_loss, one.lower_loss, 1),
    ):
        parts = [single(x, y[i], alone(batches, i)[part]) for i in range(TASKS)]
        np.testing.assert_allclose(loss(x, y, batches[part]), np.mean(parts), 1e-12)


def test_imaml_equals_the_closed_form():
    """Proximal quadratic tasks, y_i* = (A_i + lam I)^{-1} (A_i c_i + lam x)."""
    generator = np.random.default_rng(2)
    lam, n = 0.7, 3
    roots = generator.normal(size=(TASKS, n, n))
    curvatures = roots @ roots.transpose(0, 2, 1)
    centres, targets = generator.normal(size=(2, TASKS, n))
    x = generator.normal(size=n)

    def lower_loss(x: Any, y: Any, batch: Any) -> Any:
        gap = y - batch[1]
        quadratic = tf.reduce_sum(gap * tf.linalg.matvec(batch[0], gap))
        return 0.5 * quadratic + 0.5 * lam * tf.reduce_sum((y - x) ** 2)

    tasks = tb.over_tasks(
        tb.Problem(
            lambda x, y, batch: 0.5 * tf.reduce_sum((y - batch) ** 2),
            lower_loss,
            lower_start=lambda x: x,
        )
    )
    rate = 1.5 / (np.linalg.eigvalsh(curvatures).max() + lam)
    solver = tb.ConjugateGradient(20, rtol=1e-12)
    method = tb.Implicit(inner(600, rate), solver)
    batches = tb.Batches(tf.constant(targets), (curvatures, centres))
    batches = tb.Batches(*tf.nest.map_structure(tf.constant, tuple(batches)))
    y = tf.zeros([TASKS, n], tf.float64)
    step = first_step(tasks, method, tf.constant(x), y, batches)
    hessians = curvatures + lam * np.eye(n)
    right = np.einsum("mij,mj->mi", curvatures, centres) + lam * x
    solutions = np.linalg.solve(hessians, right[..., None])[..., 0]
    through = np.linalg.solve(hessians, (solutions - targets)[..., None])[..., 0]
    np.testing.assert_allclose(step.lower, solutions, rtol=1e-9)
    np.testing.assert_allclose(step.upper_gradient, lam * through.mean(0), rtol=1e-9)


def test_learned_rates_per_entry_are_meta_sgd():
    """y_1 = x - r * g'(x), so dF/dr = -f'(y_1) * g'(x) for one step, entry by entry."""
    generator = np.random.default_rng(4)
    x, r = generator.normal(size=(2, 5))
    a, b = generator.normal(size=(2, TASKS, 5))
    tasks = tb.over_tasks(
        tb.Problem(
            lambda x, y, batch: 0.5 * tf.reduce_sum((y["w"] - batch) ** 2),
            lambda x, y, batch: 0.5 * tf.reduce_sum((y["w"] - batch) ** 2),
            lower_start=lambda x: {"w": x["start"]},
        )
    )
    solver = inner(1, learned_rate=lambda x: {"w": x["rates"]})
    method = tb.Unroll(solver)
    upper = {"start": tf.constant(x), "rates": tf.constant(r)}
    y = {"w": tf.zeros([TASKS, 5], tf.float64)}
    batches = tb.Batches(upper=tf.constant(a), lower=tf.constant(b))
    step = tasks.step(method, upper, y, batches, method.init(tasks, upper, y))
    moved = x - r * (x - b)
    np.testing.assert_allclose(step.lower["w"], moved, rtol=1e-12)
    np.testing.assert_allclose(
        step.upper_gradient["rates"], (-(moved - a) * (x - b)).mean(0), rtol=1e-12
    )
    np.testing.assert_allclose(
        step.upper_gradient["start"], ((moved - a) * (1 - r)).mean(0), rtol=1e-12
    )


@pytest.mark.parametrize(
    "optimizer, accelerated",
    [(SGD(1.0), False), (SGD(1.0), True), (SGD(1.0, 0.9), False), (ADAM(1.0), False)],
)
def test_equal_rates_per_entry_are_one_rate(optimizer, accelerated):
    x, y, batches = data()
    like = type(optimizer).from_config(
        {**optimizer.get_config(), "learning_rate": 0.07}
    )
    ends = []
    for solver in (
        tb.InnerSolver(like, 4, accelerated=accelerated),
        tb.InnerSolver(
            optimizer,
            4,
            learned_rate=lambda x: tf.fill([FEATURES], 0.07),
            accelerated=accelerated,
        ),
    ):
        method = tb.Unroll(solver)
        step = method.step(
            ridge(), x, y[0], alone(batches, 0), method.init(ridge(), x, y[0])
        )
        ends.append(step.lower)
    np.testing.assert_allclose(ends[0], ends[1], rtol=1e-6)


def test_rates_per_entry_are_refused_where_a_step_is_no_multiple_of_its_rate():
    x, y, batches = data()
    solver = tb.InnerSolver(
        keras.optimizers.Ftrl(1.0), 2, learned_rate=lambda x: tf.fill([FEATURES], 0.07)
    )
    method = tb.Unroll(solver)
    state = method.init(ridge(), x, y[0])
    with pytest.raises(ValueError, match="must return a scalar with Ftrl"):
        method.step(ridge(), x, y[0], alone(batches, 0), state)


def test_one_tensor_of_rates_for_several_variables_is_refused():
    problem = tb.Problem(
        lambda x, y, batch: tf.reduce_sum(y[0]) + y[1],
        lambda x, y, batch: tf.reduce_sum(x * y[0] ** 2) + y[1] ** 2,
    )
    method = tb.Unroll(inner(1, learned_rate=lambda x: x))
    x, y = tf.ones([2]), [tf.ones([2]), tf.constant(1.0)]
    with pytest.raises(ValueError, match="in a nest like theirs"):
        problem.step(method, x, y, tb.Batches(None, None), method.init(problem, x, y))


def test_rates_that_fit_no_variable_are_refused():
    x, y, batches = data()
    solver = inner(1, learned_rate=lambda x: {"w": x})
    method = tb.Unroll(solver)
    with pytest.raises(
        ValueError, match="must return a scalar or rates that broadcast"
    ):
        method.step(ridge(), x, y[0], alone(batches, 0), method.init(ridge(), x, y[0]))


def test_what_carries_no_tasks_is_refused():
    x, y, batches = data()
    tasks, method = tb.over_tasks(ridge()), METHODS["unroll"]()
    state = method.init(tasks, x, y)
    with pytest.raises(ValueError, match="must carry the tasks along a leading axis"):
        tasks.step(method, x, y, tb.Batches(None, None), state)
    with pytest.raises(ValueError, match="must carry the same tasks"):
        tasks.step(method, x, y[:2], batches, method.init(tasks, x, y[:2]))
    with pytest.raises(ValueError, match="must be dense"):
        sparse = tf.sparse.from_dense(batches.lower[0])
        method.step(
            tasks, x, y, batches._replace(lower=(sparse, batches.lower[1])), state
        )
    with pytest.raises(ValueError, match="Call tb.over_tasks once"):
        tb.over_tasks(tasks)
    with pytest.raises(ValueError, match="`mapping` must be"):
        tb.over_tasks(ridge(), "both")
    started = tb.over_tasks(
        tb.Problem(ridge().upper_loss, ridge().lower_loss, lower_start=lambda x: x[:2])
    )
    with pytest.raises(ValueError, match="one task's lower variables"):
        method.step(started, x, y, batches, method.init(started, x, y))
    many = tb.AugmentedLagrangian(SGD(0.1), 5, independent_starts=TASKS)
    with pytest.raises(ValueError, match="`independent_starts` must be None"):
        many.init(tasks, x, y)


def test_a_loss_of_one_task_must_be_a_scalar():
    x, y, batches = data()
    tasks = tb.over_tasks(tb.Problem(lambda x, y, b: y, ridge().lower_loss))
    method = METHODS["unroll"]()
    with pytest.raises(ValueError, match="must be a floating-point scalar"):
        tasks.step(method, x, y, batches, method.init(tasks, x, y))


def test_a_schedule_of_the_outer_step_is_the_inner_rate():
    x, y, batches = data()
    decay = tb.CosineDecay(0.1, 0.02, 2)
    method = tb.Unroll(tb.InnerSolver(SGD(9.0), 1, learning_rate=decay))
    one, own = ridge(), alone(batches, 0)
    state = method.init(one, x, y[0])
    for rate in (0.1, 0.06, 0.02, 0.02):
        plain = tb.Unroll(inner(1, rate))
        want = plain.step(one, x, y[0], own, plain.init(one, x, y[0]))
        step = method.step(one, x, y[0], own, state)
        np.testing.assert_allclose(step.lower, want.lower, rtol=1e-12)
        np.testing.assert_allclose(step.upper_gradient, want.upper_gradient, 1e-12)
        state = step.state


def test_every_leaf_must_carry_the_tasks() -> None:
    """One leaf of another length, hidden behind one of the right length."""
    tasks = tb.over_tasks(ridge(), "vectorized")
    x, y, batches = data()
    inputs, targets = batches.lower
    for broken in (inputs[:1], tf.concat([inputs, inputs], 0)):
        with pytest.raises(ValueError, match="same tasks along the leading axis"):
            tasks.lower_loss(x, y, (broken, targets))


@pytest.mark.parametrize(
    "mapping", fast_where("vectorized".__eq__, ["vectorized", "sequential"])
)
def test_a_task_that_has_ended_stays_where_it_is(mapping: str) -> None:
    """With momentum its next step, not made, would go past the solution."""
    x, y, batches = data()
    method = tb.Implicit(
        tb.InnerSolver(SGD(0.15, momentum=0.95), 60, atol=0.6), tb.Direct()
    )
    together = first_step(tb.over_tasks(ridge(), mapping), method, x, y, batches)
    steps = []
    for task, single in enumerate(single_steps(ridge(), method, x, y, batches)):
        np.testing.assert_allclose(together.lower[task], single.lower, rtol=1e-9)
        steps.append(single.metrics["lower_loss"])
    assert len({float(step) for step in steps}) == TASKS


def test_a_preconditioner_sees_one_task() -> None:
    """Scaled by a norm of y: that of one task is not that of all of them."""

    def cholesky(x: Any, y: Any, vector: Any) -> Any:
        factor = tf.linalg.diag(tf.exp(x / 2) * (1 + tf.reduce_sum(y * y)))
        return tf.linalg.cholesky_solve(factor, vector[:, None])[:, 0]

    x, y, batches = data()
    solver = tb.ConjugateGradient(2, rtol=0.0, preconditioner=cholesky)
    method = implicit(solver)
    together = first_step(tb.over_tasks(ridge(), "vectorized"), method, x, y, batches)
    single = single_steps(ridge(), method, x, y, batches)
    want = np.mean([s.upper_gradient for s in single], axis=0)
    np.testing.assert_allclose(together.upper_gradient, want, rtol=1e-9)


@pytest.mark.parametrize("tasks", [3, pytest.param(33, marks=pytest.mark.slow)])
def test_what_is_prepared_of_images_is_what_each_task_would_prepare(tasks) -> None:
    """Written out for few tasks, mapped for many; absent and whole parts too."""
    generator = np.random.default_rng(3)
    images = tf.constant(generator.normal(size=(tasks, 2, 4, 4, 1)))
    labels = tf.constant(generator.integers(0, 3, (tasks, 2)))
    kernel = tf.constant(generator.normal(size=(3, 3, 1, 2)))

    def features(x: Any, pixels: Any) -> Any:
        made = tf.nn.conv2d(pixels, x, 1, "SAME")
        mean, variance = tf.nn.moments(made, [0, 1, 2])
        made = (made - mean) * tf.math.rsqrt(variance + 0.1)
        return tf.reduce_sum(tf.nn.relu(made), [1, 2])

    def prepare(x: Any, batches: tb.Batches) -> tb.Batches:
        (pixels, kept), absent = batches
        return tb.Batches((features(x, pixels[:1] ** 2), kept), absent)

    problem = tb.Problem(lambda x, y, b: 0.0, lambda x, y, b: 0.0, prepare=prepare)
    prepared = tb.over_tasks(problem).prepare
    assert prepared is not None
    made = prepared(kernel, tb.Batches((images, labels), None))
    assert made.lower is None
    np.testing.assert_array_equal(made.upper[1], labels)
    alone = [features(kernel, pixels[:1] ** 2) for pixels in images]
    np.testing.assert_allclose(made.upper[0], tf.stack(alone), rtol=1e-9)


# Tasks that stop at different steps, and go on from there at the next outer step.


def counted_in_numpy(kind: str, rate: float, tolerance: float, most: int) -> tuple:
    """Every task's y after two outer steps, and its numbers of inner steps."""
    x, y, batches = data(4)
    a, b = (leaf.numpy() for leaf in batches.lower)
    ends, counts = [], []
    for task in range(TASKS):

        def gradient(point: Any, task: int = task) -> Any:
            error = a[task] @ point - b[task]
            return a[task].T @ error / EXAMPLES + np.exp(x.numpy()) * point

        point, made, steps = y[task].numpy(), 0, []
        m = v = ahead = np.zeros(FEATURES)
        s = 1.0
        for _ in range(2):
            for step in range(most):
                g = gradient(point + ahead)
                steps_made = step + 1
                made += 1
                if kind == "adam":
                    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
                    mean, square = m / (1 - 0.9**made), v / (1 - 0.999**made)
                    # Keras adds epsilon before the correction of v.
                    epsilon = 1e-7 / np.sqrt(1 - 0.999**made)
                    point = point - rate * mean / (np.sqrt(square) + epsilon)
                else:
                    after = point + ahead - rate * g
                    s, before = (1 + np.sqrt(1 + 4 * s**2)) / 2, s
                    ahead = (before - 1) / s * (after - point)
                    point = after
                if np.linalg.norm(g) <= tolerance:
                    break
            steps.append(steps_made)
        ends.append(point)
        counts.append(steps)
    return np.stack(ends), np.array(counts)


@pytest.mark.parametrize(
    "mapping", fast_where("vectorized".__eq__, ["vectorized", "sequential"])
)
@pytest.mark.parametrize("kind", ["adam", "accelerated"])
def test_carried_moments_and_sequences_count_each_task_s_own_steps(kind, mapping):
    rate, tolerance = (0.2 if kind == "adam" else 0.03), 0.1
    ends, counts = counted_in_numpy(kind, rate, tolerance, 90)
    assert len(set(counts[:, 0])) == TASKS and counts.max() < 90
    method = tb.Implicit(
        tb.InnerSolver(
            ADAM(rate) if kind == "adam" else SGD(rate),
            90,
            atol=tolerance,
            optimizer_state="carry",
            accelerated=kind == "accelerated",
        ),
        tb.Direct(),
    )
    x, y, batches = data(4)
    tasks = tb.over_tasks(ridge(), mapping)
    run = tf.function(lambda *a: tasks.step(method, *a), autograph=False)
    first = run(x, y, batches, method.init(tasks, x, y))
    second = run(x, first.lower, batches, first.state)
    # Keras rounds Adam's constants to float32: 1e-5 in its first steps.
    np.testing.assert_allclose(second.lower, ends, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "name", fast_where("gradient-solver".__eq__, ["gradient-solver", "schedule"])
)
def test_two_outer_steps_over_tasks_are_each_task_s_own(name):
    """What stops at different steps goes on from a task's own count of them."""
    decay = keras.optimizers.schedules.ExponentialDecay(0.3, 5, 0.5)
    method = {
        "gradient-solver": tb.Implicit(
            inner(), tb.GradientSolver(ADAM(0.2), 60, rtol=0.3)
        ),
        "schedule": tb.Implicit(
            tb.InnerSolver(SGD(decay), 60, atol=0.2, optimizer_state="carry"),
            tb.Direct(),
        ),
    }[name]
    x, y, batches = data(4)

    def two(problem: tb.Problem, run: Any, y: Any, batches: tb.Batches) -> tb.Step:
        first = run(x, y, batches, method.init(problem, x, y))
        return run(0.8 * x, first.lower, batches, first.state)

    def traced(problem: tb.Problem) -> Any:
        return tf.function(lambda *a: problem.step(method, *a), autograph=False)

    one, tasks = ridge(), tb.over_tasks(ridge())
    step, run = two(tasks, traced(tasks), y, batches), traced(one)
    single = [two(one, run, y[i], alone(batches, i)) for i in range(TASKS)]
    want = np.mean([s.upper_gradient for s in single], axis=0)
    np.testing.assert_allclose(step.upper_gradient, want, rtol=1e-8)
    np.testing.assert_allclose(step.lower, np.stack([s.lower for s in single]), 1e-9)


@pytest.mark.parametrize("kind", ["rmsprop", "adam"])
def test_rates_per_layer_under_scaled_steps_are_the_loop_s_by_hand(kind):
    """Keras rounds the constants to float32, and adds epsilon where it does: with 0.9
    and 0.999 as written an independent loop is 1e-5 away."""
    optimizer = keras.optimizers.RMSprop(0.1) if kind == "rmsprop" else ADAM(0.1)
    generator = np.random.default_rng(7)
    h = generator.normal(size=(7, 7))
    h, q = h @ h.T / 7 + np.eye(7), generator.normal(size=7)
    start, log_rates = generator.normal(size=7), np.log([0.05, 0.2])
    # As Keras computes them: 1 - beta in double, then rounded to single.
    b1, b2, rest1, rest2 = (
        float(np.float32(v)) for v in (0.9, 0.999, 1 - 0.9, 1 - 0.999)
    )

    def by_hand(logs):
        rates = np.repeat(np.exp(logs), [3, 4])
        y, m, v = start, np.zeros(7), np.zeros(7)
        for t in range(1, 6):
            g = h @ y - q
            if kind == "rmsprop":
                v = b1 * v + rest1 * g**2
                y = y - rates * g / np.sqrt(v + 1e-7)
            else:
                m, v = m + (g - m) * rest1, v + (g**2 - v) * rest2
                scale = np.sqrt(1 - b2**t) / (1 - b1**t)
                y = y - rates * scale * m / (np.sqrt(v) + 1e-7)
        return 0.5 * np.sum((y - 1) ** 2)

    def joined(y):
        return tf.concat([y["first"], y["second"]], axis=0)

    problem = tb.Problem(
        lambda x, y, batch: 0.5 * tf.reduce_sum((joined(y) - 1.0) ** 2),
        lambda x, y, batch: (
            0.5 * tf.tensordot(joined(y), tf.linalg.matvec(h, joined(y)), 1)
            - tf.tensordot(q, joined(y), 1)
        ),
    )

    def rates(x):
        return {"first": tf.exp(x[0]), "second": tf.exp(x[1])}

    method = tb.Unroll(tb.InnerSolver(optimizer, 5, learned_rate=rates))
    x, y = tf.constant(log_rates), {"first": start[:3], "second": start[3:]}
    y = tf.nest.map_structure(tf.constant, y)
    step = first_step(problem, method, x, y, tb.Batches(None, None))
    width = 1e-5 * np.eye(2)
    want = [(by_hand(log_rates + w) - by_hand(log_rates - w)) / 2e-5 for w in width]
    np.testing.assert_allclose(step.metrics["upper_loss"], by_hand(log_rates), 1e-6)
    np.testing.assert_allclose(step.upper_gradient, want, rtol=1e-6)


@pytest.mark.slow
def test_normal_conjugate_gradients_through_an_optimizer_are_ill_conditioned():
    """Over tasks and alone they may differ by 1e-3 where rounding does as much: a
    start moved by 1e-12 moves the gradient further than the tasks do."""
    x, y, batches = data(4)
    method = tb.Implicit(
        tb.InnerSolver(ADAM(0.05), 10),
        tb.NormalConjugateGradient(12, rtol=1e-12),
        through="optimizer",
    )
    exact = tb.Implicit(method.inner, tb.Direct(), through="optimizer")

    @functools.cache
    def traced(method: tb.Method) -> Any:
        return tf.function(lambda *a: method.step(ridge(), *a), autograph=False)

    def mean(method: tb.Method, move: float = 0.0) -> Any:
        run = traced(method)
        parts = [(y[i] * (1 + move), alone(batches, i)) for i in range(TASKS)]
        steps = [run(x, *p, method.init(ridge(), x, p[0])) for p in parts]
        return np.mean([step.upper_gradient for step in steps], axis=0)

    def apart(a: Any, b: Any) -> float:
        return float(np.abs(a - b).max() / np.abs(b).max())

    tasks = tb.over_tasks(ridge())
    alone_ = mean(method)
    moved = apart(mean(method, 1e-12), alone_)
    found = apart(first_step(tasks, method, x, y, batches).upper_gradient, alone_)
    assert moved > 1e-11 and found < 100 * moved
    # The system's own solution is the same.
    found = apart(first_step(tasks, exact, x, y, batches).upper_gradient, mean(exact))
    assert found < 1e-9
