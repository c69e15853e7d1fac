"""The published logistic regression example: one L2 coefficient per weight.

The numbers are the printed output stored with the example (Grazzi et al.'s
hypergradient package, notebook "logistic regression"), an independent PyTorch
implementation: 1,000 points in 20 dimensions, half of them for training, gradient
descent with rate 0.1 from zero for 100 steps, outer SGD with momentum.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbilevel as tb

STEPS = 100
INNER_LOSSES = {
    0: 0.693147,
    10: 0.628559,
    20: 0.624391,
    30: 0.624111,
    40: 0.624091,
    99: 0.624090,
}
VALIDATION_LOSSES = {
    0: 0.574399,
    10: 0.533768,
    20: 0.361522,
    30: 0.322504,
    40: 0.298765,
    50: 0.294467,
    100: 0.285354,
    990: 0.280506,
}


def data() -> tb.Batches:
    """Draws in the example's order; the split is scikit-learn's, unseeded."""
    generator = np.random.RandomState(1)
    weights = generator.randn(20)
    inputs = generator.randn(1000, 20)
    labels = inputs @ weights + 0.1 * generator.randn(1000) > 0
    order = generator.permutation(1000)
    inputs, labels = inputs.astype("float32"), labels.astype("float32")
    validation, training = order[:500], order[500:]
    return tb.Batches(
        upper=(inputs[validation], labels[validation]),
        lower=(inputs[training], labels[training]),
    )


def cross_entropy(weights: tf.Tensor, batch: tuple) -> tf.Tensor:
    inputs, labels = batch
    logits = tf.linalg.matvec(inputs, weights)
    return tf.reduce_mean(
        tf.nn.sigmoid_cross_entropy_with_logits(labels=labels, logits=logits)
    )


PROBLEM = tb.Problem(
    upper_loss=lambda x, y, batch: cross_entropy(y, batch),
    lower_loss=lambda x, y, batch: (
        cross_entropy(y, batch) + 0.5 * tf.reduce_sum(x * y**2)
    ),
    lower_start=lambda x: tf.zeros_like(x),
    project_upper=lambda x: tf.maximum(x, 1e-8),
)


@pytest.mark.parametrize("t", INNER_LOSSES)
def test_inner_losses(t: int) -> None:
    """The metric `lower_loss` is the loss before the last step, step t of t + 1."""
    inner = tb.InnerSolver(keras.optimizers.SGD(0.1), steps=t + 1)
    method = tb.Unroll(inner, last=1)
    x = tf.ones([20])
    step = method.step(PROBLEM, x, x, data(), method.init(PROBLEM, x, x))
    assert float(step.metrics["lower_loss"]) == pytest.approx(INNER_LOSSES[t], abs=1e-6)


def test_validation_losses() -> None:
    """T-RHG with K = 10: 991 outer steps of SGD, rate 1, momentum 0.9."""
    inner = tb.InnerSolver(keras.optimizers.SGD(0.1), STEPS)
    result = tb.minimize(
        PROBLEM,
        tb.Unroll(inner, last=10),
        upper=tf.ones([20]),
        lower=tf.zeros([20]),
        upper_optimizer=keras.optimizers.SGD(1.0, momentum=0.9),
        batches=data(),
        steps=991,
        trace=lambda point: point.metrics["upper_loss"],
    )
    steps = list(VALIDATION_LOSSES)
    np.testing.assert_allclose(
        result.trace.numpy()[steps], list(VALIDATION_LOSSES.values()), atol=1e-4
    )


@pytest.mark.slow
def test_full_reverse_is_not_the_truncated_one() -> None:
    """The reference values belong to K = 10; so this problem tells K apart."""
    x = tf.ones([20])
    inner = tb.InnerSolver(keras.optimizers.SGD(0.1), STEPS)
    gradients = []
    for last in (None, 10):
        method = tb.Unroll(inner, last=last)
        step = method.step(PROBLEM, x, x, data(), ())
        gradients.append(step.upper_gradient.numpy())
    difference = np.linalg.norm(gradients[0] - gradients[1])
    assert difference > 1e-2 * np.linalg.norm(gradients[0])
