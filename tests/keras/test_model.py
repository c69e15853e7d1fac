"""BilevelModel: fit, callbacks, saving, resuming, and what it refuses."""

import gc
import os
import pathlib
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from suites import fast_where

import tfbilevel as tb
from tfbilevel._keras import outer_step

TRAIN, VALIDATION, FEATURES, CLASSES = 7, 6, 4, 3


def arrays(seed=0):
    generator = np.random.default_rng(seed)
    train = generator.normal(size=(TRAIN, FEATURES)).astype("float32")
    validation = generator.normal(size=(VALIDATION, FEATURES)).astype("float32")
    return (
        (train, generator.integers(0, CLASSES, TRAIN)),
        (validation, generator.integers(0, CLASSES, VALIDATION)),
    )


def full_batch(repeat=1):
    train, validation = arrays()
    full = tf.data.Dataset.from_tensors
    return tb.pair(full(validation), full(train)).repeat(repeat)


def network(*layers, seed=1):
    keras.utils.set_random_seed(seed)
    dense = [keras.layers.Dense(5, "tanh"), *layers, keras.layers.Dense(CLASSES)]
    return keras.Sequential([keras.Input((FEATURES,)), *dense])


def cross_entropy(model, batch, **keywords):
    return tf.nn.sparse_softmax_cross_entropy_with_logits(
        batch[1], model(batch[0], **keywords)
    )


def upper_loss(upper, lower, batch):
    return tf.reduce_mean(cross_entropy(lower, batch))


def lower_loss(upper, lower, batch):
    return tf.reduce_mean(upper(None) * cross_entropy(lower, batch, training=True))


def inner(steps=4, **keywords):
    return tb.InnerSolver(keras.optimizers.SGD(0.3), steps, **keywords)


def unroll():
    return tb.Unroll(inner())


def value_gap():
    ramp = tb.LinearRamp(0.0, 1.0, 5)
    return tb.ValueGap(inner(1), keras.optimizers.Adam(0.05), ramp)


def implicit():
    return tb.Implicit(
        inner(start="cold"), tb.ConjugateGradient(9, damping=3.0, warm_start=True)
    )


def make(method=None, *layers, optimizer=None, jit_compile=False, **keywords):
    model = tb.BilevelModel(
        tb.ExampleWeights(TRAIN), network(*layers), upper_loss, lower_loss
    )
    model.compile(
        method or unroll(),
        optimizer or keras.optimizers.Adam(0.1),
        jit_compile=jit_compile,
        **keywords,
    )
    return model


def weights(model):
    return [v.numpy() for v in model.upper.variables + model.lower.variables]


def assert_same(a, b):
    for left, right in zip(a, b, strict=True):
        np.testing.assert_array_equal(left, right)


def assert_close(a, b, rtol=1e-5):
    for left, right in zip(a, b, strict=True):
        np.testing.assert_allclose(left, right, rtol=rtol, atol=1e-6)


METHODS = {
    "unroll": unroll,
    "value_gap": value_gap,
    "implicit": implicit,
    "gradient_norm": lambda: tb.GradientNorm(keras.optimizers.SGD(0.1), 2.0),
}


@pytest.mark.parametrize("name", fast_where("value_gap".__eq__, METHODS))
def test_fit_does_what_minimize_does_on_plain_tensors(name):
    """The same losses written over tensors, through the other loop."""
    model = make(METHODS[name](), optimizer=keras.optimizers.SGD(2.0))
    functional = tb.functional(model.lower)
    lower = functional.initial()

    def entropy(y, batch):
        return tf.nn.sparse_softmax_cross_entropy_with_logits(
            batch[1], functional(y, batch[0])
        )

    problem = tb.Problem(
        lambda x, y, batch: tf.reduce_mean(entropy(y, batch)),
        lambda x, y, batch: tf.reduce_mean(tf.sigmoid(x) * entropy(y, batch)),
    )
    train, validation = arrays()
    result = tb.minimize(
        problem,
        METHODS[name](),
        tf.zeros([TRAIN]),
        lower,
        keras.optimizers.SGD(2.0),
        tb.Batches(upper=validation, lower=train),
        steps=6,
    )
    model.fit(full_batch(3), epochs=2, verbose=0)
    assert_close(weights(model), [result.upper.numpy(), *map(np.array, result.lower)])


