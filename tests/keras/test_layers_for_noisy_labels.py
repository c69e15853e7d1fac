"""TransitionMatrix, LossWeights and LabelCorrection against NumPy."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbilevel as tb

GENERATOR = np.random.default_rng(0)
EXAMPLES, CLASSES = 5, 3
Z = GENERATOR.normal(size=(EXAMPLES, CLASSES))
GIVEN = np.array([2, 0, 1, 1, 2])
START = np.array([[0.7, 0.2, 0.1], [0.05, 0.9, 0.05], [0.3, 0.1, 0.6]])


def softmax(x):
    shares = np.exp(x - x.max(axis=-1, keepdims=True))
    return shares / shares.sum(axis=-1, keepdims=True)


def derivatives(loss, *variables, compiled):
    """A loss of tensors and its gradient: eagerly, or in a graph."""

    def both(*values):
        with tf.GradientTape() as tape:
            tape.watch(values)
            loss_here = loss(*values)
        gradients = tape.gradient(loss_here, values)
        return loss_here, [tf.convert_to_tensor(one) for one in gradients]

    if compiled:
        both = tf.function(both, autograph=False, jit_compile=compiled == "xla")
    return both(*map(tf.constant, variables))


WAYS = ["", "graph", "xla"]


class Of(keras.layers.Layer):
    """A method of a layer, as `tb.functional` calls it."""

    def __init__(self, layer, function):
        super().__init__(dtype="float64", autocast=False)
        self.layer, self.function = layer, function
        self.built = True

    def call(self, inputs):
        return self.function(*inputs)


# TransitionMatrix.


def test_a_matrix_starts_as_told():
    np.testing.assert_allclose(tb.TransitionMatrix(3, START).matrix(), START, rtol=1e-6)
    of_number = tb.TransitionMatrix(3, 0.7, dtype="float64").matrix()
    want = [[0.7, 0.15, 0.15], [0.15, 0.7, 0.15], [0.15, 0.15, 0.7]]
    np.testing.assert_allclose(of_number, want, rtol=1e-12)
    zeros = tb.TransitionMatrix(3, np.eye(3, dtype=int), dtype="float64")
    np.testing.assert_allclose(zeros.matrix(), np.eye(3), atol=2e-6)
    assert np.all(np.isfinite(zeros.logits.numpy()))


@pytest.mark.parametrize("compiled", WAYS)
def test_corrected_losses_and_their_gradients(compiled):
    transition = tb.TransitionMatrix(3, START, dtype="float64")
    call = tb.functional(Of(transition, transition))
    value, (d_x, d_z) = derivatives(
        lambda x, z: tf.reduce_sum(call([x], (z, GIVEN))),
        np.log(START),
        Z,
        compiled=compiled,
    )
    joint = softmax(Z) * START[:, GIVEN].T
    np.testing.assert_allclose(value, -np.log(joint.sum(1)).sum(), rtol=1e-12)
    posterior = joint / joint.sum(1, keepdims=True)
    np.testing.assert_allclose(d_z, softmax(Z) - posterior, rtol=1e-10)
    # d log T[k, j] / d x[k, m] = (m == j) - T[k, m]
    want = np.zeros((3, 3))
    for row, j in zip(posterior, GIVEN, strict=True):
        want -= row[:, None] * (np.eye(3)[j] - START)
    np.testing.assert_allclose(d_x, want, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(transition.posterior(Z, GIVEN), posterior, rtol=1e-10)


def test_corrected_losses_have_any_leading_axes_and_do_not_underflow():
    transition = tb.TransitionMatrix(3, START)
    z = np.stack([Z, Z + 1.0]).astype("float32")
    given = np.stack([GIVEN, GIVEN])
    once = transition(z[0], given[0])
    np.testing.assert_allclose(transition(z, given), [once, once], rtol=1e-5)
    # All of exp(-1000) is zero: log T[0, 2] = log 0.1 remains.
    far = transition(tf.constant([[0.0, -1000.0, -1000.0]]), tf.constant([2]))
    np.testing.assert_allclose(far, [-np.log(0.1)], rtol=1e-5)
    ruled_out = tb.TransitionMatrix(2, np.eye(2))
    value, (slope,) = derivatives(
        lambda z: tf.reduce_sum(ruled_out(z, tf.constant([1]))),
        np.array([[200.0, 0.0]], "float32"),
        compiled="",
    )
    assert float(value) == pytest.approx(-np.log(1e-6), rel=1e-4)
    assert np.all(np.isfinite(slope))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_precision_is_that_of_the_logits(dtype):
    transition = tb.TransitionMatrix(3, START)
    z = Z.astype(dtype)
    want = -np.log((softmax(z.astype(float)) * START[:, GIVEN].T).sum(1))
    losses, shares = transition(z, GIVEN), transition.posterior(z, GIVEN)
    assert losses.dtype == shares.dtype == dtype
    if dtype == "float16":  # computed in float32, rounded once
        np.testing.assert_array_equal(losses, want.astype(dtype))
    else:
        np.testing.assert_allclose(losses, want, rtol=1e-6)
    labels = tb.LabelCorrection(GIVEN, 3)
    assert labels.loss(z).dtype == dtype
    weights = tb.LossWeights()
    assert weights(z).dtype == "float32" and weights.mean(z[:, 0]).dtype == dtype


def test_a_label_that_only_the_step_knows_is_nan_out_of_range():
    transition = tb.TransitionMatrix(3, START)
    labels = tf.constant([0, 3, 1, -1, 2])
    losses = tf.function(lambda j: transition(Z, j), autograph=False)(labels)
    shares = tf.function(lambda j: transition.posterior(Z, j), autograph=False)(labels)
    assert np.isnan(losses).tolist() == [False, True, False, True, False]
    assert np.isnan(shares).all(1).tolist() == [False, True, False, True, False]
    with pytest.raises(ValueError, match="`labels` must be from 0 to 2.*label 3"):
        transition(Z, np.array([0, 3, 1, 1, 2]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1,), "`classes` must be an integer of at least 2"),
        ((3, 1.0), "`start` must be a finite number, above 0 and below 1"),
        ((3, np.eye(2)), r"`start` must be a number, or a matrix of shape \(3, 3\)"),
        ((3, START.T), "whose rows sum to 1"),
        ((3, 2 * np.eye(3) - START), "`start`.*without negative entries"),
        ((3, np.full((3, 3), np.nan)), "whose rows sum to 1"),
        ((3, "diagonal"), "`start` must be a number, or a matrix.*'diagonal'"),
    ],
)
def test_a_matrix_that_is_none_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tb.TransitionMatrix(*arguments)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (Z[:, :2], np.zeros(5, int), "`logits` must have one entry per class.*s=3"),
        (Z, GIVEN[:4], "`labels` must have the shape of `logits` without"),
        (Z, GIVEN[:, None], "`labels` must have the shape of `logits` without"),
        (Z, GIVEN.astype(float), "`labels` must be integers"),
        (GIVEN, GIVEN, "`logits` must be floating"),
    ],
)
def test_logits_and_labels_that_do_not_fit_are_refused(logits, labels, message):
    transition = tb.TransitionMatrix(3)
    for call in (transition, transition.posterior):
        with pytest.raises(ValueError, match=message):
            call(logits, labels)


# LossWeights.

LOSSES = np.array([0.1, 2.0, 0.7, 5.0])
UNITS = 6


def loss_weights():
    weights = tb.LossWeights((UNITS,), "tanh", dtype="float64")
    generator = np.random.default_rng(1)
    values = [generator.normal(size=v.shape) for v in weights.trainable_variables]
    return weights, values


def by_hand(values, losses):
    """V(l), V'(l), and the hidden layer's outputs."""
    first, shift, last, offset = values
    hidden = np.tanh(losses[:, None] * first + shift)
    v = 1 / (1 + np.exp(-(hidden @ last + offset)))[:, 0]
    slope = v * (1 - v) * (((1 - hidden**2) * first) @ last)[:, 0]
    return v, slope, hidden


@pytest.mark.parametrize("compiled", WAYS)
def test_a_mean_of_weighted_losses_has_the_paper_s_derivatives(compiled):
    """The first derivative holds the weights constant; the second ones do not."""
    weights, values = loss_weights()
    mean = tb.functional(Of(weights, weights.mean))

    def all_derivatives(losses: Any, *values: Any) -> Any:
        with tf.GradientTape(persistent=True) as outer:
            outer.watch((losses, values))
            with tf.GradientTape() as inner:
                inner.watch((losses, values))
                value = mean(values, [losses])
            first: Any = inner.gradient(value, (losses, values))
            d_l, d_x = first
            entry, last = d_l[1], tf.reduce_sum(d_x[2])
        return (
            value,
            d_l,
            d_x,
            outer.gradient(entry, losses),
            outer.gradient(entry, values[2]),
            outer.gradient(last, losses),
        )

    if compiled:
        all_derivatives = tf.function(
            all_derivatives, autograph=False, jit_compile=compiled == "xla"
        )
    value, d_l, d_x, curved, mixed, back = all_derivatives(
        *map(tf.constant, (LOSSES, *values))
    )
    v, slope, hidden = by_hand(values, LOSSES)
    n = len(LOSSES)
    np.testing.assert_allclose(value, np.mean(v * LOSSES), rtol=1e-12)
    np.testing.assert_allclose(d_l, v / n, rtol=1e-12)
    outer_layer = (LOSSES * v * (1 - v)) @ hidden / n
    np.testing.assert_allclose(d_x[2][:, 0], outer_layer, rtol=1e-10)
    np.testing.assert_allclose(curved, [0, slope[1] / n, 0, 0], rtol=1e-10, atol=0)
    per_example = (v * (1 - v))[:, None] * hidden / n
    np.testing.assert_allclose(mixed[:, 0], per_example[1], rtol=1e-10)
    # The same mixed derivative, whichever comes first.
    np.testing.assert_allclose(back, per_example.sum(1), rtol=1e-10)


def test_weights_called_directly_are_the_network_s_with_all_derivatives():
    weights, values = loss_weights()
    call = tb.functional(weights)
    value, (d_l,) = derivatives(
        lambda losses: tf.reduce_sum(call(values, losses)), LOSSES, compiled=""
    )
    v, slope, _ = by_hand(values, LOSSES)
    np.testing.assert_allclose(value, v.sum(), rtol=1e-12)
    np.testing.assert_allclose(d_l, slope, rtol=1e-10)
    square = LOSSES.reshape(2, 2)
    np.testing.assert_allclose(call(values, square), v.reshape(2, 2), rtol=1e-12)


def test_a_column_of_losses_is_a_row_of_them():
    weights, values = loss_weights()
    for variable, one in zip(weights.trainable_variables, values, strict=True):
        variable.assign(one)
    want = np.mean(by_hand(values, LOSSES)[0] * LOSSES)
    np.testing.assert_allclose(weights.mean(LOSSES[:, None]), want, rtol=1e-12)


@pytest.mark.parametrize("hidden", [(), (4, 3)])
def test_weights_start_at_a_half_with_the_hidden_layers_at_random(hidden):
    weights = tb.LossWeights(hidden)
    np.testing.assert_allclose(weights(LOSSES), np.full(4, 0.5), rtol=1e-6)
    shapes = [tuple(v.shape) for v in weights.trainable_variables]
    widths = (1, *hidden, 1)
    pairs = zip(widths[:-1], widths[1:], strict=True)
    assert shapes == [s for a, b in pairs for s in [(a, b), (b,)]]
    for layer, width in zip(weights.dense[:-1], widths[:-2], strict=True):
        spread = np.concatenate([v.numpy().ravel() for v in layer.variables])
        assert len({*spread}) == spread.size and np.abs(spread).max() < width**-0.5


@pytest.mark.parametrize("hidden", [100, "100", (0,), (10, 2.5), (True,)])
def test_widths_that_are_none_are_refused(hidden):
    with pytest.raises(ValueError, match="`hidden.* must be a"):
        tb.LossWeights(hidden)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (np.ones(()), "`losses` of tb.LossWeights.mean must be one per example"),
        (np.ones((3, 2)), "`losses` of tb.LossWeights.mean must be one per example"),
        (np.ones(3, int), "`losses` must be floating"),
    ],
)
def test_losses_that_are_not_one_each_are_refused(losses, message):
    with pytest.raises(ValueError, match=message):
        tb.LossWeights().mean(losses)


# LabelCorrection.


def test_labels_start_at_the_given_ones():
    labels = tb.LabelCorrection(GIVEN, 3, confidence=0.8, dtype="float64")
    want = np.full((5, 3), 0.1)
    want[np.arange(5), GIVEN] = 0.8
    np.testing.assert_allclose(labels(None), want, rtol=1e-12)
    index = np.array([[4, 0], [1, 1]])
    np.testing.assert_allclose(labels(index), want[index], rtol=1e-12)
    np.testing.assert_array_equal(labels.corrected(), GIVEN)
    moved = labels.logits.numpy()
    moved[0] = [0.0, 4.0, 1.0]
    labels.logits.assign(moved)
    assert labels.corrected().numpy().tolist() == [1, *GIVEN[1:]]


@pytest.mark.parametrize("compiled", WAYS)
def test_losses_with_learned_labels_and_their_gradients(compiled):
    index, n = np.array([3, 0, 3]), 4
    x = np.random.default_rng(2).normal(size=(n, 3))
    labels = tb.LabelCorrection(GIVEN[:n], 3, dtype="float64")
    losses = tb.functional(Of(labels, labels.loss))
    weights = np.array([1.0, 10.0, 100.0])
    value, (d_x, d_z) = derivatives(
        lambda x, z: tf.reduce_sum(weights * losses([x], (z, index))),
        x,
        Z[:3],
        compiled=compiled,
    )
    t, log_p = softmax(x)[index], np.log(softmax(Z[:3]))
    each = -(t * log_p).sum(1)
    np.testing.assert_allclose(value, weights @ each, rtol=1e-12)
    np.testing.assert_allclose(
        d_z, weights[:, None] * (softmax(Z[:3]) - t), rtol=1e-10, atol=1e-14
    )
    want = np.zeros((n, 3))
    np.add.at(want, index, -weights[:, None] * t * (log_p + each[:, None]))
    np.testing.assert_allclose(d_x, want, rtol=1e-10, atol=1e-14)


def test_all_examples_in_order_and_a_column_of_indices():
    labels = tb.LabelCorrection(GIVEN[:, None], 3, dtype="float64")
    want = -(labels(None).numpy() * np.log(softmax(Z))).sum(1)
    np.testing.assert_allclose(labels.loss(Z), want, rtol=1e-10)
    column = np.arange(5)[:, None]
    np.testing.assert_allclose(labels.loss(Z, column), want, rtol=1e-10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((GIVEN, 2), "`labels` must be from 0 to 1.*label 2, classes=2"),
        ((GIVEN - 1, 3), "`labels` must be from 0 to 2.*label -1"),
        ((GIVEN.astype(float), 3), "`labels` must be integers"),
        ((np.eye(3, dtype=int), 3), r"`labels` must be integers, one.*\(3, 3\)"),
        ((np.zeros(0, int), 3), "`labels` must be integers"),
        ((7, 3), "`labels` must be integers"),
        ((GIVEN, 1), "`classes` must be an integer of at least 2"),
        ((GIVEN, 3, 0.3), "`confidence` must be a finite number, at least 1 / classes"),
        ((GIVEN, 3, 1.0), "`confidence` must be.*below 1"),
    ],
)
def test_labels_that_are_none_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tb.LabelCorrection(*arguments)


@pytest.mark.parametrize(
    ("logits", "index", "message"),
    [
        (Z[:4], None, "`logits` of tb.LabelCorrection.loss.*like the 5 labels"),
        (Z[:1], np.array([0, 1]), "one row of 3 per example.*like the indices"),
        (Z[:, :2], None, "`logits` of tb.LabelCorrection.loss must be"),
        (Z[0], np.array([0, 1, 2]), "`logits` of tb.LabelCorrection.loss must be"),
        (Z[:2], np.array([0, 5]), "`index` must be from 0 to 4.*tb.LabelCorrection"),
        (Z[:2], np.array([0.0, 1.0]), "`index` must be integers"),
    ],
)
def test_logits_that_do_not_fit_the_labels_are_refused(logits, index, message):
    with pytest.raises(ValueError, match=message):
        tb.LabelCorrection(GIVEN, 3).loss(logits, index)


# All three.

LAYERS = [
    lambda: tb.TransitionMatrix(3, START, name="mine"),
    lambda: tb.TransitionMatrix(3, 0.6, name="mine"),
    lambda: tb.LossWeights((4, 2), "softplus", name="mine"),
    lambda: tb.LabelCorrection(GIVEN, 3, 0.7, name="mine"),
]


@pytest.mark.parametrize("make", LAYERS)
def test_layers_survive_their_configuration_and_their_weights(make, tmp_path):
    layer = make()
    again = keras.layers.deserialize(keras.layers.serialize(layer))
    assert type(again) is type(layer) and again.name == "mine"
    assert again.get_config() == layer.get_config()
    if not isinstance(layer, tb.LossWeights):  # they start at random
        np.testing.assert_allclose(again.logits, layer.logits, rtol=1e-6)
    for variable in layer.trainable_variables:
        variable.assign(np.random.default_rng(3).normal(size=variable.shape))
    again.set_weights(layer.get_weights())
    given = (Z[:, 0],) if isinstance(layer, tb.LossWeights) else (None,)
    given = (Z, GIVEN) if isinstance(layer, tb.TransitionMatrix) else given
    np.testing.assert_array_equal(again(*given), layer(*given))


@pytest.mark.parametrize("make", LAYERS)
def test_a_mixed_policy_leaves_the_layers_in_float32(make):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        layer = make()
    finally:
        keras.config.set_dtype_policy("float32")
    assert {v.dtype for v in layer.trainable_variables} == {"float32"}
    if isinstance(layer, tb.LossWeights):
        assert layer(Z[:, 0]).dtype == tf.float32
        assert layer.dense[0].compute_dtype == "float32"
    elif isinstance(layer, tb.LabelCorrection):
        assert layer(None).dtype == tf.float32
