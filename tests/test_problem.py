"""`Problem`, `Batches`, `StackedBatches` and `pair`."""

import itertools
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbilevel as tb

# Batches.


def test_one_lower_batch_is_the_same_at_every_draw() -> None:
    batches = tb.Batches(upper=1.0, lower={"a": tf.constant([1.0, 2.0])})
    for draw in (0, 3, tf.constant(7)):
        assert batches.lower_at(draw) is batches.lower


def test_stacked_batches_are_taken_in_turn_and_again_from_the_first() -> None:
    lower = (tf.constant([[10.0], [20.0], [30.0]]), {"labels": tf.constant([1, 2, 3])})
    batches = tb.StackedBatches(upper=None, lower=lower)

    @tf.function(autograph=False)
    def compiled(draw: tf.Tensor) -> Any:
        return batches.lower_at(draw)

    for draw, index in [(0, 0), (1, 1), (2, 2), (3, 0), (7, 1)]:
        for inputs, rest in (batches.lower_at(draw), compiled(tf.constant(draw))):
            assert inputs.numpy().tolist() == [10.0 * (index + 1)]
            assert int(rest["labels"]) == index + 1


def test_stacked_batches_with_ragged_parts_and_parts_that_are_not_there() -> None:
    rows = tf.ragged.constant([[1.0, 2.0], [3.0]])
    for lower in ((None, rows), (rows, None)):
        slices = [
            tb.StackedBatches(None, lower).lower_at(draw)[lower.index(None) - 1]
            for draw in (0, 1, 2)
        ]
        assert [one.numpy().tolist() for one in slices] == [[1, 2], [3], [1, 2]]
    assert tb.StackedBatches(None, None).lower_at(3) is None


def test_stacked_batches_keep_their_kind_through_nests_and_functions() -> None:
    batches = tb.StackedBatches(upper=tf.constant(1.0), lower=tf.constant([1.0, 2.0]))
    doubled = tf.nest.map_structure(lambda leaf: 2 * leaf, batches)
    assert isinstance(doubled, tb.StackedBatches)
    kinds = []

    @tf.function(autograph=False)
    def compiled(data: tb.Batches) -> tf.Tensor:
        kinds.append(type(data))
        return data.lower_at(1)

    assert float(compiled(batches)) == 2.0
    assert kinds == [tb.StackedBatches]


# pair.


RANGE = tf.data.Dataset.range(2)


def values(dataset: tf.data.Dataset, most: int = 20) -> list:
    return [
        (int(b.upper), b.lower.numpy().tolist())
        for b in itertools.islice(dataset, most)
    ]


def test_pair_repeats_the_shorter_dataset() -> None:
    short, long = tf.data.Dataset.range(2), tf.data.Dataset.range(10, 15)
    assert values(tb.pair(short, long)) == [(0, 10), (1, 11), (0, 12), (1, 13), (0, 14)]
    assert values(tb.pair(long, short)) == [(10, 0), (11, 1), (12, 0), (13, 1), (14, 0)]
    assert values(tb.pair(short, short)) == [(0, 0), (1, 1)]


def test_pair_groups_lower_batches() -> None:
    paired = tb.pair(tf.data.Dataset.range(1), tf.data.Dataset.range(7), 3)
    # What the last step misses comes from the next pass.
    assert values(paired) == [(0, [0, 1, 2]), (0, [3, 4, 5]), (0, [6, 0, 1])]
    assert int(paired.cardinality()) == 3
    assert issubclass(type(paired.element_spec), tb.StackedBatches)
    plain = tb.pair(tf.data.Dataset.range(1), tf.data.Dataset.range(7))
    assert not issubclass(type(plain.element_spec), tb.StackedBatches)
    assert issubclass(type(plain.element_spec), tb.Batches)


@pytest.mark.parametrize(
    ("count", "size", "draws", "upper", "steps"),
    [
        (10, 4, 3, 1, 1),
        (14, 4, 2, 1, 2),
        (14, 4, 2, 2, 2),
        (12, 4, 2, 1, 2),
        (9, 4, 2, 5, 5),
        (4, 4, 1, 3, 3),
    ],
)
@pytest.mark.parametrize("known", [True, False])
def test_pair_leaves_no_example_of_a_smaller_last_batch_out(
    count, size, draws, upper, steps, known
) -> None:
    """Every step has batches of one size; every example is in one of the epoch."""
    lower = tf.data.Dataset.range(count)
    if not known:
        lower = lower.filter(lambda i: i >= 0)
    paired = tb.pair(tf.data.Dataset.range(upper), lower.batch(size), draws)
    rows = [b.lower.numpy() for b in paired]
    assert len(rows) == steps or (not known and upper > 1)
    assert set(np.concatenate([row.ravel() for row in rows])) == set(range(count))
    if draws > 1:
        assert all(row.shape == (draws, size) for row in rows)
        stream = np.concatenate([row.ravel() for row in rows])
        np.testing.assert_array_equal(stream, np.arange(stream.size) % count)


