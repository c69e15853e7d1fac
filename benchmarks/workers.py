"""Processes that compute by turns, so that load of the machine hits all of them.

A worker answers the commands of `contestants/protocol.py`.
"""

import json
import math
import os
import pathlib
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
DEVICES = ("cpu", "gpu")
# A framework would otherwise take all of a GPU's memory at once, for itself.
SHARED_GPU = {
    "TF_FORCE_GPU_ALLOW_GROWTH": "true",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}
NO_GPU = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}


class Worker:
    """A process with its measurements.

    Args:
        name: what its errors call it.
        command: how it is started.
        threads: the number of cores that it gets.
        device: "cpu" hides the GPUs from it.
    """

    def __init__(
        self, name: str, command: Sequence[str], threads: int, device: str = "cpu"
    ):
        self.name = name
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=worker_environment(threads, device),
            preexec_fn=pinned(threads),
        )
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.steps = 1  # of one round

    def ask(self, command: str) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self.log.seek(0)
            raise SystemExit(
                f"error: {self.name} ended at `{command}`:\n{self.log.read()[-3000:]}"
            )
        return json.loads(answer)

    def fill(self, seconds: float) -> None:
        """Choose the steps of a round so that they take so long."""
        self.ask("run 1")
        once = self.ask("run 1")
        self.steps = max(1, math.ceil(seconds * once["steps"] / once["seconds"]))

    def measure(self, units: int = 1) -> None:
        """One round; its seconds are those of a step over its `units`."""
        answer = self.ask(f"run {self.steps}")
        made = answer["steps"] * units
        self.seconds.append(answer["seconds"] / made)
        self.cpu_seconds.append(answer["cpu_seconds"] / made)

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.seconds)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait()
        self.log.close()


def take_turns(workers: Sequence[Worker], rounds: int, units: int = 1) -> float:
    """Rounds in which each worker is timed once; returns other processes' share."""
    busy = Busy(workers)
    for _ in range(rounds):
        for worker in workers:
            # Threads of the previous worker may still wait in a spin loop.
            time.sleep(0.05)
            worker.measure(units)
    return busy.foreign_share()


def worker_environment(threads: int, device: str = "cpu") -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TF_CPP_MIN_LOG_LEVEL": "2",
        **(NO_GPU if device == "cpu" else SHARED_GPU),
        "OMP_NUM_THREADS": str(threads),
    }


def pinned(threads: int, first: int = 0) -> Any:
    """Runs in the child process: every library then sees this number of cores."""
    cores = sorted(os.sched_getaffinity(0))[first : first + threads]
    return lambda: os.sched_setaffinity(0, cores)


class Busy:
    """The share of the machine that other processes use during the benchmark."""

    def __init__(self, workers: Sequence[Worker]):
        self.pids = [worker.process.pid for worker in workers] + [os.getpid()]
        self.start = time.perf_counter(), _machine_seconds(), self._own()

    def foreign_share(self) -> float:
        start, machine, own = self.start
        elapsed = (time.perf_counter() - start) * (os.cpu_count() or 1)
        foreign = (_machine_seconds() - machine) - (self._own() - own)
        return max(0.0, foreign / elapsed)

    def _own(self) -> float:
        total = 0
        for pid in self.pids:
            fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1]
            total += sum(map(int, fields.split()[11:13]))
        return total / os.sysconf("SC_CLK_TCK")


def _machine_seconds() -> float:
    fields = pathlib.Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _, _, interrupt, soft, steal = map(int, fields[:8])
    ticks = user + nice + system + interrupt + soft + steal
    return ticks / os.sysconf("SC_CLK_TCK")


def processor() -> str:
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} cores"
    return "unknown"
