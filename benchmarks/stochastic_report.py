"""The table and the picture of one part of `stochastic.py`."""

import json
import math
import pathlib
import statistics
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from stochastic_protocol import end, of

Record = dict[str, Any]


class Result(NamedTuple):
    """The runs of a row, and the oracle calls of one of its outer steps."""

    records: list[Record]
    calls: float
    jax: bool


class Reported(NamedTuple):
    """What a part reports.

    Attributes:
        measure: which of the problem's measures.
        goal: the calls and seconds to this value are reported. In (c), to the best
            method's value plus this.
        above_best: whether values are reported above the least that is known.
        show: a value in the table.
    """

    measure: int
    goal: float
    above_best: bool
    show: Callable[[float], str]


REPORTED = {
    "a": Reported(0, 1e-4, False, "{:.1e}".format),
    "b": Reported(0, 1e-3, True, "{:.1e}".format),
    "c": Reported(1, 1.0, False, "{:.2f}".format),
}


def write(
    out: pathlib.Path,
    part: str,
    problem: Any,
    results: dict[str, Result],
    machine: str,
) -> None:
    """stochastic-PART.json, .md and .png."""
    path = out / f"stochastic-{part}"
    made = {
        case: summary(part, problem, case, results)
        for case in problem.cases
        if any(of(each.records, case=case) for each in results.values())
    }
    document = {"machine": machine, "measures": problem.measures, "cases": made}
    path.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    lines = [f"{machine}.", "", same_steps(results), ""]
    for case, each in made.items():
        title = f"{case} percent of the labels are sampled again" if case else ""
        lines += [title, "", *table(part, problem, each), ""]
    text = "\n".join(line for line in lines if line is not None)
    path.with_suffix(".md").write_text(text)
    print(text)
    picture(part, problem, made, path.with_suffix(".png"))