def test_pair_makes_batches_of_one_size_of_every_kind_of_part() -> None:
    dense = np.arange(20.0).reshape(10, 2)
    parts = {
        "sparse": tf.sparse.from_dense(dense),
        "ragged": tf.RaggedTensor.from_row_lengths(np.arange(15), [1, 2] * 5),
        "dense": dense,
    }
    lower = tf.data.Dataset.from_tensor_slices(parts).batch(4)
    lower = lower.map(lambda batch: batch | {"nothing": None})
    [batches] = list(tb.pair(tf.data.Dataset.range(1), lower, 3))
    assert batches.lower["dense"].shape == (3, 4, 2)
    last = tb.StackedBatches(None, batches.lower).lower_at(2)
    want = dense[[8, 9, 0, 1]]
    np.testing.assert_array_equal(last["dense"], want)
    np.testing.assert_array_equal(tf.sparse.to_dense(last["sparse"]), want)
    assert last["ragged"].to_list() == [[12], [13, 14], [0], [1, 2]]


@pytest.mark.parametrize(
    "lower",
    [
        # Of other lengths, of an unknown shape, and what is not per example.
        tf.data.Dataset.range(1, 8).map(lambda i: tf.ones([i])).padded_batch(3),
        tf.data.Dataset.from_generator(lambda: iter([[1.0]] * 4), tf.float32),
        tf.data.Dataset.zip((tf.data.Dataset.range(8).batch(4), RANGE)),
    ],
)
def test_pair_refuses_batches_that_cannot_be_stacked(lower) -> None:
    with pytest.raises(ValueError, match="`lower_dataset` must have batches of one"):
        tb.pair(tf.data.Dataset.range(1), lower, lower_batches=2)
    assert list(tb.pair(tf.data.Dataset.range(1), lower))  # of one batch a step


def test_pair_says_that_a_dataset_of_unknown_length_is_empty() -> None:
    lower = tf.data.Dataset.range(3).filter(lambda i: i < 0).batch(2)
    with pytest.raises(ValueError, match="`lower_dataset` must not be empty"):
        tb.pair(tf.data.Dataset.range(1), lower, lower_batches=2)


def test_pair_of_unknown_and_infinite_lengths() -> None:
    known = tf.data.Dataset.range(2)
    unknown = tf.data.Dataset.range(6).filter(lambda i: i % 2 == 0)
    assert values(tb.pair(known, unknown)) == [(0, 0), (1, 2), (0, 4)]
    assert values(tb.pair(unknown, known)) == [(0, 0), (2, 1), (4, 0)]
    endless = tb.pair(known, tf.data.Dataset.range(1).repeat())
    assert len(values(endless, 9)) == 9


def test_pair_keeps_nested_elements() -> None:
    upper = tf.data.Dataset.from_tensors((np.ones([8, 2]), np.zeros(8)))
    lower = tf.data.Dataset.from_tensors({"x": np.ones([7, 2])})
    [batches] = list(tb.pair(upper, lower))
    assert batches.upper[0].shape == (8, 2) and batches.lower["x"].shape == (7, 2)


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("chosen", [None, True, False])
def test_pair_turns_tuning_off_unless_told(level: int, chosen: bool | None) -> None:
    """With it on, deleting an iterator took a second after each fit of one second."""
    options = tf.data.Options()
    if chosen is not None:
        options.autotune.enabled = chosen
    datasets = [tf.data.Dataset.range(3), tf.data.Dataset.range(3)]
    datasets[level] = datasets[level].with_options(options)
    paired = tb.pair(*datasets)
    assert paired.options().autotune.enabled is bool(chosen)
    assert values(paired) == [(0, 0), (1, 1), (2, 2)]


# Problem.


def test_projections_are_applied_by_name() -> None:
    problem = tb.Problem(
        lambda x, y, b: x, lambda x, y, b: y, project_upper=lambda x: -x
    )
    assert float(problem.projected_upper(tf.constant(2.0))) == -2.0
    assert float(problem.projected_lower(tf.constant(0.0), tf.constant(2.0))) == 2.0


def methods(inner: tb.InnerSolver) -> dict[str, tb.Method]:
    return {
        "unroll": tb.Unroll(inner),
        "implicit": tb.Implicit(inner, tb.ConjugateGradient(10, rtol=1e-13)),
        "gap": tb.ValueGap(
            tb.InnerSolver(keras.optimizers.SGD(0.3), 2), keras.optimizers.SGD(0.1), 0.5
        ),
        "norm": tb.GradientNorm(keras.optimizers.SGD(0.1), 0.5),
    }


