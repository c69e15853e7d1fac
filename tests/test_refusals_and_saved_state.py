"""What a model or a method must refuse, save, or count, and once did not."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbilevel as tb

SGD = keras.optimizers.SGD
EXAMPLES, FEATURES = 6, 3


def network(*layers: Any, seed: int = 1) -> keras.Model:
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [keras.Input((FEATURES,)), *layers, keras.layers.Dense(2, name="last")]
    )


def mean_square(model: keras.Model, batch: tuple) -> tf.Tensor:
    inputs, targets = batch
    outputs = model(inputs, training=True)
    return tf.reduce_mean((tf.cast(outputs, tf.float32) - targets) ** 2)


def upper_loss(upper: Any, lower: keras.Model, batch: tuple) -> tf.Tensor:
    return mean_square(lower, batch)


def lower_loss(upper: Any, lower: keras.Model, batch: tuple) -> tf.Tensor:
    inputs, targets = batch
    outputs = tf.cast(lower(inputs, training=True), tf.float32)
    weights = tf.cast(upper(None), tf.float32)
    return tf.reduce_mean(weights * tf.reduce_mean((outputs - targets) ** 2, 1))


def full_batch(bad: int | None = None, repeat: int = 1) -> tf.data.Dataset:
    """Elements that are all alike, but for a NaN in the one numbered `bad`."""
    generator = np.random.default_rng(0)

    def part() -> tuple:
        return (
            generator.normal(size=(repeat, EXAMPLES, FEATURES)).astype("float32")[:1],
            generator.normal(size=(repeat, EXAMPLES, 2)).astype("float32")[:1],
        )

    inputs, targets = (np.repeat(a, repeat, axis=0) for a in part())
    if bad is not None:
        inputs[bad] = np.nan
    upper = tf.data.Dataset.from_tensor_slices((inputs, targets))
    (inputs,), (targets,) = part()
    return tb.pair(upper, tf.data.Dataset.from_tensors((inputs, targets)))


def unroll(**options: Any) -> tb.Unroll:
    return tb.Unroll(tb.InnerSolver(SGD(0.2), 3), **options)


def value_gap() -> tb.ValueGap:
    inner = tb.InnerSolver(SGD(0.1), 1)
    return tb.ValueGap(inner, SGD(0.1), tb.LinearRamp(0.0, 1.0, 9))


def make(*layers: Any, method: Any = None, **options: Any) -> tb.BilevelModel:
    lower = network(*layers)
    model = tb.BilevelModel(tb.ExampleWeights(EXAMPLES), lower, upper_loss, lower_loss)
    model.compile(method or unroll(), SGD(0.5), jit_compile=False, **options)
    return model


# Upper optimizers.


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


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: SGD(0.1, loss_scale_factor=1024.0),
        lambda: keras.optimizers.LossScaleOptimizer(SGD(0.1)),
    ],
)
def test_loss_scaling_is_refused(optimizer: Any) -> None:
    with pytest.raises(ValueError, match="`upper_optimizer` must not scale losses"):
        make().compile(unroll(), optimizer())


@pytest.mark.parametrize("which", ["upper_optimizer", "start_optimizer"])
def test_averages_with_a_learned_start_are_refused(which: str) -> None:
    model = tb.BilevelModel(
        tb.ExampleWeights(EXAMPLES),
        network(),
        upper_loss,
        lower_loss,
        lower_start="learned",
    )
    optimizers = {"upper_optimizer": SGD(0.1), "start_optimizer": SGD(0.1)}
    optimizers[which] = SGD(0.1, use_ema=True)
    with pytest.raises(ValueError, match=f"`{which}` must not average weights"):
        model.compile(unroll(), **optimizers)


# Models.


def test_a_network_at_both_levels_is_refused() -> None:
    """The lower step would overwrite what the upper optimizer has moved."""
    shared = network()

    def loss(upper: Any, lower: keras.Model, batch: tuple) -> tf.Tensor:
        return mean_square(lower, batch)

    with pytest.raises(ValueError, match="must not share trainable variables.*last"):
        tb.BilevelModel(shared, shared, loss, loss)


@pytest.mark.parametrize(
    "method",
    [
        value_gap,
        lambda: tb.GradientNorm(SGD(0.1), 1.0),
        lambda: tb.TTSA(SGD(0.1), 1, 0.1),
        lambda: tb.BAMM(SGD(0.1)),
    ],
)
def test_methods_that_move_y_are_refused_where_y_is_not_kept(method: Any) -> None:
    model = tb.BilevelModel(network(), network(seed=2), upper_loss, upper_loss, tasks=2)
    with pytest.raises(ValueError, match="`method` must solve every task anew"):
        model.compile(method(), SGD(0.1))


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


@pytest.mark.parametrize("name", ["class_weight", "sample_weight"])
def test_weights_of_examples_belong_to_the_losses(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` means nothing to fit"):
        make().fit(full_batch(), **{name: {0: 1.0}})


def test_a_dataset_that_turns_out_to_be_empty() -> None:
    model = make()
    model.compile(unroll(), SGD(0.1))  # "auto" looks at the first element
    with pytest.raises(ValueError, match="`x` must not be empty"):
        model.fit(full_batch().filter(lambda batches: tf.constant(False)), verbose=0)


# What is saved and logged.


def test_random_layers_resume_where_they_were(tmp_path: Any) -> None:
    def run(model: tb.BilevelModel) -> list[np.ndarray]:
        model.fit(full_batch().repeat(3), verbose=0)
        return [v.numpy() for v in model.lower.trainable_variables]

    through = make(keras.layers.Dense(8), keras.layers.Dropout(0.5))
    run(through)
    through.save_weights(tmp_path / "half.weights.h5")
    want = run(through)
    resumed = make(keras.layers.Dense(8), keras.layers.Dropout(0.5))
    resumed.load_weights(tmp_path / "half.weights.h5")
    for a, b in zip(run(resumed), want, strict=True):
        np.testing.assert_array_equal(a, b)


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


def test_a_second_compile_saves_its_own_state(tmp_path: Any) -> None:
    model = make(method=value_gap())
    model.fit(full_batch().repeat(3), verbose=0)
    count = len(model.weights)
    model.compile(value_gap(), SGD(0.5), jit_compile=False)
    model.fit(full_batch().repeat(7), verbose=0)
    assert len(model.weights) == count
    model.save_weights(tmp_path / "one.weights.h5")
    fresh = make(method=value_gap())
    fresh.load_weights(tmp_path / "one.weights.h5")
    # Both go on with the penalty weight of the eighth step of the second ramp.
    for one in (model, fresh):
        history = one.fit(full_batch(), verbose=0).history
        assert history["weight"] == [pytest.approx(7 / 9)]
    # And weights saved before a compile load after it.
    model.compile(value_gap(), SGD(0.1), jit_compile=False)
    model.load_weights(tmp_path / "one.weights.h5")
    assert model.fit(full_batch(), verbose=0).history["weight"][0] == pytest.approx(
        7 / 9
    )


# The whole model in one file. Functions and the method come back as custom objects.

OBJECTS = {"upper_loss": upper_loss, "lower_loss": lower_loss}


def build_whole(**options: Any) -> tb.BilevelModel:
    model = tb.BilevelModel(
        tb.ExampleWeights(EXAMPLES),
        network(keras.layers.Dense(4), keras.layers.Dropout(0.5)),
        upper_loss,
        lower_loss,
        **options,
    )
    model.compile(
        value_gap(),
        keras.optimizers.Adam(0.1),
        metrics=[keras.metrics.MeanSquaredError()],
        jit_compile=False,
        on_nonfinite="skip",
        steps_per_execution=2,
    )
    return model


def test_a_saved_model_trains_on_as_if_nothing_had_happened(tmp_path: Any) -> None:
    model = build_whole()
    model.fit(full_batch(repeat=4), verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(
        tmp_path / "model.keras", custom_objects=OBJECTS | {"method": value_gap()}
    )
    assert type(loaded) is tb.BilevelModel and loaded.outer_step == 4
    assert loaded.on_nonfinite == "skip" and loaded.steps_per_execution == 2
    went, goes = (
        one.fit(full_batch(repeat=4), verbose=0).history for one in (model, loaded)
    )
    assert went == goes
    assert goes["weight"] == [pytest.approx(np.mean([4, 5, 6, 7]) / 9)]  # on the ramp
    everything = zip(
        [*model.variables, *model.optimizer.variables],
        [*loaded.variables, *loaded.optimizer.variables],
        strict=True,
    )
    for a, b in everything:
        np.testing.assert_array_equal(a.numpy(), b.numpy())
    pairs = tf.data.Dataset.from_tensors((np.ones((2, 3)), np.ones((2, 2))))
    assert loaded.evaluate(pairs, verbose=0) == model.evaluate(pairs, verbose=0)


def test_a_saved_model_keeps_a_learned_start_and_its_projection(tmp_path: Any) -> None:
    clipped = {"project_upper": lambda x: [tf.clip_by_value(v, -1.0, 0.01) for v in x]}
    model = tb.BilevelModel(
        tb.ExampleWeights(EXAMPLES),
        network(),
        upper_loss,
        lower_loss,
        lower_start="learned",
        **clipped,
    )
    start = SGD(0.3)
    model.compile(unroll(), SGD(0.5), jit_compile=False, start_optimizer=start)
    model.save(tmp_path / "model.keras")
    objects = OBJECTS | clipped | {"method": unroll()}
    loaded = keras.saving.load_model(tmp_path / "model.keras", custom_objects=objects)
    assert float(loaded.start_optimizer.learning_rate) == pytest.approx(0.3)
    for one in (model, loaded):
        one.fit(full_batch(), verbose=0)
    for a, b in zip(model.upper_variables, loaded.upper_variables, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())
        assert float(tf.reduce_max(b)) <= np.float32(0.01)


def test_a_model_saved_before_its_first_step_loads(tmp_path: Any) -> None:
    """The method's state is in the file then, too."""
    model, path = build_whole(), tmp_path / "model.keras"
    model.save(path)
    loaded = keras.saving.load_model(
        path, custom_objects=OBJECTS | {"method": value_gap()}
    )
    for one in (model, loaded):
        one.fit(full_batch(repeat=2), verbose=0)
    for a, b in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_the_old_format_is_refused_before_the_first_step(tmp_path: Any) -> None:
    """Keras's HDF5 writer breaks the model, and its reader cannot read it."""
    model, path = build_whole(), str(tmp_path / "model.h5")
    with pytest.raises(ValueError, match=r"must end in \.keras"):
        model.save(path)
    whole = keras.callbacks.ModelCheckpoint(path)
    with pytest.raises(ValueError, match=r"must end in \.keras"):
        model.fit(full_batch(), callbacks=[whole], verbose=0)
    assert model.outer_step == 0 and not (tmp_path / "model.h5").exists()
    model.save(tmp_path / "model.keras")


