"""Networks that compute in bfloat16, on variables in float32.

A number in bfloat16 has 8 bits, so each operation rounds by at most 2^-9 of its result.
A hypergradient passes through some tens of roundings, most of which cancel: 16 of them
are what it may differ by from float32's. The lower problem is well conditioned, so that
linear solves do not enlarge this.
"""

import dataclasses
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from suites import fast_where

import tfbilevel as tb

SGD = keras.optimizers.SGD
ROUNDING = 2.0**-9
MOST = 16 * ROUNDING  # 3 percent
BFLOAT16 = "mixed_bfloat16"
EXAMPLES, FEATURES, CLASSES, TASKS = 12, 4, 3, 2
SEEN: list = []  # the dtypes of a linear solver's vectors


@dataclasses.dataclass(frozen=True, eq=False)
class Watched(tb.ConjugateGradient):
    """Conjugate gradients that note the dtypes of their vectors."""

    def solve(self, system: Any, rhs: Any, state: Any = ()) -> Any:
        solution = super().solve(system, rhs, state)
        vectors = (rhs, system.product(rhs), solution.value, solution.residual)
        SEEN.extend(leaf.dtype for leaf in tf.nest.flatten(vectors))
        return solution


def inner(**options: Any) -> tb.InnerSolver:
    return tb.InnerSolver(SGD(0.3, momentum=0.5), steps=4, **options)


METHODS = {
    "unroll": lambda: tb.Unroll(inner()),
    "unroll-checkpoint": lambda: tb.Unroll(inner(), memory="checkpoint"),
    "unroll-tape": lambda: tb.Unroll(inner(), memory="tape"),
    "implicit": lambda: tb.Implicit(inner(), Watched(5)),
    "value-gap": lambda: tb.ValueGap(inner(), SGD(0.1), weight=2.0),
    "gradient-norm": lambda: tb.GradientNorm(SGD(0.1), weight=2.0),
    "augmented-lagrangian": lambda: tb.AugmentedLagrangian(SGD(0.05), steps=2),
    "stocbio": lambda: tb.StocBiO(tb.InnerSolver(SGD(0.3), 4), 3, 0.3),
    "bamm": lambda: tb.BAMM(SGD(0.3)),
}


def cross_entropy(lower: Any, batch: tuple) -> tf.Tensor:
    logits = lower(batch[0])
    return tf.nn.sparse_softmax_cross_entropy_with_logits(batch[1], logits)


def upper_loss(upper: Any, lower: Any, batch: tuple) -> tf.Tensor:
    return tf.reduce_mean(cross_entropy(lower, batch))


def lower_loss(upper: Any, lower: Any, batch: tuple) -> tf.Tensor:
    if isinstance(upper, tb.ExampleWeights):
        loss = upper.mean(cross_entropy(lower, batch), batch[2])
    else:
        loss = upper_loss(upper, lower, (upper(batch[0]), batch[1]))
    squares = sum(tf.reduce_sum(v**2) for v in lower.trainable_variables)
    return loss + 0.1 * squares


def network(policy: str, last: str = "float32") -> keras.Model:
    """A network of that policy, but for its last layer, as Keras's guide has it."""
    return keras.Sequential(
        [
            keras.Input((FEATURES,)),
            keras.layers.Dense(5, "tanh", dtype=policy),
            keras.layers.Dense(CLASSES, dtype=last),
        ]
    )


def model_of(policy: str, method: tb.Method, tasks: int | None = None) -> Any:
    keras.utils.set_random_seed(1)
    upper: Any = tb.ExampleWeights(EXAMPLES)
    if tasks:
        dense = keras.layers.Dense(FEATURES, dtype=policy)
        upper = keras.Sequential([keras.Input((FEATURES,)), dense])
    lower = network(policy)
    model = tb.BilevelModel(upper, lower, upper_loss, lower_loss, tasks=tasks)
    model.compile(method, SGD(1.0), jit_compile=False)
    return model


def batches(tasks: int | None = None) -> tb.Batches:
    generator = np.random.default_rng(0)
    shape = (tasks, EXAMPLES) if tasks else (EXAMPLES,)

    def part() -> tuple:
        inputs = generator.normal(size=(*shape, FEATURES))
        labels = generator.integers(CLASSES, size=shape)
        index = np.broadcast_to(np.arange(EXAMPLES), shape)
        return tf.constant(inputs, tf.float32), tf.constant(labels), tf.constant(index)

    return tb.Batches(part(), part())


def require_close(half: Any, whole: Any) -> None:
    """Close in length and in direction; and not equal, or it was not in bfloat16."""
    a, b = (
        np.concatenate([np.ravel(leaf) for leaf in tf.nest.flatten(nest)]).astype(float)
        for nest in (half, whole)
    )
    length = np.linalg.norm(b)
    assert length > 1e-3
    assert 1e-5 < np.linalg.norm(a - b) / length < MOST
    assert abs(np.linalg.norm(a) / length - 1) < MOST
    assert a @ b / np.linalg.norm(a) / length > 1 - MOST**2


