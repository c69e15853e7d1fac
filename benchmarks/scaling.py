"""Time of an outer step and bytes exchanged, against the number of replicas.

    python benchmarks/scaling.py --out runs/scaling                # all GPUs
    python benchmarks/scaling.py --logical 2 --out runs/scaling    # CPU, a core each

Without a GPU, as many logical CPU devices as there are cores are the replicas. One
device without a strategy makes the same steps on the same global batches, and all take
turns. On several machines start it on each with TF_CONFIG (docs/scaling.md) and the
same arguments; there all workers together are measured, without the single device.

It writes scaling.csv and scaling.json, and prints them with a projection to 8 GPUs,
which is calculated and not measured.
"""

import argparse
import contextlib
import csv
import datetime
import json
import os
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "contestants")]

from gpu import gpus  # noqa: E402
from replica_sizes import CLASSES, INPUTS, Sizes  # noqa: E402
from workers import Worker, processor, take_turns  # noqa: E402

METHODS = ("v-pbgd", "unroll", "implicit-cg", "stocbio", "maml")
TITLES = {
    "v-pbgd": "V-PBGD (ValueGap)",
    "unroll": "Unroll",
    "implicit-cg": "Implicit(CG)",
    "stocbio": "StocBiO",
    "maml": "MAML (tasks)",
}
QUICK = {"batch": 32, "hidden": 8, "weights": 100, "steps": 2, "products": 2}
QUICK |= {"tasks": 4, "shots": 5}
COLUMNS: tuple[str, ...] = (
    "method",
    "device",
    "replicas",
    "cores",
    "batch",
    "seconds",
    "speed_up",
    "collectives",
    "numbers",
    "bytes",
    "of_upper",
    "of_lower",
)


