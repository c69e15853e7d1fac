"""Training on several replicas equals training on one device."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

import tfbilevel as tb
from tfbilevel._keras.replicas.dealing import part_of

HERE = pathlib.Path(__file__).parent


def start(script: str, *cases: str, **environment: str) -> subprocess.Popen:
    path = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, str(HERE / script), *cases],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path} | environment,
    )


def require_equal(process: subprocess.Popen, cases: tuple[str, ...]) -> None:
    try:
        out, errors = process.communicate(timeout=900)
    finally:
        process.kill()  # replicas that wait for each other never end
    assert process.returncode == 0, errors[-3000:]
    assert out.split("\n")[:-1] == [f"equal {case}" for case in cases]


def run(script: str, *cases: str, **environment: str) -> None:
    require_equal(start(script, *cases, **environment), cases)


# TensorFlow's graph optimizer takes 15 percent of the time of steps that are made three
# times. The quick test and several workers run with it.
QUICKER = {"GRAPPLER": "off"}


def test_parts_hold_every_example_once_and_their_shares():
    """Of seven upper examples and three stacked batches of five lower ones."""
    values = np.arange(21).reshape(7, 3)
    dense = tf.constant(1.0 * values * (values % 4 > 0))
    ragged = tf.RaggedTensor.from_row_lengths(tf.range(14.0), [2, 0, 3, 1, 4, 4, 0])
    stacked = tf.reshape(tf.range(30.0), [3, 5, 2])
    batches = tb.StackedBatches(
        upper=(dense, tf.sparse.from_dense(dense), ragged, tf.constant(2.0)),
        lower=(stacked, tf.sparse.from_dense(stacked)),
    )
    parts = [part_of(batches, replica, 3) for replica in range(3)]
    assert [int(part.first) for part in parts] == [0, 2, 4]
    shares = [[2 / 7, 2 / 7, 3 / 7], [1 / 5, 2 / 5, 2 / 5]]
    np.testing.assert_allclose([p.upper_share for p in parts], shares[0])
    np.testing.assert_allclose([p.lower_share for p in parts], shares[1])
    upper, lower = zip(*(part.batches for part in parts), strict=True)
    first, sparse, rows, scalar = zip(*upper, strict=True)
    np.testing.assert_array_equal(np.concatenate(first), dense)
    whole = np.concatenate([tf.sparse.to_dense(v) for v in sparse])
    np.testing.assert_array_equal(whole, dense)
    assert tf.concat(rows, axis=0).to_list() == ragged.to_list()
    assert [float(v) for v in scalar] == [2.0] * 3
    first, sparse = zip(*lower, strict=True)
    np.testing.assert_array_equal(np.concatenate(first, axis=1), stacked)
    whole = np.concatenate([tf.sparse.to_dense(v) for v in sparse], axis=1)
    np.testing.assert_array_equal(whole, stacked)


def test_two_replicas_are_equal_to_one_device():
    """One of the methods, on parts of different sizes; gradients are slices."""
    run("replica_fits.py", "derivatives", "value-gap:5:weights")


@pytest.mark.slow
def test_every_kind_of_method_is_equal_on_two_replicas():
    """On even and uneven parts, with the stated number of collectives.

    Losses over tasks sample, too: a task's samples do not depend on its replica.
    All methods, by hand:

        python tests/keras/replica_fits.py every:6: every:5:tasks
    """
    cases = (
        "kinds:6:",
        "unroll:5:tasks",
        "implicit-cg:6:sequential-tasks",
        "value-gap:7:microbatches",
        # Distributed before `fit`: parts of other sizes, one has a single example.
        "value-gap:6:mixed:split",
        "unroll:5:tasks:split",
        "unroll:6:weights:function",
        "stocbio:5:stacked:function",
    )
    run("replica_fits.py", *cases, **QUICKER)


HABITS = (
    "metrics_and_validation_data",
    "one_step_at_a_time",
    "nan_stops_or_is_skipped_by_all",
    "index_out_of_range_is_named",
    "random_layers_and_statistics",
    "saved_and_resumed",
    "backed_up",
    "refusals",
    "unknown_number_of_steps",
    "every_part_of_the_problem",
    "other_strategies",
    "labels_are_cleaned",
    "losses_without_metrics",
    "distributed_before",
)


@pytest.mark.slow
def test_fit_has_the_habits_of_keras_on_two_replicas():
    run("replica_habits.py", *HABITS, **QUICKER)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@contextlib.contextmanager
def workers(count: int, *cases: str, **environment: str):
    """As many processes, each with the cases; they are ended in the end."""
    addresses = [f"127.0.0.1:{port}" for port in free_ports(count)]
    started: list[subprocess.Popen] = []
    try:
        for index in range(count):
            task = {"type": "worker", "index": index}
            cluster = {"cluster": {"worker": addresses}, "task": task}
            environment["TF_CONFIG"] = json.dumps(cluster)
            started.append(start("replica_fits.py", *cases, **environment))
        yield started
    finally:
        for process in started:
            with process:  # closes its pipes
                process.kill()


@pytest.mark.slow
def test_two_workers_are_equal_to_one_process(tmp_path):
    """Each has two replicas, with parts that are uneven or of one example.

    Files, and other numbers of replicas afterwards.

    The other methods by hand (docs/scaling.md).
    """
    cases = "unroll:5:tasks", "cleaner", f"files={tmp_path}"
    with workers(2, *cases, DEVICES="2") as started:
        for process in started:
            require_equal(process, cases)


@pytest.mark.slow
def test_a_worker_is_killed_and_all_resume(tmp_path):
    """Three workers lose one; two go on, and end like one process."""
    folder = tmp_path / "backup"
    with workers(3, f"killed={folder}", VICTIM="1") as started:
        started[1].communicate(timeout=300)
        ends = [started[n].communicate(timeout=180)[1] for n in (0, 2)]
    assert started[1].returncode == -signal.SIGKILL
    for process, errors in zip((started[0], started[2]), ends, strict=True):
        assert process.returncode == 1
        printed = errors[errors.rindex("Traceback") :].splitlines()
        assert "Another worker has ended or cannot be reached" in printed[-1]
        assert "Start all workers again" in printed[-1]
        assert len(printed) < 25, errors
    cases = (f"resumed={folder}",)
    with workers(2, *cases) as started:
        for process in started:
            require_equal(process, cases)
