"""Methods written outside the package: those of docs/extending.md, in every use."""

import dataclasses
import pathlib
import re
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from suites import fast_where

import tfbilevel as tb

SGD = keras.optimizers.SGD
PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "extending.md"
TASKS, SIZE = 3, 4


def written(name: str) -> type:
    """A class as it stands on the page."""
    found = re.search(
        rf"^(@dataclasses.*?\nclass {name}\(.*?)\n(?:```|\n\S)",
        PAGE.read_text(),
        re.DOTALL | re.MULTILINE,
    )
    assert found is not None
    # The last one before the name, if several classes stand before it.
    source = "@dataclasses" + found[1].rsplit("@dataclasses", 1)[1]
    namespace: dict[str, Any] = {"__name__": "page"}
    imports = "import dataclasses\nimport tensorflow as tf\nimport tfbilevel as tb\n"
    exec(imports + source, namespace)
    return namespace[name]


OWN = {name: written(name) for name in ("Alternating", "OneStep")}


def inner(steps: int = 3) -> tb.InnerSolver:
    return tb.InnerSolver(SGD(0.1), steps)


def one_task(**options: Any) -> tb.Problem:
    """Curvatures exp(x) + 1 in y; f depends on x itself too."""
    return tb.Problem(
        lambda x, y, batch: tf.reduce_sum((y - batch) ** 2 + 0.1 * x**2 * batch),
        lambda x, y, batch: 0.5 * tf.reduce_sum(tf.exp(x) * (y - batch) ** 2 + y**2),
        **options,
    )


def data() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    targets, centres = generator.normal(size=(2, TASKS, SIZE))
    x = generator.normal(size=SIZE)
    return x, generator.normal(size=(TASKS, SIZE)), targets, centres


def by_hand(name: str, x: Any, y: Any, target: Any, centre: Any) -> tuple:
    """One task's upper gradient and lower variables."""
    curvature = np.exp(x)
    for _ in range(3):
        y = y - 0.1 * (curvature * (y - centre) + y)
    gradient = 0.2 * x * target  # f_x
    if name == "OneStep":
        f_y, hessian = 2 * (y - target), curvature + 1
        length = (f_y @ f_y) / (f_y @ (hessian * f_y))
        gradient = gradient - curvature * (y - centre) * length * f_y
    return gradient, y


@pytest.mark.parametrize(
    ("name", "mapping", "prepare"),
    [  # one that uses all that the other one does, sequentially too
        ("Alternating", "vectorized", None),
        ("OneStep", "vectorized", lambda x, batches: batches),
        pytest.param("OneStep", "sequential", None, marks=pytest.mark.slow),
    ],
)
def test_over_tasks_the_gradient_is_the_mean_of_the_tasks_own(name, mapping, prepare):
    x, y, targets, centres = data()
    tasks = tb.over_tasks(one_task(prepare=prepare), mapping)
    method = OWN[name](inner())
    batches = tb.Batches(tf.constant(targets), tf.constant(centres))
    inputs = (tf.constant(x), tf.constant(y), batches)
    expected = [by_hand(name, x, y[i], targets[i], centres[i]) for i in range(TASKS)]
    gradient = np.mean([one[0] for one in expected], axis=0)
    lower = np.stack([one[1] for one in expected])
    loss = np.mean(((lower - targets) ** 2 + 0.1 * x**2 * targets).sum(1))

    def step(x: Any, y: Any, batches: Any) -> tb.Step:
        return tasks.step(method, x, y, batches, method.init(tasks, x, y))

    def direct(x: Any, y: Any, batches: Any) -> tb.Step:
        return method.step(tasks, x, y, batches, method.init(tasks, x, y))

    graph = tf.function(step, autograph=False)
    xla = tf.function(lambda *a: graph(*a), autograph=False, jit_compile=True)
    for run in (graph, xla, tf.function(direct, autograph=False)):
        made = run(*inputs)
        np.testing.assert_allclose(made.upper_gradient, gradient, rtol=1e-12)
        np.testing.assert_allclose(made.lower, lower, rtol=1e-12)
        np.testing.assert_allclose(made.metrics["upper_loss"], loss, rtol=1e-12)
    report = tb.check_hypergradient(tasks, method, *inputs, probes=2)
    assert report.error < 1e-8