class Setting(NamedTuple):
    """What takes part: a number of replicas, 0 for one device without a strategy."""

    name: str
    replicas: int
    cores: int


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    rows = several(arguments) if "TF_CONFIG" in os.environ else alone(arguments)
    if rows is None:
        return 0  # another worker writes
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / "scaling.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    machine = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "processor": processor(),
        "device": arguments.device,
        "load_before": arguments.load,
        "sizes": sizes_of(arguments),
    }
    made = {"machine": machine, "rows": rows, "projection": projected(arguments, rows)}
    (arguments.out / "scaling.json").write_text(json.dumps(made, indent=2) + "\n")
    print(table(rows))
    print(projection_table(made["projection"]))
    print(f"written: {arguments.out / 'scaling.csv'} and .json")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/bench"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--logical", type=int, help="replicas, as logical CPU devices")
    parser.add_argument("--replicas", nargs="+", type=int, help="only these numbers")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.3, help="of one round")
    parser.add_argument("--steps", type=int, default=5, help="of one, with TF_CONFIG")
    parser.add_argument("--batch", type=int, default=512, help="of all replicas")
    parser.add_argument("--hidden", type=int, default=300, help="units of the network")
    parser.add_argument("--weights", type=int, default=50_000, help="upper variables")
    parser.add_argument("--quick", action="store_true", help="a trial, a minute")
    arguments = parser.parse_args(argv)
    for name in ("rounds", "steps", "batch", "hidden", "weights"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1")
    arguments.load = os.getloadavg()[0]
    if arguments.quick:
        arguments.rounds, arguments.seconds = 2, 0.02
    found = 0 if arguments.logical else gpus()
    arguments.device = "gpu" if found else "cpu"
    cores = len(os.sched_getaffinity(0))
    most = found or arguments.logical or cores
    if arguments.device == "cpu" and most > cores:
        parser.error(f"--logical {most} needs a core each, and there are {cores}")
    if arguments.replicas is None:
        arguments.replicas = [2**k for k in range(1, 10) if 2**k <= most]
    if not all(1 < replicas <= most for replicas in arguments.replicas):
        parser.error(f"--replicas must be from 2 to {most}, the number of devices")
    return arguments


def sizes_of(arguments: argparse.Namespace) -> dict[str, int]:
    if arguments.quick:
        return QUICK
    return {name: getattr(arguments, name) for name in ("batch", "hidden", "weights")}


def settings_of(arguments: argparse.Namespace) -> list[Setting]:
    cores = len(os.sched_getaffinity(0))
    if arguments.device == "gpu":
        replicated = [Setting(f"{n} GPUs", n, cores) for n in arguments.replicas]
        return [Setting("one GPU", 0, cores), *replicated]
    replicated = [Setting(f"{n} x 1 core", n, n) for n in arguments.replicas]
    alone = [Setting("one device, 1 core", 0, 1)]
    most = max(arguments.replicas, default=1)
    if most > 1:
        alone.append(Setting(f"one device, {most} cores", 0, most))
    return [*alone, *replicated]


def alone(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All replicas are devices of this machine."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        path = pathlib.Path(folder) / "sizes.json"
        path.write_text(json.dumps(sizes_of(arguments)))
        settings = settings_of(arguments)
        workers = []
        for setting in settings:
            workers.append(started(setting, path, arguments.device))
            stack.callback(workers[-1].close)
        for method in arguments.methods:
            print(f"measuring {TITLES[method]} ...", file=sys.stderr, flush=True)
            found = []
            for worker in workers:
                found.append(worker.ask(f"use {method}"))
                worker.seconds.clear()
                worker.fill(arguments.seconds)
            foreign = take_turns(workers, arguments.rounds)
            if foreign > 0.03:
                print(f"NOISY: other processes used {foreign:.0%}", file=sys.stderr)
            for setting, worker, facts in zip(settings, workers, found, strict=True):
                row = row_of(arguments, method, setting, worker.seconds, facts)
                row["speed_up"] = statistics.median(
                    one / own
                    for one, own in zip(workers[0].seconds, worker.seconds, strict=True)
                )
                rows.append({**row, "foreign_share": foreign})
    return rows


def started(setting: Setting, sizes: pathlib.Path, device: str) -> Worker:
    command = [
        sys.executable,
        str(HERE / "contestants" / "replicas.py"),
        "--method=all",
        f"--variant={setting.replicas}",
        f"--threads={setting.cores}",
        f"--data={sizes}",
        f"--device={device}",
    ]
    return Worker(setting.name, command, setting.cores, device)


def several(arguments: argparse.Namespace) -> list[dict[str, Any]] | None:
    """This process is one of several workers; `None`: it is not the first of them."""
    import tensorflow as tf

    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    from protocol import Clock
    from replicas import Training

    training = Training(strategy, Sizes(**sizes_of(arguments)))
    replicas, rows = strategy.num_replicas_in_sync, []
    workers = strategy.extended._num_workers
    name = f"{replicas} {arguments.device.upper()}s in {workers} processes"
    for method in arguments.methods:
        facts = training.use(method)._asdict()
        seconds = []
        for _ in range(1 + arguments.rounds):  # the first one compiles
            clock = Clock()
            made = training.run(arguments.steps, clock)
            seconds.append(clock.read()["seconds"] / made)
        setting = Setting(name, replicas, len(os.sched_getaffinity(0)))
        rows.append(row_of(arguments, method, setting, seconds[1:], facts))
    return rows if strategy.extended._is_chief else None


def row_of(
    arguments: argparse.Namespace,
    method: str,
    setting: Setting,
    seconds: Sequence[float],
    facts: dict[str, int],
) -> dict[str, Any]:
    sizes = Sizes(**sizes_of(arguments))
    return {
        "method": method,
        "device": setting.name,
        "replicas": max(setting.replicas, 1),
        "cores": setting.cores,
        "batch": sizes.images(method),
        "seconds": statistics.median(seconds),
        "rounds": list(seconds),
        "speed_up": None,
        "collectives": facts["number"],
        **{name: facts[name] for name in ("numbers", "bytes", "of_upper", "of_lower")},
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| method | devices | replicas | global batch | ms per step | speed-up "
        "| collectives per step | KB reduced per step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        speed_up = "" if r["speed_up"] is None else f"{r['speed_up']:.2f}"
        lines.append(
            f"| {TITLES[r['method']]} | {r['device']} | {r['replicas']} | {r['batch']} "
            f"| {1e3 * r['seconds']:.1f} | {speed_up} | {r['collectives']} "
            f"| {r['bytes'] / 1e3:,.0f} |"
        )
    return "\n".join([*lines, ""])


class Device(NamedTuple):
    """What the projection assumes of a GPU and what connects it to the others.

    Attributes:
        rate: floating-point operations per second (TF32, as matrix products reach).
        bandwidth: bytes per second of a ring all-reduce, in each direction.
        latency: seconds of one collective, whatever its size.
    """

    rate: float = 60e12
    bandwidth: float = 200e9
    latency: float = 20e-6


class Workload(NamedTuple):
    """A problem, as far as the projection knows it.

    Attributes:
        forward: operations of one image through the network.
        lower, upper: numbers of variables.
        images: in a batch of all replicas together.
        per_task: images of a level in the tasks of a step.
    """

    forward: float
    lower: int
    upper: int
    images: int
    per_task: int


GPUS = 8
RESNET = Workload(8.2e9, 25_600_000, 1_281_167, 1024, 32 * 25)


def operations(method: str, work: Workload, steps: int, products: int) -> float:
    """Of one outer step. A gradient takes three forward passes, a product with a second
    derivative at a new point nine, and at a known one six."""
    passes = {
        # z: a step and its loss; the gradients of f and g at y.
        "v-pbgd": 3 + 1 + 3 + 3,
        "unroll": (3 + 9) * steps + 3,
        "maml": (3 + 9) * steps + 3,
        "implicit-cg": 3 * steps + 3 + 3 + 6 * products + 6,
        "stocbio": 3 * steps + 3 + 9 * products + 9,
    }[method]
    images = work.per_task if method == "maml" else work.images
    return passes * work.forward * images


def projected(
    arguments: argparse.Namespace, rows: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """On paper: an outer step on one GPU and on several.

    t_1 = operations / rate
    t_n = t_1 / n + collectives * latency + 2 (n - 1) / n * bytes / bandwidth
    """
    device, sizes, made = Device(), Sizes(**sizes_of(arguments)), []
    for row in rows:
        method = row["method"]
        if not row["collectives"] or any(method == m["method"] for m in made):
            continue
        forward = 2.0 * sizes.hidden * (INPUTS + CLASSES)
        here = Workload(
            forward, sizes.lower, sizes.weights, sizes.batch, sizes.images("maml")
        )
        for name, work in (("this network", here), ("ResNet-50", RESNET)):
            upper = work.lower if method == "maml" else work.upper
            numbers = row["of_upper"] * upper + row["of_lower"] * work.lower
            single = operations(method, work, sizes.steps, sizes.products) / device.rate
            exchange = 2 * (GPUS - 1) / GPUS * 4 * numbers / device.bandwidth
            waiting = row["collectives"] * device.latency
            together = single / GPUS + waiting + exchange
            made.append(
                {
                    "method": method,
                    "workload": name,
                    "one_gpu_seconds": single,
                    "gpus": GPUS,
                    "computing_seconds": single / GPUS,
                    "latency_seconds": waiting,
                    "exchange_seconds": exchange,
                    "bytes": 4 * numbers,
                    "seconds": together,
                    "speed_up": single / together,
                    **device._asdict(),
                }
            )
    return made


def projection_table(made: list[dict[str, Any]]) -> str:
    if not made:
        return ""
    device = Device()
    lines = [
        f"On paper, {GPUS} GPUs: {device.rate / 1e12:.0f} TFLOP/s, ring all-reduce at "
        f"{device.bandwidth / 1e9:.0f} GB/s, {1e6 * device.latency:.0f} microseconds "
        "per collective.",
        "",
        "| method | network | one GPU ms | computing ms | latency ms | exchange ms "
        "| together ms | speed-up |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for m in made:
        parts = ("one_gpu", "computing", "latency", "exchange")
        cells = [f"{1e3 * m[f'{part}_seconds']:.3g}" for part in parts]
        lines.append(
            f"| {TITLES[m['method']]} | {m['workload']} | {' | '.join(cells)} "
            f"| {1e3 * m['seconds']:.3g} | {m['speed_up']:.2f} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