@pytest.mark.parametrize("trainable", [False, True])
def test_shared_layers(trainable: bool, tmp_path: Any) -> None:
    """A frozen one at both levels trains; a file would hold it once for two."""
    backbone = keras.Sequential([keras.Input((FEATURES,)), keras.layers.Dense(3)])
    backbone.trainable = trainable

    def build(tasks: int | None) -> tb.BilevelModel:
        upper, lower = (
            keras.Sequential([keras.Input((FEATURES,)), backbone, layer])
            for layer in (keras.layers.Dense(2), keras.layers.Dense(2))
        )
        return tb.BilevelModel(upper, lower, upper_loss, lower_loss, tasks=tasks)

    if trainable:
        for tasks in (None, 2):
            with pytest.raises(ValueError, match="must not share trainable variables"):
                build(tasks)
        return
    with pytest.raises(ValueError, match="cannot be saved whole.*save_weights"):
        build(None).save(tmp_path / "model.keras")
    build(None).save_weights(tmp_path / "model.weights.h5")


def test_one_batch_after_loading_is_compiled_as_it_was(tmp_path: Any) -> None:
    model = build_whole()
    model.compile(value_gap(), SGD(0.1), jit_compile="auto")
    model.fit(full_batch(), verbose=0)
    model._progress.compilation.assign(2)  # whatever was faster here: XLA
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(
        tmp_path / "model.keras", custom_objects=OBJECTS | {"method": value_gap()}
    )
    loaded.train_on_batch(next(iter(full_batch())))
    assert loaded.jit_compile


