"""Arrays in `tb.pair` and in `fit`: which batches they give, and that a run resumes."""

import functools
import itertools
import math
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from suites import fast_where

import tfbilevel as tb

COUNT, TRUSTED = 10, 4
generator = np.random.default_rng(0)
X = generator.normal(size=(COUNT, 3)).astype("float32")
Y = (X[:, 0] > 0).astype("int32")
XV = generator.normal(size=(TRUSTED, 3)).astype("float32")
YV = (XV[:, 0] > 0).astype("int32")
LOWER, UPPER = (X, Y), (XV, YV)


def permuted(count: int, seed: int, number: int) -> np.ndarray:
    key = tf.constant([seed, number], tf.int64)
    return tf.random.experimental.stateless_shuffle(tf.range(count), key).numpy()


def stream(count: int, size: int, draws: int, seed: int, step: int) -> np.ndarray:
    """The example numbers of one outer step, [draws, size], as documented."""
    steps = math.ceil(math.ceil(count / size) / draws)
    order = permuted(count, seed, step // steps)
    begin = (step % steps) * draws * size
    entries = [order[(begin + i) % count] for i in range(draws * size)]
    return np.reshape(entries, [draws, size])


# The batches.


@pytest.mark.parametrize(
    ("size", "draws", "steps"),
    fast_where(
        lambda size, draws, steps: draws > 1,
        [(3, 1, 4), (2, 2, 3), (4, 3, 1), (5, 1, 2)],
    ),
)
def test_batches_go_through_whole_permutations(size, draws, steps) -> None:
    sizes = tb.Batches(upper=3, lower=size)
    options: dict = {"batch_size": sizes, "seed": 7, "index": True}
    paired = tb.pair(UPPER, LOWER, draws, **options)
    assert len(paired) == steps
    twice = list(paired.repeat(2))
    assert len(twice) == 2 * steps
    for step, (upper, lower) in enumerate(twice):
        want = stream(COUNT, size, draws, 15, step)
        want = want if draws > 1 else want[0]
        np.testing.assert_array_equal(lower[2], want)
        np.testing.assert_array_equal(lower[0], X[want])
        np.testing.assert_array_equal(lower[1], Y[want])
        np.testing.assert_array_equal(upper[0], XV[stream(TRUSTED, 3, 1, 14, step)[0]])
        assert len(upper) == 2
    # Every example once in each epoch, before the last step is completed.
    for epoch in (twice[:steps], twice[steps:]):
        seen = np.concatenate([np.ravel(b.lower[2]) for b in epoch])
        assert sorted(seen[:COUNT]) == list(range(COUNT))
    assert isinstance(twice[0], tb.StackedBatches) == (draws > 1)
    # Any step can be the first one.
    late = tb.pair(UPPER, LOWER, draws, first=5, **options)
    np.testing.assert_array_equal(
        next(iter(late)).lower[2].numpy().ravel(),
        stream(COUNT, size, draws, 15, 5).ravel(),
    )


def test_passes_are_shuffled_as_index_batches_do() -> None:
    paired = tb.pair(UPPER, LOWER, batch_size=(2, 5), index=True, seed=3).repeat(3)
    for level, part, count, size in ((0, 1, TRUSTED, 2), (1, 2, COUNT, 5)):
        want = [i.numpy() for i in tb.index_batches(count, size, 6 + level).take(6)]
        found = [b[level][part].numpy() for b in paired]
        np.testing.assert_array_equal(found, want if level else YV[np.array(want)])


def test_whole_arrays_are_one_batch_in_their_order() -> None:
    paired = tb.pair(XV, X, index=True)
    assert len(paired) == 1
    for upper, (x, index) in paired.repeat(2):
        np.testing.assert_array_equal(upper, XV)
        np.testing.assert_array_equal(x, X)
        np.testing.assert_array_equal(index, range(COUNT))


def test_changed_batches_are_still_numbered_by_step() -> None:
    paired = tb.pair(XV, X, batch_size=2, seed=1)
    options = tf.data.Options()
    changed = paired.map(lambda b: tb.Batches(b.upper, -b.lower))
    changed = changed.prefetch(2).with_options(options).repeat(2)
    assert len(changed) == 10
    for one, other in zip(paired.repeat(2), changed, strict=True):
        np.testing.assert_array_equal(one.lower, -other.lower)
    endless = [b.lower.numpy() for b in paired.repeat().take(12)]
    np.testing.assert_array_equal(endless[:10], [b.lower for b in paired.repeat(2)])


def numbers(dataset: Any, most: int = 99) -> list:
    return [
        (b.upper.numpy().tolist(), b.lower.numpy().tolist())
        for b in itertools.islice(dataset, most)
    ]


def test_arrays_beside_a_dataset() -> None:
    rows, data = np.arange(4), tf.data.Dataset.range
    # An epoch is a pass over the lower data ...
    below = numbers(tb.pair(rows, data(3), batch_size=(2, None)))
    assert [lower for _, lower in below] == [0, 1, 2]
    want = [stream(4, 2, 1, 0, step)[0].tolist() for step in range(3)]
    assert [upper for upper, _ in below] == want
    grouped = tb.pair(rows, data(3), 2, batch_size=2)  # one number: that of arrays
    assert [lower for _, lower in numbers(grouped)] == [[0, 1], [2, 0]]
    # ... and not over before an upper dataset is, which begins again.
    above = numbers(tb.pair(data(3), rows, batch_size=2))
    assert [upper for upper, _ in above] == [0, 1, 2]
    want = [stream(4, 2, 1, 1, step)[0].tolist() for step in range(3)]
    assert [lower for _, lower in above] == want
    short = numbers(tb.pair(data(1), rows, batch_size=2))
    assert short == [(0, lower) for lower in want[:2]]
    assert len(numbers(tb.pair(data(1), rows, batch_size=2).repeat(2))) == 4
    unknown = data(6).filter(lambda i: i % 2 == 0)
    assert [u for u, _ in numbers(tb.pair(unknown, rows, batch_size=2))] == [0, 2, 4]
    assert len(numbers(tb.pair(rows, unknown, batch_size=2))) == 3
    assert len(numbers(tb.pair(data(9).repeat(), rows, batch_size=2), 30)) == 30
    # Without batches of arrays a dataset is treated as always.
    assert [u for u, _ in numbers(tb.pair(data(3), rows))] == [0, 1, 2]


def test_every_kind_of_array() -> None:
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"a": np.arange(4.0), "b": np.arange(4)})
    ragged = tf.RaggedTensor.from_row_lengths(range(6), [1, 2, 1, 2])
    data = {
        "table": table,
        "text": pandas.Series(["a", "b", "c", "d"]),
        "list": [np.arange(4), np.arange(4) > 1],
        "ragged": ragged,
        "nothing": None,
    }
    paired = tb.pair(np.arange(4, dtype="float16"), data, batch_size=2)
    spec = paired.element_spec
    assert spec.upper.dtype == spec.lower["table"].dtype == tf.float32
    order = permuted(4, 1, 0)
    lower = next(iter(paired)).lower
    np.testing.assert_array_equal(lower["table"], table.to_numpy()[order[:2]])
    assert [t.decode() for t in lower["text"].numpy()] == ["abcd"[i] for i in order[:2]]
    np.testing.assert_array_equal(lower["list"][0], order[:2])
    np.testing.assert_array_equal(lower["list"][1], order[:2] > 1)
    assert lower["ragged"].to_list() == [ragged.to_list()[i] for i in order[:2]]
    assert lower["nothing"] is None
    sparse = tf.sparse.from_dense(np.eye(4))
    whole = next(iter(tb.pair(table, (sparse, np.arange(4)))))
    np.testing.assert_array_equal(tf.sparse.to_dense(whole.lower[0]), np.eye(4))