def summary(
    part: str, problem: Any, case: str, results: dict[str, Result]
) -> dict[str, Any]:
    """Every row's best settings, one for each column of the table."""
    shown = REPORTED[part]
    chosen = {title: of(each.records, case=case, stage="whole")
              for title, each in results.items()}  # fmt: skip
    values = [
        found[shown.measure]
        for records in chosen.values()
        for record in records
        for found in record["found"]
        if found is not None
    ]
    least = min(values, default=math.inf)
    if shown.above_best:
        least = min(least, float(problem.least))
    zero = least if shown.above_best else 0.0
    # Settings are chosen by the first measure, and another may be reported.
    ends, rows = {}, {}
    for title, records in chosen.items():
        if records:
            settings = by_setting(records)
            _, setting = best(settings, end)
            value = statistics.median(
                measure(each, shown.measure) for each in settings[setting]
            )
            ends[title] = value, setting
    goal = shown.goal
    if part == "c":
        goal += min((value for value, _ in ends.values()), default=0.0)
    for title, records in chosen.items():
        result, settings = results[title], by_setting(records)
        value, setting = ends.get(title, (math.inf, ()))
        if not math.isfinite(value):
            rows[title] = {"diverged": True}
            continue
        kept = settings[setting]
        rows[title] = {
            "setting": list(setting),
            "value": value - zero,
            "values": [measure(each, shown.measure) - zero for each in kept],
            "others": [
                statistics.median(measure(each, number) for each in kept)
                for number in range(len(problem.measures))
            ],
            "steps_per_second": statistics.median(
                each["steps"][-1] / each["seconds"][-1] for each in kept
            ),
            "calls_per_step": result.calls,
            "order": kept[0]["order"],
            "bytes": kept[0]["step_bytes"],
            "peak_bytes": max(each["peak_bytes"] for each in kept),
            "trace": trace(sorted(kept, key=end)[len(kept) // 2], shown, zero),
        }
        for name, factor in ("steps", result.calls), ("seconds", 1.0):

            def reached(record: Record, name: str = name) -> float:
                return when(record, name, shown.measure, zero, goal)

            least_of, where = best(settings, reached)
            key = "calls_to_goal" if name == "steps" else "seconds_to_goal"
            if math.isfinite(least_of):
                rows[title][key] = least_of * factor
                rows[title][f"{key}_setting"] = list(where)
    return {"goal": goal, "least": least, "rows": rows}


def by_setting(records: Iterable[Record]) -> dict[tuple, list[Record]]:
    settings: dict[tuple, list[Record]] = {}
    for record in records:
        settings.setdefault(tuple(record["setting"]), []).append(record)
    return settings


def best(
    settings: dict[tuple, list[Record]], value: Callable[[Record], float]
) -> tuple[float, tuple]:
    """The least median of a setting's seeds, and the setting."""
    medians = {
        setting: statistics.median(map(value, records))
        for setting, records in settings.items()
    }
    setting = min(medians, key=medians.__getitem__)
    return medians[setting], setting


def measure(record: Record, number: int) -> float:
    found = record["found"][-1]
    return math.inf if found is None else found[number]


def first_below(record: Record, number: int, goal: float) -> int | None:
    """The number of the first look at or below the goal. (From when on it stays there
    would be later the longer a run is.)"""
    for look, found in enumerate(record["found"]):
        if found is not None and found[number] <= goal:
            return look
    return None


def when(record: Record, name: str, number: int, zero: float, goal: float) -> float:
    """The steps or the seconds when the measure first is zero + goal; between two looks
    its logarithm is a straight line."""
    at = first_below(record, number, zero + goal)
    if at is None:
        return math.inf
    along, found = record[name], record["found"]
    if at == 0:
        return along[0]
    before, after = (found[i][number] - zero for i in (at - 1, at))
    share = 1.0 if after <= 0 else math.log(before / goal) / math.log(before / after)
    return along[at - 1] + share * (along[at] - along[at - 1])


def trace(record: Record, shown: Reported, zero: float) -> dict[str, list]:
    """At most 200 looks, spaced like their logarithms."""
    count = len(record["steps"])
    kept = sorted({int(i) for i in np.geomspace(1, count, 200).round() - 1})
    kept = [i for i in kept if record["found"][i] is not None]
    return {
        "steps": [record["steps"][i] for i in kept],
        "seconds": [record["seconds"][i] for i in kept],
        "value": [record["found"][i][shown.measure] - zero for i in kept],
    }


def same_steps(results: dict[str, Result]) -> str:
    """How far the values of JAX's first looks are from the library's."""
    apart = {}
    for title, result in results.items():
        if not result.jax:
            continue
        ours = results[title.removesuffix(", JAX")].records
        pairs = [
            (record["found"][0], other["found"][0])
            for record in of(result.records, stage="whole")
            for other in of(
                ours,
                **{k: record[k] for k in ("stage", "setting", "case", "seed")},
            )
        ]
        differences = [abs(a[0] - b[0]) / abs(b[0]) for a, b in pairs if a and b]
        if differences:
            apart[title] = max(differences)
    if not apart:
        return ""
    named = ", ".join(f"{title} {value:.0e}" for title, value in apart.items())
    return (
        "JAX and tfbilevel make the same steps; largest relative difference at the "
        f"first look: {named}."
    )


def table(part: str, problem: Any, made: dict[str, Any]) -> list[str]:
    shown, goal = REPORTED[part], made["goal"]
    name = problem.measures[shown.measure] + " - least" * shown.above_best
    others = [
        number for number in range(len(problem.measures)) if number != shown.measure
    ]
    names = [problem.measures[number] for number in others]
    heads = [
        "method",
        "order",
        name,
        *names,
        f"calls to {goal:g}",
        f"seconds to {goal:g}",
        "outer steps per second",
        "calls per step",
        "step MiB",
        "process MiB",
        "rate, ratio, power",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    rows = made["rows"]
    order = sorted(rows, key=lambda title: rows[title].get("value", math.inf))
    for title in order:
        row = rows[title]
        if "value" not in row:
            lines.append(f"| {title} | | diverged |" + " |" * (len(heads) - 3))
            continue
        calls, seconds = row.get("calls_to_goal"), row.get("seconds_to_goal")
        cells = [
            title,
            str(row["order"]),
            shown.show(row["value"]),
            *(f"{row['others'][number]:.4g}" for number in others),
            "-" if calls is None else f"{calls:,.0f}",
            "-" if seconds is None else f"{seconds:.3g}",
            f"{row['steps_per_second']:,.0f}",
            f"{row['calls_per_step']:,.0f}",
            mebibytes(row["bytes"]),
            f"{row['peak_bytes'] / 2**20:.0f}",
            ", ".join(f"{each:g}" for each in row["setting"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def mebibytes(number: int | None) -> str:
    """Small buffers are not counted, so small numbers say nothing."""
    if number is None:
        return "-"
    return f"{number / 2**20:.1f}" if number >= 2**20 / 10 else "< 0.1"


def picture(
    part: str, problem: Any, made: dict[str, dict[str, Any]], path: pathlib.Path
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = REPORTED[part]
    name = problem.measures[shown.measure] + " - least" * shown.above_best
    figure, axes = pyplot.subplots(
        len(made), 2, figsize=(11, 4.5 * len(made)), sharey="row", squeeze=False
    )
    for (case, each), pair in zip(made.items(), axes, strict=True):
        for number, (title, row) in enumerate(each["rows"].items()):
            if "trace" not in row:
                continue
            seen = row["trace"]
            calls = np.array(seen["steps"]) * row["calls_per_step"]
            style = ":" if title.endswith(", JAX") else ("-", "--", "-.")[number // 10]
            for axis, against in zip(pair, (calls, seen["seconds"]), strict=True):
                marker = "." if len(seen["value"]) == 1 else None
                axis.loglog(against, seen["value"], style, marker=marker, label=title)
        label = f"{name}, {case} percent noise" if case else name
        pair[0].set(xlabel="oracle calls", ylabel=label)
        pair[1].set(xlabel="seconds")
    axes[0, 1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