def network(seed: int) -> keras.Model:
    start = keras.initializers.RandomNormal(stddev=0.5, seed=seed)
    layer = keras.layers.Dense(1, kernel_initializer=start)
    return keras.Sequential([keras.Input((SIZE,)), layer])


def error(upper: Any, lower: Any, batch: Any) -> Any:
    del upper
    return tf.reduce_mean(tf.square(lower(batch[0])[:, 0] - batch[1]))


def penalised(upper: Any, lower: Any, batch: Any) -> Any:
    """The upper model's kernel is a coefficient for each feature."""
    kernel = lower.trainable_variables[0]
    strength = tf.exp(upper.trainable_variables[0])
    return error(upper, lower, batch) + 0.1 * tf.reduce_sum(strength * kernel**2)


def watched(upper: Any, lower: Any, batch: Any) -> Any:
    """Depends on the upper variables itself, or alternation would not move them."""
    total = tf.add_n([tf.reduce_sum(v**2) for v in upper.trainable_variables])
    return error(upper, lower, batch) + 0.1 * total


OBJECTS = {"upper_loss": watched, "lower_loss": penalised}


class Strengths(keras.layers.Layer):
    def __init__(self, **keywords: Any):
        super().__init__(**keywords)
        self.strength = self.add_weight(shape=(SIZE, 1), initializer="zeros")
        self.built = True


def build(tasks: int | None, mapping: str = "auto") -> tb.BilevelModel:
    return tb.BilevelModel(
        Strengths(), network(1), watched, penalised, tasks=tasks, mapping=mapping
    )


def dataset(tasks: int | None, steps: int = 2) -> tf.data.Dataset:
    generator = np.random.default_rng(1)
    shape = (steps, 6) if tasks is None else (steps, tasks, 6)

    def part() -> tuple:
        inputs = generator.normal(size=(*shape, SIZE)).astype("float32")
        return inputs, generator.normal(size=shape).astype("float32")

    return tf.data.Dataset.from_tensor_slices(tb.Batches(part(), part()))


@pytest.mark.parametrize(
    ("name", "mapping", "jit"),
    [
        ("Alternating", None, False),
        pytest.param("Alternating", "sequential", True, marks=pytest.mark.slow),
        pytest.param("OneStep", None, True, marks=pytest.mark.slow),
        ("OneStep", "vectorized", False),
    ],
)
def test_fit_moves_along_the_central_difference(name, mapping, jit):
    """One step of SGD(1) moves x by the derivative of the method's objective."""
    tasks = None if mapping is None else TASKS
    model = build(tasks, mapping or "auto")
    method = OWN[name](inner())
    model.upper.strength.assign([[0.3], [-0.2], [0.5], [0.1]])
    before = [tf.constant(v) for v in model.upper_variables]
    lower = [tf.constant(v) for v in model.lower.trainable_variables]
    if tasks is not None:
        lower = [tf.stack([v] * tasks) for v in lower]
    batch = next(iter(dataset(tasks, 1)))
    state = method.init(model.problem, before, lower)
    objective = method.objective(model.problem, before, lower, batch, state)
    objective = tf.function(objective, autograph=False)
    model.compile(method, SGD(1.0), jit_compile=jit)
    history = model.fit(dataset(tasks, 1), verbose=0).history
    assert np.isfinite(history["upper_loss"]).all()
    moved = before[0] - model.upper_variables[0]
    for row in range(SIZE):
        along = 2e-2 * np.eye(SIZE)[:, [row]]
        ahead, behind = (
            float(objective([before[0] + sign * along])) for sign in (1.0, -1.0)
        )
        slope = (ahead - behind) / 4e-2
        assert float(moved[row, 0]) == pytest.approx(slope, rel=5e-3, abs=2e-4)


