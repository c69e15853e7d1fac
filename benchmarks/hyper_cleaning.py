"""Speed, memory and hypergradient error on data hyper-cleaning, compared with peers.

    python benchmarks/hyper_cleaning.py --out runs/bench

Run it in the library's environment. The peers run in `.venv-bench`, which
`make bench-env` creates; without it they are left out. Every contestant runs in a
separate process, and only one computes at a time. They alternate, so that load spikes
of the machine affect all of them. See README.md in this folder.
"""

import argparse
import datetime
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
CONTESTANTS = HERE / "contestants"
sys.path[:0] = [str(HERE), str(CONTESTANTS)]

import environment  # noqa: E402
import operations  # noqa: E402
import protocol  # noqa: E402
import reference  # noqa: E402
from workers import (  # noqa: E402
    Worker,
    pinned,
    processor,
    take_turns,
    worker_environment,
)


class Contestant(NamedTuple):
    """An implementation: its name in the tables, and how it is started."""

    name: str
    family: str
    script: str
    variant: str
    methods: tuple[str, ...] = protocol.METHODS
    peer: bool = False


CONTESTANTS_IN_ORDER = (
    Contestant("tfbilevel", "library", "library.py", "plain"),
    Contestant("tfbilevel, XLA", "library", "library.py", "xla"),
    Contestant(
        "tfbilevel, fit",
        "fit",
        "library.py",
        "fit",
        methods=tuple(m for m in protocol.METHODS if m != "stocbio"),
    ),
    Contestant("tf.function", "bare", "bare_tensorflow.py", "plain"),
    Contestant("tf.function, XLA", "bare", "bare_tensorflow.py", "xla"),
    Contestant(
        "PyTorch as published", "torch", "published_torch.py", "published", peer=True
    ),
    Contestant(
        "PyTorch with higher",
        "higher",
        "published_torch.py",
        "higher",
        methods=("rhg",),
        peer=True,
    ),
    Contestant(
        "PyTorch with PyPI's hypergrad",
        "hypergrad",
        "published_torch.py",
        "hypergrad",
        methods=("aid-cg", "aid-fp"),
        peer=True,
    ),
    Contestant("JAX", "jax", "jitted_jax.py", "jit", peer=True),
    Contestant(
        "JAX, remat", "jax", "jitted_jax.py", "remat", methods=("rhg",), peer=True
    ),
)

# Families of peers in the summary, with the titles of their columns.
COMPARED = {
    "bare": "tf.function",
    "torch": "PyTorch as published",
    "higher": "PyTorch with higher",
    "hypergrad": "PyTorch with PyPI's hypergrad",
    "jax": "JAX",
    "fit": "fit",
    # Only gpu.py has these.
    "fit-xla": "fit, XLA",
    "fit-bfloat16": "fit, bf16",
    "fit-xla-bfloat16": "fit, XLA, bf16",
}

TITLES = {
    "v-pbgd": "V-PBGD, one outer step",
    "g-pbgd": "G-PBGD, one outer step",
    "rhg": "RHG, one inner step (forward and reverse)",
    "aid-cg": "AID-CG, one outer step",
    "aid-fp": "AID-FP, one outer step",
    "stocbio": "stocBiO, one outer step",
}


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    compare(checked(arguments), CONTESTANTS_IN_ORDER, "hyper_cleaning")
    return 0


def compare(
    arguments: argparse.Namespace, contestants: Sequence[Contestant], name: str
) -> None:
    """Measure all methods and networks, and write the tables after each.

    Args:
        arguments: those of `parser`.
        contestants: the peers among them are left out if they are not installed.
        name: of the files that are written.
    """
    with_peers = environment.PYTHON.exists()
    if not with_peers:
        print(
            f"note: no peers, because {environment.PYTHON} does not exist. "
            "Create it with `make bench-env`.",
            file=sys.stderr,
        )
    chosen = [c for c in contestants if with_peers or not c.peer]
    arguments.out.mkdir(parents=True, exist_ok=True)
    machine = describe_machine(arguments, with_peers)
    groups: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        for net in arguments.nets:
            instance = protocol.make_instance(
                net, arguments.rows, arguments.inner_steps
            )
            data = pathlib.Path(folder) / f"{net}.npz"
            protocol.save(instance, data)
            for method in arguments.methods:
                if method not in protocol.METHODS_OF[net]:
                    continue
                exact = reference.hypergradient(method, instance)
                entrants = [c for c in chosen if method in c.methods]
                group = {
                    "net": net,
                    "method": method,
                    "floor": operations.floor(
                        net, method, arguments.rows, machine["rates"]
                    ),
                    **measure(arguments, data, method, entrants, exact),
                }
                groups.append(group)
                print(table(group), flush=True)
                report(arguments.out, name, machine, groups)
    print(f"written: {arguments.out / name}.md and .json")