RANGE = tf.data.Dataset.range(3)
WRONG = {
    "numbers": (lambda: tb.pair(3.0, X), ["`upper_dataset`", "3.0"]),
    "list of numbers": (lambda: tb.pair(XV, [1, 2]), ["`lower_dataset`", "asarray"]),
    "scalar tensor": (lambda: tb.pair(tf.ones([]), X), ["one row per example", "()"]),
    "lengths": (
        lambda: tb.pair(UPPER, (X, Y[:9])),
        ["`lower_dataset`", "as many rows", "(10, 3), (9,)"],
    ),
    "empty": (lambda: tb.pair(XV[:0], X), ["`upper_dataset`", "at least one example"]),
    "nothing": (lambda: tb.pair((), X), ["`upper_dataset`", "nothing"]),
    "objects": (
        lambda: tb.pair(np.array([1, "a", None], object), X),
        ["`upper_dataset`", "one kind", "object"],
    ),
    "size above": (
        lambda: tb.pair(UPPER, LOWER, batch_size=5),
        ["`batch_size`", "4 examples of `upper_dataset`", "(upper, lower)"],
    ),
    "size of words": (lambda: tb.pair(XV, X, batch_size="2"), ["`batch_size`"]),
    "size 0": (lambda: tb.pair(XV, X, batch_size=(2, 0)), ["`batch_size`", "1"]),
    "three sizes": (lambda: tb.pair(XV, X, batch_size=(1, 2, 3)), ["a pair"]),
    "size of datasets": (
        lambda: tb.pair(RANGE, RANGE, batch_size=1),
        ["`batch_size` is for arrays"],
    ),
    "size of one dataset": (
        lambda: tb.pair(RANGE, X, batch_size=(1, 2)),
        ["`batch_size` is for arrays"],
    ),
    "index of a dataset": (
        lambda: tb.pair(X, RANGE, index=True),
        ["`index`", "enumerate"],
    ),
    "index of a dictionary": (
        lambda: tb.pair(XV, {"a": X}, index=True),
        ["`lower_dataset`", "tuple", "`index`", "dictionary of a"],
    ),
    "too many lower batches": (
        lambda: tb.pair(XV, X, 4, batch_size=4),
        ["`lower_batches`", "4 of 3"],
    ),
    "lower batches of whole arrays": (lambda: tb.pair(XV, X, 2), ["2 of 1"]),
    "seed": (lambda: tb.pair(XV, X, batch_size=2, seed=0.5), ["`seed`"]),
    "first": (lambda: tb.pair(XV, X, batch_size=2, first=-1), ["`first`"]),
    "sparse": (
        lambda: tb.pair(XV, tf.sparse.from_dense(X), batch_size=2),
        ["`lower_dataset`", "dense", "batch_size=None"],
    ),
    # In fit, by the names of its arguments.
    "no validation data": (
        lambda: untrained().fit(LOWER),
        ["`validation_data`", "upper level", "None"],
    ),
    "split": (
        lambda: untrained().fit(X, Y, validation_split=0.2),
        ["`validation_data`", "validation_split=0.2"],
    ),
    "lengths in fit": (
        lambda: untrained().fit(X, Y[:9], validation_data=UPPER),
        ["`x`", "as many rows"],
    ),
    "empty validation": (
        lambda: untrained().fit(X, Y, validation_data=(XV[:0], YV[:0])),
        ["`validation_data`", "at least one example"],
    ),
    "size above in fit": (
        lambda: untrained().fit(X, Y, 5, validation_data=UPPER),
        ["`batch_size`", "4 examples of `validation_data`"],
    ),
    "index without labels": (
        lambda: untrained().fit(X, validation_data=XV, with_index=True),
        ["`with_index`", "labels"],
    ),
    "batches as validation data": (
        lambda: untrained().fit(X, Y, validation_data=tb.pair(UPPER, LOWER)),
        ["`validation_data`", "not batches of both"],
    ),
    "arrays beside batches": (
        lambda: untrained().fit(tb.pair(UPPER, LOWER), batch_size=3),
        ["`batch_size` is for arrays", "tb.pair"],
    ),
    "index beside batches": (
        lambda: untrained().fit(tb.pair(UPPER, LOWER), with_index=True),
        ["`with_index` is for arrays", "tb.pair"],
    ),
    "one element": (
        lambda: untrained().fit(next(iter(tb.pair(UPPER, LOWER)))),
        ["`x` must be a tf.data.Dataset of tb.Batches"],
    ),
    "no labels for metrics": (
        lambda: untrained(metrics=["accuracy"]).fit(LOWER, validation_data=XV),
        ["`validation_data`", "labels", "metrics"],
    ),
    "weights": (
        lambda: untrained().fit(X, Y, validation_data=UPPER, sample_weight=Y),
        ["`sample_weight`"],
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_gets_one_line(name) -> None:
    call, parts = WRONG[name]
    with pytest.raises(ValueError, match="Received") as error:
        call()
    assert [part for part in parts if part not in str(error.value)] == []
    assert "\n" not in str(error.value)


def test_an_unknown_argument_is_an_error_as_in_keras() -> None:
    with pytest.raises(TypeError, match="batchsize"):
        untrained().fit(X, Y, validation_data=UPPER, batchsize=3)


def test_arrays_are_not_tasks() -> None:
    network = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    weights = tb.ExampleWeights(COUNT)
    model = tb.BilevelModel(weights, network, upper_loss, lower_loss, tasks=2)
    model.compile(method(), "sgd")
    with pytest.raises(ValueError, match="over tasks.*tasks=2"):
        model.fit(LOWER, validation_data=UPPER)


# Training.


def cross_entropy(network: Any, batch: tuple) -> tf.Tensor:
    return tb.sparse_cross_entropy(network(batch[0], training=True), batch[1])


def upper_loss(upper: Any, lower: Any, batch: tuple) -> tf.Tensor:
    return tf.reduce_mean(cross_entropy(lower, batch))


def lower_loss(upper: Any, lower: Any, batch: tuple) -> tf.Tensor:
    return upper.mean(cross_entropy(lower, batch), batch[2])


def method() -> tb.Unroll:
    return tb.Unroll(tb.InnerSolver(keras.optimizers.SGD(0.2), 2))


def untrained(**options: Any) -> tb.BilevelModel:
    keras.utils.set_random_seed(1)
    network = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model = tb.BilevelModel(tb.ExampleWeights(COUNT), network, upper_loss, lower_loss)
    adam = keras.optimizers.Adam(0.1)
    model.compile(method(), adam, jit_compile=False, **options)
    return model


def assert_same(one: tb.BilevelModel, other: tb.BilevelModel) -> None:
    assert one.outer_step == other.outer_step > 0
    for a, b in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


OPTIONS: dict = {"batch_size": (3, 2), "lower_batches": 2, "seed": 5}
STEPS, EPOCHS = 3, 4  # five lower batches, two in a step
ARRAYS = {"with_index": True, "validation_data": UPPER, "verbose": 0, **OPTIONS}


@functools.cache
def trained() -> tb.BilevelModel:
    """On arrays, for all epochs at once."""
    model = untrained()
    model.fit(LOWER, epochs=EPOCHS, **ARRAYS)
    assert model.outer_step == EPOCHS * STEPS
    return model


def test_training_on_arrays_is_training_on_the_same_batches() -> None:
    def by_hand() -> Any:
        for step in range(EPOCHS * STEPS):
            upper = stream(TRUSTED, 3, 1, 10, step)[0]
            lower = stream(COUNT, 2, 2, 11, step).astype("int32")
            yield tb.StackedBatches((XV[upper], YV[upper]), (X[lower], Y[lower], lower))

    want = untrained()
    spec = tb.pair(UPPER, LOWER, 2, batch_size=(3, 2), index=True).element_spec
    data = tf.data.Dataset.from_generator(by_hand, output_signature=spec)
    want.fit(data, epochs=EPOCHS, steps_per_epoch=STEPS, verbose=0)
    assert_same(trained(), want)
    # By position, measured, one epoch after the other, in calls of 2 steps and of 1.
    other = untrained(metrics=["accuracy"], steps_per_execution=2)
    arrays = {**ARRAYS}
    size = arrays.pop("batch_size")
    history = [other.fit(X, Y, size, 1, **arrays).history for _ in range(EPOCHS)]
    assert_same(other, want)
    right = np.mean(other.predict(XV, verbose=0).argmax(axis=1) == YV)
    assert history[-1]["val_accuracy"] == [pytest.approx(right)]
    assert "val_accuracy" not in trained().history.history


def test_sizes_of_batches_where_none_is_given() -> None:
    """Keras's 32, or all if there are fewer."""
    seen = []

    def loss(upper: Any, lower: Any, batch: tuple) -> tf.Tensor:
        seen.append(len(batch[0]))
        return upper.mean(cross_entropy(lower, batch), batch[1])

    network = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model = tb.BilevelModel(tb.ExampleWeights(2), network, loss, loss)
    model.compile(method(), "sgd", run_eagerly=True)
    more = np.zeros([40, 3], "float32"), np.zeros(40, "int32")
    model.fit(more, validation_data=UPPER, verbose=0)
    assert set(seen) == {32, TRUSTED} and model.outer_step == 2


class Killed(Exception):
    pass


class Kill(keras.callbacks.Callback):
    """Ends training in the middle of the third epoch."""

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self.model.outer_step >= 2 * STEPS + 2:
            raise Killed


@pytest.mark.parametrize(
    ("way", "packed"),  # 2 does not divide the steps of an epoch
    [
        ("arrays", 1),
        pytest.param("pair", 2, marks=pytest.mark.slow),
        pytest.param("keras", 1, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_fit_equals_one_that_ran_through(way, packed, tmp_path) -> None:
    data, options = (LOWER,), {"epochs": EPOCHS, **ARRAYS}
    if way != "arrays":
        made = tb.pair(
            UPPER, LOWER, 2, batch_size=OPTIONS["batch_size"], index=True, seed=5
        )
        data, options = (made.prefetch(1),), {"epochs": EPOCHS, "verbose": 0}

    def fit(*callbacks: Any) -> tb.BilevelModel:
        backup = (
            keras.callbacks.BackupAndRestore(str(tmp_path))
            if way == "keras"
            else tb.Backup(tmp_path)
        )
        model = untrained(steps_per_execution=packed)
        model.fit(*data, callbacks=[backup, *callbacks], **options)
        return model

    with pytest.raises(Killed):
        fit(Kill())
    resumed = fit()
    assert resumed.history.epoch == [2, 3]
    assert_same(resumed, trained())


def test_epochs_shorter_than_a_pass_go_on_where_the_last_one_stopped() -> None:
    data = tb.pair(UPPER, LOWER, batch_size=2, index=True)
    one, other = untrained(), untrained()
    one.fit(data, epochs=5, steps_per_epoch=2, verbose=0)
    for _ in range(2):  # with a list of callbacks as Keras makes it
        calls = keras.callbacks.CallbackList([], model=other, add_history=True)
        other.fit(data, callbacks=calls, verbose=0)
    assert_same(one, other)


def test_a_backup_needs_a_known_length(tmp_path: Any) -> None:
    data = tb.pair(UPPER, LOWER, batch_size=2, index=True)
    unknown = data.filter(lambda b: True)
    model = untrained()
    with pytest.raises(ValueError, match="`steps_per_epoch` must be given"):
        model.fit(unknown, callbacks=[tb.Backup(tmp_path)], verbose=0)
    assert model.outer_step == 0
