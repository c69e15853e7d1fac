"""Runs at successive seeds."""

import argparse
import contextlib
import math
import pathlib
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import keras
import tensorflow as tf

from common.flags import settings
from common.run import Run


def trials(
    args: argparse.Namespace,
    run: Run,
    one: Callable[[argparse.Namespace, Run], dict[str, Any]],
) -> dict[str, Any]:
    """One run, or `--trials` runs at successive seeds; complete runs are kept.

    Each of several runs has a folder `seed-N`. The run's own `metrics.csv` then has one
    row per seed. Its `summary.json` has the means of all numbers over the seeds, their
    standard deviations (of the population) with the suffix `_std`, all values that are
    equal for all seeds, and all summaries under `runs`.

    Args:
        args: flags with `seed` and `trials`.
        run: receives the results.
        one: (flags of one trial, its run) -> its summary.

    Returns:
        The summary.

    Raises:
        SystemExit: with status 1 if any trials ended so (at NaN), after all others.
    """
    if args.trials == 1:
        return complete(args, run, one)
    jobs = {
        f"seed-{seed}": argparse.Namespace(**vars(args) | {"seed": seed, "trials": 1})
        for seed in range(args.seed, args.seed + args.trials)
    }
    done, failed = sweep(run, jobs, in_folder(one))
    summaries = list(done.values())
    run.rewind(-1)
    for step, (name, summary) in enumerate(done.items()):
        columns = [k for k, v in summaries[0].items() if is_number(v)]
        numbers = {column: summary.get(column, math.nan) for column in columns}
        run.log({"step": step, "seed": jobs[name].seed} | numbers)
    return concluded(run, {"trials": args.trials, **over_trials(summaries)}, failed)


@contextlib.contextmanager
def many_runs() -> Iterator[None]:
    """A context for several runs in one process, without TensorFlow's warning that
    functions are traced repeatedly: these are different functions."""
    logger = tf.get_logger()
    level = logger.level
    logger.setLevel("ERROR")
    try:
        yield
    finally:
        logger.setLevel(level)


Job = TypeVar("Job")


def sweep(
    run: Run,
    jobs: Mapping[str, Job],
    one: Callable[[Job, pathlib.Path], dict[str, Any]],
    after: Callable[[dict[str, Any]], None] = lambda summary: None,
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Make several runs in subfolders of a run, continuing after runs that end at NaN.

    Args:
        run: the run whose folder contains the subfolders.
        jobs: name of the folder -> description of the run in it.
        one: (job, folder) -> its summary, computed unless it exists (`in_folder`).
        after: called with each summary when it is ready.

    Returns:
        name -> summary, and the names of the runs that failed.
    """
    done, failed = {}, []
    for name, job in jobs.items():
        try:
            with many_runs():
                done[name] = one(job, run.out / name)
        except SystemExit:  # the error is printed already; continue with the others
            failed.append(name)
        else:
            after(done[name])
        keras.backend.clear_session()
    return done, failed


def in_folder(one: Callable[[argparse.Namespace, Run], dict[str, Any]]) -> Callable:
    """Turn (flags, run) -> summary into a function of flags and a folder for `sweep`.

    The run in the folder is started or continued; if it is complete, `one` is not
    called.
    """

    def made(args: argparse.Namespace, folder: pathlib.Path) -> dict[str, Any]:
        begun = (folder / "config.json").exists()
        return complete(args, Run(folder, settings(args), begun), one)

    return made


def concluded(run: Run, summary: dict[str, Any], failed: list[str]) -> dict[str, Any]:
    """Write and return a sweep's summary; exit with status 1 if any run failed."""
    run.summarise(summary | ({"failed": failed} if failed else {}))
    if failed:
        print(f"failed: {', '.join(failed)}; --resume tries again", file=sys.stderr)
        raise SystemExit(1)
    return summary


def over_trials(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and deviations of the values that vary, and the values that do not."""
    made: dict[str, Any] = {}
    for name, first in summaries[0].items() if summaries else ():
        values: list[Any] = [one.get(name) for one in summaries]
        alike = isinstance(first, (str, int)) and all(v == first for v in values)
        if alike and name != "seed":
            made[name] = first
        elif all(map(is_number, values)) and name != "seed":
            made[name] = statistics.fmean(values)
            made[f"{name}_std"] = statistics.pstdev(values)
    return made | {"runs": summaries}


def is_number(value: Any) -> bool:
    whole = isinstance(value, (int, float)) and not isinstance(value, bool)
    return whole and math.isfinite(value)


def complete(args: argparse.Namespace, run: Run, one: Callable) -> dict[str, Any]:
    """The run's summary, computed unless it exists."""
    summary = run.summary()
    if summary is None:
        summary = one(args, run)
        run.summarise(summary)
    return summary
