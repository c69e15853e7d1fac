"""Losses of validation batches in the logs; optimizers by name; layers as built."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from suites import fast_where

import tfbilevel as tb

N, D = 6, 3
SGD = keras.optimizers.SGD
generator = np.random.default_rng(0)
DATA = [
    (generator.normal(size=(N, D)), generator.normal(size=(N, 1))) for _ in range(4)
]
full = tf.data.Dataset.from_tensors


def errors(lower: Any, batch: tuple) -> Any:
    return (lower(batch[0]) - batch[1])[:, 0] ** 2


def make(lower: Any = None, optimizer: Any = "sgd", **options: Any) -> tb.BilevelModel:
    keras.utils.set_random_seed(1)
    lower = lower or keras.Sequential(
        [keras.Input((D,)), keras.layers.Dense(1, dtype="float64")]
    )
    keywords = {k: options.pop(k) for k in ("tasks", "prepare") if k in options}
    model = tb.BilevelModel(
        tb.ExampleWeights(N, dtype="float64"),
        lower,
        lambda upper, lower, batch: tf.reduce_mean(errors(lower, batch)),
        lambda upper, lower, batch: tf.reduce_mean(upper(None) * errors(lower, batch)),
        **keywords,
    )
    inner = tb.InnerSolver(SGD(0.1), 3)
    options = {"jit_compile": False} | options
    model.compile(tb.Unroll(inner), optimizer, **options)
    return model


def by_hand(model: tb.BilevelModel, batch: tuple) -> np.ndarray:
    kernel, bias = (v.numpy() for v in model.lower.trainable_variables)
    return (batch[0] @ kernel + bias - batch[1])[:, 0] ** 2


TRAIN = tb.pair(full(DATA[0]), full(DATA[1]))


def validation() -> tf.data.Dataset:
    """Two elements, whose losses are averaged."""
    upper = full(DATA[2]).concatenate(full(DATA[3]))
    return tb.pair(upper, full(DATA[1]))


@pytest.mark.parametrize("jit", fast_where(lambda jit: not jit, [False, True]))
def test_logs_hold_the_losses_at_the_variables_after_the_epoch(jit):
    model = make(jit_compile=jit)
    logs = model.fit(TRAIN, validation_data=validation(), verbose=0).history
    assert set(logs) == {"upper_loss", "lower_loss", "val_upper_loss", "val_lower_loss"}
    expected = np.mean([by_hand(model, batch).mean() for batch in DATA[2:]])
    assert logs["val_upper_loss"] == pytest.approx([expected], rel=1e-5)
    x = model.upper.logits.numpy()
    weighted = np.mean(by_hand(model, DATA[1]) / (1 + np.exp(-x)))
    assert logs["val_lower_loss"] == pytest.approx([weighted], rel=1e-5)
    assert model.outer_step == 1
    # The epoch's own losses are those of the training steps.
    alone = make(jit_compile=jit).fit(TRAIN, verbose=0).history
    assert logs["upper_loss"] == pytest.approx(alone["upper_loss"])


def test_evaluate_takes_both_kinds_one_after_the_other():
    model = make(metrics=[keras.metrics.MeanSquaredError("error")])
    data = tf.data.Dataset.from_tensors(DATA[2])
    for _ in range(2):
        losses = model.evaluate(validation(), verbose=0, return_dict=True)
        expected = np.mean([by_hand(model, batch).mean() for batch in DATA[2:]])
        assert losses["upper_loss"] == pytest.approx(expected, rel=1e-5)
        assert set(losses) == {"upper_loss", "lower_loss"}
        measured = model.evaluate(data, verbose=0, return_dict=True)
        assert measured == pytest.approx({"error": by_hand(model, DATA[2]).mean()})


def test_a_lower_part_is_not_needed():
    batches = tf.data.Dataset.from_tensors(tb.Batches(upper=DATA[2], lower=None))
    losses = make().evaluate(batches, verbose=0, return_dict=True)
    assert set(losses) == {"upper_loss"}


def test_prepared_batches_are_measured_as_prepared():
    def doubled(upper: Any, batches: tb.Batches) -> tb.Batches:
        inputs, targets = batches.upper
        return batches._replace(upper=(2 * inputs, targets))

    model = make(prepare=doubled)
    losses = model.evaluate(validation(), verbose=0, return_dict=True)
    parts = [by_hand(model, (2 * a, b)).mean() for a, b in DATA[2:]]
    assert losses["upper_loss"] == pytest.approx(np.mean(parts), rel=1e-5)


def test_callbacks_watch_it():
    """A rate that only worsens the upper loss: training stops, the rate falls."""
    model = make(optimizer=SGD(0.5))
    worse = tb.pair(full((DATA[2][0], 1e3 * np.ones([N, 1]))), full(DATA[1]))
    before = model.evaluate(worse, verbose=0, return_dict=True)["upper_loss"]
    assert np.isfinite(before)
    patience = {"monitor": "val_upper_loss", "patience": 1, "min_delta": 1e9}
    stop = keras.callbacks.EarlyStopping(**(patience | {"patience": 3}))
    slow = keras.callbacks.ReduceLROnPlateau(**patience)
    logs = model.fit(
        TRAIN, epochs=9, validation_data=worse, callbacks=[stop, slow], verbose=0
    ).history
    assert len(logs["val_upper_loss"]) == 4
    assert float(model.optimizer.learning_rate) < 0.1


def test_tasks_have_no_solution_to_measure():
    model = make(tasks=2)
    with pytest.raises(ValueError, match="take no tb.Batches over tasks"):
        model.evaluate(validation(), verbose=0)


def test_optimizers_are_known_by_name():
    named, built = make(optimizer="adam"), make(optimizer=keras.optimizers.Adam())
    assert type(named.optimizer) is keras.optimizers.Adam
    settings = [model.optimizer.get_config() | {"name": ""} for model in (named, built)]
    assert settings[0] == settings[1]
    assert isinstance(tb.InnerSolver("adam", 3).optimizer, keras.optimizers.Adam)
    assert tb.InnerSolver("rmsprop", 3).rule.learning_rate == 0.001
    assert tb.ValueGap(None, "sgd", 1.0).rule.learning_rate == 0.01
    with pytest.raises(ValueError, match="`optimizer` must be .*or the name of one"):
        tb.InnerSolver("adamm", 3)


class Linear(keras.layers.Layer):
    """Makes its variables at once and leaves `built` as it is."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(dtype="float64", **keywords)
        self.kernel = self.add_weight(shape=(D, 1))
        self.bias = self.add_weight(shape=(1,))

    def call(self, inputs: Any) -> Any:
        return inputs @ tf.convert_to_tensor(self.kernel) + self.bias


class Around(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.part = keras.layers.Dense(1, dtype="float64")


def test_a_layer_whose_variables_exist_counts_as_built():
    assert not Linear().built
    for lower in (
        Linear(),
        keras.Sequential([Linear(), keras.layers.ReLU(dtype="float64")]),
    ):
        model = make(lower)
        model.fit(TRAIN, verbose=0)
        assert model.outer_step == 1
    unbuilt = [keras.layers.Dense(1), Around(), keras.Sequential([Around()])]
    unbuilt.append(keras.Sequential([Linear(), keras.layers.Dense(1)]))
    for lower in unbuilt:
        with pytest.raises(ValueError, match="`lower` must be built"):
            make(lower)