def test_history_reports_the_means_of_the_steps_metrics():
    model = make()
    rows = []
    for _ in range(3):
        x = [tf.convert_to_tensor(v.value) for v in model.upper.trainable_variables]
        y = [tf.convert_to_tensor(v.value) for v in model.lower.trainable_variables]
        batches = next(iter(full_batch()))
        step = model.method.step(model.problem, x, y, batches, {})
        rows.append(float(step.metrics["upper_loss"]))
        model.fit(full_batch(), epochs=1, verbose=0)
    again = make()
    history = again.fit(full_batch(3), epochs=1, verbose=0).history
    assert history["upper_loss"][0] == pytest.approx(np.mean(rows), rel=1e-6)
    assert set(history) == {"upper_loss", "lower_loss"}


def test_steps_per_execution_and_jit_change_nothing():
    plain, packed, xla = make(), make(steps_per_execution=4), make(jit_compile=True)
    for model in (plain, packed, xla):
        model.fit(full_batch(8), epochs=1, verbose=0)
        assert model.outer_step == 8
    assert_close(weights(packed), weights(plain))
    assert_close(weights(xla), weights(plain), rtol=1e-4)


def test_eager_mode_equals_compiled_mode():
    compiled, eager = make(value_gap()), make(value_gap(), run_eagerly=True)
    for model in (compiled, eager):
        model.fit(full_batch(3), epochs=1, verbose=0)
    assert_close(weights(eager), weights(compiled))


@pytest.mark.parametrize(
    "batch",
    [
        pytest.param(tf.ragged.constant([[1.0, 2.0], [3.0]]), id="ragged"),
        pytest.param(tf.sparse.from_dense([[1.0, 0.0]]), id="sparse"),
        pytest.param(tf.zeros([0, 3]), id="empty", marks=pytest.mark.slow),
        pytest.param(tf.constant(1.0), id="scalar", marks=pytest.mark.slow),
    ],
)
def test_automatic_compilation_takes_batches_that_cannot_be_turned(batch):
    def loss(upper, lower, batch):
        gap = lower.trainable_variables[0] - upper.trainable_variables[0]
        return tf.reduce_sum(tf.square(gap))

    layer = keras.layers.Dense(2, use_bias=False)
    layer.build((None, 3))
    model = tb.BilevelModel(tb.ExampleWeights(1), layer, loss, loss)
    inner = tb.InnerSolver(keras.optimizers.SGD(0.1), 3)
    model.compile(tb.Unroll(inner), keras.optimizers.SGD(0.1), jit_compile="auto")
    before = layer.kernel.numpy()  # x is 0: every step takes a fifth of y
    one = tf.data.Dataset.from_tensors(batch)
    model.fit(tb.pair(one, one), verbose=0)
    np.testing.assert_allclose(layer.kernel, 0.8**3 * before, rtol=1e-5)


@pytest.mark.parametrize("xla", [True, False])
def test_automatic_compilation_takes_what_was_faster(xla, monkeypatch):
    monkeypatch.setattr(outer_step, "faster_with_xla", lambda *arguments: xla)
    model = make(jit_compile="auto")
    batches = next(iter(full_batch()))
    model._ready(batches, lambda: batches)
    assert model.jit_compile is xla


@pytest.mark.slow
def test_automatic_compilation_decides_without_touching_variables():
    auto, plain = make(jit_compile="auto"), make()
    auto._ensure_carried()
    before, batches = weights(auto), next(iter(full_batch()))
    auto._ready(batches, lambda: batches)
    assert_same(before, weights(auto))
    assert int(auto._progress.compilation.numpy()) in (1, 2)
    auto.fit(full_batch(5), verbose=0)
    plain.fit(full_batch(5), verbose=0)
    assert_close(weights(auto), weights(plain), rtol=1e-4)


