"""Shared by all contestants: the problem's data and the commands they answer.

A contestant is a process. It reads one command per line from standard input and
answers each one with one line of JSON:

    hypergradient PATH   the upper gradient of the first step, written as .npy
    run N                make at least N outer steps; answers how many `steps` were
                         timed, their elapsed seconds and those of all threads
    use METHOD           (replicas.py only) train by that method from now on
    quit

Every answer has the process's memory: its `peak`, `baseline` before the method, and
`device_peak`, the most that it had on the GPU (`null` on a CPU).

Only NumPy is imported here, because the peers have a separate environment.
"""

import argparse
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

METHODS = ("v-pbgd", "g-pbgd", "rhg", "aid-cg", "aid-fp", "stocbio")
NETS = ("linear", "mlp")
# Conjugate gradients need a positive definite Hessian; the mlp's is indefinite.
METHODS_OF = {"linear": METHODS, "mlp": tuple(m for m in METHODS if m != "aid-cg")}

UPPER_RATE = 0.1
LOWER_RATE = 0.1
AUXILIARY_RATE = 0.01  # V-PBGD's second copy
INNER_RATE = 0.1  # RHG, AID and stocBiO
WEIGHT = {"v-pbgd": 0.1, "g-pbgd": 10.0}

SOLVER_STEPS = 10  # AID's linear solve
# stocBiO's inner steps, factors of its series, and images per minibatch.
STOCHASTIC_STEPS = 20
FACTORS = 3
BATCH_SIZE = 50
SERIES_RATE = 0.1  # eta; the published 0.5 exceeds 1 / (curvature) of the mlp


def scale(weight: float) -> float:
    """The published step scale min(1 / gamma, 1)."""
    return min(1.0 / (weight + 1e-8), 1.0)


class Instance(NamedTuple):
    """Data hyper-cleaning: one weight per training image, all arrays NumPy.

    Attributes:
        train: images, [n, 784], float32.
        train_labels: [n], int32, random.
        validation: images, [m, 784].
        validation_labels: [m], int32, random.
        upper: the example weights' logits, [n].
        lower: kernels [in, out] and biases [out], alternating.
        auxiliary: V-PBGD's second copy of the lower variables.
        inner_steps: length of the unrolled loop.
        draws: stocBiO's training minibatches, [steps + factors + 1, batch], int32:
            indices of their images.
        validation_draw: its validation minibatch, [batch], int32.
    """

    train: np.ndarray
    train_labels: np.ndarray
    validation: np.ndarray
    validation_labels: np.ndarray
    upper: np.ndarray
    lower: list[np.ndarray]
    auxiliary: list[np.ndarray]
    inner_steps: int
    draws: np.ndarray
    validation_draw: np.ndarray


def make_instance(net: str, rows: int, inner_steps: int, seed: int = 0) -> Instance:
    """Random numbers with the sizes, range and sparsity of MNIST."""
    generator = np.random.default_rng(seed)
    sizes = {"linear": [784, 10], "mlp": [784, 300, 10]}[net]

    def images() -> np.ndarray:
        pixels = generator.uniform(0.0, 1.0, [rows, 784])
        return (pixels * (generator.uniform(size=[rows, 784]) > 0.8)).astype("float32")

    def network() -> list[np.ndarray]:
        leaves = []
        for fan_in, units in zip(sizes[:-1], sizes[1:], strict=True):
            for shape in ([fan_in, units], [units]):
                leaf = generator.uniform(-1.0, 1.0, shape) / np.sqrt(fan_in)
                leaves.append(leaf.astype("float32"))
        return leaves

    def labels() -> np.ndarray:
        return generator.integers(0, 10, rows).astype("int32")

    def minibatch() -> np.ndarray:
        return generator.permutation(rows)[:BATCH_SIZE].astype("int32")

    return Instance(
        train=images(),
        train_labels=labels(),
        validation=images(),
        validation_labels=labels(),
        upper=generator.normal(size=rows).astype("float32"),
        lower=network(),
        auxiliary=network(),
        inner_steps=inner_steps,
        draws=np.stack([minibatch() for _ in range(STOCHASTIC_STEPS + FACTORS + 1)]),
        validation_draw=minibatch(),
    )


