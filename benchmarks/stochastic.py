"""Stochastic and first-order methods on three bilevel problems of known difficulty.

    python benchmarks/stochastic.py --part a --out runs/bench-stochastic

Part (a) is a quadratic whose value function h is known, (b) logistic regression with
one penalty per feature, (c) the cleaning of MNIST at 50, 70 and 90 percent of wrong
labels (TFDS_DATA_DIR is the folder of tensorflow-datasets): `stochastic_problems.py`.
The methods are the rows of `contestants/stochastic_library.py`. On (a), SOBA, StocBiO
and F2SA in JAX (`contestants/stochastic_jax.py`) stand beside them, which make the same
steps with the same batches: the report has the largest difference.

Every method has the grid of its problem: a lower rate, the ratio of the upper to the
lower rate, and whether both decay like (k + 1)^(-0.4); rates of a series do not decay.
Batches of 64 random examples at both levels, numbered by NumPy, so that all methods pay
the same for them: nothing. (SABA needs fixed batches, blocks of 64; full-batch methods
take all examples, and others may take all in blocks of 64.) Each setting is run for
--look seconds with three seeds, and the best three (in (c) two) by the median of the
seeds for --seconds with three seeds; of these, the table has the best median of each
column. Full-batch methods need one seed.

Seconds are of the processor, with one thread, compiled by XLA; compilation and
measuring are not counted. One oracle call is one gradient of f or g on a batch; a
product with g_yy, g_xy or both counts as two, and a value that a method needs (BVFSM)
as one, whatever it really takes. Full-batch
methods count a call for every 64 examples. Every row of the library says what it
counts.

Two methods run side by side, each in a process with a core of its own. With the
defaults that takes 25 minutes for (a), 15 for (b) and 20 for (c) on two quiet cores.
Every run is written to OUT/PART/METHOD.jsonl when it ends; an interrupted benchmark
goes on there. The same options are needed then. `--quick` tries everything in a minute.

Writes stochastic-PART.json, .md (a table) and .png (a picture, with matplotlib).
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
CONTESTANTS = HERE / "contestants"
sys.path[:0] = [str(HERE.parent), str(HERE), str(CONTESTANTS)]

import environment  # noqa: E402
import stochastic_report as report  # noqa: E402
from stochastic_library import ENTRIES, sizes_of  # noqa: E402
from stochastic_problems import PARTS, load  # noqa: E402
from stochastic_protocol import Plan, Setting, read  # noqa: E402
from workers import pinned, processor, worker_environment  # noqa: E402

from data_prep.command_line import positive  # noqa: E402

JAX = ("SOBA", "StocBiO", "F2SA")
AT_ONCE = 2  # processes


class Defaults(NamedTuple):
    """Of a part."""

    look: float
    seconds: float
    finalists: int


DEFAULTS = {
    "a": Defaults(0.5, 5.0, 3),
    "b": Defaults(0.3, 2.0, 3),
    "c": Defaults(0.3, 2.0, 2),
}
# One setting for each part, from the middle of its grid.
QUICK = {
    "a": Setting(0.3, 0.1, 0.0),
    "b": Setting(1.0, 10.0, 0.0),
    "c": Setting(1.0, 1e4, 0.0),
}


class Row(NamedTuple):
    """A row of the table: a method and who makes it."""

    method: str
    jax: bool

    @property
    def title(self) -> str:
        return f"{self.method}, JAX" if self.jax else self.method

    @property
    def file(self) -> str:
        return self.title.replace(", ", "-").replace(" ", "_") + ".jsonl"


def rows_of(part: str, methods: Sequence[str], peers: bool) -> list[Row]:
    rows = [Row(name, False) for name in methods]
    if part == "a" and peers:
        rows += [Row(name, True) for name in JAX if name in methods]
    return rows


def command(row: Row, part: str, data: pathlib.Path, out: pathlib.Path, plan: Plan):
    if ENTRIES[row.method].kind == "full":  # its batches are not random
        plan = plan._replace(seeds=1)
    script = "stochastic_jax.py" if row.jax else "stochastic_library.py"
    return [
        str(environment.PYTHON) if row.jax else sys.executable,
        str(CONTESTANTS / script),
        f"--method={row.method}",
        f"--part={part}",
        f"--data={data}",
        f"--out={out / row.file}",
        f"--plan={json.dumps(plan)}",
    ]


class Started(NamedTuple):
    row: Row
    process: subprocess.Popen
    log: Any
    core: int


def started(row: Row, core: int, *given: Any) -> Started:
    out: pathlib.Path = given[2]
    log = (out / f"{row.file}.log").open("w+")
    process = subprocess.Popen(
        command(row, *given),
        stdout=log,
        stderr=subprocess.STDOUT,
        env=worker_environment(1),
        preexec_fn=pinned(1, core),
    )
    return Started(row, process, log, core)


def ended(one: Started) -> str | None:
    """The error of a process that failed."""
    one.log.seek(0)
    text = one.log.read()[-3000:]
    one.log.close()
    failed = one.process.returncode != 0
    return f"{one.row.title} ended with {one.process.returncode}:\n{text}" * failed


def run_all(rows: list[Row], part: str, data: pathlib.Path, out: pathlib.Path, plan):
    """The processes of all rows, two at a time; returns their errors."""
    waiting, running, errors = list(rows), [], []
    free, begun, shown = list(range(cores())), time.monotonic(), 0.0
    try:
        while waiting or running:
            while waiting and free:
                row = waiting.pop(0)
                running.append(started(row, free.pop(0), part, data, out, plan))
            time.sleep(0.2)
            for one in [each for each in running if each.process.poll() is not None]:
                running.remove(one)
                free.append(one.core)
                errors += filter(None, [ended(one)])
            if time.monotonic() - shown > 10 or not (waiting or running):
                shown = time.monotonic()
                progress(rows, running, waiting, out, shown - begun)
    finally:
        for one in running:
            one.process.terminate()
            one.process.wait()
            one.log.close()
    return errors


def cores() -> int:
    return min(AT_ONCE, len(os.sched_getaffinity(0)))


def progress(rows, running, waiting, out: pathlib.Path, elapsed: float) -> None:
    now = ", ".join(
        f"{one.row.title} ({len(read(out / one.row.file))} runs)" for one in running
    )
    done = len(rows) - len(running) - len(waiting)
    left = ""
    if 0 < done < len(rows):
        minutes = elapsed / done * (len(rows) - done) / 60
        left = f", about {minutes:.0f} min left"
    print(
        f"{done} of {len(rows)} methods in {elapsed / 60:.1f} min{left}; now: {now}",
        file=sys.stderr,
        flush=True,
    )


def same_options(path: pathlib.Path, options: dict[str, Any]) -> None:
    """Results in one folder must have the same options."""
    if path.exists() and json.loads(path.read_text()) != options:
        raise SystemExit(
            f"error: {path.parent} has results of other options: {path.read_text()}"
            "Give those, or another --out."
        )
    path.write_text(json.dumps(options) + "\n")


def prepared(part: str, folder: pathlib.Path, arguments: argparse.Namespace):
    """The file of the part's arrays."""
    path = folder / "data.npz"
    if not path.exists():
        options = {"condition": arguments.condition} if part == "a" else {}
        try:
            arrays = PARTS[part].made(**options)
        except FileNotFoundError as error:
            raise SystemExit(f"error: {error}") from None
        np.savez(folder / "unfinished.npz", **arrays)
        (folder / "unfinished.npz").rename(path)
    return path