@pytest.mark.parametrize(
    ("name", "tasks"),
    fast_where(
        lambda name, tasks: tasks is None, [("Alternating", None), ("OneStep", TASKS)]
    ),
)
def test_a_saved_run_goes_on_as_if_nothing_had_happened(name, tasks, tmp_path):
    def method() -> tb.Method:
        solver = tb.InnerSolver(
            SGD(0.1, 0.9),
            3,
            learning_rate=tb.CosineDecay(0.1, 0.01, 5),
            optimizer_state="carry",
        )
        return OWN[name](solver)

    def run(model: tb.BilevelModel) -> list[np.ndarray]:
        model.fit(dataset(tasks), verbose=0)
        return [v.numpy() for v in (*model.upper_variables, *model.lower.weights)]

    through = build(tasks)
    through.compile(method(), keras.optimizers.Adam(0.1), jit_compile=False)
    run(through)
    through.save_weights(tmp_path / "half.weights.h5")
    through.save(tmp_path / "half.keras")
    want = run(through)
    resumed = build(tasks)
    resumed.compile(method(), keras.optimizers.Adam(0.1), jit_compile=False)
    resumed.load_weights(tmp_path / "half.weights.h5")
    objects = OBJECTS | {"method": method(), "Strengths": Strengths}
    loaded = keras.saving.load_model(tmp_path / "half.keras", custom_objects=objects)
    for model in (resumed, loaded):
        assert model.outer_step == 2
        for a, b in zip(run(model), want, strict=True):
            np.testing.assert_array_equal(a, b)


@dataclasses.dataclass(frozen=True, eq=False)
class Descent(tb.Method):
    """One step of y, and a schedule of its own; notes which problems it meets."""

    couples: bool
    met: list

    @property
    def couples_tasks(self) -> bool:
        return self.couples

    def init(self, problem: Any, upper: Any, lower: Any) -> Any:
        return {"step": tf.constant(1), "last": tf.zeros_like(lower)}

    def step(self, problem: Any, upper: Any, lower: Any, batches: Any, state: Any):
        self.met.append(problem.has_tasks)
        here = problem.prepared(upper, batches)
        _, gradient = here.lower_gradient(lower)
        lower = here.add_scaled(lower, -0.1, gradient)
        upper_loss, partial, _ = here.upper_partials(lower)
        count = state["step"] + 1
        return tb.Step(
            upper_gradient=here.gradient(partial),
            lower=lower,
            state={"step": count, "last": gradient},
            metrics={"upper_loss": upper_loss, "size": here.norm(gradient)},
            upper_scale=1.0 / tf.cast(count, tf.float64),
        )


@pytest.mark.parametrize("couples", [False, True])
@pytest.mark.parametrize("mapping", ["vectorized", "sequential"])
def test_sequential_tasks_are_met_one_by_one_unless_coupled(mapping, couples):
    x, y, targets, centres = data()
    tasks, met = tb.over_tasks(one_task(), mapping), []
    method = Descent(couples, met)
    batches = tb.Batches(tf.constant(targets), tf.constant(centres))
    x_, y_ = tf.constant(x), tf.constant(y)
    made = tasks.step(method, x_, y_, batches, method.init(tasks, x_, y_))
    assert set(met) == {mapping == "vectorized" or couples}
    slopes = np.exp(x) * (y - centres) + y
    np.testing.assert_allclose(made.lower, y - 0.1 * slopes, rtol=1e-12)
    np.testing.assert_allclose(made.state["last"], slopes, rtol=1e-12)
    assert made.state["step"].shape == [] and int(made.state["step"]) == 2
    sizes = np.linalg.norm(slopes, axis=1)
    np.testing.assert_allclose(made.metrics["size"], sizes, rtol=1e-12)
    assert made.metrics["upper_loss"].shape == []
    gradient = 0.2 * x * targets.mean(0)
    np.testing.assert_allclose(made.upper_gradient, gradient, rtol=1e-12)
    assert made.upper_scale.shape == [] and float(made.upper_scale) == 0.5


# What `Prepared` and the problem say.