def test_loading_names_what_no_file_holds(tmp_path: Any) -> None:
    path = tmp_path / "model.keras"
    build_whole().save(path)
    load = keras.saving.load_model
    with pytest.raises(ValueError, match="Received: no lower_loss"):
        load(path, custom_objects={"upper_loss": upper_loss})
    with pytest.raises(ValueError, match=r"\"method\": method.*Received: no method"):
        load(path, custom_objects=OBJECTS)
    loaded = load(path, custom_objects=OBJECTS, compile=False)
    with pytest.raises(ValueError, match="compile"):
        loaded.fit(full_batch(), verbose=0)
    loaded.compile(unroll(), SGD(0.1), jit_compile=False)
    loaded.fit(full_batch(), verbose=0)
    assert loaded.outer_step == 1


def test_callbacks_that_keep_the_best_need_no_mode(tmp_path: Any) -> None:
    path = tmp_path / "best.keras"
    best = keras.callbacks.ModelCheckpoint(
        str(path), monitor="upper_loss", save_best_only=True
    )
    stop = keras.callbacks.EarlyStopping("upper_loss", min_delta=1e9)
    model = build_whole()
    model.fit(full_batch(repeat=2), epochs=3, callbacks=[best, stop], verbose=0)
    assert model.outer_step == 4  # no epoch is better by 1e9 than the first
    assert best.mode == stop.mode == "min"
    loaded = keras.saving.load_model(
        path, custom_objects=OBJECTS | {"method": value_gap()}
    )
    assert loaded.outer_step in (2, 4)


