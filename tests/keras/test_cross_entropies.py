"""`tb.sparse_cross_entropy` and `tb.soft_cross_entropy` against NumPy."""

import numpy as np
import pytest
import scipy.special
import tensorflow as tf

import tfbilevel as tb

GENERATOR = np.random.default_rng(0)
LOGITS = GENERATOR.normal(size=(2, 3, 4))
CLASSES = np.array([[3, 0, 1], [2, 2, 0]])
SOFT = GENERATOR.uniform(size=(2, 3, 4))  # they do not sum to one
LOGS = scipy.special.log_softmax(LOGITS, axis=-1)


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8"])
@pytest.mark.parametrize("compiled", [False, True])
def test_values_of_class_numbers(dtype, compiled) -> None:
    function = tb.sparse_cross_entropy
    if compiled:
        function = tf.function(function, autograph=False, jit_compile=True)
    found = function(tf.constant(LOGITS), tf.constant(CLASSES.astype(dtype)))
    want = -np.take_along_axis(LOGS, CLASSES[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(found, want, rtol=1e-12)


def test_values_of_probabilities() -> None:
    found = tb.soft_cross_entropy(LOGITS, SOFT)
    np.testing.assert_allclose(found, -(SOFT * LOGS).sum(axis=-1), rtol=1e-12)
    halves = tb.soft_cross_entropy(LOGITS.astype("float32"), SOFT)
    assert halves.dtype == tf.float32


@pytest.mark.parametrize("compiled", [False, True])
def test_both_derivatives_of_both_arguments(compiled) -> None:
    """Of sum l: (sum t) s - t in z and -log s in t; along directions v of z and w of t
    their derivatives are (sum t) J v + (sum w) s - w and (sum v s) - v."""
    v, w = GENERATOR.normal(size=(2, *LOGITS.shape))

    def derivatives(z, t, v, w):
        with tf.GradientTape(persistent=True) as outer:
            outer.watch((z, t))
            with tf.GradientTape() as inner:
                inner.watch((z, t))
                loss = tf.reduce_sum(tb.soft_cross_entropy(z, t))
            first = inner.gradient(loss, (z, t))
            along = tf.reduce_sum(first[0] * v) + tf.reduce_sum(first[1] * w)
        return first, outer.gradient(along, (z, t))

    if compiled:
        derivatives = tf.function(derivatives, autograph=False, jit_compile=True)
    first, second = derivatives(*map(tf.constant, (LOGITS, SOFT, v, w)))
    s = scipy.special.softmax(LOGITS, axis=-1)
    total, mean = SOFT.sum(-1, keepdims=True), (v * s).sum(-1, keepdims=True)
    np.testing.assert_allclose(first[0], total * s - SOFT, atol=1e-12)
    np.testing.assert_allclose(first[1], -LOGS, atol=1e-12)
    of_logits = total * s * (v - mean) + w.sum(-1, keepdims=True) * s - w
    np.testing.assert_allclose(second[0], of_logits, atol=1e-12)
    np.testing.assert_allclose(second[1], mean - v, atol=1e-12)


def test_second_derivative_of_class_numbers() -> None:
    """J v with J = diag s - s s'."""
    z, v = tf.constant(LOGITS), GENERATOR.normal(size=LOGITS.shape)
    with tf.GradientTape() as outer:
        outer.watch(z)
        with tf.GradientTape() as inner:
            inner.watch(z)
            loss = tf.reduce_sum(tb.sparse_cross_entropy(z, CLASSES))
        along = tf.reduce_sum(inner.gradient(loss, z) * v)
    s = scipy.special.softmax(LOGITS, axis=-1)
    want = s * (v - (v * s).sum(-1, keepdims=True))
    np.testing.assert_allclose(outer.gradient(along, z), want, atol=1e-12)


@pytest.mark.parametrize("label", [-1, 4])
def test_a_label_out_of_range_is_an_error_or_not_a_number(label) -> None:
    logits, labels = np.zeros((2, 4), "float32"), np.array([1, label])
    with pytest.raises(ValueError, match=f"from 0 to 3.*Received: label {label} "):
        tb.sparse_cross_entropy(logits, labels)
    compiled = tf.function(tb.sparse_cross_entropy, autograph=False, jit_compile=True)
    found = compiled(tf.constant(logits), tf.constant(labels)).numpy()
    assert np.isfinite(found[0]) and np.isnan(found[1])


@pytest.mark.parametrize(
    ("function", "logits", "labels", "said"),
    [
        (tb.sparse_cross_entropy, np.zeros((2, 3)), np.zeros(2), "must be integers"),
        (
            tb.sparse_cross_entropy,
            np.zeros((2, 3)),
            [[0], [1]],
            "without its last axis",
        ),
        (tb.sparse_cross_entropy, np.zeros((2, 3), int), [0, 1], "must be floating"),
        (tb.sparse_cross_entropy, 1.0, 0, r"\[..., classes\]"),
        (tb.soft_cross_entropy, np.zeros((2, 3)), np.zeros((2, 3), int), "be floating"),
        (tb.soft_cross_entropy, np.zeros((2, 3)), np.zeros(3), "the shape of `logits`"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(
    function, logits, labels, said
) -> None:
    with pytest.raises(ValueError, match=said):
        function(logits, labels)
