"""The host reads what steps record once in a while, not after each, on an accelerator.

Here the only device is the host: models are told that it is not.
"""

import threading
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from small_models import full_batch, lower_loss, network, unroll, upper_loss
from suites import fast_where
from tensorflow.python.framework import ops

import tfbilevel as tb
from tfbilevel._keras import reads
from tfbilevel._keras.levels import Levels

STEPS = 12
BAD = 7


def made(often: bool = False) -> tb.BilevelModel:
    model = tb.BilevelModel(tb.ExampleWeights(6), network(), upper_loss, lower_loss)
    model.compile(unroll(), "adam", jit_compile=False)
    assert not model._outer.reads.often
    model._outer.reads.often = often
    return model


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test lasts until a second read is due."""
    monkeypatch.setattr(Levels, "on_host", False)
    monkeypatch.setattr(reads, "INTERVAL", 1e6)


class Counter:
    """Counts the tensors that the main thread reads in each step of `fit`.

    Keras's own callbacks read the logs in another thread.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        own = ops._EagerTensorBase._numpy

        def counted(tensor):
            if threading.current_thread() is threading.main_thread():
                self.count += 1
            return own(tensor)

        monkeypatch.setattr(ops._EagerTensorBase, "_numpy", counted)

    def fit(self, model: tb.BilevelModel, **keywords: Any) -> list[int]:
        """The number of reads of each step."""
        model.make_train_function()
        step, counts = model.train_function, []

        def seen(iterator):
            before = self.count
            logs = step(iterator)
            counts.append(self.count - before)
            return logs

        model.train_function = seen
        model.fit(full_batch(repeat=STEPS), **keywords)
        return counts


@pytest.mark.parametrize("verbose", fast_where(lambda verbose: not verbose, [0, 1]))
def test_steps_are_not_read_one_by_one(monkeypatch, verbose) -> None:
    counts = Counter(monkeypatch).fit(made(), verbose=verbose)
    assert len(counts) == STEPS
    assert counts[0] > 0  # the step is compiled, and it is read
    assert counts[1:] == [0] * (STEPS - 1)


def test_a_read_in_every_step_is_seen(monkeypatch) -> None:
    """By the counter of the test above."""
    counts = Counter(monkeypatch).fit(made(often=True), verbose=0)
    assert min(counts) >= 1


def values(model: tb.BilevelModel) -> list:
    return [v.numpy() for v in (*model.trainable_variables, *model.optimizer.variables)]


@pytest.mark.slow
def test_a_late_read_finds_the_first_nan_and_no_later_step() -> None:
    model, prompt, epochs = made(), made(often=True), []
    noted = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: epochs.append(epoch)
    )
    data = full_batch(BAD, STEPS)
    with pytest.raises(tb.NonFiniteError) as late:
        model.fit(data, callbacks=[noted], verbose=0)
    with pytest.raises(tb.NonFiniteError) as error:
        prompt.fit(data, verbose=0)
    assert late.value.step == error.value.step == BAD
    assert late.value.quantity == error.value.quantity
    assert model.outer_step == prompt.outer_step == BAD
    for value, expected in zip(values(model), values(prompt), strict=True):
        np.testing.assert_array_equal(value, expected)
    assert epochs == []  # the user's callbacks come after the error
    model.fit(full_batch(repeat=2), verbose=0)  # and training can go on
    assert model.outer_step == BAD + 2


def test_nothing_is_saved_of_a_training_that_must_stop(tmp_path) -> None:
    path = tmp_path / "last.weights.h5"
    every = keras.callbacks.ModelCheckpoint(path, save_weights_only=True, save_freq=10)
    with pytest.raises(tb.NonFiniteError) as error:
        made().fit(full_batch(BAD, STEPS), callbacks=[every], verbose=0)
    assert error.value.step == BAD
    assert not path.exists()


@pytest.mark.parametrize("ask", ["get_weights", "save"])
def test_weights_are_not_handed_out_either(ask, tmp_path) -> None:
    model = made()
    arguments = [tmp_path / "model.keras"] if ask == "save" else []

    def asked(batch, logs):
        if batch == STEPS - 2:
            getattr(model, ask)(*arguments)

    callback = keras.callbacks.LambdaCallback(on_train_batch_end=asked)
    with pytest.raises(tb.NonFiniteError):
        model.fit(full_batch(BAD, STEPS), callbacks=[callback], verbose=0)
    assert list(tmp_path.iterdir()) == []


def test_a_step_of_ones_own_loop_is_always_read() -> None:
    model = made()
    good, bad = next(iter(full_batch())), next(iter(full_batch(0)))
    model.train_on_batch(good)
    with pytest.raises(tb.NonFiniteError, match="step=1"):
        model.train_on_batch(bad)


def test_a_read_is_due_again_after_the_interval(monkeypatch) -> None:
    monkeypatch.setattr(reads, "INTERVAL", 10.0)
    clock = [100.0]
    monkeypatch.setattr(reads.time, "monotonic", lambda: clock[0])
    seldom = reads.Reads(often=False)
    due = []
    for clock[0] in (100.0, 109.0, 110.0, 119.0, 121.0):
        due.append(seldom.due())
    assert due == [True, False, True, False, True]
    seldom.start()
    assert seldom.due()


@pytest.mark.slow
def test_replicas_of_one_process_are_read_seldom_too() -> None:
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        model = made()
    with pytest.raises(tb.NonFiniteError, match=f"step={BAD}"):
        model.fit(full_batch(BAD, STEPS), verbose=0)
    assert model.outer_step == BAD


def test_workers_are_read_after_every_step() -> None:
    """If one stopped later than the others, it would wait for them for ever."""
    with tf.distribute.MultiWorkerMirroredStrategy().scope():
        weights = tb.ExampleWeights(6)
        model = tb.BilevelModel(weights, network(), upper_loss, lower_loss)
        model.compile(unroll(), "adam")
    assert model._outer.reads.often
