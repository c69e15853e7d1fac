"""The page about a training: numbers in tables, and curves."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tfbilevel._jobs.report.page import write_page

LEFT, RIGHT, TOP, BOTTOM = 70, 300, 8, 118  # of a curve, in its picture
LOGARITHMIC = 30.0  # a curve with a larger ratio is drawn on a logarithmic scale


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of the page: the first cell of a row is its heading."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    sentence: str = ""


def write_training_report(
    path: str | os.PathLike,
    *,
    title: str,
    found: str,
    notes: Sequence[str],
    tables: Sequence[Table],
    curves: Mapping[str, Sequence[float]],
    first_epoch: int,
    done: Sequence[str],
    commands: Sequence[str],
    facts: Mapping[str, Any],
) -> None:
    """Writes a self-contained HTML file.

    Args:
        path: the file.
        title: the heading.
        found: what came out, one sentence.
        notes: more sentences.
        tables: shown in this order.
        curves: name -> one value per epoch.
        first_epoch: of the first value, 0 or 1.
        done: sentences about what was done.
        commands: the lines that repeat it.
        facts: name -> value.
    """
    write_page(
        path,
        "training.html",
        title=title,
        found=found,
        notes=notes,
        tables=tables,
        curves=[curve(n, v, first_epoch) for n, v in curves.items() if len(v) > 1],
        done=done,
        commands=commands,
        facts=facts,
    )


def curve(name: str, values: Sequence[float], first_epoch: int) -> dict[str, Any]:
    """The points of a line through the values, and what stands beside it."""
    numbers = np.asarray(values, np.float64)
    finite = numbers[np.isfinite(numbers)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
    logarithmic = low > 0 and high / low > LOGARITHMIC
    scaled = np.log(np.where(numbers > 0, numbers, low)) if logarithmic else numbers
    bottom, top = (math.log(low), math.log(high)) if logarithmic else (low, high)
    height = (scaled - bottom) / ((top - bottom) or 1.0)
    x = np.linspace(LEFT, RIGHT, len(numbers))
    points = [
        f"{a:.1f},{BOTTOM - (BOTTOM - TOP) * h:.1f}"
        for a, h in zip(x.tolist(), height.tolist(), strict=True)
        if math.isfinite(h)
    ]
    return {
        "name": name + (" (logarithmic scale)" if logarithmic else ""),
        "points": " ".join(points),
        "low": f"{low:.4g}",
        "high": f"{high:.4g}",
        "last": first_epoch + len(numbers) - 1,
        "sentence": f"{name}: {numbers[0]:.4g} at first, {numbers[-1]:.4g} at the end",
    }
