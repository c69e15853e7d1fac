"""Runs at successive seeds."""

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import keras

from tfbilevel.experiment._flags import settings
from tfbilevel.experiment._run import Run


def trials(
    args: argparse.Namespace,
    run: Run,
    one: Callable[[argparse.Namespace, Run], dict[str, Any]],
    names: Sequence[str],
) -> dict[str, Any]:
    """One run, or `--trials` of them at successive seeds; what is complete stays.

    Several have a folder each, `seed-N`. The run's own `metrics.csv` then has a row
    per seed, its `summary.json` the means over seeds, with `_std` the standard
    deviations (of the population), and all summaries under `runs`.

    Args:
        args: flags with `seed` and `trials`.
        run: where results go.
        one: (flags of one trial, its run) -> its summary.
        names: numbers of the summaries to average.

    Returns:
        The summary.
    """
    if args.trials == 1:
        return complete(args, run, one)
    summaries = []
    run.rewind(-1)
    for step, seed in enumerate(range(args.seed, args.seed + args.trials)):
        own = argparse.Namespace(**vars(args) | {"seed": seed, "trials": 1})
        folder = run.out / f"seed-{seed}"
        begun = (folder / "config.json").exists()
        summaries.append(complete(own, Run(folder, settings(own), begun), one))
        keras.backend.clear_session()
        row = {name: summaries[-1][name] for name in names}
        run.log({"step": step, "seed": seed} | row)
    summary: dict[str, Any] = {
        name: value
        for name, value in summaries[0].items()
        if isinstance(value, str) and all(one[name] == value for one in summaries)
    }
    summary["trials"] = args.trials
    for name in names:
        values = [float(one[name]) for one in summaries]
        summary[name] = statistics.fmean(values)
        summary[f"{name}_std"] = statistics.pstdev(values)
    summary["runs"] = summaries
    run.summarise(summary)
    return summary


def complete(args: argparse.Namespace, run: Run, one: Callable) -> dict[str, Any]:
    """The run's summary, made now unless it is there."""
    summary = run.summary()
    if summary is None:
        summary = one(args, run)
        run.summarise(summary)
    return summary
