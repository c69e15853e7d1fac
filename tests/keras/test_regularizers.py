"""A network's own penalties: counted once, as Keras's `fit` counts them."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from suites import fast_where

import tfbilevel as tb

N, D, RATE, STEPS = 6, 3, 0.05, 7
L2 = keras.regularizers.L2
generator = np.random.default_rng(0)
INPUTS = generator.normal(size=(N, D)).astype("float32")
TARGETS = generator.normal(size=(N, 2)).astype("float32")
BATCH = (tf.constant(INPUTS), tf.constant(TARGETS))


@keras.saving.register_keras_serializable("test_regularizers")
class Shrinks(keras.layers.Layer):
    """Adds a loss by `add_loss`."""

    def call(self, inputs: Any) -> Any:
        self.add_loss(0.3 * tf.reduce_mean(tf.square(inputs)))
        return inputs


def network(strength: float = 0.7, seed: int = 1) -> keras.Model:
    """Penalties of kernels, biases, an activity, and by add_loss, one level down."""
    keras.utils.set_random_seed(seed)
    keywords = {"kernel_regularizer": L2(strength), "bias_regularizer": L2(0.4)}
    dense = keras.layers.Dense(4, "tanh", activity_regularizer=L2(0.2), **keywords)
    inner = keras.Sequential([keras.Input((4,)), Shrinks(), keras.layers.Dense(4)])
    inner.layers[-1].kernel_regularizer = None
    frozen = keras.layers.Dense(4, kernel_regularizer=L2(9.0), trainable=False)
    last = keras.layers.Dense(2, bias_initializer="ones", **keywords)
    return keras.Sequential([keras.Input((D,)), dense, inner, frozen, last])


def penalty_by_hand(model: keras.Model, inputs: np.ndarray) -> float:
    first, nested, _, last = model.layers
    hidden = np.tanh(inputs @ first.kernel.numpy() + first.bias.numpy())
    total = 0.2 * np.sum(hidden**2) / len(inputs) + 0.3 * np.mean(hidden**2)
    for layer in (first, last):
        strength = layer.kernel_regularizer.l2
        total += strength * np.sum(layer.kernel.numpy() ** 2)
        total += 0.4 * np.sum(layer.bias.numpy() ** 2)
    return float(total)


def errors(model: keras.Model, batch: tuple) -> Any:
    return tf.reduce_mean((model(batch[0]) - batch[1]) ** 2)


def lower_loss(upper: Any, lower: keras.Model, batch: tuple) -> Any:
    return 2.0 * tf.reduce_mean(upper(None)) * errors(lower, batch)  # at first: 1


def upper_loss(upper: Any, lower: keras.Model, batch: tuple) -> Any:
    return errors(lower, batch)


def make(loss: Any = lower_loss, **options: Any) -> tb.BilevelModel:
    return tb.BilevelModel(tb.ExampleWeights(N), network(), upper_loss, loss, **options)


def values(model: tb.BilevelModel) -> tuple[list, list]:
    x = [tf.convert_to_tensor(v) for v in model.upper.trainable_variables]
    return x, [tf.convert_to_tensor(v) for v in model.lower.trainable_variables]


WAYS = {
    "eager": lambda f: f,
    "graph": lambda f: tf.function(f, autograph=False),
    "xla": lambda f: tf.function(f, autograph=False, jit_compile=True),
}


def whole(upper: Any, lower: Any, batch: tuple) -> Any:
    loss = lower_loss(upper, lower, batch)
    return loss + tf.add_n(lower.losses)


def of_a_part(upper: Any, lower: Any, batch: tuple) -> Any:
    return lower_loss(upper, lower, batch) + tf.add_n(lower.layers[0].losses)


def by_call(upper: Any, lower: Any, batch: tuple) -> Any:
    last = lower.layers[-1]
    added = last.kernel_regularizer(last.kernel)
    return lower_loss(upper, lower, batch) + added


def by_value(upper: Any, lower: Any, batch: tuple) -> Any:
    last = lower.layers[-1]
    added = last.kernel_regularizer(tf.convert_to_tensor(last.kernel))
    added += last.bias_regularizer(tf.reshape(last.bias, [1, -1]))
    return lower_loss(upper, lower, batch) + added


def nested(upper: Any, lower: Any, batch: tuple) -> Any:
    return lower_loss(upper, lower, batch) + tf.add_n(lower.layers[1].losses)


def twice(upper: Any, lower: Any, batch: tuple) -> Any:
    lower(2.0 * batch[0])  # as in Keras, losses of activities are those of the last
    return lower_loss(upper, lower, batch)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "loss", [lower_loss, whole, of_a_part, by_call, by_value, nested, twice]
)
def test_penalties_count_once_whoever_adds_them(loss, way):
    model = make(loss)
    x, y = values(model)
    evaluate = WAYS[way](model.problem.lower_loss)
    plain = float(errors(model.lower, BATCH))
    for _ in range(2):  # what was seen in one evaluation is no matter of the next
        found = float(evaluate(x, y, BATCH))
        expected = plain + penalty_by_hand(model.lower, INPUTS)
        assert found == pytest.approx(expected, rel=1e-5)


def test_ignore_leaves_losses_as_they_are():
    model = make(regularizers="ignore")
    x, y = values(model)
    plain = float(errors(model.lower, BATCH))
    assert float(model.problem.lower_loss(x, y, BATCH)) == pytest.approx(plain)
    with pytest.raises(ValueError, match="`regularizers` must be one of"):
        make(regularizers="sum")


@pytest.mark.parametrize("jit", fast_where(lambda jit: not jit, [False, True]))
def test_the_inner_loop_is_keras_s_own_fit(jit):
    """The same network, penalties and steps: fitted by Keras, and by an inner loop."""
    alone = network()
    alone.compile(keras.optimizers.SGD(RATE), "mse")
    alone.fit(INPUTS, TARGETS, epochs=STEPS, batch_size=N, shuffle=False, verbose=0)
    model = make()
    solver = tb.InnerSolver(keras.optimizers.SGD(RATE), STEPS)
    method = tb.Implicit(solver, tb.ConjugateGradient(1))
    model.compile(method, keras.optimizers.SGD(0.1), jit_compile=jit)
    data = tf.data.Dataset.from_tensors((INPUTS, TARGETS))
    model.fit(tb.pair(data, data), verbose=0)
    for ours, theirs in zip(model.lower.weights, alone.weights, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-6)


class Learned(keras.regularizers.Regularizer):
    """A ridge whose strength is an upper variable."""

    def __init__(self, upper: Any):
        self.upper = upper

    def __call__(self, kernel: Any) -> Any:
        return tf.reduce_sum(self.upper(None)) * tf.reduce_sum(tf.square(kernel))


def test_a_regulariser_that_reads_the_upper_model_is_differentiated():
    """g = mean (y a - b)^2 + s y^2 with s = sigmoid(x), solved to the end:
    y = mean(ab) / (mean(a^2) + s), f = (y - 1)^2."""
    upper = tb.ExampleWeights(1)
    lower = keras.layers.Dense(1, use_bias=False, kernel_regularizer=Learned(upper))
    lower.build((None, 1))
    a, b = INPUTS[:, :1], TARGETS[:, :1]
    model = tb.BilevelModel(
        upper,
        lower,
        lambda upper, lower, batch: tf.reduce_sum((lower.kernel - 1.0) ** 2),
        lambda upper, lower, batch: tf.reduce_mean((lower(a) - b) ** 2),
    )
    x, y = values(model)
    method = tb.Unroll(tb.InnerSolver(keras.optimizers.SGD(0.2), 60))
    step = method.step(
        model.problem, x, y, tb.Batches(0.0, 0.0), method.init(model.problem, x, y)
    )
    curvature, s = np.mean(a**2), 0.5
    solution = np.mean(a * b) / (curvature + s)
    slope = -solution / (curvature + s) * s * (1 - s)
    exact = 2 * (solution - 1) * slope
    assert float(step.upper_gradient[0][0]) == pytest.approx(exact, rel=1e-4)


@pytest.mark.usefixtures("no_dense_gradient")
def test_the_upper_model_s_own_penalty_is_part_of_the_upper_loss():
    keras.utils.set_random_seed(0)
    upper = keras.layers.Dense(1, kernel_regularizer=L2(0.5), use_bias=False)
    upper.build((None, D))
    model = tb.BilevelModel(
        upper,
        network(),
        upper_loss,
        lambda upper, lower, batch: tf.reduce_mean(
            tf.square(upper(batch[0])) * (lower(batch[0]) - batch[1]) ** 2
        ),
    )
    x, y = values(model)
    with_it = float(model.problem.upper_loss(x, y, BATCH))
    added = 0.5 * np.sum(upper.kernel.numpy() ** 2)
    assert with_it == pytest.approx(float(errors(model.lower, BATCH)) + added, rel=1e-5)
    # Its derivative: central differences of f and g together.
    method = tb.Unroll(tb.InnerSolver(keras.optimizers.SGD(RATE), 2))
    batches = tb.Batches(BATCH, BATCH)
    report = tb.check_hypergradient(model.problem, method, x, y, batches, probes=2)
    assert report.error < 5e-3


@pytest.mark.parametrize(
    "mapping", fast_where("vectorized".__eq__, ["vectorized", "sequential"])
)
def test_over_tasks_and_in_adapt_each_task_has_its_own(mapping):
    model = make(tasks=2, mapping=mapping, lower_start="learned")
    x, y = values(model)
    x = [tf.convert_to_tensor(v) for v in model.upper_variables]
    inputs = tf.stack([BATCH[0], 2 * BATCH[0]])
    targets = tf.stack([BATCH[1], BATCH[1]])
    many = [tf.stack([v, v]) for v in y]
    expected = np.mean(
        [
            float(errors(model.lower, (scale * INPUTS, TARGETS)))
            + penalty_by_hand(model.lower, scale * INPUTS)
            for scale in (1.0, 2.0)
        ]
    )
    found = float(model.problem.lower_loss(x, many, (inputs, targets)))
    assert found == pytest.approx(expected, rel=1e-5)
    # One step of adapt is one step of Keras's from the same weights, for each task.
    solver = tb.InnerSolver(keras.optimizers.SGD(RATE), 1)
    batches = tb.Batches((inputs, targets), (inputs, targets))
    model.compile(tb.Unroll(solver), keras.optimizers.SGD(0.1), jit_compile=False)
    kernels = model.adapt(
        batches, solver, lambda upper, lower, task: lower.layers[0].kernel
    )
    for task, scale in enumerate((1.0, 2.0)):
        alone = network()
        alone.compile(keras.optimizers.SGD(RATE), "mse")
        alone.fit(scale * INPUTS, TARGETS, batch_size=N, verbose=0)
        theirs = alone.layers[0].kernel
        np.testing.assert_allclose(kernels[task], theirs, rtol=2e-5, atol=1e-6)


def test_a_saved_model_keeps_the_choice(tmp_path):
    for choice in ("add", "ignore"):
        model = make(regularizers=choice)
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(
            tmp_path / "model.keras",
            custom_objects={"upper_loss": upper_loss, "lower_loss": lower_loss},
        )
        assert loaded.regularizers == choice
        losses = [
            float(m.problem.lower_loss(*values(m), BATCH)) for m in (model, loaded)
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_losses_made_where_none_can_reach_them_are_named():
    def mapped(upper: Any, lower: Any, batch: tuple) -> Any:
        made = tf.map_fn(lambda row: lower(row[None])[0], batch[0])
        return tf.reduce_mean((made - batch[1]) ** 2) * tf.reduce_sum(upper(None))

    model = make(mapped)
    x, y = values(model)
    with pytest.raises(ValueError, match="made outside of loops"):
        tf.function(model.problem.lower_loss, autograph=False)(x, y, BATCH)


def test_keras_is_left_as_it_was():
    before = keras.layers.Layer.losses, L2.__call__

    def failing(upper: Any, lower: Any, batch: Any) -> Any:
        assert keras.layers.Layer.losses is not before[0]
        raise RuntimeError("no loss")

    model = make(failing)
    with pytest.raises(RuntimeError, match="no loss"):
        model.problem.lower_loss(*values(model), BATCH)
    assert (keras.layers.Layer.losses, L2.__call__) == before