class Unserialisable(tb.ExampleWeights):
    def get_config(self) -> dict:
        raise NotImplementedError("this layer has no configuration")


def test_a_model_that_no_file_can_hold_says_so_before_the_first_step(
    tmp_path: Any,
) -> None:
    model = tb.BilevelModel(Unserialisable(EXAMPLES), network(), upper_loss, lower_loss)
    model.compile(unroll(), SGD(0.5), jit_compile=False)
    whole = keras.callbacks.ModelCheckpoint(str(tmp_path / "model.keras"))
    with pytest.raises(NotImplementedError, match="no configuration"):
        model.fit(full_batch(), callbacks=[whole], verbose=0)
    assert model.outer_step == 0
    weights = keras.callbacks.ModelCheckpoint(
        str(tmp_path / "one.weights.h5"), save_weights_only=True
    )
    model.fit(full_batch(), callbacks=[weights], verbose=0)
    assert (tmp_path / "one.weights.h5").exists()


def test_fit_too_can_choose_to_skip() -> None:
    model = make()
    data = full_batch(bad=1, repeat=3)
    with pytest.raises(tb.NonFiniteError):
        model.fit(data, verbose=0)
    history = model.fit(data, on_nonfinite="skip", verbose=0).history
    assert history["skipped"] == [1.0]
    with pytest.raises(ValueError, match="`on_nonfinite` must be one of"):
        model.fit(data, on_nonfinite="ignore", verbose=0)


def test_an_epoch_of_skipped_steps_has_no_loss() -> None:
    model = make(on_nonfinite="skip")
    data = full_batch(bad=1, repeat=3)
    history = model.fit(data.repeat(), steps_per_epoch=1, epochs=3, verbose=0).history
    assert history["skipped"] == [0.0, 1.0, 0.0]
    for name in ("upper_loss", "lower_loss"):
        first, skipped, last = history[name]
        assert np.isnan(skipped) and first > last > 0


