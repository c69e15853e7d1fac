"""Meta-learning as a Keras model: tasks in `BilevelModel`."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbilevel as tb

TASKS, WAYS, SIZE = 3, 2, 4


def network(units: int, seed: int, activation: str | None = None) -> keras.Model:
    initializer = keras.initializers.RandomNormal(stddev=0.5, seed=seed)
    dense = keras.layers.Dense(
        units, activation=activation, kernel_initializer=initializer
    )
    return keras.Sequential([keras.Input((SIZE,)), dense])


def cross_entropy(model: Any, batch: Any) -> Any:
    losses = keras.losses.sparse_categorical_crossentropy(
        batch[1], model(batch[0]), from_logits=True
    )
    return tf.reduce_mean(losses)


def meta_batches(count: int, tasks: int = TASKS) -> tf.data.Dataset:
    generator = np.random.default_rng(0)

    def batch() -> tuple:
        inputs = generator.normal(size=(count, tasks, 6, SIZE)).astype("float32")
        return inputs, np.tile([0, 1] * 3, (count, tasks, 1)).astype("int32")

    return tf.data.Dataset.from_tensor_slices(tb.Batches(upper=batch(), lower=batch()))


def inner(steps: int = 2) -> tb.InnerSolver:
    return tb.InnerSolver(keras.optimizers.SGD(0.3), steps)


def loss(upper: Any, lower: Any, batch: Any) -> Any:
    return cross_entropy(lower, batch)


def encoded(encoder: Any, batches: tb.Batches) -> tb.Batches:
    (query, answers), (support, labels) = batches
    return batches._replace(
        upper=(encoder(query), answers), lower=(encoder(support), labels)
    )


def maml(mapping: str = "auto") -> tb.BilevelModel:
    """The upper model is the start of the lower one."""
    return tb.BilevelModel(
        network(WAYS, 1),
        network(WAYS, 2),
        loss,
        loss,
        lower_start=lambda upper: upper.trainable_variables,
        tasks=TASKS,
        mapping=mapping,
    )


def anil(mapping: str = "auto") -> tb.BilevelModel:
    """A shared encoder, heads that start where the upper level says."""
    return tb.BilevelModel(
        network(SIZE, 3, "tanh"),
        network(WAYS, 4),
        loss,
        loss,
        lower_start="learned",
        prepare=encoded,
        tasks=TASKS,
        mapping=mapping,
    )


# What a file of them does not hold.
FUNCTIONS: dict[Any, dict[str, Any]] = {
    maml: {
        "upper_loss": loss,
        "lower_loss": loss,
        "lower_start": lambda upper: upper.trainable_variables,
    },
    anil: {"upper_loss": loss, "lower_loss": loss, "prepare": encoded},
}


@pytest.mark.parametrize("build", [maml, anil])
def test_fit_is_the_mean_of_the_tasks_own_gradients(build):
    """One step of SGD moves the upper variables by the mean over one-task models."""
    model = build()
    before = [np.array(v) for v in model.upper_variables]
    lower = [np.array(v) for v in model.lower.trainable_variables]
    data = meta_batches(1)
    model.compile(tb.Unroll(inner()), keras.optimizers.SGD(1.0), jit_compile=False)
    model.fit(data, verbose=0)
    moved = [
        b - np.array(v) for b, v in zip(before, model.upper_variables, strict=True)
    ]
    single = build()
    problem = single.problem
    # The losses of one task, from the mapped ones at a stack of one.
    batch = next(iter(data))
    gradients = []
    x = [tf.constant(b) for b in before]
    y = [tf.constant(v)[None] for v in lower]
    method = tb.Unroll(inner())
    start = method.init(problem, x, y)
    alone = tf.function(
        lambda own: problem.step(method, x, y, own, start), autograph=False
    )
    for task in range(TASKS):
        own = tf.nest.map_structure(lambda leaf, t=task: leaf[t : t + 1], batch)
        gradients.append(alone(own).upper_gradient)
    for index, move in enumerate(moved):
        mean = np.mean([g[index] for g in gradients], axis=0)
        np.testing.assert_allclose(move, mean, rtol=1e-4, atol=1e-6)
    # Tasks have variables of their own: the lower model's stay.
    for value, variable in zip(lower, model.lower.trainable_variables, strict=True):
        np.testing.assert_array_equal(value, variable)


def test_adapt_gives_each_task_its_own_solution():
    model = maml()
    data = next(iter(meta_batches(1, tasks=5)))
    got = model.adapt(
        data,
        inner(4),
        lambda upper, lower, batch: (lower(batch.upper[0]), lower.trainable_variables),
    )
    kernel, bias = (np.array(v) for v in model.upper.trainable_variables)
    for task in range(5):
        w, b = kernel.astype("float64"), bias.astype("float64")
        inputs, labels = (np.array(leaf)[task] for leaf in data.lower)
        for _ in range(4):
            logits = inputs @ w + b
            error = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            error = (error - np.eye(WAYS)[labels]) / len(labels)
            w, b = w - 0.3 * inputs.T @ error, b - 0.3 * error.sum(0)
        np.testing.assert_allclose(got[1][0][task], w, rtol=1e-4, atol=1e-5)
        queries = np.array(data.upper[0])[task]
        np.testing.assert_allclose(got[0][task], queries @ w + b, rtol=1e-4, atol=1e-5)


def test_adapt_sees_prepared_batches():
    model = anil()
    data = next(iter(meta_batches(1)))
    features = model.adapt(data, inner(), lambda upper, lower, batch: batch.lower[0])
    encoded = model.upper(np.array(data.lower[0]).reshape(-1, SIZE))
    np.testing.assert_allclose(
        features, np.array(encoded).reshape(TASKS, 6, SIZE), rtol=1e-5, atol=1e-6
    )


def test_adapt_takes_stacked_lower_batches_apart():
    """Their first axis holds draws, their second the tasks."""
    model, data = maml(), next(iter(meta_batches(1)))
    stacked = tb.StackedBatches(
        data.upper, tf.nest.map_structure(lambda leaf: tf.stack([leaf] * 2), data.lower)
    )

    def logits(upper, lower, batch):
        return lower(batch.upper[0])

    np.testing.assert_allclose(
        model.adapt(stacked, inner(), logits),
        model.adapt(data, inner(), logits),
        rtol=1e-5,
    )


def test_adapt_takes_convolutions_in_turn():
    layers = [keras.Input((4, 4, 1)), keras.layers.Conv2D(2, 3), keras.layers.Flatten()]
    start, lower = (keras.Sequential([*layers]) for _ in range(2))
    start = keras.models.clone_model(lower)

    def loss(upper: Any, lower: Any, batch: Any) -> Any:
        return tf.reduce_mean(lower(batch) ** 2)

    model = tb.BilevelModel(
        start,
        lower,
        loss,
        loss,
        lower_start=lambda upper: upper.trainable_variables,
        tasks=2,
    )
    generator = np.random.default_rng(0)
    images = tf.constant(generator.normal(size=(3, 5, 4, 4, 1)), tf.float32)
    data = tb.Batches(upper=images, lower=images)
    outputs = model.adapt(data, inner(1), lambda u, low, b: (low(b.upper), b.upper[0]))
    np.testing.assert_array_equal(outputs[1], images[:, 0])
    for task in range(3):
        alone = keras.models.clone_model(start)
        alone.set_weights(start.get_weights())
        with tf.GradientTape() as tape:
            value = tf.reduce_mean(alone(images[task]) ** 2)
        rate = float(inner(1).optimizer.learning_rate)
        variables = alone.trainable_variables
        gradients = tape.gradient(value, variables)
        for variable, gradient in zip(variables, gradients, strict=True):
            variable.assign_sub(rate * gradient)
        assert rate > 0 and np.abs(gradients[0]).max() > 1e-3
        np.testing.assert_allclose(
            outputs[0][task], alone(images[task]), rtol=1e-4, atol=1e-6
        )


def test_adapt_needs_tasks():
    model = tb.BilevelModel(
        network(2, 0),
        network(2, 1),
        lambda upper, lower, batch: cross_entropy(lower, batch),
        lambda upper, lower, batch: cross_entropy(lower, batch),
    )
    with pytest.raises(ValueError, match="`adapt` solves tasks"):
        model.adapt(next(iter(meta_batches(1))), inner(), lambda *_: 0.0)


@pytest.mark.slow
def test_a_killed_run_over_tasks_resumes_bit_identically(tmp_path):
    def run(epochs: int, folder: Any, load: bool = False) -> list:
        model = anil()
        model.compile(
            tb.Unroll(inner(), end="pessimistic"),
            keras.optimizers.Adam(0.01),
            start_optimizer=keras.optimizers.Adam(0.02),
            jit_compile=False,
        )
        if load:
            model.load_weights(folder / "half.weights.h5")
        data = meta_batches(2)
        model.fit(data, epochs=epochs, verbose=0)
        model.save_weights(folder / "half.weights.h5")
        return [np.array(v) for v in model.upper_variables]

    run(1, tmp_path)
    resumed = run(1, tmp_path, load=True)
    for a, b in zip(run(2, tmp_path), resumed, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("build", [pytest.param(maml, marks=pytest.mark.slow), anil])
def test_a_saved_model_keeps_its_tasks_and_functions(build, tmp_path):
    model = build("sequential")
    model.compile(tb.Unroll(inner()), keras.optimizers.SGD(0.5), jit_compile=False)
    model.save(tmp_path / "model.keras")
    objects = FUNCTIONS[build] | {"method": tb.Unroll(inner())}
    path = tmp_path / "model.keras"
    loaded = keras.saving.load_model(path, custom_objects=objects)
    assert (loaded.tasks, loaded.mapping) == (TASKS, "sequential")
    for one in (model, loaded):
        one.fit(meta_batches(2), verbose=0)
    for a, b in zip(model.upper_variables, loaded.upper_variables, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    gone = "prepare" if build is anil else "lower_start"
    del objects[gone]
    with pytest.raises(ValueError, match=f"Received: no {gone}"):
        keras.saving.load_model(path, custom_objects=objects)


def test_dropout_over_tasks_draws_anew_at_every_outer_step():
    dropout = keras.layers.Dropout(0.5, seed=3)
    lower = keras.Sequential([keras.Input((SIZE,)), dropout, keras.layers.Dense(WAYS)])
    model = tb.BilevelModel(
        network(SIZE, 3, "tanh"),
        lower,
        lambda upper, lower, batch: cross_entropy(lower, (upper(batch[0]), batch[1])),
        lambda upper, lower, batch: tf.reduce_mean(
            keras.losses.sparse_categorical_crossentropy(
                batch[1], lower(upper(batch[0]), training=True), from_logits=True
            )
        ),
        tasks=TASKS,
    )
    model.compile(tb.Unroll(inner()), keras.optimizers.SGD(0.0), jit_compile=False)
    seeds = [np.array(lower.non_trainable_variables[0])]
    for _ in range(2):
        model.fit(meta_batches(1), verbose=0)
        seeds.append(np.array(lower.non_trainable_variables[0]))
    assert len({tuple(seed) for seed in seeds}) == 3