def parser(description: str = __doc__.splitlines()[0]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/bench"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", type=int, default=5000, help="images per level")
    parser.add_argument("--inner-steps", type=int, default=50, help="RHG's inner steps")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="shortest time of one measurement"
    )
    parser.add_argument(
        "--nets", nargs="+", choices=protocol.NETS, default=protocol.NETS
    )
    parser.add_argument(
        "--methods", nargs="+", choices=protocol.METHODS, default=protocol.METHODS
    )
    return parser


def checked(arguments: argparse.Namespace) -> argparse.Namespace:
    if not any(
        m in protocol.METHODS_OF[n] for n in arguments.nets for m in arguments.methods
    ):
        raise SystemExit("error: aid-cg runs on the linear net only: add it to --nets")
    for name in ("rounds", "rows", "inner_steps", "threads"):
        if getattr(arguments, name) < 1:
            raise SystemExit(f"error: --{name.replace('_', '-')} must be at least 1")
    return arguments


def started(
    contestant: Contestant,
    arguments: argparse.Namespace,
    data: pathlib.Path,
    method: str,
) -> Worker:
    """A contestant's process. `arguments` has the threads, and may have a device."""
    device = getattr(arguments, "device", "cpu")
    command = [
        str(environment.PYTHON) if contestant.peer else sys.executable,
        str(CONTESTANTS / contestant.script),
        f"--method={method}",
        f"--variant={contestant.variant}",
        f"--threads={arguments.threads}",
        f"--data={data}",
        f"--device={device}",
    ]
    return Worker(contestant.name, command, arguments.threads, device)


def measure(
    arguments: argparse.Namespace,
    data: pathlib.Path,
    method: str,
    entrants: list[Contestant],
    exact: np.ndarray,
) -> dict[str, Any]:
    """Runs rounds in which every contestant is timed once, one after the other."""
    units = arguments.inner_steps if method == "rhg" else 1
    workers: list[Worker] = []
    try:
        errors = []
        for contestant in entrants:
            worker = started(contestant, arguments, data, method)
            workers.append(worker)
            path = data.with_name("hypergradient.npy")
            worker.ask(f"hypergradient {path}")
            difference = np.linalg.norm(np.load(path) - exact)
            errors.append(float(difference / np.linalg.norm(exact)))
            worker.fill(arguments.seconds)
        foreign = take_turns(workers, arguments.rounds, units)
        results = []
        for contestant, worker, error in zip(entrants, workers, errors, strict=True):
            memory = worker.ask("run 1")
            results.append(
                {
                    "name": contestant.name,
                    "family": contestant.family,
                    "median_seconds": worker.median_seconds,
                    "seconds": worker.seconds,
                    "cpu_seconds": statistics.median(worker.cpu_seconds),
                    "steps_per_round": worker.steps,
                    "peak_bytes": memory["peak"],
                    "method_bytes": memory["peak"] - memory["baseline"],
                    "device_peak_bytes": memory["device_peak"],
                    "hypergradient_error": error,
                }
            )
    finally:
        for worker in workers:
            worker.close()
    return {
        "results": results,
        "foreign_share": foreign,
        "ratios": ratios(results),
    }


def fastest(results: list[dict], *families: str) -> dict | None:
    entered = [r for r in results if r["family"] in families]
    return min(entered, key=lambda r: r["median_seconds"]) if entered else None


def ratios(results: list[dict]) -> dict[str, dict[str, Any]]:
    """Each peer's time divided by that of the library's faster variant."""
    ours = fastest(results, "library")
    found: dict[str, dict[str, Any]] = {}
    for family in COMPARED:
        theirs = fastest(results, family)
        if ours is None or theirs is None:
            continue
        rounds = [
            t / o for t, o in zip(theirs["seconds"], ours["seconds"], strict=True)
        ]
        found[family] = {
            "name": theirs["name"],
            "of": ours["name"],
            "of_medians": theirs["median_seconds"] / ours["median_seconds"],
            "median": statistics.median(rounds),
            "least": min(rounds),
            "most": max(rounds),
        }
    return found


