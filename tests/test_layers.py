"""The small upper models, against NumPy."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbilevel as tb

LOGITS = np.array([-1.0, 0.5, 2.0, 0.0], "float32")


def filled(layer):
    layer.logits.assign(LOGITS)
    return layer


def test_example_weights_are_gathered_by_index():
    weights = filled(tb.ExampleWeights(4))
    expected = 1 / (1 + np.exp(-LOGITS))
    np.testing.assert_allclose(weights(None), expected, rtol=1e-6)
    index = np.array([[2, 0], [2, 3]])
    np.testing.assert_allclose(weights(index), expected[index], rtol=1e-6)


def test_a_gathered_weight_sends_its_gradient_home():
    weights = filled(tb.ExampleWeights(4))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(weights(tf.constant([2, 0, 2])) * [1.0, 10.0, 100.0])
    gradient = tf.convert_to_tensor(tape.gradient(loss, weights.logits.value))
    s = 1 / (1 + np.exp(-LOGITS))
    expected = s * (1 - s) * [10.0, 0.0, 101.0, 0.0]
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 2, 5)])
def test_feature_penalties_are_half_the_weighted_squares(shape):
    kernel = np.random.default_rng(0).normal(size=shape).astype("float32")
    axes = tuple(range(1, len(shape)))
    expected = 0.5 * np.sum(np.exp(LOGITS) * np.sum(kernel**2, axis=axes))
    penalties = filled(tb.FeaturePenalties(4))
    np.testing.assert_allclose(penalties(kernel), expected, rtol=1e-5)
    np.testing.assert_allclose(penalties.coefficients, np.exp(LOGITS), rtol=1e-6)


def test_a_kernel_with_other_rows_is_refused():
    with pytest.raises(ValueError, match="`kernel` must have one row per feature"):
        tb.FeaturePenalties(4)(np.ones((3, 4), "float32"))


@pytest.mark.parametrize("jit", [False, True])
def test_feature_penalties_have_both_derivatives(jit):
    """Gradient and Hessian-vector product, written out in NumPy."""
    generator = np.random.default_rng(1)
    kernel, v = generator.normal(size=(2, 4, 3)).astype("float32")
    penalties = filled(tb.FeaturePenalties(4))
    penalty = tb.functional(penalties)

    @tf.function(jit_compile=jit, autograph=False)
    def derivatives(x, y, v):
        with tf.GradientTape() as outer:
            outer.watch((x, y))
            with tf.GradientTape() as inner:
                inner.watch((x, y))
                value = 3.0 * penalty([x], y)
            first = inner.gradient(value, (x, y))
            along = tf.reduce_sum(first[1] * v)
        return first, outer.gradient(along, (x, y))

    (d_x, d_y), (mixed, curved) = derivatives(*map(tf.constant, (LOGITS, kernel, v)))
    c = 3 * np.exp(LOGITS)
    np.testing.assert_allclose(d_x, 0.5 * c * (kernel**2).sum(1), rtol=1e-5)
    np.testing.assert_allclose(d_y, c[:, None] * kernel, rtol=1e-5)
    np.testing.assert_allclose(curved, c[:, None] * v, rtol=1e-5)
    np.testing.assert_allclose(mixed, c * (kernel * v).sum(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [tb.ExampleWeights, tb.FeaturePenalties])
def test_layers_survive_their_configuration(kind):
    layer = kind(4, activation="softplus", name="mine")
    again = keras.layers.deserialize(keras.layers.serialize(layer))
    assert type(again) is kind and again.name == "mine" and again.n == 4
    filled(again)
    values = again(None) if kind is tb.ExampleWeights else again.coefficients
    np.testing.assert_allclose(values, np.log1p(np.exp(LOGITS)), rtol=1e-5)


@pytest.mark.parametrize("n", [0, -3, 2.5, True])
def test_how_many_is_checked(n):
    with pytest.raises(ValueError, match="`n` must be an integer of at least 1"):
        tb.ExampleWeights(n=n)