def simplex(logits: list) -> list:
    """A projection that divides by zero where all entries are negative."""
    positive = [tf.nn.relu(v) for v in logits]
    return [v / tf.reduce_sum(v) for v in positive]


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
def test_a_projection_that_ends_at_nan(on_nonfinite: str) -> None:
    model = tb.BilevelModel(
        tb.ExampleWeights(EXAMPLES),
        network(),
        upper_loss,
        lower_loss,
        project_upper=simplex,
    )
    model.compile(unroll(), SGD(1e-6), on_nonfinite=on_nonfinite, jit_compile=False)
    model.upper.logits.assign(-np.ones(EXAMPLES))
    before = [v.numpy() for v in (model.upper.logits, *model.lower.variables)]
    if on_nonfinite == "raise":
        with pytest.raises(tb.NonFiniteError, match="the upper variables became NaN"):
            model.fit(full_batch(), verbose=0)
    else:
        history = model.fit(full_batch(), verbose=0).history
        assert history["skipped"] == [1.0] and model.outer_step == 1
    after = [v.numpy() for v in (model.upper.logits, *model.lower.variables)]
    for a, b in zip(after, before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_minimize_with_a_projection_that_ends_at_nan() -> None:
    problem = quadratic(project_upper=lambda x: x / tf.reduce_sum(tf.nn.relu(x)))
    x = y = -tf.ones([2])
    with pytest.raises(tb.NonFiniteError, match="the upper variables became"):
        tb.minimize(problem, unroll(), x, y, SGD(0.1), tb.Batches(None, None), 1)


# Methods.

SOLVERS = {
    "cg": lambda: tb.ConjugateGradient(5),
    "normal-cg": lambda: tb.NormalConjugateGradient(5),
    "neumann": lambda: tb.Neumann(5, rate=0.5),
    "fixed-point": lambda: tb.FixedPoint(5, rate=0.5),
    "gradient": lambda: tb.GradientSolver(SGD(0.5), 5),
    "direct": tb.Direct,
}


@pytest.mark.parametrize("name", SOLVERS)
def test_an_upper_gradient_that_is_not_finite_is_not_dropped(name: str) -> None:
    """f is finite, f_y is not: with f_x alone every solver had gone on."""
    x = tf.constant([0.2, 0.3])
    y = tf.zeros([2])  # the solution, where the norm has no gradient
    problem = tb.Problem(
        lambda c, y, batch: tf.reduce_sum(c * c) + tf.norm(y),
        lambda c, y, batch: 0.5 * tf.reduce_sum((y - (c - x)) ** 2),
    )
    method = tb.Implicit(tb.InnerSolver(SGD(1.0), 2), SOLVERS[name]())
    with pytest.raises(tb.NonFiniteError, match="the upper gradient"):
        tb.minimize(problem, method, x, y, SGD(0.1), tb.Batches(None, None), 1)


def test_a_rank_one_gradient_that_is_not_finite_is_not_dropped() -> None:
    """As above, where g_y = 0 made 0 of NaN / 0."""
    x = tf.constant([0.2, 0.3])
    problem = tb.Problem(
        lambda c, y, batch: tf.reduce_sum(c * c) + tf.norm(y),
        lambda c, y, batch: 0.5 * tf.reduce_sum((y - (c - x)) ** 2),
    )
    method = tb.RankOne(tb.InnerSolver(SGD(1.0), 2))
    with pytest.raises(tb.NonFiniteError, match="the upper gradient"):
        none = tb.Batches(None, None)
        tb.minimize(problem, method, x, tf.zeros([2]), SGD(0.1), none, 1)


def quadratic(**options: Any) -> tb.Problem:
    return tb.Problem(
        lambda x, y, batch: 0.5 * tf.reduce_sum((y - 1.0) ** 2),
        lambda x, y, batch: 0.5 * tf.reduce_sum((y - x) ** 2),
        **options,
    )


def test_conjugate_gradients_are_refused_for_unsymmetric_maps() -> None:
    solver = tb.ConjugateGradient(5)
    rates = tb.InnerSolver(SGD(1.0), 3, learning_rate=lambda x: tf.nn.sigmoid(x))
    with pytest.raises(ValueError, match="symmetric system"):
        tb.Implicit(rates, solver, through="optimizer")
    plain = tb.Implicit(tb.InnerSolver(SGD(0.5), 3), solver, through="optimizer")
    x = y = tf.zeros([2])
    plain.init(quadratic(), x, y)
    with pytest.raises(ValueError, match="symmetric system"):
        plain.init(quadratic(project_lower=tf.nn.relu), x, y)
    helped = tb.ConjugateGradient(5, preconditioner=lambda x, y, v: v)
    with pytest.raises(ValueError, match="must not have a preconditioner"):
        tb.Implicit(tb.InnerSolver(SGD(0.5), 3), helped, through="optimizer")


@pytest.mark.parametrize("xla", [False, True])
@pytest.mark.parametrize("tasks", [1, 2])
def test_a_batch_of_too_few_tasks_is_an_error(tasks: int, xla: bool) -> None:
    """Of unknown size while traced: it was taken for the mean over all tasks."""
    problem = tb.over_tasks(
        tb.Problem(
            lambda x, y, batch: 0.5 * (y - batch) ** 2,
            lambda x, y, batch: 0.5 * (y - x) ** 2,
        )
    )
    method = unroll()
    x, y = tf.constant(0.0), tf.zeros([4])
    unknown = tf.TensorSpec([None], tf.float32)

    @tf.function(
        input_signature=[tb.Batches(unknown, unknown)], jit_compile=xla, autograph=False
    )
    def gradient(batches: tb.Batches) -> tf.Tensor:
        state = method.init(problem, x, y)
        return method.step(problem, x, y, batches, state).upper_gradient

    whole = gradient(tb.Batches(tf.ones([4]), tf.ones([4])))
    assert float(whole) == pytest.approx(-(1 - 0.8**3))  # y_3 = 0, dy_3/dx = 1 - 0.8^3
    with pytest.raises((tf.errors.InvalidArgumentError, ValueError)):
        gradient(tb.Batches(tf.ones([tasks]), tf.ones([tasks])))


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
        lambda: method.step(problem, x, y, tb.Batches(None, None), state)
    )()
    np.testing.assert_allclose(step.upper_gradient, [(3.0 - 1.0) * 0.5])