def test_one_trace_over_many_steps():
    traces = []

    def counted(upper, lower, batch):
        traces.append(1)
        return upper_loss(upper, lower, batch)

    model = tb.BilevelModel(tb.ExampleWeights(TRAIN), network(), counted, lower_loss)
    model.compile(unroll(), keras.optimizers.SGD(0.1), jit_compile=False)
    model.fit(full_batch(1), epochs=2, verbose=0)
    # The metrics, made when their names are known, do not make it trace again.
    assert len(traces) == 1
    model.fit(full_batch(20), epochs=2, verbose=0)
    assert len(traces) == 1


@pytest.mark.slow
def test_memory_is_flat_over_hundreds_of_steps():
    def resident():
        gc.collect()
        pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20

    model = make(value_gap(), keras.layers.Dense(8000))
    assert model.lower.count_params() > 70_000  # a copy per step: 80 MiB
    model.fit(full_batch(100), verbose=0)
    before = resident()
    model.fit(full_batch(150), epochs=2, verbose=0)
    # One kept graph, tape or copy of the weights per step would be far above this.
    assert resident() - before < 15


def test_projections_hold_after_every_step():
    model = tb.BilevelModel(
        tb.ExampleWeights(TRAIN),
        network(),
        upper_loss,
        lower_loss,
        project_upper=lambda x: [tf.clip_by_value(v, -0.05, 0.05) for v in x],
        project_lower=lambda y: [tf.clip_by_value(v, -0.2, 0.2) for v in y],
    )
    model.compile(unroll(), keras.optimizers.Adam(0.1), jit_compile=False)
    model.fit(full_batch(4), verbose=0)
    assert np.abs(model.upper.logits.numpy()).max() == pytest.approx(0.05)
    assert max(np.abs(v).max() for v in weights(model)[1:]) <= 0.2 + 1e-7


def test_learned_start_is_differentiated():
    """MAML's shape: upper and lower are networks, inner solves start at upper."""
    upper, lower = network(seed=3), network(seed=4)
    model = tb.BilevelModel(
        upper,
        lower,
        upper_loss,
        lambda upper, lower, batch: tf.reduce_mean(cross_entropy(lower, batch)),
        lower_start=lambda upper: upper.trainable_variables,
    )
    model.compile(unroll(), keras.optimizers.SGD(1.0), jit_compile=False)
    start = [v.numpy() for v in upper.trainable_variables]
    train, validation = arrays()
    values = [tf.Variable(v) for v in start]
    functional = tb.functional(lower)

    def loss(y, batch):
        return tf.reduce_mean(
            tf.nn.sparse_softmax_cross_entropy_with_logits(
                batch[1], functional(y, batch[0])
            )
        )

    with tf.GradientTape() as tape:
        y = [tf.convert_to_tensor(v) for v in values]
        for _ in range(4):
            with tf.GradientTape() as step:
                step.watch(y)
                value = loss(y, train)
            y = [v - 0.3 * g for v, g in zip(y, step.gradient(value, y), strict=True)]
        value = loss(y, validation)
    gradients = tape.gradient(value, values)
    model.fit(full_batch(), verbose=0)
    moved = [v.numpy() for v in upper.trainable_variables]
    expected = [v - g.numpy() for v, g in zip(start, gradients, strict=True)]
    assert_close(moved, expected)


def test_evaluate_and_predict_are_of_the_lower_model():
    model = make(metrics=[keras.metrics.SparseCategoricalAccuracy("accuracy")])
    (inputs, labels), _ = arrays()
    data = tf.data.Dataset.from_tensor_slices((inputs, labels)).batch(3)
    history = model.fit(full_batch(), validation_data=data, verbose=0).history
    predicted = np.argmax(model.lower(inputs).numpy(), axis=1)
    expected = np.mean(predicted == labels)
    assert history["val_accuracy"][-1] == pytest.approx(expected)
    assert model.evaluate(data, verbose=0, return_dict=True) == {
        "accuracy": pytest.approx(expected)
    }
    assert_close([model.predict(inputs, verbose=0)], [model.lower(inputs).numpy()])


