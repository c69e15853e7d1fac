"""What saving keeps: a model that is loaded goes on as if nothing had happened."""

import collections
import io
import zipfile
from typing import Any

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from small_models import (
    EXAMPLES,
    FEATURES,
    full_batch,
    lower_loss,
    make,
    network,
    unroll,
    upper_loss,
    value_gap,
)

import tfbilevel as tb

SGD = keras.optimizers.SGD


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


# Functions and the method come back as custom objects.
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_one_batch_after_loading_is_compiled_as_it_was(tmp_path: Any) -> None:
    model = build_whole()
    model.compile(value_gap(), SGD(0.1), jit_compile="auto")
    model._ensure_carried()
    model._progress.compilation.assign(2)  # whatever is faster here: XLA
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


# What 0.1 writes, so that later versions load it: a name or a number that changes here
# loses its users' files.
LAYOUT = {
    "layers/carried": 7,
    "layers/example_weights": 1,
    "layers/progress": 5,
    "layers/sequential/layers/batch_normalization": 4,
    "layers/sequential/layers/dense": 2,
    "layers/start": 4,
    "optimizer": 4,
    "start_optimizer": 2,
}


def layout(path: Any) -> dict[str, int]:
    """How many variables every group of a file holds."""
    names: list[str] = []
    with h5py.File(path) as file:
        file.visititems(
            lambda name, value: (
                names.append(name) if isinstance(value, h5py.Dataset) else None
            )
        )
    return dict(collections.Counter(name.rpartition("/vars/")[0] for name in names))


def build_of_every_kind() -> tb.BilevelModel:
    """With all that a file can hold."""
    model = tb.BilevelModel(
        tb.ExampleWeights(EXAMPLES),
        network(keras.layers.BatchNormalization(), keras.layers.Dropout(0.5)),
        upper_loss,
        lower_loss,
        lower_start="learned",
    )
    adam = keras.optimizers.Adam(0.1)
    model.compile(value_gap(), adam, start_optimizer=SGD(0.1), jit_compile=False)
    return model


def test_the_layout_of_files_stays(tmp_path: Any) -> None:
    model, path = build_of_every_kind(), tmp_path / "one.weights.h5"
    model.save_weights(path)
    assert layout(path) == LAYOUT
    model.save(tmp_path / "one.keras")
    with zipfile.ZipFile(tmp_path / "one.keras") as file:
        assert layout(io.BytesIO(file.read("model.weights.h5"))) == LAYOUT
    # Which is which: Dropout's seed, the losses' seed, and three numbers.
    shapes = [tuple(v.shape) for v in model._progress.weights]
    assert shapes == [(2,), (2,), (), (), ()]
    names = [v.name for v in model._progress.weights[2:]]
    assert names == ["step", "bad_code", "compilation"]


def test_weights_of_before_the_seed_of_the_losses(tmp_path: Any) -> None:
    """They had one variable less, the second of `progress`."""
    path = str(tmp_path / "old.weights.h5")
    old = build_of_every_kind()
    for variable in old.lower.trainable_variables:
        variable.assign(tf.fill(variable.shape, 0.25))
    old.save_weights(path)
    with h5py.File(path, "a") as file:
        group = file["layers/progress/vars"]
        del group["1"]
        for number in ("2", "3", "4"):
            group.move(number, str(int(number) - 1))
    model = build_of_every_kind()
    with pytest.raises(ValueError, match=r"before 0\.1.*skip_mismatch=True.*these 5"):
        model.load_weights(path)
    with pytest.warns(UserWarning, match="could not be loaded"):
        model.load_weights(path, skip_mismatch=True)
    for one, other in zip(
        model.lower.trainable_variables, old.lower.trainable_variables, strict=True
    ):
        np.testing.assert_array_equal(one.numpy(), other.numpy())
    assert model.outer_step == 0


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
