"""What Keras users do with any model: summary, export, weights, evaluate."""

from typing import Any

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
    upper_loss,
    value_gap,
)

import tfbilevel as tb


def printed(model: Any, **options: Any) -> str:
    lines: list[str] = []
    model.summary(print_fn=lambda line, **_: lines.append(line), **options)
    return "\n".join(lines)


def test_summary_is_of_both_levels() -> None:
    text = printed(make(keras.layers.Dense(4)))
    upper, lower = text.split("Lower level (y)")
    assert "Upper level (x): " in upper and "(ExampleWeights)" in upper
    assert f"1 trainable variable of {EXAMPLES} numbers" in upper
    numbers = 4 * FEATURES + 4 + 4 * 2 + 2
    assert f"4 trainable variables of {numbers} numbers" in lower
    assert "last (Dense)" in lower and f"Total params: {numbers}" in lower


def test_summary_of_a_learned_start_and_of_an_upper_model() -> None:
    model = tb.BilevelModel(
        network(), network(), upper_loss, lower_loss, lower_start="learned"
    )
    text = printed(model, show_trainable=True)
    assert text.count("last (Dense)") == 2 and "Trainable" in text
    assert "learned start" in text
    assert text.count("2 trainable variables of 8 numbers") == 3


def test_the_exported_artifact_predicts_what_predict_does(tmp_path: Any) -> None:
    model = make(keras.layers.BatchNormalization(), keras.layers.Dropout(0.5))
    model.fit(full_batch(), verbose=0)
    model.export(str(tmp_path / "served"), verbose=False)
    inputs = np.random.default_rng(1).normal(size=(5, FEATURES)).astype("float32")
    artifact: Any = tf.saved_model.load(str(tmp_path / "served"))
    want = model.predict(inputs, verbose=0)
    np.testing.assert_allclose(artifact.serve(inputs), want, rtol=1e-6)
    # By hand: batch normalisation at rest, then the last layer.
    scale, shift, mean, variance = (v.numpy() for v in model.lower.layers[0].variables)
    kernel, bias = (v.numpy() for v in model.lower.layers[-1].variables)
    normal = (inputs - mean) / np.sqrt(variance + 1e-3) * scale + shift
    np.testing.assert_allclose(want, normal @ kernel + bias, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_exported_says_so(tmp_path: Any) -> None:
    layer = keras.layers.Dense(2)
    layer.build((None, FEATURES))
    of_a_layer = tb.BilevelModel(
        tb.ExampleWeights(EXAMPLES), layer, upper_loss, lower_loss
    )
    of_tasks = tb.BilevelModel(network(), network(), upper_loss, lower_loss, tasks=2)
    for model, rule in (
        (of_a_layer, "keras.Model as `lower`.*keras.Sequential"),
        (of_tasks, "no task's solution.*model.adapt"),
    ):
        with pytest.raises(ValueError, match=rule) as error:
            model.export(tmp_path / "served")
        assert "Received" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_weights_go_from_one_model_to_another() -> None:
    """All of them: variables, statistics, seeds, and the method's state."""
    first = make(keras.layers.Dropout(0.5), method=value_gap())
    fresh = make(keras.layers.Dropout(0.5), method=value_gap())
    first.fit(full_batch(repeat=3), verbose=0)
    held = first.get_weights()
    fresh.set_weights(held)
    assert fresh.outer_step == 3
    for a, b in zip(fresh.get_weights(), held, strict=True):
        np.testing.assert_array_equal(a, b)
    logs = [m.fit(full_batch(repeat=2), verbose=0).history for m in (first, fresh)]
    assert logs[0] == logs[1]
    for a, b in zip(first.get_weights(), fresh.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


INPUTS = np.random.default_rng(2).normal(size=(7, FEATURES))
TARGETS = np.random.default_rng(3).normal(size=(7, 2))
WEIGHTS = np.arange(7.0)


def test_evaluate_on_arrays() -> None:
    metric = keras.metrics.MeanSquaredError
    model = make(metrics=[metric("plain")], weighted_metrics=[metric("weighted")])
    found = model.evaluate(
        INPUTS,
        TARGETS,
        batch_size=3,
        sample_weight=WEIGHTS,
        verbose=0,
        return_dict=True,
    )
    kernel, bias = (v.numpy() for v in model.lower.layers[-1].variables)
    squares = np.mean((INPUTS @ kernel + bias - TARGETS) ** 2, axis=1)
    assert found["plain"] == pytest.approx(squares.mean(), rel=1e-5)
    weighted = np.average(squares, weights=WEIGHTS)
    assert found["weighted"] == pytest.approx(weighted, rel=1e-5)
    with pytest.raises(ValueError, match=r"evaluate\(x, y\).*Received: y=None"):
        model.evaluate((INPUTS, TARGETS), verbose=0)


def test_evaluate_on_arrays_needs_metrics() -> None:
    with pytest.raises(ValueError, match="need metrics of the lower model"):
        make().evaluate(INPUTS, TARGETS, verbose=0)