def test_evaluate_is_of_the_model_at_rest_and_weighted():
    """No dropout, moving statistics that are read only, a weight per example."""
    layers = [keras.Input((FEATURES,)), keras.layers.BatchNormalization()]
    layers += [keras.layers.Dropout(0.5), keras.layers.Dense(CLASSES)]
    lower = keras.Sequential(layers)
    lower.layers[0].set_weights([np.full(FEATURES, v) for v in (2.0, 0.5, 0.3, 4.0)])
    model = tb.BilevelModel(tb.ExampleWeights(TRAIN), lower, upper_loss, lower_loss)
    metrics = [
        keras.metrics.SparseCategoricalCrossentropy(name, from_logits=True)
        for name in ("plain", "weighted")
    ]
    model.compile(
        unroll(),
        keras.optimizers.Adam(0.1),
        metrics=metrics[:1],
        weighted_metrics=metrics[1:],
        jit_compile=False,
    )
    (inputs, labels), _ = arrays()
    by = np.linspace(0.1, 3.0, len(labels)).astype("float32")
    before = weights(model)
    data = tf.data.Dataset.from_tensors((inputs, labels, by))
    found = model.evaluate(data, verbose=0, return_dict=True)
    assert_same(before, weights(model))
    gamma, beta, mean, variance = (np.float64(v) for v in (2.0, 0.5, 0.3, 4.0))
    kernel, bias = (np.float64(v) for v in lower.layers[-1].get_weights())
    scaled = gamma * (inputs - mean) / np.sqrt(variance + 1e-3) + beta
    logits = scaled @ kernel + bias
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels]
    assert found["plain"] == pytest.approx(losses.mean(), rel=1e-5)
    assert found["weighted"] == pytest.approx((by * losses).sum() / by.sum(), rel=1e-5)


def test_callbacks_work(tmp_path):
    model = make()
    callbacks = [
        keras.callbacks.CSVLogger(str(tmp_path / "log.csv")),
        keras.callbacks.TensorBoard(str(tmp_path / "tensorboard")),
        keras.callbacks.ModelCheckpoint(
            str(tmp_path / "best.weights.h5"),
            monitor="upper_loss",
            mode="min",
            save_best_only=True,
            save_weights_only=True,
        ),
        keras.callbacks.EarlyStopping(
            monitor="upper_loss", mode="min", min_delta=1e9, patience=2
        ),
    ]
    history = model.fit(full_batch(2), epochs=9, verbose=0, callbacks=callbacks)
    assert len(history.history["upper_loss"]) == 3  # patience 2 after the first
    header, *rows = (tmp_path / "log.csv").read_text().splitlines()
    assert len(rows) == 3
    logged = float(rows[0].split(",")[header.split(",").index("upper_loss")])
    assert logged == pytest.approx(history.history["upper_loss"][0])
    assert list((tmp_path / "tensorboard").rglob("events*"))
    other = make()
    other.load_weights(str(tmp_path / "best.weights.h5"))
    best = np.argmin(history.history["upper_loss"])
    assert other.outer_step == 2 * (best + 1)


# The one that carries most, and one that carries a linear system's solution.
@pytest.mark.parametrize(
    "name", fast_where("value_gap".__eq__, ["value_gap", "implicit"])
)
def test_saved_weights_continue_to_the_last_bit(name, tmp_path):
    through, second = make(METHODS[name]()), make(METHODS[name]())
    through.fit(full_batch(5), epochs=1, verbose=0)
    through.save_weights(str(tmp_path / "half.weights.h5"))
    through.fit(full_batch(5), epochs=1, verbose=0)
    second.load_weights(str(tmp_path / "half.weights.h5"))
    second.fit(full_batch(5), epochs=1, verbose=0)
    assert_same(weights(through), weights(second))