def test_a_response_of_nothing_counts_as_zero() -> None:
    x, y, targets, _ = data()
    here = one_task().prepared(tf.constant(x), tb.Batches(targets[0], targets[0]))
    _, partial, _ = here.upper_partials(tf.constant(y[0]))
    np.testing.assert_allclose(here.gradient(partial), 0.2 * x * targets[0], rtol=1e-12)
    np.testing.assert_array_equal(here.gradient(None), 0 * x)
    # What was asked for and is not there is another thing.
    with pytest.raises(tb.UnconnectedGradientError, match="upper variable"):
        here.gradient(partial, None)


@pytest.mark.parametrize("mapping", ["vectorized", "sequential"])
def test_numbers_of_tasks_are_each_task_s_own(mapping: str) -> None:
    x, y, targets, centres = data()
    tasks = tb.over_tasks(one_task(), mapping)
    batches = tb.Batches(tf.constant(targets), tf.constant(centres))
    here = tasks.prepared(tf.constant(x), batches)
    rows = tf.constant(y)
    np.testing.assert_allclose(here.dot(rows, 2 * rows), 2 * (y**2).sum(1), rtol=1e-12)
    np.testing.assert_allclose(here.norm(rows), np.linalg.norm(y, axis=1), rtol=1e-12)
    factors = np.array([2.0, 0.0, -1.0])[:, None]
    scaled = here.scale(tf.constant(factors[:, 0]), rows)
    np.testing.assert_allclose(scaled, factors * y, rtol=1e-12)
    added = here.add_scaled(rows, tf.constant(factors[:, 0]), rows)
    np.testing.assert_allclose(added, (1 + factors) * y, rtol=1e-12)
    middle = np.median(np.linalg.norm(y, axis=1)) + 1e-9
    chosen = here.where(here.norm(rows) > middle, rows, 0 * rows)
    kept = np.linalg.norm(y, axis=1, keepdims=True) > middle
    assert kept.sum() == 1
    np.testing.assert_array_equal(chosen, np.where(kept, y, 0))
    own = 0.5 * (np.exp(x) * (y - centres) ** 2 + y**2).sum(1)
    np.testing.assert_allclose(here.lower_loss(rows), own.mean(), rtol=1e-12)
    loss, gradient = here.lower_gradient(rows)
    np.testing.assert_allclose(loss, own.mean(), rtol=1e-12)
    np.testing.assert_allclose(gradient, np.exp(x) * (y - centres) + y, rtol=1e-12)


def test_lower_batches_have_numbers() -> None:
    x, y, _, centres = data()
    stacked = tb.StackedBatches(tf.constant(centres[0]), tf.constant(centres))
    here = one_task().prepared(tf.constant(x), stacked)
    for number in range(TASKS):
        own = 0.5 * (np.exp(x) * (y[0] - centres[number]) ** 2 + y[0] ** 2).sum()
        loss = here.lower_loss(tf.constant(y[0]), number)
        np.testing.assert_allclose(loss, own, rtol=1e-12)


@pytest.mark.parametrize("tasks", [False, True])
def test_the_former_way_to_solve_is_the_same_and_warns(tasks: bool) -> None:
    x, y, targets, centres = data()
    problem = tb.over_tasks(one_task()) if tasks else one_task()
    rows = slice(None) if tasks else 0
    batches = tb.Batches(tf.constant(targets[rows]), tf.constant(centres[rows]))
    here, lower = problem.prepared(tf.constant(x), batches), tf.constant(y[rows])
    solver = tb.InnerSolver(SGD(0.1, 0.9), 3, optimizer_state="carry")
    state = solver.init(problem, here.upper, lower)
    found, after, _ = solver.solve(here, lower, state)
    with pytest.warns(DeprecationWarning, match="solve\\(problem.prepared"):
        former = solver.solve(here.problem, here.upper, lower, here.batches, state)
    np.testing.assert_array_equal(former[0], found)
    for a, b in zip(*map(tf.nest.flatten, (former[1], after)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_former_name_of_sequential_tasks_warns() -> None:
    with pytest.warns(DeprecationWarning, match='now called "sequential"'):
        tasks = tb.over_tasks(one_task(), "in-turn")
    assert tasks.mapping == "sequential"
    with pytest.warns(DeprecationWarning, match='now called "sequential"'):
        assert build(2, "in-turn").mapping == "sequential"
