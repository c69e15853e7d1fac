"""Shared by the contestants of `stochastic.py`: what a run is, and how it is timed.

A contestant is a process for one method. It compiles the method once for each setting
and adds a line of JSON to a file after each run: a run whose line is there already is
not made again. Time is that of the processor, of all threads (there is one).

Only NumPy is imported here: the JAX contestants have an environment of their own.
"""

import argparse
import itertools
import json
import math
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))

from protocol import peak_resident  # noqa: E402
from stochastic_problems import BATCH, PARTS, Grid, Problem, load  # noqa: E402

TERMS = 10  # of series, and steps of y and v where a method makes several
RAMP = (1.0, 100.0, 5000)  # the weight of F2SA and ValueGap: from, to, outer steps
APART = 1.3  # of two expensive looks, at least this factor in time
HOPELESS = 1e6  # a run with so large a measurement ends


class Setting(NamedTuple):
    rate: float
    ratio: float
    power: float

    @classmethod
    def all(cls, grid: Grid) -> list["Setting"]:
        return [cls(*each) for each in itertools.product(*grid)]


class Method(Protocol):
    """One method, compiled for one setting.

    Attributes:
        kind: "random": every batch holds BATCH random examples; "fixed": it is one of
            the n // BATCH blocks of the examples; "full": all examples; "blocks": all
            of them in those blocks, which the method chooses from, mixed by the seed.
        draws: the number of lower batches of an outer step.
        together: the number of outer steps in one call.
        order: of the derivatives that it takes, 1 or 2.
    """

    kind: str
    draws: int
    together: int
    order: int

    def begin(self, case: str, seed: int) -> Any:
        """What is carried, before the first step; the case's examples are part."""
        ...

    def several(self, carried: Any, batches: tuple[np.ndarray, ...]) -> Any:
        """`together` outer steps with the batches of these examples."""
        ...

    def ready(self, batches: tuple[np.ndarray, ...]) -> Any:
        """The batches' numbers as `several` takes them: no part of its time."""
        ...

    def x(self, carried: Any) -> np.ndarray: ...

    def y(self, carried: Any) -> Any: ...

    def step_bytes(self) -> int | None:
        """Memory of `several` besides the examples: variables and intermediate
        results, as the framework counts them; `None` if it does not."""
        ...


def batches(
    kind: str, draws: int, together: int, sizes: tuple[int, ...], seed: int
) -> Iterator[tuple[np.ndarray, ...]]:
    """Upper and lower numbers for one call after the other, the same for all
    frameworks: of examples ("random", [together, BATCH] and [together, draws, BATCH])
    or of blocks ("fixed", [together] each)."""
    generator = np.random.default_rng(seed)
    shapes = [together, BATCH], [together, draws, BATCH]
    if kind != "random":
        shapes = [together], [together]
        sizes = sizes[0] // BATCH, sizes[1] // BATCH
    while True:
        yield tuple(
            generator.integers(0, size, shape, np.int32)
            for size, shape in zip(sizes, shapes, strict=True)
        )


def run(
    method: Method,
    problem: Problem,
    case: str,
    seed: int,
    seconds: float,
    sparing: bool,
) -> dict[str, Any]:
    """From the start until the time is over.

    Args:
        method: compiled.
        problem: what is measured; outside the time.
        case: of the problem.
        seed: of the batches.
        seconds: of the processor.
        sparing: whether only the end is measured.

    Returns:
        Steps, seconds and measurements of every look. Measurements are `None` if the
        run diverged; that is its last look then.
    """
    sizes = tuple(len(arrays[0]) for arrays in problem.examples(case))
    numbers = batches(method.kind, method.draws, method.together, sizes, seed)
    carried, began = method.begin(case, seed), time.perf_counter()
    steps, spent, next_look = 0, 0.0, 0.0
    looks: dict[str, list] = {"steps": [], "seconds": [], "found": []}
    while spent < seconds:
        given = method.ready(next(numbers))
        start = time.process_time()
        carried = method.several(carried, given)
        x = method.x(carried)  # waits
        spent += time.process_time() - start
        steps += method.together
        finite = bool(np.isfinite(x).all())
        over = spent >= seconds or not finite
        due = problem.every_look or spent >= next_look
        if not over and (sparing or not due):
            continue
        next_look = APART * spent
        found = measured(problem, x, method.y(carried)) if finite else None
        looks["steps"].append(steps)
        looks["seconds"].append(round(spent, 5))
        looks["found"].append(found)
        if found is None:
            break
    return {**looks, "elapsed": time.perf_counter() - began}