@pytest.mark.slow
def test_keras_backup_and_restore_resumes_to_the_last_bit(tmp_path):
    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 3:
                raise KeyboardInterrupt

    through = make(value_gap())
    through.fit(full_batch(4), epochs=6, verbose=0)
    backup = keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))
    with pytest.raises(KeyboardInterrupt):
        make(value_gap()).fit(
            full_batch(4), epochs=6, verbose=0, callbacks=[backup, Interrupt()]
        )
    begun = []
    first = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: begun.append(resumed.outer_step)
    )
    resumed = make(value_gap())
    backup = keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))
    resumed.fit(full_batch(4), epochs=6, verbose=0, callbacks=[backup, first])
    assert begun[0] == 12 and resumed.outer_step == 24
    assert_same(weights(through), weights(resumed))


EPOCHS = 30


def fit_with_backup(out):
    """The model, and the outer step that it began at."""
    model, begun = make(value_gap(), jit_compile="auto"), []
    tell = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: begun.append(model.outer_step),
        on_epoch_end=lambda epoch, logs: (out / "epoch").write_text(str(epoch)),
    )
    backup = tb.Backup(out / "backup", 5)
    model.fit(full_batch(5), epochs=EPOCHS, verbose=0, callbacks=[backup, tell])
    return model, begun[0]


KILLED = """
import pathlib, sys
sys.path[:0] = {tests!r}
import test_model
test_model.fit_with_backup(pathlib.Path({out!r}))
"""


@pytest.mark.slow
def test_a_fit_killed_and_resumed_equals_one_that_ran_through(tmp_path):
    """SIGKILL in the middle of training, whatever it was doing, then resumed in another
    process: this one."""
    tests = [str(folder) for folder in pathlib.Path(__file__).parents[:2]]
    code = KILLED.format(tests=tests, out=str(tmp_path))
    victim = subprocess.Popen([sys.executable, "-c", code], env=os.environ)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (tmp_path / "epoch").exists() and (tmp_path / "epoch").read_text() > "2":
            break
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    resumed, begun = fit_with_backup(tmp_path)
    assert begun >= 5  # not from the start, which would end the same
    # The compilation that the first sitting chose holds for the second one.
    through = make(value_gap(), jit_compile=resumed.jit_compile)
    through.fit(full_batch(5), epochs=EPOCHS, verbose=0)
    assert through.outer_step == resumed.outer_step == 5 * EPOCHS
    assert_same(weights(through), weights(resumed))


def test_a_fit_after_a_resumed_one_trains(tmp_path):
    """Keras's own callback leaves the model believing that it has begun already."""
    for _ in range(2):  # the second one resumes
        model = make()
        backup = tb.Backup(tmp_path, 2)
        model.fit(full_batch(2), epochs=3, verbose=0, callbacks=[backup])
    assert model.outer_step == 6
    model.fit(full_batch(2), epochs=2, verbose=0)
    assert model.outer_step == 10


