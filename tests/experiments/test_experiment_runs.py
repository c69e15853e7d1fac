"""What every experiment shares: its folder, its rows, its clock, its backup."""

import argparse
import logging
import pathlib
import subprocess
import sys
import time
import types

import common
import keras
import numpy as np
import pytest
import tensorflow as tf
from common import callbacks
from common import run as runs

import tfbilevel as tb


def test_rows_go_under_their_own_columns(tmp_path):
    run = common.Run(tmp_path / "run", {}, resume=False)
    run.log({"step": 0, "a": 1, "b": 2})
    run.log({"step": 1, "b": 4, "a": 3})
    assert run.column("a") == [1, 3] and run.column("b") == [2, 4]
    with pytest.raises(ValueError, match="not in fieldnames"):
        run.log({"step": 2, "c": 5})
    assert len(run.rows()) == 2


def test_a_row_that_a_kill_has_cut_short_is_not_there(tmp_path):
    run = common.Run(tmp_path / "run", {}, resume=False)
    run.log({"step": 0, "seconds": 0, "a": 1})
    run.log({"step": 2, "seconds": 3, "a": 2})
    path = tmp_path / "run" / "metrics.csv"
    path.write_text(path.read_text() + "4,5")
    assert [row["step"] for row in run.rows()] == ["0", "2"]
    assert run.rewind(4) == 3.0
    run.log({"step": 4, "seconds": 6, "a": 3})
    assert run.column("a") == [1, 2, 3]


def test_a_row_that_was_glued_to_one_cut_short_is_not_there(tmp_path):
    run = common.Run(tmp_path / "run", {}, resume=False)
    run.log({"step": 0, "seconds": 0, "a": 1})
    path = tmp_path / "run" / "metrics.csv"
    path.write_text(path.read_text() + "2,1.")
    run.log({"step": 4, "seconds": 6, "a": 3})
    assert run.column("a") == [1]


def test_a_table_that_a_kill_has_left_empty_is_begun_anew(tmp_path):
    run = common.Run(tmp_path / "run", {}, resume=False)
    (tmp_path / "run" / "metrics.csv").touch()
    run.log({"step": 0, "a": 1})
    assert run.column("a") == [1]


def test_a_folder_has_one_writer(tmp_path):
    """What `common` imports is not needed by the other process, and takes seconds."""
    code = (
        "import pathlib, runpy, sys, unittest.mock\n"
        "sys.modules['tfbilevel'] = unittest.mock.Mock(__version__='1')\n"
        f"run = runpy.run_path({runs.__file__!r})\n"
        f"run['Run'](pathlib.Path({str(tmp_path)!r}), {{}}, False)\n"
        "print('there', flush=True); sys.stdin.read()"
    )
    pipe = subprocess.PIPE
    other = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe)
    assert other.stdout.readline() == b"there\n"
    with pytest.raises(ValueError, match="--out must not be in use"):
        common.Run(tmp_path, {}, resume=True)
    other.communicate(b"")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    common.Run(tmp_path, {}, resume=True)
    common.Run(tmp_path, {}, resume=True)  # one process may come back


def test_a_folder_in_which_a_kill_left_no_settings_can_be_used(tmp_path):
    (tmp_path / "config.json.partial").write_text("{")
    with pytest.raises(ValueError, match="--resume needs a folder with a run"):
        common.Run(tmp_path, {"a": 1}, resume=True)
    common.Run(tmp_path, {"a": 1}, resume=False)
    common.Run(tmp_path, {"a": 1}, resume=True)


