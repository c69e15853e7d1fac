"""Hypergradients with TransitionMatrix, LossWeights and LabelCorrection."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from suites import fast_where

import tfbilevel as tb

SGD = keras.optimizers.SGD
N, CLASSES, FEATURES = 12, 3, 2
GENERATOR = np.random.default_rng(0)
INPUTS = GENERATOR.normal(size=(N, FEATURES))
GIVEN = GENERATOR.integers(0, CLASSES, N)
TRUSTED = GENERATOR.normal(size=(8, FEATURES)), np.arange(8) % CLASSES
INDEX = np.array([11, 2, 3, 2, 7, 0])  # one example twice


def network(start="glorot_uniform", dtype="float64"):
    dense = keras.layers.Dense(CLASSES, kernel_initializer=start, dtype=dtype)
    return keras.Sequential([keras.Input((FEATURES,), dtype=dtype), dense])


def trusted_loss(upper, lower, batch):
    return tf.reduce_mean(tb.sparse_cross_entropy(lower(batch[0]), batch[1]))


def decay(lower):
    return 0.2 * tf.add_n([tf.reduce_sum(v**2) for v in lower.trainable_variables])


def corrected(upper, lower, batch):
    return tf.reduce_mean(upper(lower(batch[0]), batch[1])) + decay(lower)


def weighted(upper, lower, batch):
    losses = tb.sparse_cross_entropy(lower(batch[0]), batch[1])
    return upper.mean(losses) + decay(lower)


def relabelled(upper, lower, batch):
    losses = upper.loss(lower(batch[0]), batch[2])
    return tf.reduce_mean(losses) + decay(lower)


PAIRS = {
    "transition": (lambda: tb.TransitionMatrix(CLASSES, dtype="float64"), corrected),
    "loss weights": (lambda: tb.LossWeights((4,), "tanh", dtype="float64"), weighted),
    "labels": (lambda: tb.LabelCorrection(GIVEN, 3, dtype="float64"), relabelled),
}
METHODS = {
    "unroll": tb.Unroll(tb.InnerSolver(SGD(0.5), 4)),
    "forward": tb.ForwardUnroll(tb.InnerSolver(SGD(0.5, momentum=0.5), 3)),
    "implicit": tb.Implicit(
        tb.InnerSolver(SGD(1.0), 40), tb.ConjugateGradient(50, rtol=1e-12)
    ),
}


def model_of(name, **options):
    make, lower_loss = PAIRS[name]
    return tb.BilevelModel(make(), network(), trusted_loss, lower_loss, **options)


def moved(upper):
    """Every variable somewhere else than at the start, where much is alike."""
    for number, variable in enumerate(upper.trainable_variables):
        noise = np.random.default_rng(number).normal(size=variable.shape)
        variable.assign(variable + 0.5 * noise)


def values(model):
    return [tf.identity(v.value) for v in model.trainable_variables]


def batches(index):
    return tb.Batches(TRUSTED, (INPUTS[index], GIVEN[index], index))


@pytest.mark.parametrize(
    ("name", "method"),
    fast_where(
        lambda name, method: method == "unroll",
        itertools.product(PAIRS, METHODS),
    ),
)
def test_hypergradients_are_central_differences(name, method):
    model = model_of(name)
    moved(model.upper)
    report = tb.check_hypergradient(
        model.problem,
        METHODS[method],
        values(model.upper),
        values(model.lower),
        batches(INDEX),
        probes=2,
    )
    assert np.abs(report.differences).min() > 1e-5
    assert report.error < 1e-6 and report.noise is not None, report
    assert report.noise < 1e-7, report
    if method == "implicit":
        assert report.implicit_error is not None and report.implicit_error < 1e-6
        assert report.stationarity is not None and report.stationarity < 1e-7


@pytest.mark.slow
def test_lazy_adam_leaves_the_labels_outside_the_batch():
    model = model_of("labels")
    model.compile(METHODS["unroll"], tb.LazyAdam(0.1), jit_compile=False)
    before = model.upper(None).numpy()
    for _ in range(2):
        model.train_on_batch(batches(INDEX))
    model.train_on_batch(batches(np.array([4, 5])))
    change = np.abs(model.upper(None).numpy() - before).max(axis=1)
    assert {*np.flatnonzero(change)} == {*INDEX, 4, 5}
    with pytest.raises(ValueError, match=r"index 12, out of range, n=12"):
        model.train_on_batch(batches(np.array([4, 5]))._replace(lower=bad(12)))


def bad(index):
    return INPUTS[:2], GIVEN[:2], np.array([0, index])


@pytest.mark.parametrize("jit", [False, True])
def test_logits_of_a_size_that_only_the_step_knows_are_refused_by_name(jit):
    """One row of logits for all indices would be broadcast."""

    def first_alone(upper, lower, batch):
        return tf.reduce_mean(upper.loss(lower(batch[0])[:1], batch[2]))

    labels = tb.LabelCorrection(GIVEN, 3)
    model = tb.BilevelModel(labels, network(dtype="float32"), trusted_loss, first_alone)
    model.compile(tb.Unroll(tb.InnerSolver(SGD(0.5), 1)), SGD(1.0), jit_compile=jit)
    parts = INPUTS, GIVEN, np.arange(N)
    data = tf.data.Dataset.from_tensor_slices(parts).batch(5)
    upper = tf.data.Dataset.from_tensors(TRUSTED).repeat()
    with pytest.raises(ValueError, match=r"`logits` of tb.LabelCorrection.loss"):
        model.fit(tb.pair(upper, data), verbose=0)


FUNCTIONS = {"upper_loss": trusted_loss}


@pytest.mark.parametrize("name", PAIRS)
def test_a_saved_model_has_the_same_upper_model(name, tmp_path):
    model = model_of(name)
    moved(model.upper)
    method = METHODS["unroll"]
    model.compile(method, SGD(0.1), jit_compile=False)
    model.save(tmp_path / "model.keras")
    objects = FUNCTIONS | {"lower_loss": PAIRS[name][1], "method": method}
    loaded = keras.saving.load_model(tmp_path / "model.keras", custom_objects=objects)
    assert type(loaded.upper) is type(model.upper)
    assert loaded.upper.get_config() == model.upper.get_config()
    pairs = zip(model.upper.get_weights(), loaded.upper.get_weights(), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


# The whole job, without noise of sampling: the minimum is known.

TRUTH = np.array([[0.7, 0.25, 0.05], [0.05, 0.6, 0.35], [0.3, 0.1, 0.6]])
TEACHER = np.array([[3.0, -1.0, -2.0], [0.0, 2.5, -2.5]])


def shares(x):
    exponentials = np.exp(x - x.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def learned(rate):
    """T and the upper loss after training on how often each label is given.

    P(true class | x) = softmax(x W) with W the teacher, and P(given label | x) is that
    times the truth. So the learned matrix should be the truth.
    """
    inputs = np.random.default_rng(1).normal(size=(300, FEATURES))
    right = shares(inputs @ TEACHER)
    given = right @ TRUTH
    dense = keras.layers.Dense(3, kernel_initializer="zeros", dtype="float64")
    transition = tb.TransitionMatrix(3, start=0.8, dtype="float64")

    def upper_loss(upper, lower, batch):
        return tf.reduce_mean(tb.soft_cross_entropy(lower(inputs), right))

    def lower_loss(upper, lower, batch):
        each = [upper(lower(inputs), np.full(len(inputs), j)) for j in range(3)]
        return tf.reduce_mean(tf.reduce_sum(given * tf.stack(each, axis=1), axis=1))

    model = tb.BilevelModel(
        transition,
        keras.Sequential([keras.Input((FEATURES,), dtype="float64"), dense]),
        upper_loss,
        lower_loss,
    )
    inner = tb.InnerSolver(keras.optimizers.SGD(1.0, momentum=0.9), 10)
    model.compile(tb.Unroll(inner), keras.optimizers.Adam(rate), jit_compile=False)
    nothing = tf.data.Dataset.from_tensors((np.zeros(1), np.zeros(1))).repeat(80)
    model.fit(tb.pair(nothing, nothing), verbose=0)
    last = float(model.problem.upper_loss(values(transition), values(dense), None))
    return transition.matrix().numpy(), last, -np.mean((right * np.log(right)).sum(1))


@pytest.mark.slow
def test_a_matrix_learned_by_hypergradients_is_that_of_the_noise():
    start, frozen, least = learned(rate=0.0)
    found, loss, _ = learned(rate=0.1)
    assert np.abs(start - TRUTH).max() > 0.2
    assert np.abs(found - TRUTH).max() < 0.02
    assert frozen > least + 0.1 and loss < least + 0.002