def test_batch_normalization_statistics_move_once_per_inner_step():
    normalise = keras.layers.BatchNormalization(momentum=0.75)
    model = make(unroll(), normalise)
    (inputs, _), _ = arrays()
    model.fit(full_batch(), verbose=0)
    hidden = model.lower.layers[0](inputs).numpy()  # with the weights after the step
    np.testing.assert_allclose(
        normalise.moving_mean.numpy(),
        (1 - 0.75**4) * hidden.mean(axis=0),
        rtol=1e-5,
        atol=1e-6,
    )
    np.testing.assert_allclose(
        normalise.moving_variance.numpy(),
        0.75**4 + (1 - 0.75**4) * hidden.var(axis=0),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.usefixtures("no_dense_gradient")
def test_dropout_masks_are_fixed_within_a_step_and_new_in_the_next():
    dropout = keras.layers.Dropout(0.5, seed=3)
    model = make(unroll(), dropout)
    x = [tf.convert_to_tensor(v.value) for v in model.upper.trainable_variables]
    y = [tf.convert_to_tensor(v.value) for v in model.lower.trainable_variables]
    lower = next(iter(full_batch())).lower
    first = float(model.problem.lower_loss(x, y, lower))
    assert float(model.problem.lower_loss(x, y, lower)) == first
    model.fit(full_batch(), verbose=0)
    assert float(model.problem.lower_loss(x, y, lower)) != first
    report = tb.check_hypergradient(
        model.problem, unroll(), x, y, next(iter(full_batch())), probes=2
    )
    assert report.error < 5e-3  # float32: one function throughout


class Breaks:
    """An upper loss that is NaN at one outer step, by a counter in the data."""

    def __call__(self, upper, lower, batch):
        inputs, labels, poison = batch
        loss = tf.reduce_mean(cross_entropy(lower, (inputs, labels)))
        return loss + tf.cast(poison, loss.dtype)


def poisoned(steps, bad):
    train, validation = arrays()
    poison = np.zeros(steps, "float32")
    poison[bad] = np.nan
    upper = tf.data.Dataset.from_tensor_slices(poison).map(
        lambda p: (validation[0], validation[1], p)
    )
    return tb.pair(upper, tf.data.Dataset.from_tensors(train))


@pytest.mark.parametrize("packed", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_nonfinite_raises_and_keeps_everything_from_before(packed):
    def build():
        model = tb.BilevelModel(
            tb.ExampleWeights(TRAIN), network(), Breaks(), lower_loss
        )
        model.compile(
            value_gap(),
            keras.optimizers.Adam(0.1),
            jit_compile=False,
            steps_per_execution=packed,
        )
        return model

    model = build()
    with pytest.raises(tb.NonFiniteError, match="upper loss .* outer step 4"):
        model.fit(poisoned(9, bad=4), verbose=0)
    reference = build()
    reference.fit(poisoned(9, bad=8).take(4), verbose=0)
    assert model.outer_step == 4
    assert_same(weights(model), weights(reference))
    assert_same(
        [v.numpy() for v in model.optimizer.variables],
        [v.numpy() for v in reference.optimizer.variables],
    )


def test_nonfinite_steps_can_be_skipped_and_are_counted():
    model = tb.BilevelModel(tb.ExampleWeights(TRAIN), network(), Breaks(), lower_loss)
    model.compile(
        value_gap(), keras.optimizers.Adam(0.1), jit_compile=False, on_nonfinite="skip"
    )
    history = model.fit(poisoned(8, bad=[2, 5]), verbose=0).history
    assert history["skipped"] == [2.0]
    assert np.isfinite(history["upper_loss"][0])
    assert model.outer_step == 8  # what a resumed run must not repeat


def test_a_step_that_the_upper_optimizer_breaks_leaves_it_as_it_was():
    """All gradients are finite and x afterwards is not: neither moments nor the count
    of a step that was not made may stay."""
    model = tb.BilevelModel(
        tb.ExampleWeights(TRAIN),
        network(),
        upper_loss,
        lower_loss,
        project_upper=lambda x: [v / 0.0 * 0.0 for v in x],
    )
    optimizer = keras.optimizers.Adam(0.1)
    model.compile(unroll(), optimizer, jit_compile=False, on_nonfinite="skip")
    before = [v.numpy() for v in optimizer.variables]
    history = model.fit(full_batch(2), verbose=0).history
    assert history["skipped"] == [2.0]
    assert_same(before, [v.numpy() for v in optimizer.variables])


def test_what_validation_needs_is_said_before_any_step():
    data = full_batch()
    model = make()
    with pytest.raises(ValueError, match="need metrics of the lower model"):
        model.fit(data, validation_data=data.map(lambda b: b.upper), verbose=0)
    assert model.outer_step == 0


@pytest.mark.slow
def test_models_of_another_scope_are_refused_but_in_that_of_one_device():
    model = tb.BilevelModel(tb.ExampleWeights(TRAIN), network(), upper_loss, lower_loss)
    rule = "`compile` and `fit` must be called in the scope.*outside of any scope"
    with tf.distribute.MirroredStrategy(["cpu:0"]).scope():
        with pytest.raises(ValueError, match=rule):
            model.compile(unroll(), keras.optimizers.Adam(0.1))
    metrics = {"metrics": [keras.metrics.SparseCategoricalAccuracy("accuracy")]}
    plain = make(**metrics)
    with tf.distribute.OneDeviceStrategy("cpu:0").scope():
        model = make(**metrics)
        data = full_batch().map(lambda b: b.upper)
        logs = model.fit(full_batch(3), validation_data=data, verbose=0).history
    expected = plain.fit(full_batch(3), validation_data=data, verbose=0).history
    assert logs == pytest.approx(expected)
    assert_close(weights(model), weights(plain), rtol=1e-6)


def test_train_on_batch_is_a_step_of_fit():
    fitted, mine = make(), make()
    history = fitted.fit(full_batch(3), verbose=0).history
    alone = make()
    for batch in full_batch(3):
        logs = mine.train_on_batch(batch, return_dict=True)
        one = alone.fit(tf.data.Dataset.from_tensors(batch), verbose=0).history
        for name, value in logs.items():  # of this step, not a mean over all so far
            assert value == pytest.approx(one[name][0], rel=1e-5)
    assert_close(weights(fitted), weights(mine), rtol=1e-5)
    assert mine.outer_step == 3 and set(logs) == set(history)
    with pytest.raises(ValueError, match="`x` must be tb.Batches"):
        mine.train_on_batch(np.ones(3), np.ones(3))
    with pytest.raises(ValueError, match="takes a tb.Batches and nothing else"):
        mine.train_on_batch(batch, np.ones(3))


def test_unconnected_variable_is_named_by_its_path():
    model = tb.BilevelModel(
        tb.ExampleWeights(TRAIN, name="importance"),
        network(),
        upper_loss,
        lambda upper, lower, batch: tf.reduce_mean(cross_entropy(lower, batch)),
    )
    model.compile(unroll(), keras.optimizers.Adam(0.1), jit_compile=False)
    with pytest.raises(tb.UnconnectedGradientError, match="importance/logits"):
        model.fit(full_batch(), verbose=0)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: make().fit(np.zeros([3, 2])), "`validation_data` must hold"),
        (
            lambda: make().fit(tf.data.Dataset.from_tensors((1.0, 2.0))),
            "Dataset of tb.Batches",
        ),
        (
            lambda: tb.BilevelModel(
                tb.ExampleWeights(3),
                keras.Sequential([keras.layers.Dense(2)]),
                upper_loss,
                lower_loss,
            ),
            "`lower` must be built",
        ),
        (
            lambda: tb.BilevelModel(
                keras.layers.Flatten(), network(), upper_loss, lower_loss
            ),
            "`upper`",
        ),
        (
            lambda: tb.BilevelModel(network(), network(), None, lower_loss),
            "`upper_loss` must be callable",
        ),
        (
            lambda: tb.BilevelModel(network(), network(), upper_loss, "mse"),
            "`lower_loss` must be callable",
        ),
        (
            lambda: tb.BilevelModel(
                network(), network(), upper_loss, lower_loss, prepare="features"
            ),
            "`prepare` must be callable",
        ),
        (
            lambda: tb.BilevelModel(
                network(), network(), upper_loss, lower_loss, lower_start=[1.0]
            ),
            "`lower_start` must be callable",
        ),
        (lambda: make().fit(full_batch().take(0)), "`x` must not be empty"),
        (lambda: make().compile("unroll", keras.optimizers.SGD(0.1)), "`method`"),
        (lambda: make().compile(unroll(), "sgdd"), "`upper_optimizer`"),
        (lambda: make(jit_compile="yes"), "`jit_compile`"),
        (lambda: make(on_nonfinite="ignore"), "`on_nonfinite`"),
        (
            lambda: make().evaluate(tf.data.Dataset.from_tensors(arrays()[0])),
            "need metrics",
        ),
    ],
)
def test_bad_input_gets_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "Received" in str(error.value)


