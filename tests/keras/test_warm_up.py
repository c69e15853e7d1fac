"""`warm_up` compiles the outer step; training goes on as if it had not been called."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from small_models import (
    EXAMPLES,
    SGD,
    full_batch,
    lower_loss,
    make,
    network,
    unroll,
    upper_loss,
    value_gap,
)
from suites import fast_where

import tfbilevel as tb
from tfbilevel._keras import outer_step


def random_layers() -> list:
    return [keras.layers.BatchNormalization(), keras.layers.Dropout(0.5, seed=3)]


def build(calls: list, **options: Any) -> tb.BilevelModel:
    """With statistics, seeds, a method's state and an optimizer's; notes the traces."""

    def counted(*arguments: Any) -> tf.Tensor:
        calls.append(1)
        return lower_loss(*arguments)

    lower = network(*random_layers())
    model = tb.BilevelModel(tb.ExampleWeights(EXAMPLES), lower, upper_loss, counted)
    adam = keras.optimizers.Adam(0.1)
    model.compile(value_gap(), adam, **{"jit_compile": False, **options})
    return model


def everything(model: tb.BilevelModel) -> list[np.ndarray]:
    metrics = [v for metric in model.metrics for v in metric.variables]
    kept = [*model.variables, *model.optimizer.variables, *metrics]
    return [v.numpy() for v in kept]


def assert_same(one: list, other: list) -> None:
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


def train(model: tb.BilevelModel, by_batch: bool) -> list:
    if not by_batch:
        return list(model.fit(full_batch(repeat=6), verbose=0).history.values())
    batches = next(iter(full_batch()))
    return [model.train_on_batch(batches) for _ in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize("by_batch", fast_where(lambda by: not by, [False, True]))
def test_training_after_it_is_training_without_it(by_batch: bool) -> None:
    calls: list = []
    options = {"steps_per_execution": 1 if by_batch else 3, "on_nonfinite": "skip"}
    warm, cold = build(calls, **options), build([], **options)
    data = next(iter(full_batch())) if by_batch else full_batch(repeat=6)
    warm.warm_up(data)
    traced = len(calls)
    assert traced
    logs = [train(model, by_batch) for model in (warm, cold)]
    assert len(calls) == traced  # the first step does not trace again
    assert_same(*logs)
    assert_same(everything(warm), everything(cold))


@pytest.mark.slow
def test_nothing_moves_between_two_fits() -> None:
    model = build([])
    model.fit(full_batch(repeat=2), verbose=0)
    before = everything(model)
    model.warm_up(full_batch())
    assert_same(everything(model), before)
    assert model.outer_step == 2
    # Nor where the step is compiled for the first time.
    fresh = build([])
    fresh._ensure_carried()
    before = everything(fresh)
    fresh.warm_up(full_batch())
    after = everything(fresh)
    assert_same(after[: len(before)], before)
    assert not any(np.any(value) for value in after[len(before) :])  # means of nothing


@pytest.mark.slow
def test_the_state_is_of_the_variables_that_training_begins_at() -> None:
    def start(warm: bool) -> tb.BilevelModel:
        model = build([])
        if warm:
            model.warm_up(full_batch())
        for variable in model.lower.trainable_variables:
            variable.assign(tf.fill(variable.shape, 0.25))
        model.fit(full_batch(), verbose=0)
        return model

    assert_same(everything(start(True)), everything(start(False)))


@pytest.mark.slow
def test_weights_loaded_after_it_keep_their_state(tmp_path: Any) -> None:
    trained = build([])
    trained.fit(full_batch(repeat=2), verbose=0)
    trained.save_weights(tmp_path / "two.weights.h5")
    model = build([])
    model.warm_up(full_batch())
    model.load_weights(tmp_path / "two.weights.h5")
    for one in (trained, model):
        one.fit(full_batch(), verbose=0)
    assert_same(everything(model), everything(trained))


def test_it_chooses_the_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list = []

    def faster(*arguments: Any) -> bool:
        tried.append(1)
        return True

    monkeypatch.setattr(outer_step, "faster_with_xla", faster)
    model = make(method=unroll())
    model.compile(unroll(), SGD(0.1))
    model.warm_up(full_batch())
    assert tried == [1] and model.jit_compile is True and model.outer_step == 0
    model.fit(full_batch(), verbose=0)
    assert tried == [1]


def test_what_is_not_finite_is_said_before_training() -> None:
    model = make()
    model._ensure_carried()
    before = everything(model)
    with pytest.raises(tb.NonFiniteError, match="outer step 0"):
        model.warm_up(full_batch(bad=0))
    assert_same(everything(model)[: len(before)], before)
    model.fit(full_batch(), verbose=0)
    assert model.outer_step == 1


def test_what_it_refuses() -> None:
    model = make()
    with pytest.raises(ValueError, match=r"must be a tf\.data\.Dataset of tb\.Batches"):
        model.warm_up(np.ones(3))
    unknown = full_batch().filter(lambda *batches: tf.constant(False))
    for empty in (full_batch().take(0), unknown):
        with pytest.raises(ValueError, match="must not be empty"):
            model.warm_up(empty)
    raw = tb.BilevelModel(tb.ExampleWeights(6), network(), upper_loss, lower_loss)
    with pytest.raises(ValueError, match="compile"):
        raw.warm_up(full_batch())