def describe_machine(arguments: argparse.Namespace, with_peers: bool) -> dict[str, Any]:
    command = [
        sys.executable,
        str(CONTESTANTS / "machine.py"),
        f"--threads={arguments.threads}",
        f"--rows={arguments.rows}",
    ]
    device = getattr(arguments, "device", "cpu")
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=worker_environment(arguments.threads, device),
        preexec_fn=pinned(arguments.threads),
    )
    if done.returncode != 0:
        raise SystemExit(f"error: machine.py failed:\n{done.stderr[-3000:]}")
    rates = json.loads(done.stdout)
    import importlib.metadata

    library = {n: importlib.metadata.version(n) for n in ("tensorflow", "keras")}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "processor": processor(),
        "device": rates.pop("device"),
        "threads": arguments.threads,
        "load_before": os.getloadavg()[0],
        "rows": arguments.rows,
        "rounds": arguments.rounds,
        "inner_steps": arguments.inner_steps,
        "versions": {**library, **(environment.versions() if with_peers else {})},
        "rates": rates,
    }


def report(out: pathlib.Path, name: str, machine: dict, groups: list[dict]) -> None:
    (out / f"{name}.json").write_text(
        json.dumps({"machine": machine, "groups": groups}, indent=2) + "\n"
    )
    rates, versions = machine["rates"], machine["versions"]
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [
        "# Hyper-cleaning benchmark",
        "",
        f"{machine['date']}, {machine['processor']}, {machine['threads']} threads, "
        f"computing on {machine['device']}; {named}.",
        f"{machine['rows']} x 784 images per level, full batch (stocBiO: minibatches "
        f"of {protocol.BATCH_SIZE}), float32; medians of {machine['rounds']} "
        f"interleaved rounds; RHG unrolls {machine['inner_steps']} steps. Matrix "
        "products run at "
        f"{max(rates['flops'].values()) / 1e9:.0f} GFLOP/s at best, memory reads at "
        f"{rates['bytes']['memory'] / 1e9:.1f} GB/s.",
        "",
        summary(groups),
        *(table(group) for group in groups),
    ]
    (out / f"{name}.md").write_text("\n".join(lines))


def summary(groups: list[dict]) -> str:
    entered = {f for group in groups for f in group["ratios"]}
    compared = {f: title for f, title in COMPARED.items() if f in entered}
    lines = [
        "Time of each peer over tfbilevel's (medians of paired rounds; above 1: "
        "tfbilevel is faster):",
        "",
        f"| | {' | '.join(compared.values())} |",
        "|---" * (1 + len(compared)) + "|",
    ]
    for group in groups:
        cells = [
            f"{group['ratios'][f]['median']:.2f}" if f in group["ratios"] else "-"
            for f in compared
        ]
        label = f"{group['method']}, {group['net']}"
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def mebibytes(number: int | None) -> str:
    return "-" if number is None else f"{number / 2**20:.0f}"


def table(group: dict) -> str:
    ours = fastest(group["results"], "library")
    lines = [
        f"## {TITLES[group['method']]}, {group['net']}",
        "",
        "| | ms | over tfbilevel | CPU ms | peak MiB | above start MiB "
        "| device peak MiB | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in group["results"]:
        over = (
            statistics.median(
                t / o for t, o in zip(r["seconds"], ours["seconds"], strict=True)
            )
            if ours
            else math.nan
        )
        lines.append(
            f"| {r['name']} | {1e3 * r['median_seconds']:.2f} | {over:.2f} "
            f"| {1e3 * r['cpu_seconds']:.2f} | {r['peak_bytes'] / 2**20:.0f} "
            f"| {r['method_bytes'] / 2**20:.0f} | {mebibytes(r['device_peak_bytes'])} "
            f"| {r['hypergradient_error']:.0e} |"
        )
    bound = group["floor"]
    stored = (
        f" ({1e3 * bound['seconds_everything_stored']:.2f} ms if nothing is recomputed)"
        if group["method"] == "rhg"
        else ""
    )
    lines += [
        "",
        f"Floor: {bound['flops'] / 1e9:.2f} GFLOP, "
        f"{1e3 * bound['seconds_at_best_rate']:.2f} ms at the best rate{stored}, "
        f"{1e3 * bound['seconds_at_rate_of_these_shapes']:.2f} ms at the rate of "
        f"these shapes; {bound['bytes'] / 1e6:.0f} MB of images read, "
        f"{1e3 * bound['seconds_reading_from_memory']:.2f} ms from memory, "
        f"{1e3 * bound['seconds_reading_from_cache']:.2f} ms from cache.",
    ]
    share = group["foreign_share"]
    if share > 0.03:
        lines.append(
            f"NOISY: other processes used {100 * share:.0f} percent of the machine."
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