def prepared_features(upper, batches):
    """A shared encoder's features in place of the inputs, on both levels."""
    (upper_inputs, upper_labels), (lower_inputs, lower_labels) = batches
    return batches._replace(
        upper=(upper(upper_inputs), upper_labels),
        lower=(upper(lower_inputs), lower_labels),
    )


def head_loss(upper, lower, batch):
    return tf.reduce_mean(cross_entropy(lower, batch, training=True))


def encoder_and_head(prepare, *layers):
    keras.utils.set_random_seed(5)
    encoder = keras.Sequential([keras.Input((FEATURES,)), keras.layers.Dense(2)])
    head = keras.Sequential([keras.Input((2,)), *layers, keras.layers.Dense(CLASSES)])

    def loss(upper, lower, batch):
        inputs = batch[0] if prepare else upper(batch[0])
        return head_loss(upper, lower, (inputs, batch[1]))

    model = tb.BilevelModel(
        encoder, head, loss, loss, prepare=prepared_features if prepare else None
    )
    model.compile(unroll(), keras.optimizers.SGD(1.0), jit_compile=False)
    model.fit(full_batch(3), verbose=0)
    return model


def test_prepare_equals_computing_the_features_in_the_losses():
    assert_close(weights(encoder_and_head(True)), weights(encoder_and_head(False)))


