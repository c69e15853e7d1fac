"""Losses on parts of their batches: the numbers of the whole, and what is not kept."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from method_table import METHODS, Row, unroll
from problems import flat, ridge
from small_models import SGD, network
from suites import fast_where

import tfbilevel as tb
from tfbilevel._check.look import _all_of, require_second_derivatives

RIDGE = ridge()  # 7 lower examples, 8 upper ones
# What these ask of the losses is asked by others too, which are here: where steps are
# kept and how many there are is no matter, nor which solver asks for H v.
RELATIVES = {
    *("unroll-checkpoint-last", "unroll-tape-last", "unroll-replay-last"),
    *("unroll-pessimistic-checkpoint", "unroll-pessimistic-tape", "unroll-converged"),
    *("implicit-neumann", "implicit-fixed-point", "implicit-gradient-solver", "bsa"),
}
ROWS = [
    row for row in METHODS if RIDGE.name in row.oracles and row.name not in RELATIVES
]
FAST = {"unroll-replay"}


def first_step(problem: tb.Problem, method: tb.Method, xla: bool = False) -> tb.Step:
    upper, lower, batches = RIDGE.at("float64")
    state = method.init(problem, upper, lower)
    step = tf.function(
        lambda *inputs: problem.step(method, *inputs, state),
        autograph=False,
        jit_compile=xla,
    )
    return step(upper, lower, batches)


def close(got: Any, want: Any, tolerance: float = 1e-10) -> None:
    np.testing.assert_allclose(flat(got), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "row", fast_where(lambda row: row.name in FAST, ROWS), ids=lambda row: row.name
)
def test_every_method(row: Row) -> None:
    """Parts of 3, 3 and 1 examples below, of 2 above; NumPy knows no parts."""
    problem = tb.microbatched(RIDGE.problem, upper=4, lower=3)
    step = first_step(problem, row.build(RIDGE))
    gradient, after = row.expected(RIDGE, flat(RIDGE.x), flat(RIDGE.y))
    tolerance = (row.tolerance or {"float64": 2e-8})["float64"]
    close(step.upper_gradient, gradient, tolerance)
    close(step.lower, after, 2e-8)


# A method never learns how many parts there are: what it asks of the losses is one of
# a few derivatives, and each of these methods asks for others. All of them have other
# parts above.
ASKING = {
    "unroll-replay",  # reverse products along a path
    "unroll-tape",  # the derivative of a gradient
    "forward-unroll",  # forward products
    "implicit-cg",  # Hessian products
    "implicit-direct",  # a dense Hessian
    "value-gap",  # first derivatives alone
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.name in ASKING], ids=lambda row: row.name
)
def test_eight_parts_are_the_whole_batch(row: Row) -> None:
    method = row.build(RIDGE)
    problem = tb.microbatched(RIDGE.problem, upper=8, lower=8)
    whole, parts = (first_step(p, method) for p in (RIDGE.problem, problem))
    close((parts.upper_gradient, parts.lower), flat(whole[:2]))


@pytest.mark.slow
def test_with_xla() -> None:
    problem = tb.microbatched(RIDGE.problem, upper=4, lower=3)
    row = next(row for row in ROWS if row.name == "unroll-replay")
    step = first_step(problem, row.build(RIDGE), xla=True)
    close(step.upper_gradient, row.expected(RIDGE, flat(RIDGE.x), flat(RIDGE.y))[0])


EXAMPLES, INPUTS, HIDDEN = 21, 3, 13


def perceptron() -> tb.Problem:
    """A hidden layer, and one weight per example."""

    def errors(y: Any, batch: Any) -> Any:
        inputs, answers = batch[:2]
        hidden = tf.tanh(tf.matmul(inputs, y[0]))
        return (tf.linalg.matvec(hidden, y[1]) - answers) ** 2

    return tb.Problem(
        upper_loss=lambda x, y, batch: tf.reduce_mean(errors(y, batch)),
        lower_loss=lambda x, y, batch: tf.reduce_mean(
            tf.sigmoid(tf.gather(x, batch[2])) * errors(y, batch)
        ),
    )


def point() -> tuple[Any, Any, tb.Batches]:
    generator = np.random.default_rng(0)

    def normal(*shape: int) -> tf.Tensor:
        return tf.constant(generator.normal(size=shape))

    y = [normal(INPUTS, HIDDEN), normal(HIDDEN)]
    batch = (normal(EXAMPLES, INPUTS), normal(EXAMPLES), tf.range(EXAMPLES))
    return normal(EXAMPLES), y, tb.Batches(batch, batch)


def operations(graph: Any) -> Iterator[tf.Operation]:
    return (suspect.operation for suspect in _all_of(graph, "", None))


@pytest.mark.parametrize("parts", [1, 4])
def test_nothing_of_the_whole_batch_is_kept(parts: int) -> None:
    """No tensor has the hidden layer of all examples, and no loop keeps lists of its
    intermediate results for a derivative. With one part there is such a tensor."""
    problem = tb.microbatched(perceptron(), upper=parts, lower=parts)
    x, y, batches = point()
    method = unroll(2)(RIDGE)
    state = method.init(problem, x, y)
    traced = tf.function(
        lambda *inputs: problem.step(method, *inputs, state).upper_gradient,
        autograph=False,
    ).get_concrete_function(x, y, batches)
    kinds = {operation.type for operation in operations(traced.graph)}
    assert "While" in str(kinds) and "TensorListPushBack" not in kinds
    shapes = [
        output.shape
        for operation in operations(traced.graph)
        for output in operation.outputs
        if output.shape.rank is not None
    ]
    assert any(list(shape) == [-(-EXAMPLES // parts), HIDDEN] for shape in shapes)
    large = [s for s in shapes if EXAMPLES in s and HIDDEN in s]
    assert bool(large) == (parts == 1)


def test_derivatives_that_nothing_uses_are_not_computed() -> None:
    """Neither g_y nor g_yy v runs an operation of the gradient in x."""
    calls = []

    def noted(value: np.ndarray) -> np.ndarray:
        calls.append(1)
        return value

    @tf.custom_gradient
    def watched(x: tf.Tensor) -> Any:
        def gradient(d: tf.Tensor) -> tf.Tensor:
            made = tf.numpy_function(noted, [d], d.dtype, stateful=False)
            return tf.ensure_shape(made, d.shape)

        return tf.identity(x), gradient

    def loss(x: Any, y: Any, batch: Any) -> Any:
        return tf.reduce_mean(watched(x) * y**2 * batch)

    split = tb.microbatched(tb.Problem(loss, loss), lower=2)
    batch = tf.constant([1.0, 2.0, 3.0, 6.0])
    here = split.prepared(tf.constant(2.0), tb.Batches(batch, batch))
    y = tf.constant(5.0)

    def run(gradient: Any) -> float:
        # In a loop, as inner steps are: there TensorFlow itself leaves out less.
        loop = tf.function(
            lambda: tf.while_loop(
                lambda t, _: t < 1,
                lambda t, _: (t + 1, gradient()),
                (tf.constant(0), tf.constant(0.0)),
            ),
            autograph=False,
        )
        return float(loop()[1])

    # g = 3 x y^2
    assert run(lambda: here.lower_gradient(y)[1]) == 60.0 and not calls
    product = here.lower_gradient_pullback
    assert run(lambda: product(y)[2](tf.constant(1.0))[1]) == 12.0 and not calls
    assert run(lambda: here.lower_pullback(y)[1](1.0)[0]) == 75.0 and len(calls) == 2


@pytest.mark.slow
def test_unknown_numbers_of_examples_and_prepare() -> None:
    """One graph for 20 and 21 examples, whose features depend on x, in one task."""
    x, y, (batch, _) = point()

    def with_features(split: int) -> tuple[Any, Any]:
        problem = tb.microbatched(
            tb.Problem(
                perceptron().upper_loss,
                lambda x, y, batch: perceptron().lower_loss(x[0], y, batch),
                prepare=lambda x, batches: batches._replace(
                    lower=(batches.lower[0] * x[1], *batches.lower[1:])
                ),
            ),
            lower=split,
        )
        method = unroll(2)(RIDGE)
        state = method.init(problem, (x, tf.constant(1.5, tf.float64)), y)

        def step(lower: Any) -> Any:
            joined = (x, tf.constant(1.5, tf.float64))
            batches = tb.Batches(batch, lower)
            return problem.step(method, joined, y, batches, state).upper_gradient

        specs = tuple(tf.TensorSpec([None, *v.shape[1:]], v.dtype) for v in batch)
        traced = tf.function(step, input_signature=[specs], autograph=False)
        return traced(batch), traced(tuple(leaf[:-1] for leaf in batch))

    for parts, whole in zip(with_features(4), with_features(1), strict=True):
        close(parts, flat(whole))


@pytest.mark.slow
@pytest.mark.parametrize("mapping", ["vectorized", "sequential"])
def test_tasks(mapping: str) -> None:
    """Of every task the examples are split, and the gradient is the mean of theirs."""
    x, y, (batch, _) = point()
    stacked = tf.nest.map_structure(lambda leaf: tf.stack([leaf, leaf[::-1]]), batch)
    y = [tf.stack([leaf, 2 * leaf]) for leaf in y]
    made = []
    for parts in (1, 4):
        split = tb.microbatched(perceptron(), upper=parts, lower=parts)
        problem = tb.over_tasks(split, mapping)
        method = unroll(2)(RIDGE)
        state = method.init(problem, x, y)
        run = tf.function(
            lambda *inputs: problem.step(method, *inputs, state)[:2],  # noqa: B023
            autograph=False,
        )
        made.append(run(x, y, tb.Batches(stacked, stacked)))
    close(made[1], flat(made[0]))


def test_parts_have_samples_of_their_own() -> None:
    """One sample per example: with a part each, no two are alike, and they stay."""
    problem = tb.microbatched(
        tb.Problem(
            upper_loss=lambda x, y, batch: x * y,
            lower_loss=lambda x, y, batch: (
                y * tf.reduce_mean(batch * tf.random.normal([1]))
            ),
        ),
        lower=2,
    )
    x, y = tf.constant(1.0), tf.constant(1.0)

    def gradient(first: float, second: float) -> float:
        batches = tb.Batches(tf.zeros([2]), tf.constant([first, second]))
        return float(problem.prepared(x, batches).lower_gradient(y)[1])

    samples = gradient(2.0, 0.0), gradient(0.0, 2.0)
    assert samples[0] != samples[1]
    assert gradient(2.0, 2.0) == pytest.approx(sum(samples), rel=1e-6)


def fitted(microbatches: Any) -> tuple[tb.BilevelModel, dict]:
    """Three outer steps on 6 examples; the data are the same in all calls."""
    weights = tb.ExampleWeights(6)

    def squares(lower: Any, batch: Any) -> Any:
        return tf.reduce_mean((lower(batch[0], training=True) - batch[1]) ** 2, 1)

    model = tb.BilevelModel(
        weights,
        network(),
        lambda upper, lower, batch: tf.reduce_mean(squares(lower, batch)),
        lambda upper, lower, batch: upper.mean(squares(lower, batch), batch[2]),
    )
    method = tb.Unroll(tb.InnerSolver(SGD(0.2), 3))
    model.compile(method, SGD(1.0), jit_compile=False, microbatches=microbatches)
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(6, 3)).astype("float32")
    targets = generator.normal(size=(6, 2)).astype("float32")
    data = tb.pair((inputs, targets), (inputs, targets), index=True)
    history = model.fit(data, epochs=3, verbose=0)
    return model, history.history


def test_fit() -> None:
    whole, parts = fitted(1), fitted((2, 4))  # of two examples, with none left over
    for a, b in zip(whole[0].get_weights(), parts[0].get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(
        whole[1]["upper_loss"], parts[1]["upper_loss"], rtol=2e-5
    )
    model = parts[0]
    assert model.get_compile_config()["microbatches"] == [2, 4]
    # The layers are not heard within the loop over the parts, but the index is found.
    inputs, targets = np.zeros((6, 3), "float32"), np.zeros((6, 2), "float32")
    batch = (inputs, targets, np.array([0, 1, 2, 3, 4, 9]))
    with pytest.raises(ValueError, match="index 9, out of range"):
        model.train_on_batch(tb.Batches((inputs, targets), batch))


def test_refusals() -> None:
    problem = perceptron()
    for arguments in ({"upper": 0}, {"lower": 1.5}, {"lower": True}):
        with pytest.raises(ValueError, match="must be an integer of at least 1"):
            tb.microbatched(problem, **arguments)
    with pytest.raises(ValueError, match="Received: a problem over tasks"):
        tb.microbatched(tb.over_tasks(problem), lower=2)
    x, y, (batch, _) = point()
    split = tb.microbatched(problem, lower=2)
    for lower in ((*batch[:2], batch[2][:-1]), None):
        with pytest.raises(ValueError, match="split along its examples"):
            split.lower_loss(x, y, lower)
    with pytest.raises(ValueError, match="or a pair of numbers"):
        fitted((1, 2, 3))
    with pytest.raises(ValueError, match="`microbatches` must be an integer"):
        fitted(0)


def test_a_count_that_does_not_fit_is_found_when_the_graph_runs() -> None:
    x, y, (batch, _) = point()
    split = tb.microbatched(perceptron(), lower=2)
    specs = tuple(tf.TensorSpec([None, *v.shape[1:]], v.dtype) for v in batch)
    loss = tf.function(
        lambda batch: split.lower_loss(x, y, batch),
        input_signature=[specs],
        autograph=False,
    )
    with pytest.raises(tf.errors.InvalidArgumentError, match="must have its examples"):
        loss((*batch[:2], batch[2][:-1]))


def test_second_derivatives_are_looked_at_in_whole_batches() -> None:
    """The loop hides its operations: the look must see the loss."""

    def loss(x: Any, y: Any, batch: Any) -> Any:
        return tf.reduce_mean(tf.grad_pass_through(tf.square)(y * batch * x) ** 2)

    split = tb.microbatched(tb.Problem(loss, loss), lower=2)
    batches = tb.Batches(tf.ones([4, 3]), tf.ones([4, 3]))
    method = tb.Unroll(tb.InnerSolver(SGD(0.1), 1))
    with pytest.raises(tb.MissingSecondDerivativeError, match="grad_pass_through"):
        require_second_derivatives(split, method, tf.ones([3]), tf.ones([3]), batches)


@pytest.mark.parametrize("kind", ["sparse", "ragged"])
def test_sparse_and_ragged_examples(kind: str) -> None:
    """5 examples in parts of 2, 2 and 1."""
    entries = np.array([[0, 2, 1], [0, 0, 0], [3, 0, 0], [0, 0, 4], [5, 6, 0]])
    whole = tf.constant(entries, tf.float64)
    # Sparse: rows with no entry; ragged: rows of several lengths.
    of_kind = tf.sparse.from_dense(whole)
    if kind == "ragged":
        of_kind = tf.RaggedTensor.from_tensor(whole, padding=0.0)

    def loss(x: Any, y: Any, batch: Any) -> Any:
        inputs, answers = batch
        if kind == "sparse":
            made = tf.sparse.sparse_dense_matmul(inputs, y[:, None])[:, 0]
        else:
            made = tf.reduce_sum(inputs, 1) * y[0]
        return tf.reduce_mean((made - answers) ** 2)

    split = tb.microbatched(tb.Problem(loss, loss), lower=3)
    x, y = tf.constant(1.0, tf.float64), tf.constant([1.0, -2.0, 0.5], tf.float64)
    answers = tf.range(5.0, dtype=tf.float64)
    made = entries @ y.numpy() if kind == "sparse" else entries.sum(1) * y.numpy()[0]
    run = tf.function(split.lower_loss, autograph=False)
    got = run(x, y, (of_kind, answers))
    close(got, np.mean((made - np.arange(5.0)) ** 2))
