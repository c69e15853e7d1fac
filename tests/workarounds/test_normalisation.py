"""Hypergradients through normalisation layers.

TensorFlow's own `tf.nn.moments` stops the gradient of the mean inside the variance, so
second derivatives through any layer that calls it are wrong. Here they must equal
central differences of the same computation.
"""

import threading
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from suites import fast_where

import tfbilevel as tb

pytestmark = pytest.mark.usefixtures("no_dense_gradient")

CASES = {
    "batch": (lambda: keras.layers.BatchNormalization(dtype="float64"), (8,)),
    "batch-images": (lambda: keras.layers.BatchNormalization(dtype="float64"), (5, 5)),
    "group": (lambda: keras.layers.GroupNormalization(2, dtype="float64"), (5, 5)),
    "function": (lambda: keras.layers.Lambda(by_hand, dtype="float64"), (8,)),
}


def by_hand(inputs: Any) -> Any:
    mean, variance = tf.nn.moments(inputs, [0])
    return (inputs - mean) * tf.math.rsqrt(variance + 1e-3)


def problem_of(case: str) -> tuple[tb.Problem, Any, Any, tb.Batches]:
    """Scales x of the inputs; y: a layer, the normalisation, a linear layer."""
    build, shape = CASES[case]
    images = len(shape) == 2
    shape = (*shape, 3) if images else shape
    layers = keras.layers
    first: Any = layers.Dense(8, activation="tanh", dtype="float64")
    if images:
        first = layers.Conv2D(4, 2, activation="tanh", dtype="float64")
    network = keras.Sequential(
        [
            keras.Input(shape, dtype="float64"),
            first,
            build(),
            layers.Activation("tanh", dtype="float64"),
            layers.Flatten(dtype="float64"),
            layers.Dense(2, dtype="float64"),
        ]
    )
    function = tb.functional(network)
    generator = np.random.default_rng(0)
    y = [
        tf.constant(0.4 * generator.normal(size=v.shape) + np.array(v))
        for v in function.initial()
    ]
    x = tf.constant(0.1 * generator.normal(size=shape))
    data = tf.constant(generator.normal(size=(6, *shape)))

    def loss(x: Any, y: Any, batch: Any) -> Any:
        logits = function(y, batch * tf.exp(x), training=True)
        labels = tf.constant([0, 1, 0, 1, 1, 0])
        return tf.reduce_mean(
            tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        )

    def upper_loss(x: Any, y: Any, batch: Any) -> Any:
        return loss(tf.zeros_like(x), y, batch)

    return tb.Problem(upper_loss, loss), x, y, tb.Batches(data, data[::-1])


# Every layer stands in the sweep of tests/check/test_check_second_derivatives.py.
@pytest.mark.parametrize(
    "case",
    fast_where(
        {"batch", "function"}.__contains__,
        ["batch", "batch-images", "group", "function"],
    ),
)
def test_second_derivatives_are_central_differences(case):
    problem, x, y, batches = problem_of(case)
    method = tb.Unroll(tb.InnerSolver(keras.optimizers.SGD(0.3), 2))
    report = tb.check_hypergradient(problem, method, x, y, batches, probes=1)
    assert report.error < 1e-6, report


@pytest.mark.parametrize("case", fast_where("batch".__eq__, ["batch", "group"]))
def test_penalties_see_them_too(case):
    """The other file's way to a second derivative: a tape within a tape."""
    problem, x, y, batches = problem_of(case)
    method = tb.GradientNorm(keras.optimizers.SGD(0.1), 1.7)
    report = tb.check_hypergradient(problem, method, x, y, batches, probes=1)
    assert report.error < 1e-6, report


@pytest.mark.slow
def test_forward_mode_sees_them_too():
    problem, x, y, batches = problem_of("batch")
    method = tb.ForwardUnroll(tb.InnerSolver(keras.optimizers.SGD(0.3), 2))
    report = tb.check_hypergradient(problem, method, x, y, batches, probes=1)
    assert report.error < 1e-6, report


def test_tensorflow_s_own_function_is_what_is_wrong():
    """If this fails, TensorFlow was mended and `_workarounds/moments.py` can go."""
    x = tf.constant([[0.3], [-1.2], [0.8]], tf.float64)

    def second(moments: Any) -> np.ndarray:
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                variance = tf.reduce_sum(moments(x, [0])[1])
            gradient = inner.gradient(variance, x)
        return outer.jacobian(gradient, x)[:, 0, :, 0].numpy()

    # d^2 var / dx_i dx_j = 2 / n (delta_ij - 1 / n)
    exact = 2 / 3 * (np.eye(3) - 1 / 3)
    assert not np.allclose(second(tf.nn.moments), exact)
    from tfbilevel._workarounds.moments import moments

    np.testing.assert_allclose(second(moments), exact, rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("keepdims", [False, True])
def test_values_are_tensorflow_s_to_the_last_bit(dtype, keepdims):
    from tfbilevel._workarounds.moments import moments

    values = np.random.default_rng(0).normal(size=(4, 5, 6))
    x = tf.constant(values.astype(dtype))
    for axes in ([0], [0, 2], [0, 1, 2]):
        for ours, theirs in zip(
            moments(x, axes, keepdims=keepdims),
            tf.nn.moments(x, axes, keepdims=keepdims),
            strict=True,
        ):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)


def test_tensorflow_is_left_as_it_was():
    """Also where a loss fails, and where two threads differentiate at once."""
    before = tf.nn.moments
    problem, x, y, batches = problem_of("batch")
    method = tb.Unroll(tb.InnerSolver(keras.optimizers.SGD(0.3), 1))
    seen = []

    def failing(x: Any, y: Any, batch: Any) -> Any:
        seen.append(tf.nn.moments)
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        broken = tb.Problem(problem.upper_loss, failing)
        method.step(broken, x, y, batches, method.init(broken, x, y))
    assert seen[0] is not before and tf.nn.moments is before

    inside, leave = threading.Event(), threading.Event()

    def slow(x: Any, y: Any, batch: Any) -> Any:
        inside.set()
        assert leave.wait(30)
        seen.append(tf.nn.moments)
        return problem.lower_loss(x, y, batch)

    def run() -> None:
        waiting = tb.Problem(problem.upper_loss, slow)
        method.step(waiting, x, y, batches, method.init(waiting, x, y))

    other = threading.Thread(target=run)
    other.start()
    assert inside.wait(30)
    # This one comes and goes while the other one is still at work.
    problem.step(method, x, y, batches, method.init(problem, x, y))
    leave.set()
    other.join()
    assert seen[-1] is seen[0] and tf.nn.moments is before


@pytest.mark.slow
def test_over_tasks_whoever_evaluates_a_loss_first() -> None:
    """The mapped loss keeps its first trace: it must be a differentiable one."""
    problem, x, y, batches = problem_of("batch")
    stacked = tf.nest.map_structure(lambda leaf: tf.stack([leaf, 0.5 * leaf]), batches)
    many = [tf.stack([leaf, 0.9 * leaf]) for leaf in y]
    method = tb.Unroll(tb.InnerSolver(keras.optimizers.SGD(0.3), 3))

    def gradient(looked_at: bool) -> Any:
        tasks = tb.over_tasks(problem, "vectorized")
        if looked_at:
            tasks.lower_loss(x, many, stacked.lower)
            tasks.upper_loss(x, many, stacked.upper)
        state = method.init(tasks, x, many)
        return tasks.step(method, x, many, stacked, state).upper_gradient.numpy()

    np.testing.assert_allclose(gradient(True), gradient(False), rtol=1e-9)
