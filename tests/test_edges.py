"""What is easily taken wrongly: other precisions, arrays, one step, added losses."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from small_models import (
    EXAMPLES,
    full_batch,
    make,
    mean_square,
    network,
    quadratic,
    unroll,
)

import tfbilevel as tb

SGD = keras.optimizers.SGD


def test_a_mixed_precision_policy_does_not_scale_the_upper_step() -> None:
    """Keras would wrap the optimizer and divide by 32,768 what nobody multiplied."""
    moves = {}
    for policy in ("float32", "mixed_float16"):
        keras.config.set_dtype_policy(policy)
        try:
            model = make()
            before = model.upper.logits.numpy()
            model.fit(full_batch(), verbose=0)
            moves[policy] = model.upper.logits.numpy() - before
        finally:
            keras.config.set_dtype_policy("float32")
    scale = np.abs(moves["float32"]).max()
    assert scale > 1e-3
    np.testing.assert_allclose(
        moves["mixed_float16"], moves["float32"], atol=0.02 * scale
    )


def test_losses_that_layers_add_count_inside_the_problem() -> None:
    layer = keras.layers.Dense(4, activity_regularizer=keras.regularizers.L2(0.5))
    lower = network(layer)

    def with_added(upper: Any, lower: keras.Model, batch: tuple) -> tf.Tensor:
        return mean_square(lower, batch) + tf.add_n(lower.losses)

    model = tb.BilevelModel(tb.ExampleWeights(EXAMPLES), lower, with_added, with_added)
    batch = next(iter(full_batch())).upper
    x = [tf.convert_to_tensor(v) for v in model.upper.trainable_variables]
    y = [tf.convert_to_tensor(v) for v in lower.trainable_variables]
    found = float(model.problem.upper_loss(x, y, batch))
    # Keras's own rule: half of the squares' sum over the number of examples.
    hidden = batch[0] @ layer.kernel.numpy() + layer.bias.numpy()
    added = 0.5 * np.sum(hidden**2) / EXAMPLES
    assert found == pytest.approx(float(mean_square(lower, batch)) + added, rel=1e-5)


@pytest.mark.parametrize("kind", [tf.Variable, np.array])
def test_a_cold_start_stays_where_it_was(kind) -> None:
    """The caller moves its own variables, or arrays, after every step."""
    problem = tb.Problem(
        lambda x, y, b: tf.reduce_sum(y * y),
        lambda x, y, b: 0.5 * tf.reduce_sum((y - x) ** 2),
    )
    half = keras.optimizers.SGD(0.5)
    x = tf.zeros([2])
    for method in (
        tb.Unroll(tb.InnerSolver(half, 1, start="cold")),
        tb.ValueGap(tb.InnerSolver(half, 1), keras.optimizers.SGD(0.1), 1.0),
    ):
        y: Any = kind([4.0, 8.0])
        state = method.init(problem, x, y)
        if kind is tf.Variable:
            y.assign([100.0, 100.0])
        else:
            y[:] = 100.0
        kept = state["start"] if "start" in state else state["auxiliary"]
        np.testing.assert_array_equal(kept, [4.0, 8.0])


@pytest.mark.parametrize("loss_dtype", ["bfloat16", "float64"])
def test_value_gap_of_losses_in_another_precision(loss_dtype: str) -> None:
    def cast(loss: Any) -> Any:
        return lambda x, y, batch: tf.cast(loss(x, y), loss_dtype)

    problem = tb.Problem(
        cast(lambda x, y: 0.5 * tf.reduce_sum((y - 1.0) ** 2)),
        cast(lambda x, y: 0.5 * tf.reduce_sum((y - x) ** 2)),
    )
    batches, x, y = tb.Batches(None, None), tf.constant([2.0]), tf.constant([4.0])
    method = tb.ValueGap(tb.InnerSolver(SGD(0.5), 1), SGD(0.1), 0.5)
    state = method.init(problem, x, y)
    step = method.step(problem, x, y, batches, state)
    # z = 4 - (4 - 2) / 2 = 3; gamma (g_x(y) - g_x(z)) = ((2 - 4) - (2 - 3)) / 2.
    np.testing.assert_allclose(step.upper_gradient, [-0.5], rtol=1e-2)
    assert float(step.metrics["gap"]) == pytest.approx(2.0 - 0.5, rel=1e-2)
    value = method.objective(problem, x, y, batches, state)(x)
    assert float(value) == pytest.approx(4.5 + 0.5 * 1.5, rel=1e-2)


@pytest.mark.parametrize("memory", ["replay", "checkpoint", "tape"])
def test_a_pessimistic_end_of_one_step(memory: str) -> None:
    method = tb.Unroll(tb.InnerSolver(SGD(0.5), 1), end="pessimistic", memory=memory)
    problem, x, y = quadratic(), tf.constant([2.0]), tf.constant([4.0])
    state = method.init(problem, x, y)
    step = tf.function(
        lambda: method.step(problem, x, y, tb.Batches(None, None), state),
        autograph=False,
    )()
    np.testing.assert_allclose(step.upper_gradient, [(3.0 - 1.0) * 0.5])


def test_a_start_may_be_an_array() -> None:
    problem = quadratic(lower_start=lambda x: np.float32([4.0, 5.0]))
    x, y = tf.zeros([2]), tf.zeros([2])
    method = unroll()
    state = method.init(problem, x, y)
    step = method.step(problem, x, y, tb.Batches(None, None), state)
    np.testing.assert_allclose(step.lower, 0.8**3 * np.array([4.0, 5.0]), rtol=1e-6)
    wrong = quadratic(lower_start=lambda x: 4.0)
    with pytest.raises(ValueError, match="`lower_start`.*shape"):
        method.step(wrong, x, y, tb.Batches(None, None), state)


def test_numpy_numbers_are_numbers() -> None:
    inner = tb.InnerSolver(SGD(0.1), np.int64(3))
    assert inner.steps == 3
    method = tb.GradientNorm(SGD(0.1), np.float32(2.0))
    assert float(method.schedule(tf.constant(0))) == 2.0


def test_pair_leaves_no_lower_batch_out() -> None:
    upper, lower = tf.data.Dataset.range(5), tf.data.Dataset.range(3)
    seen = [b.lower.numpy().tolist() for b in tb.pair(upper, lower, lower_batches=2)]
    assert seen == [[0, 1], [2, 0], [1, 2], [0, 1], [2, 0]]


def test_forward_mode_takes_a_gather_of_the_upper_variables() -> None:
    """Its gradient is a list of slices, which no tape differentiates as it is."""
    group, begun = np.array([0, 1, 1, 0]), np.array([2.0, -1.0, 0.5, 3.0])
    problem = tb.Problem(
        lambda x, y, batch: 0.5 * tf.reduce_sum(y**2),
        lambda x, y, batch: 0.5 * tf.reduce_sum(tf.gather(x, group) * (y - 1.0) ** 2),
    )
    x, y = tf.constant([0.5, 2.0], tf.float64), tf.constant(begun)
    method = tb.ForwardUnroll(tb.InnerSolver(SGD(0.1), 1))
    batches = tb.Batches(None, None)
    step = method.step(problem, x, y, batches, method.init(problem, x, y))
    moved = begun - 0.1 * np.array([0.5, 2.0])[group] * (begun - 1)
    want = np.bincount(group, moved * -0.1 * (begun - 1))
    np.testing.assert_allclose(step.upper_gradient, want, rtol=1e-12)


def test_prepare_may_hand_arrays_on() -> None:
    """Batches of NumPy arrays, of which it changes some."""
    targets = np.array([1.0, 2.0])
    problem = tb.Problem(
        lambda x, y, batch: 0.5 * tf.reduce_sum((y * batch[0] - batch[1]) ** 2),
        lambda x, y, batch: 0.5 * tf.reduce_sum((y - batch[0]) ** 2),
        prepare=lambda x, b: tb.Batches(
            (x * b.upper[0], b.upper[1]), (x * b.lower[0], b.lower[1])
        ),
    )
    x, y = tf.constant([0.3, 0.7], tf.float64), tf.zeros([2], tf.float64)
    batches = tb.Batches((np.ones(2), targets), (np.ones(2), targets))
    method = tb.Unroll(tb.InnerSolver(SGD(0.5), 1))
    step = method.step(problem, x, y, batches, method.init(problem, x, y))
    # y_1 = x / 2: f = (x^2 / 2 - t)^2 / 2.
    want = (0.5 * x.numpy() ** 2 - targets) * x.numpy()
    np.testing.assert_allclose(step.upper_gradient, want, rtol=1e-12)