def make_batches(method: str, instance: Instance) -> tuple[tuple, tuple]:
    """The images and labels that the method's upper and lower losses read.

    stocBiO's lower batches are stacked. Each contains the indices of its images, which
    select their weights.
    """
    upper = (instance.validation, instance.validation_labels)
    lower = (instance.train, instance.train_labels)
    if method != "stocbio":
        return upper, lower
    draws = instance.draws
    return (
        tuple(leaf[instance.validation_draw] for leaf in upper),
        (*(leaf[draws] for leaf in lower), draws),
    )


def save(instance: Instance, path: pathlib.Path) -> None:
    arrays = {}
    for name, value in instance._asdict().items():
        if isinstance(value, list):
            arrays.update({f"{name}_{i}": leaf for i, leaf in enumerate(value)})
        else:
            arrays[name] = np.asarray(value)
    np.savez(path, **arrays)


def load(path: pathlib.Path) -> Instance:
    with np.load(path) as arrays:
        fields = {}
        for name in Instance._fields:
            if name in ("lower", "auxiliary"):
                count = sum(key.startswith(f"{name}_") for key in arrays.files)
                fields[name] = [arrays[f"{name}_{i}"] for i in range(count)]
            else:
                fields[name] = arrays[name]
        fields["inner_steps"] = int(fields["inner_steps"])
        return Instance(**fields)


class Contestant(Protocol):
    """One implementation of one method on one network."""

    def hypergradient(self) -> np.ndarray:
        """The upper gradient of the first step from the instance's start."""
        ...

    def run(self, steps: int, clock: "Clock") -> int:
        """Make at least `steps` outer steps, and wait for their results.

        The clock is running; to exclude time from the measurement, start it again.
        Returns the number of steps since the clock was last started.
        """
        ...


class Clock:
    """Elapsed time and processor time of all threads."""

    def start(self) -> None:
        self._start = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        elapsed, processor = self._start
        return {
            "seconds": time.perf_counter() - elapsed,
            "cpu_seconds": time.process_time() - processor,
        }


def serve(
    build: Callable[[argparse.Namespace, Any], Contestant],
    read: Callable[[pathlib.Path], Any] = load,
    methods: tuple[str, ...] = METHODS,
    device_peak: Callable[[], int] | None = None,
) -> None:
    """Answer the driver's commands until `quit`.

    Args:
        build: (flags, instance) -> the contestant.
        read: reads the instance from its file.
        methods: the allowed values of --method.
        device_peak: () -> the most bytes that this process had on its GPU.
    """
    arguments = _arguments(methods)
    # Frameworks also write to standard output, so answers use a separate descriptor.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    instance = read(arguments.data)
    # The framework is imported already; later memory belongs to the method.
    baseline = resident()
    contestant: Any = build(arguments, instance)
    for line in sys.stdin:
        command, *operands = line.split()
        if command == "quit":
            break
        if command == "hypergradient":
            np.save(operands[0], contestant.hypergradient())
            answer: dict[str, Any] = {}
        elif command == "use":
            answer = contestant.use(operands[0])
        else:
            clock = Clock()
            clock.start()
            steps = contestant.run(int(operands[0]), clock)
            answer = {"steps": steps, **clock.read()}
        answer |= {"peak": peak_resident(), "baseline": baseline}
        answer["device_peak"] = None
        if device_peak is not None and arguments.device == "gpu":
            answer["device_peak"] = device_peak()
        answers.write(json.dumps(answer) + "\n")


def resident() -> int:
    """The bytes of this process that are in memory now."""
    return _status("VmRSS")


def peak_resident() -> int:
    """The largest number of bytes that this process had in memory."""
    return _status("VmHWM")


def _status(name: str) -> int:
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}")


def _arguments(methods: tuple[str, ...]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", choices=methods, required=True)
    parser.add_argument("--variant", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    return parser.parse_args()