@pytest.mark.parametrize("name", ["unroll", "implicit", "gap", "norm"])
def test_prepare_changes_nothing_but_when_it_is_computed(name: str) -> None:
    """The same encoder inside both losses, or prepared once."""
    generator = np.random.default_rng(0)
    train, check = generator.normal(size=(7, 4)), generator.normal(size=(8, 4))
    index = np.arange(7)[::-1].copy()
    x = {
        "encoder": tf.constant(generator.normal(size=(4, 3))),
        "target": tf.constant(0.7, tf.float64),
    }
    y = tf.constant(generator.normal(size=3))
    data = tb.Batches(tf.constant(check), (tf.constant(train), tf.constant(index)))

    def features(x: Any, inputs: Any) -> Any:
        return tf.tanh(inputs @ x["encoder"])

    def f(x: Any, y: Any, made: Any) -> Any:
        return tf.reduce_mean((tf.linalg.matvec(made, y) - x["target"] ** 2) ** 2)

    def g(x: Any, y: Any, made: Any, index: Any) -> Any:
        picked = tf.gather(made, index[:5])
        fit = tf.reduce_mean((tf.linalg.matvec(picked, y) - 1) ** 2)
        return fit + 0.5 * tf.exp(x["target"]) * tf.reduce_sum(y**2)

    def box(y: Any) -> Any:
        return tf.clip_by_value(y, -0.2, 0.2)

    inside = tb.Problem(
        upper_loss=lambda x, y, batch: f(x, y, features(x, batch)),
        lower_loss=lambda x, y, batch: g(x, y, features(x, batch[0]), batch[1]),
        project_lower=box,
    )
    calls = []

    def prepare(x: Any, batches: tb.Batches) -> tb.Batches:
        calls.append(1)
        inputs, index = batches.lower
        return tb.Batches(features(x, batches.upper), (features(x, inputs), index))

    prepared = tb.Problem(
        upper_loss=f,
        lower_loss=lambda x, y, batch: g(x, y, *batch),
        project_lower=box,
        prepare=prepare,
    )
    method = methods(tb.InnerSolver(keras.optimizers.SGD(0.3), 5))[name]
    steps = [
        method.step(problem, x, y, data, method.init(problem, x, y))
        for problem in (inside, prepared)
    ]
    assert len(calls) == 1
    assert np.abs(steps[0].lower).max() == 0.2  # a bound is met
    for a, b in zip(
        tf.nest.flatten((steps[0].upper_gradient, steps[0].lower, steps[0].metrics)),
        tf.nest.flatten((steps[1].upper_gradient, steps[1].lower, steps[1].metrics)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def test_prepare_of_stacked_batches() -> None:
    """Prepared slices are taken in turn, like others."""
    problem = tb.Problem(
        upper_loss=lambda x, y, batch: 0.5 * y**2,
        lower_loss=lambda x, y, batch: 0.5 * (y - batch) ** 2,
        prepare=lambda x, batches: batches._replace(lower=x * batches.lower),
    )
    data = tb.StackedBatches(None, tf.constant([1.0, 10.0], tf.float64))
    x, y = tf.constant(2.0, tf.float64), tf.constant(0.0, tf.float64)
    inner = tb.InnerSolver(keras.optimizers.SGD(0.5), 2)
    step = tb.Unroll(inner).step(problem, x, y, data, {})
    # y_1 = x / 2, y_2 = y_1 / 2 + 10 x / 2 = 5.25 x; dF/dx = 5.25^2 x
    assert float(step.lower) == pytest.approx(10.5, rel=1e-13)
    assert float(step.upper_gradient) == pytest.approx(5.25**2 * 2, rel=1e-13)


def test_a_linear_solve_takes_the_slice_after_the_inner_steps() -> None:
    """Slices c scale the curvature: H = c. The third of three is the solve's."""
    problem = tb.Problem(
        upper_loss=lambda x, y, batch: y,
        lower_loss=lambda x, y, batch: batch * 0.5 * (y - x) ** 2 + 0.0 * x,
    )
    data = tb.StackedBatches(None, tf.constant([1.0, 2.0, 4.0], tf.float64))
    inner = tb.InnerSolver(keras.optimizers.SGD(0.1), 2)
    solver = tb.FixedPoint(1, rate=0.1)
    x, y = tf.constant(2.0, tf.float64), tf.constant(0.0, tf.float64)
    method = tb.Implicit(inner, solver)
    step = method.step(problem, x, y, data, method.init(problem, x, y))
    # v = rate * f_y = 0.1; dF/dx = -g_xy v = 4 * 0.1
    assert float(step.upper_gradient) == pytest.approx(0.4, rel=1e-12)


@pytest.mark.parametrize("name", ["unroll", "implicit"])
def test_partial_of_the_upper_loss_in_x_may_be_absent(name: str) -> None:
    """Zero, not an error: f = y^2 / 2 only."""
    problem = tb.Problem(
        upper_loss=lambda x, y, batch: 0.5 * y**2,
        lower_loss=lambda x, y, batch: 0.5 * (y - 3 * x) ** 2,
    )
    x, y = tf.constant(2.0, tf.float64), tf.constant(6.0, tf.float64)
    method = methods(tb.InnerSolver(keras.optimizers.SGD(1.0), 1))[name]
    state = method.init(problem, x, y)
    step = method.step(problem, x, y, tb.Batches(None, None), state)
    assert float(step.upper_gradient) == pytest.approx(18.0, rel=1e-12)