def two_steps(policy: str, name: str, tasks: int | None = None) -> tuple[tb.Step, Any]:
    """Two steps of a method (BAMM's first one has no hypergradient yet)."""
    model, data = model_of(policy, METHODS[name](), tasks), batches(tasks)
    model._ensure_carried()
    (x, y), state = model._levels.read(), model._carried.read()
    for _ in range(2):
        step = model.problem.step(model.method, x, y, data, state)
        if not tasks:
            y, state = step.lower, step.state
    return step, step.upper_gradient


def require_float32(step: tb.Step) -> None:
    leaves = tf.nest.flatten(step._replace(upper_scale=()))  # a number in float64
    floats = [leaf.dtype for leaf in leaves if leaf.dtype.is_floating]
    assert len(floats) > 5
    assert set(floats) == {tf.float32}


@pytest.mark.parametrize(
    "name", fast_where({"unroll", "implicit", "value-gap"}.__contains__, METHODS)
)
def test_a_hypergradient_is_close_to_that_of_float32(name: str) -> None:
    SEEN.clear()
    step, half = two_steps(BFLOAT16, name)
    require_float32(step)
    assert set(SEEN) == ({tf.float32} if name == "implicit" else set())
    require_close(half, two_steps("float32", name)[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unroll", "implicit"])
def test_tasks(name: str) -> None:
    step, half = two_steps(BFLOAT16, name, TASKS)
    require_float32(step)
    require_close(half, two_steps("float32", name, TASKS)[1])


@pytest.mark.slow
def test_minimize() -> None:
    moved = {}
    for policy in (BFLOAT16, "float32"):
        keras.utils.set_random_seed(1)
        lower = tb.functional(network(policy))
        upper, y = tf.zeros([EXAMPLES]), lower.initial()

        def losses(y, batch, lower=lower):
            logits = lower(y, batch[0])
            return tf.nn.sparse_softmax_cross_entropy_with_logits(batch[1], logits)

        problem = tb.Problem(
            lambda x, y, b: tf.reduce_mean(losses(y, b)),
            lambda x, y, b: (
                tf.reduce_mean(tf.sigmoid(x) * losses(y, b))
                + 0.1 * sum(tf.reduce_sum(v**2) for v in y)
            ),
        )
        method = METHODS["implicit"]()
        rate = SGD(1.0)
        made = tb.minimize(problem, method, upper, y, rate, batches(), steps=2)
        assert made.upper.dtype == made.lower[0].dtype == tf.float32
        moved[policy] = made.upper
    require_close(moved[BFLOAT16], moved["float32"])


@pytest.mark.parametrize("jit", fast_where(lambda jit: not jit, [False, True]))
def test_fit_under_a_global_policy(jit: bool) -> None:
    moved, logs = {}, {}
    data = tf.data.Dataset.from_tensors(batches())
    for policy in (BFLOAT16, "float32"):
        keras.config.set_dtype_policy(policy)
        try:
            model = model_of(policy, METHODS["unroll"]())
            model.compile(model.method, SGD(1.0), jit_compile=jit)
            logs[policy] = model.fit(data.repeat(2), verbose=0).history
        finally:
            keras.config.set_dtype_policy("float32")
        kept = [*model.trainable_variables, *model.optimizer.variables]
        assert {v.dtype for v in kept} <= {"float32", "int64"}
        moved[policy] = model.upper.logits.numpy()
    require_close(moved[BFLOAT16], moved["float32"])
    for name, (value,) in logs["float32"].items():
        assert logs[BFLOAT16][name][0] == pytest.approx(value, rel=MOST)


def test_a_loss_in_bfloat16_is_added_up_in_float32() -> None:
    """1 and a penalty of 2^-10, of which bfloat16 would keep nothing."""
    dense = keras.layers.Dense(1, kernel_regularizer=keras.regularizers.L2(2.0**-10))
    lower = keras.Sequential([keras.Input((1,)), dense])
    dense.kernel.assign([[1.0]])

    def one(upper: Any, lower: Any, batch: Any) -> tf.Tensor:
        return tf.cast(tf.reduce_sum(lower(batch)), tf.bfloat16)

    model = tb.BilevelModel(tb.ExampleWeights(1), lower, one, one)
    here = model.problem.prepared(*batches_of_ones(model))
    loss, gradient = here.lower_gradient(model._levels.point()[1])
    assert (loss.dtype, float(loss)) == (tf.float32, 1.0 + 2.0**-10)
    np.testing.assert_array_equal(gradient[0], [[1.0 + 2.0 * 2.0**-10]])
    assert here.upper_loss(model._levels.point()[1]).dtype == tf.float32


def batches_of_ones(model: Any) -> tuple:
    return model._levels.point()[0], tb.Batches(tf.ones([1, 1]), tf.ones([1, 1]))