def planned(part: str, arguments: argparse.Namespace) -> Plan:
    if arguments.quick:
        return Plan([QUICK[part]], 1, 0.05, 0.2, 1)
    default = DEFAULTS[part]
    settings = Setting.all(PARTS[part].GRID)
    look = arguments.look or default.look
    return Plan(
        settings, 3, look, arguments.seconds or default.seconds, default.finalists
    )


def calls_of(method: str, problem: Any) -> float:
    """Oracle calls of one outer step."""
    calls = ENTRIES[method].calls
    return calls if isinstance(calls, (int, float)) else calls(sizes_of(problem))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--part", choices=PARTS, default="a")
    parser.add_argument("--methods", nargs="+", choices=ENTRIES, default=list(ENTRIES))
    above = positive(float)
    parser.add_argument("--condition", type=above, default=10.0, help="of part (a)")
    parser.add_argument("--seconds", type=above, help="of a run; default by part")
    parser.add_argument("--look", type=above, help="seconds, of the grid")
    parser.add_argument("--quick", action="store_true", help="one setting, briefly")
    arguments = parser.parse_args(argv)
    part, plan = arguments.part, planned(arguments.part, arguments)
    folder = arguments.out / part
    folder.mkdir(parents=True, exist_ok=True)
    options = {"condition": arguments.condition, "plan": plan}
    same_options(folder / "options.json", json.loads(json.dumps(options)))
    data = prepared(part, folder, arguments)
    peers = environment.PYTHON.exists()
    if part == "a" and not peers:
        print(f"note: no JAX: {environment.PYTHON} is missing", file=sys.stderr)
    rows = rows_of(part, arguments.methods, peers)
    errors = run_all(rows, part, data, folder, plan)
    problem = load(part, data)
    found = {
        row.title: report.Result(
            read(folder / row.file), calls_of(row.method, problem), row.jax
        )
        for row in rows
    }
    machine = f"{processor()}; {cores()} processes at once"
    report.write(arguments.out, part, problem, found, machine)
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    return int(bool(errors))


if __name__ == "__main__":
    sys.exit(main())