def measured(problem: Problem, x: np.ndarray, y: Any) -> tuple[float, ...] | None:
    leaves = y if isinstance(y, list) else [y]
    if not all(np.isfinite(leaf).all() for leaf in leaves):
        return None
    found = problem.measured(x, y)
    if not all(math.isfinite(each) and each < HOPELESS for each in found):
        return None
    return tuple(float(f"{each:.8g}") for each in found)


def end(record: dict[str, Any]) -> float:
    """What a setting is chosen by; infinite for a run that diverged."""
    found = record["found"][-1]
    return math.inf if found is None else found[0]


def middle(records: list[dict[str, Any]]) -> float:
    """The median of the ends of a setting's seeds."""
    return statistics.median(end(each) for each in records)


class Plan(NamedTuple):
    """What a contestant does.

    Attributes:
        settings: all that are tried, for `look` seconds each.
        seeds: of the batches; how many.
        finalists: the number of settings, best by the median of all seeds at the end
            of their looks, that are run for `seconds` then.
    """

    settings: list[Setting]
    seeds: int
    look: float
    seconds: float
    finalists: int


class Book:
    """The runs that were made, one to a line of a file."""

    def __init__(self, path: pathlib.Path):
        self.path, self.records, self.parent = path, read(path), os.getppid()
        # A line that was not finished is not there any more.
        path.write_text("".join(map(_line, self.records)))

    def has(self, **key: Any) -> bool:
        return any(key.items() <= each.items() for each in self.records)

    def add(self, record: dict[str, Any]) -> None:
        if os.getppid() != self.parent:
            # A benchmark that goes on has a process of its own for this file.
            sys.exit("the benchmark was killed")
        self.records.append(record)
        with self.path.open("a") as file:
            file.write(_line(record))


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The runs of a file, without a last line that is not finished."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def of(records: list[dict[str, Any]], **key: Any) -> list[dict[str, Any]]:
    return [each for each in records if key.items() <= each.items()]


def made(plan: Plan, problem: Problem, build: Callable[[Setting], Method], book: Book):
    """All runs of a plan: every setting is looked at, and the best are run to the end.

    All cases and seeds of a setting share one compilation.
    """

    def make(stage: str, setting: Setting, cases: list[str], seconds: float) -> None:
        seeds = range(plan.seeds)
        keys = [
            {"stage": stage, "setting": list(setting), "case": case, "seed": seed}
            for case in cases
            for seed in seeds
        ]
        left = [key for key in keys if not book.has(**key)]
        if not left:
            return
        method = build(setting)
        for key in left:
            record = run(
                method, problem, key["case"], key["seed"], seconds, stage == "look"
            )
            memory = {"step_bytes": method.step_bytes(), "peak_bytes": peak_resident()}
            book.add({**key, **record, **memory, "order": method.order})

    for setting in plan.settings:
        make("look", setting, list(problem.cases), plan.look)
    chosen: dict[Setting, list[str]] = {}
    for case in problem.cases:
        looks = {
            each: middle(of(book.records, stage="look", setting=list(each), case=case))
            for each in plan.settings
        }
        for each in sorted(looks, key=looks.__getitem__)[: plan.finalists]:
            if math.isfinite(looks[each]):
                chosen.setdefault(each, []).append(case)
    for setting, cases in chosen.items():
        make("whole", setting, cases, plan.seconds)


def serve(build: Callable[[argparse.Namespace, Any], Callable[[Setting], Method]]):
    """The process of a contestant.

    Args:
        build: (flags, problem) -> (setting -> the method compiled for it).
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", required=True)
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--plan", type=json.loads, required=True)
    arguments = parser.parse_args()
    plan = Plan(*arguments.plan)
    plan = plan._replace(settings=[Setting(*each) for each in plan.settings])
    problem = load(arguments.part, arguments.data)
    made(plan, problem, build(arguments, problem), Book(arguments.out))
