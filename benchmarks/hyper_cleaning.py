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
import time
from typing import Any, NamedTuple

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
CONTESTANTS = HERE / "contestants"
sys.path.insert(0, str(CONTESTANTS))

import environment  # noqa: E402
import operations  # noqa: E402
import protocol  # noqa: E402
import reference  # noqa: E402


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
    arguments = parse(argv)
    with_peers = environment.PYTHON.exists()
    if not with_peers:
        print(
            f"note: no peers, because {environment.PYTHON} does not exist. "
            "Create it with `make bench-env`.",
            file=sys.stderr,
        )
    chosen = [c for c in CONTESTANTS_IN_ORDER if with_peers or not c.peer]
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
                report(arguments.out, machine, groups)
    print(f"written: {arguments.out / 'hyper_cleaning.md'} and .json")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
    arguments = parser.parse_args(argv)
    if not any(
        m in protocol.METHODS_OF[n] for n in arguments.nets for m in arguments.methods
    ):
        parser.error("aid-cg runs on the linear net only: add it to --nets")
    for name in ("rounds", "rows", "inner_steps", "threads"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return arguments


class Worker:
    """A contestant's process."""

    def __init__(
        self,
        contestant: Contestant,
        arguments: argparse.Namespace,
        data: pathlib.Path,
        method: str,
    ):
        self.contestant = contestant
        self.log = tempfile.TemporaryFile("w+")
        command = [
            str(environment.PYTHON) if contestant.peer else sys.executable,
            str(CONTESTANTS / contestant.script),
            f"--method={method}",
            f"--variant={contestant.variant}",
            f"--threads={arguments.threads}",
            f"--data={data}",
        ]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=worker_environment(arguments.threads),
            preexec_fn=pinned(arguments.threads),
        )
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []

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
                f"error: {self.contestant.name} ended at `{command}`:\n"
                f"{self.log.read()[-3000:]}"
            )
        return json.loads(answer)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait()
        self.log.close()


def worker_environment(threads: int) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": str(threads),
    }


def pinned(threads: int) -> Any:
    """Runs in the child process: every library then sees this number of cores."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    return lambda: os.sched_setaffinity(0, cores)


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
        errors, counts = {}, {}
        for contestant in entrants:
            worker = Worker(contestant, arguments, data, method)
            workers.append(worker)
            path = data.with_name("hypergradient.npy")
            worker.ask(f"hypergradient {path}")
            difference = np.linalg.norm(np.load(path) - exact)
            errors[contestant.name] = float(difference / np.linalg.norm(exact))
            worker.ask("run 1")
            once = worker.ask("run 1")
            rate = once["steps"] / once["seconds"]
            counts[contestant.name] = max(1, math.ceil(arguments.seconds * rate))
        busy = Busy(workers)
        for _ in range(arguments.rounds):
            for worker in workers:
                # Threads of the previous contestant may still wait in a spin loop.
                time.sleep(0.05)
                count = counts[worker.contestant.name]
                answer = worker.ask(f"run {count}")
                made = answer["steps"] * units
                worker.seconds.append(answer["seconds"] / made)
                worker.cpu_seconds.append(answer["cpu_seconds"] / made)
        foreign = busy.foreign_share()
        results = []
        for worker in workers:
            memory = worker.ask("run 1")
            contestant = worker.contestant
            results.append(
                {
                    "name": contestant.name,
                    "family": contestant.family,
                    "median_seconds": statistics.median(worker.seconds),
                    "seconds": worker.seconds,
                    "cpu_seconds": statistics.median(worker.cpu_seconds),
                    "steps_per_round": counts[contestant.name],
                    "peak_bytes": memory["peak"],
                    "method_bytes": memory["peak"] - memory["baseline"],
                    "hypergradient_error": errors[contestant.name],
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


class Busy:
    """The share of the machine that other processes use during the benchmark."""

    def __init__(self, workers: list[Worker]):
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
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=worker_environment(arguments.threads),
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
        "threads": arguments.threads,
        "load_before": os.getloadavg()[0],
        "rows": arguments.rows,
        "rounds": arguments.rounds,
        "inner_steps": arguments.inner_steps,
        "versions": {**library, **(environment.versions() if with_peers else {})},
        "rates": rates,
    }


def processor() -> str:
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} cores"
    return "unknown"


def report(out: pathlib.Path, machine: dict, groups: list[dict]) -> None:
    (out / "hyper_cleaning.json").write_text(
        json.dumps({"machine": machine, "groups": groups}, indent=2) + "\n"
    )
    rates, versions = machine["rates"], machine["versions"]
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [
        "# Hyper-cleaning benchmark",
        "",
        f"{machine['date']}, {machine['processor']}, {machine['threads']} threads; "
        f"{named}.",
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
    (out / "hyper_cleaning.md").write_text("\n".join(lines))


def summary(groups: list[dict]) -> str:
    lines = [
        "Time of each peer over tfbilevel's (medians of paired rounds; above 1: "
        "tfbilevel is faster):",
        "",
        f"| | {' | '.join(COMPARED.values())} |",
        "|---" * (1 + len(COMPARED)) + "|",
    ]
    for group in groups:
        cells = [
            f"{group['ratios'][f]['median']:.2f}" if f in group["ratios"] else "-"
            for f in COMPARED
        ]
        label = f"{group['method']}, {group['net']}"
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def table(group: dict) -> str:
    ours = fastest(group["results"], "library")
    lines = [
        f"## {TITLES[group['method']]}, {group['net']}",
        "",
        "| | ms | over tfbilevel | CPU ms | peak MiB | above start MiB | error |",
        "|---|---|---|---|---|---|---|",
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
            f"| {r['method_bytes'] / 2**20:.0f} | {r['hypergradient_error']:.0e} |"
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