def test_seconds_are_those_of_outer_steps_alone(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def measure():
        now[0] += 100
        return {"test_loss": 1.0}

    model = types.SimpleNamespace(
        outer_step=0, stop_training=False, reset_metrics=lambda: None
    )
    run = common.Run(tmp_path / "run", {}, False)

    def fit(made, **limits):
        clock = common.Evaluate(run, measure, every=2, **limits)
        clock.set_model(model)
        clock.on_train_begin()
        for step in made:
            assert not model.stop_training
            clock.on_train_batch_begin(step)
            now[0] += 0.5
            model.outer_step = step
            clock.on_train_batch_end(step, {"upper_loss": 10.0 * step})
            now[0] += 7  # a backup
        return [
            (int(row["step"]), float(row["seconds"]), float(row["upper_loss"]))
            for row in run.rows()
        ]

    rows = fit([1, 2, 3, 4, 5], limit=2.5)
    np.testing.assert_equal(
        rows, [(0, 0, np.nan), (2, 1, 20), (4, 2, 40), (5, 2.5, 50)]
    )
    assert model.stop_training
    # From a backup after step 2, and from the start for want of one.
    model.outer_step, model.stop_training = 2, False
    assert fit([3], limit=9, steps=3)[1:] == [(2, 1, 20), (3, 1.5, 30)]
    assert model.stop_training
    model.outer_step, model.stop_training = 0, False
    assert fit([1, 2])[1:] == [(2, 1, 20)]
    assert fit([])[1:] == [(2, 1, 20)]


def test_a_row_holds_means_over_all_steps_since_the_last_one():
    """Parts of unlike length; a part whose steps were all skipped has no loss."""
    parts = [
        (2, {"loss": 1.0, "skipped": 0.0}),
        (1, {"loss": float("nan"), "skipped": 1.0}),
        (6, {"loss": 5.0, "skipped": 2.0}),
    ]
    assert callbacks._means(parts) == {"loss": 4.0, "skipped": 3.0}


def test_no_clock_runs_before_the_first_evaluation_is_whole(tmp_path):
    """A run killed before its first row starts over with the right columns."""
    run = common.Run(tmp_path / "run", {}, False)
    model = types.SimpleNamespace(outer_step=0, reset_metrics=lambda: None)
    for _ in range(2):
        clock = common.Evaluate(run, lambda: {"a": 1}, every=2)
        clock.set_model(model)
        clock.on_train_batch_begin(0)
        assert run.rows() == []


def test_backup_never_leaves_a_partial_file(tmp_path):
    class Model(keras.Model):
        outer_step = 10

        def save_weights(self, path):
            pathlib.Path(path).write_text("new")
            raise OSError("disk full")

    backup = tb.Backup(tmp_path, 5)
    (tmp_path / "latest.weights.h5").write_text("old")
    backup.set_model(Model())
    with pytest.raises(OSError):
        backup._save_model()
    assert (tmp_path / "latest.weights.h5").read_text() == "old"


def test_many_runs_trace_without_warnings_and_warnings_come_back(capsys):
    logger, written = tf.get_logger(), []
    before = logger.level

    class Keep(logging.Handler):
        def emit(self, record):
            written.append(record.getMessage())

    def trace_often(name):
        """TensorFlow counts by the place in the code."""
        namespace = {"tf": tf}
        exec(f"def {name}(): return tf.function(lambda: tf.constant(1.0))", namespace)
        for _ in range(12):
            namespace[name]()()

    keep = Keep()
    logger.addHandler(keep)
    try:
        with pytest.raises(SystemExit), common.many_runs():
            trace_often("first")
            raise SystemExit
        assert written == [] and logger.level == before
        trace_often("second")
        assert any("triggered tf.function retracing" in line for line in written)
    finally:
        logger.removeHandler(keep)


def test_rows_of_another_run_as_numbers_and_the_best_of_them(tmp_path):
    run = common.Run(tmp_path / "run", {}, resume=False)
    run.replace([{"method": "a", "loss": 3}, {"method": "b", "loss": 1}])
    run.log({"method": "c", "loss": 1})
    rows = common.numbers(common.rows_of(tmp_path / "run"))
    assert rows[0] == {"method": "a", "loss": 3.0} and len(rows) == 3
    assert common.best_row(rows, "loss") is rows[0]
    assert common.best_row(rows, "loss", lowest=True) is rows[1]
    run.replace([])
    assert common.rows_of(tmp_path / "run") == run.rows() == []
    assert run.files() == f"Files in {run.out}: config.json"


@pytest.mark.slow
def test_a_sweep_goes_past_what_fails_and_does_nothing_again(tmp_path, capsys, cleared):
    run, made, told = common.Run(tmp_path, {}, False), [], []

    def one(args, own):
        made.append(own.out.name)
        if args.loss > 2:
            raise SystemExit(1)
        return {"loss": args.loss}

    jobs = {f"run-{n}": argparse.Namespace(loss=n) for n in (1, 3, 2)}
    for _ in range(2):  # the second time only what failed
        done, failed = common.sweep(run, jobs, common.in_folder(one), told.append)
        assert done == {"run-1": {"loss": 1}, "run-2": {"loss": 2}}
        assert failed == ["run-3"]
    assert made == ["run-1", "run-3", "run-2", "run-3"]
    assert cleared.call_count == 6
    assert told == 2 * [{"loss": 1}, {"loss": 2}]
    with pytest.raises(SystemExit) as stop:
        common.concluded(run, {"runs": 2}, failed)
    assert stop.value.code == 1 and "failed: run-3" in capsys.readouterr().err
    assert run.summary() == {"runs": 2, "failed": ["run-3"]}
    assert common.concluded(run, {"runs": 3}, []) == run.summary() == {"runs": 3}


@pytest.mark.parametrize("jit", [False, True])
def test_plain_training_by_an_inner_solver_is_that_of_numpy(jit):
    """Gradient descent on (y - b)^2 / 2, y kept above 0."""
    train = common.trainer(
        lambda y, b: tf.reduce_sum(0.5 * (y - b) ** 2),
        keras.optimizers.SGD(0.25),
        3,
        jit,
        project=tf.nn.relu,
    )
    b, y = np.array([2.0, -3.0]), np.array([1.0, 1.0])
    given = tf.constant(b), tf.constant(y)
    found = train(*given)
    for _ in range(3):
        y = np.maximum(y - 0.25 * (y - b), 0)
    np.testing.assert_allclose(found, y)
    if not jit:
        with pytest.raises(ValueError, match="jit_compile=True"):
            train.experimental_get_compiler_ir(*given)
    else:
        assert "HloModule" in train.experimental_get_compiler_ir(*given)(stage="hlo")
