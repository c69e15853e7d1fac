"""How far a job is: lines off a terminal, a bar on one."""

import sys
import time
import types

import common
import keras
import numpy as np
import pytest


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_line_every_half_minute_off_a_terminal(clock, capsys):
    progress = common.Progress("runs/a", 1000, "outer steps")
    for done in range(1, 91):  # one second each
        clock[0] += 1
        progress.update(done)
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.splitlines() == [
        f"runs/a: {done} of 1000 outer steps after {done} s" for done in (30, 60, 90)
    ]


def test_a_short_job_says_nothing_off_a_terminal(clock, capsys):
    progress = common.Progress("runs/a", 10, "outer steps")
    for done in range(1, 11):
        clock[0] += 2.9
        progress.update(done)
    assert capsys.readouterr() == ("", "")


def test_a_bar_and_no_lines_on_a_terminal(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    progress = common.Progress("runs/a", 10, "outer steps")
    for done in (5, 12):
        clock[0] += 40
        progress.update(done)
    written = capsys.readouterr()
    assert "10/10" in written.out and "12" not in written.out.replace("0:12", "")
    assert written.err == ""


def test_plain_training_counts_its_batches(clock, capsys):
    """7 examples in batches of 2 are 4 batches; 20 seconds each, two epochs."""

    class Late(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            clock[0] += 20

    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    shown = common.FitProgress("fit")
    x, y = np.ones((7, 2)), np.ones((7, 1))
    for _ in range(2):  # it may be used again
        model.fit(x, y, 2, 2, callbacks=[Late(), shown], verbose=0)
        assert capsys.readouterr().err.splitlines() == [
            f"fit: {done} of 8 batches after {20 * done} s" for done in (2, 4, 6, 8)
        ]


@pytest.mark.parametrize(
    ("limits", "lines"),
    [
        ({"steps": 7}, ["3 of 7 outer steps after 36 s", "6 of 7 outer steps"]),
        ({"limit": 70.5}, ["30 of 71 seconds of training", "60 of 71 seconds of"]),
    ],
)
def test_training_shows_how_far_it_is(
    limits, lines, clock, tmp_path, monkeypatch, capsys
):
    """Outer steps of 10 seconds, and 2 more between them; the seconds of training are
    those of the steps alone."""
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    run = common.Run(tmp_path / "run", {}, False)
    model = types.SimpleNamespace(
        outer_step=0, stop_training=False, reset_metrics=lambda: None
    )
    evaluate = common.Evaluate(run, lambda: {"a": 1}, every=100, **limits)
    evaluate.set_model(model)
    for step in range(1, 8):
        clock[0] += 2
        evaluate.on_train_batch_begin(step)
        clock[0] += 10
        model.outer_step = step
        evaluate.on_train_batch_end(step, {})
    written = capsys.readouterr().err.splitlines()
    assert len(written) == 2
    for line, start in zip(written, lines, strict=True):
        assert line.startswith(f"{run.out}: {start}")