def test_prepare_works_with_non_trainable_state():
    normalise = keras.layers.BatchNormalization(momentum=0.5)
    model = encoder_and_head(True, normalise)
    assert np.abs(normalise.moving_mean.numpy()).min() > 0
    assert model.outer_step == 3


@pytest.mark.slow
def test_a_saved_choice_of_compilation_holds_after_loading(tmp_path):
    model = make(jit_compile="auto")
    model._ensure_carried()
    model._progress.compilation.assign(1)  # the plain graph, whatever is faster
    model.save_weights(str(tmp_path / "a.weights.h5"))
    other = make(jit_compile="auto")
    other.load_weights(str(tmp_path / "a.weights.h5"))
    other._outer.faster_with_xla = lambda *arguments: pytest.fail("timed again")
    other.fit(full_batch(), verbose=0)
    assert other.jit_compile is False


@pytest.mark.parametrize("whole", fast_where(bool, [False, True]))
def test_a_saved_xla_is_used_without_timing(whole, tmp_path, monkeypatch):
    """By load_weights at once, by load_model from its first fit on; within a fit."""
    path = str(tmp_path / ("a.keras" if whole else "a.weights.h5"))
    model = make(jit_compile="auto")
    model._ensure_carried()
    model._progress.compilation.assign(2)
    (model.save if whole else model.save_weights)(path)
    monkeypatch.setattr(outer_step, "faster_with_xla", lambda *arguments: False)
    if whole:
        objects = {"upper_loss": upper_loss, "lower_loss": lower_loss}
        objects["method"] = model.method
        other = keras.saving.load_model(path, custom_objects=objects)
        other.fit(full_batch(), verbose=0)
        assert other.jit_compile is True
        return
    other = make(jit_compile="auto")
    other.load_weights(path)
    assert other.jit_compile is True
    restored = make(jit_compile="auto")
    load = keras.callbacks.LambdaCallback(
        on_train_begin=lambda logs: restored.load_weights(path)
    )
    restored.fit(full_batch(), callbacks=[load], verbose=0)
    assert restored.jit_compile is True


def test_fit_before_compile_says_so():
    model = tb.BilevelModel(tb.ExampleWeights(TRAIN), network(), upper_loss, lower_loss)
    with pytest.raises(ValueError, match="compile"):
        model.fit(full_batch(), verbose=0)
