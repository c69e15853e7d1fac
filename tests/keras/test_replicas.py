"""Training on several replicas equals training on one device."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parents[1]


def start(*cases: str, **environment: str) -> subprocess.Popen:
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, str(HERE / "two_replicas.py"), *cases],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path} | environment,
    )


def require_equal(process: subprocess.Popen, cases: tuple[str, ...]) -> None:
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-3000:]
    assert out.split("\n")[:-1] == [f"equal {case}" for case in cases]


def run(*cases: str) -> None:
    require_equal(start(*cases), cases)


def test_two_replicas_are_equal_to_one_device():
    run("derivatives", "implicit-cg:5:weights")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.mark.slow
def test_two_workers_are_equal_to_one_process():
    workers = [f"127.0.0.1:{port}" for port in free_ports(2)]
    cases = ("unroll:5:weights", "implicit-cg:6:dense", "value-gap:5:dense")
    started = []
    try:
        for index in range(2):
            task = {"type": "worker", "index": index}
            cluster = {"cluster": {"worker": workers}, "task": task}
            started.append(start(*cases, TF_CONFIG=json.dumps(cluster)))
        for process in started:
            require_equal(process, cases)
    finally:
        for process in started:
            process.kill()