def test_an_accelerated_map_over_tasks_is_refused() -> None:
    inner = tb.InnerSolver(SGD(0.5), 3, accelerated=True)
    method = tb.Implicit(inner, tb.FixedPoint(3), through="optimizer")
    x, y = tf.constant(0.0), tf.zeros([2])
    method.init(quadratic(), x, y)
    with pytest.raises(ValueError, match="must not be accelerated"):
        method.init(tb.over_tasks(quadratic()), x, y)


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


def test_constraints_of_lower_variables_are_refused() -> None:
    held = keras.layers.Dense(4, kernel_constraint="non_neg")
    with pytest.raises(ValueError, match="constraints on .*kernel"):
        make(held)


def test_averages_that_would_leave_the_set_are_refused() -> None:
    averaging = SGD(0.1, use_ema=True)
    model = tb.BilevelModel(
        tb.ExampleWeights(EXAMPLES),
        network(),
        upper_loss,
        lower_loss,
        project_upper=simplex,
    )
    with pytest.raises(ValueError, match="use_ema.* with `project_upper`"):
        model.compile(unroll(), averaging)
    held = keras.layers.Dense(1, kernel_constraint="non_neg")
    held.build((None, FEATURES))
    constrained = tb.BilevelModel(held, network(), upper_loss, lower_loss)
    with pytest.raises(ValueError, match="use_ema.* with constraints of upper"):
        constrained.compile(unroll(), averaging)
    free = make()
    scaled = tb.AugmentedLagrangian(SGD(0.1), 2, weight=1.0, rate_decay=0.5)
    free.compile(scaled, SGD(0.1, use_ema=True), jit_compile=False)
    with pytest.raises(ValueError, match="use_ema.* scales the upper step"):
        free.fit(full_batch(), verbose=0)
    assert free.outer_step == 0
