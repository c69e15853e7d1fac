"""Runs at successive seeds."""

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from typing import Any

import keras

from tfbilevel.experiment._flags import settings
from tfbilevel.experiment._run import Run


def trials(
    args: argparse.Namespace,
    run: Run,
    one: Callable[[argparse.Namespace, Run], dict[str, Any]],
) -> dict[str, Any]:
    """One run, or `--trials` of them at successive seeds; what is complete stays.

    Several have a folder each, `seed-N`. The run's own `metrics.csv` then has a row
    per seed, its `summary.json` the means of all numbers over seeds, with `_std` their
    standard deviations (of the population), what is alike in all of them, and all
    summaries under `runs`.

    Args:
        args: flags with `seed` and `trials`.
        run: where results go.
        one: (flags of one trial, its run) -> its summary.

    Returns:
        The summary.

    Raises:
        SystemExit: with status 1 where trials ended so (at NaN), after all others.
    """
    if args.trials == 1:
        return complete(args, run, one)
    summaries: list[dict[str, Any]] = []
    failed: list[str] = []
    columns: list[str] = []
    run.rewind(-1)
    for seed in range(args.seed, args.seed + args.trials):
        own = argparse.Namespace(**vars(args) | {"seed": seed, "trials": 1})
        folder = run.out / f"seed-{seed}"
        begun = (folder / "config.json").exists()
        try:
            summaries.append(complete(own, Run(folder, settings(own), begun), one))
        except SystemExit:  # NaN, said already: the others go on
            failed.append(folder.name)
            continue
        keras.backend.clear_session()
        columns = columns or [k for k, v in summaries[0].items() if is_number(v)]
        numbers = {name: summaries[-1].get(name, math.nan) for name in columns}
        run.log({"step": len(summaries) - 1, "seed": seed} | numbers)
    summary: dict[str, Any] = {"trials": args.trials, **over_trials(summaries)}
    if failed:
        summary["failed"] = failed
    run.summarise(summary)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
        raise SystemExit(1)
    return summary


def over_trials(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and deviations of what varies, and what does not, of all summaries."""
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
    """The run's summary, made now unless it is there."""
    summary = run.summary()
    if summary is None:
        summary = one(args, run)
        run.summarise(summary)
    return summary
