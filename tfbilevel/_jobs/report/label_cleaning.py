"""The page about cleaned labels."""

import inspect
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbilevel._jobs.intervals import wilson_interval
from tfbilevel._jobs.report.examples import shown_examples
from tfbilevel._jobs.report.page import write_page
from tfbilevel._jobs.report.pictures import confusion, histogram, percent
from tfbilevel._version import __version__

MOST_EXAMPLES = 200


def write_cleaning_report(
    path: str | os.PathLike,
    cleaner: Any,
    x: Any = None,
    *,
    commands: Sequence[str] = (),
    facts: Mapping[str, Any] | None = None,
    names: Sequence[str] | None = None,
    title: str = "Label cleaning",
    most: int = MOST_EXAMPLES,
) -> None:
    """Writes what a fitted `tb.LabelCleaner` found as one self-contained HTML file.

    Args:
        path: the file.
        cleaner: the fitted estimator.
        x: the examples, in the order in which it was fitted: images, texts, rows or a
            pandas table. None: the page shows labels without examples.
        commands: the lines that repeat the job. Default: Python lines with the
            estimator's arguments.
        facts: more to tell about the run, {"seconds": 12}.
        names: of all examples, of the pictures' files for instance.
        title: the heading.
        most: how many examples the page shows at most.

    Raises:
        MissingPackageError: without jinja2.
        ValueError: if `x` has another number of examples.
    """
    n = len(cleaner.weights_)
    if x is not None and len(x) != n:
        raise ValueError(
            "`x` must be the examples on which the cleaner was fitted, in their order, "
            f"{n} of them. Received: {len(x)}"
        )
    classes = [str(each) for each in np.asarray(cleaner.classes_).tolist()]
    issues = {name: np.asarray(cleaner.label_issues_[name]) for name in COLUMNS}
    rows = issues["row"].astype(int)
    shown = shown_examples(x, rows[:most])
    examples = [
        {
            "rank": int(rank),
            "row": int(row),
            "given": _name(given),
            "suggested": _name(suggested),
            "probability": float(probability),
            "shown": shown.shown[index],
            "name": names[row] if names is not None else f"row {row}",
        }
        for index, (row, given, suggested, probability, rank) in enumerate(
            zip(*(issues[name][:most].tolist() for name in COLUMNS), strict=True)
        )
    ]
    suspicious = np.zeros(n, bool)
    suspicious[rows] = True
    accuracy = _accuracy(cleaner)
    write_page(
        path,
        "label_cleaning.html",
        title=title,
        found=_found(len(rows), n),
        notes=[accuracy["sentence"]] if accuracy else [],
        accuracy=accuracy,
        issues=len(rows),
        kind=shown.kind,
        columns=shown.columns,
        examples=examples,
        given_names=_occurring(classes, examples, "given"),
        suggested_names=_occurring(classes, examples, "suggested"),
        classes=classes,
        confusion=confusion(cleaner.transition_, classes),
        histogram=histogram(cleaner.weights_, suspicious),
        choice=_choice(cleaner.choice_),
        stages=_stages(getattr(cleaner, "history_", None) or {}),
        commands=list(commands) or _lines(cleaner),
        facts={
            "examples": f"{n:,}",
            "classes": len(classes),
            **(facts or {}),
            "versions": f"tfbilevel {__version__}, TensorFlow {tf.__version__}, Keras "
            f"{keras.__version__}, NumPy {np.__version__}, Python "
            f"{platform.python_version()}",
        },
    )


COLUMNS = ("row", "given_label", "suggested_label", "probability_right", "rank")


def _name(label: Any) -> str:
    """A class as text; of a one-hot row the number of its class."""
    return str(int(np.argmax(label))) if isinstance(label, list) else str(label)


def _occurring(classes: list[str], examples: list[dict], which: str) -> list[str]:
    there = {example[which] for example in examples}
    return [name for name in classes if name in there]


def _found(issues: int, n: int) -> str:
    if not issues:
        return f"None of the {n:,} labels looks wrong."
    verb = "looks" if issues == 1 else "look"
    return f"{issues:,} of {n:,} labels ({percent(issues / n, 1)}) {verb} wrong."


def measured_accuracy(measured: Any) -> dict[str, Any] | None:
    """The accuracies `before` and `after`, each {share, low, high}, and `n`.

    Args:
        measured: the estimator's `accuracy_`, an object or a mapping; or `None`.
    """
    if measured is None:
        return None
    before, after, n = (
        measured[name] if isinstance(measured, Mapping) else getattr(measured, name)
        for name in ("before", "after", "n")
    )
    if not n:
        return None
    both = {"before": _with_interval(before, n), "after": _with_interval(after, n)}
    return {**both, "n": int(n)}


def _accuracy(cleaner: Any) -> dict[str, Any] | None:
    """Both accuracies with their intervals, and the sentence about them."""
    parts = measured_accuracy(getattr(cleaner, "accuracy_", None))
    if parts is None:
        return None
    before, after, n = parts["before"], parts["after"], parts["n"]
    first, last = (percent(a["share"], 1) for a in (before, after))
    if after["share"] > before["share"]:
        sentence = (
            f"On held-out trusted examples the network is right in {last} of cases "
            f"after cleaning; trained on the given labels it is right in {first}."
        )
    elif after["share"] == before["share"]:
        sentence = f"Cleaning did not change the accuracy: {first} before and after."
    else:
        sentence = (
            f"Cleaning did not help the network: right in {last} of cases after "
            f"cleaning, {first} when trained on the given labels."
        )
    differ = after["share"] != before["share"]
    if differ and before["low"] <= after["high"] and after["low"] <= before["high"]:
        sentence += f" With {n:,} trusted examples such a difference can be chance."
    if after["low"] <= 1 / len(cleaner.classes_):
        sentence += (
            " The network is not clearly better than guessing: do not rely on what it "
            "suggests."
        )
    return {**parts, "sentence": sentence}


def _with_interval(share: Any, n: int) -> dict[str, float]:
    low, high = wilson_interval(float(share), n)
    return {"share": float(share), "low": low, "high": high}


def _choice(choice: Any) -> dict[str, Any]:
    scores = sorted((choice.scores or {}).items(), key=lambda pair: pair[1])
    trusted = getattr(choice, "trusted_scores", None) or {}
    return {
        "trusted_scores": [(name, f"{score:.4f}") for name, score in trusted.items()],
        "name": choice.name,
        "sentence": f"Model of the noise: {choice.name}. {choice.reason}",
        "scores": [(name, f"{score:.4f}") for name, score in scores],
    }


def _stages(history: Mapping[str, Mapping[str, Sequence[float]]]) -> list[dict]:
    """Each stage's number of epochs, its seconds, and how its curves changed."""
    stages = []
    for name, curves in history.items():
        values = {curve: np.ravel(v).tolist() for curve, v in curves.items() if len(v)}
        took = values.pop("seconds", [])
        change = "; ".join(
            f"{curve} {each[0]:.4g} to {each[-1]:.4g}" for curve, each in values.items()
        )
        epochs = max(map(len, values.values()), default=0)
        seconds = f"{sum(took):.1f}" if took else ""
        stages.append(
            {"name": name, "epochs": epochs, "seconds": seconds, "change": change}
        )
    return stages


def _lines(cleaner: Any) -> list[str]:
    """Python lines with the arguments that are not the defaults."""
    arguments = inspect.signature(type(cleaner)).parameters
    given = [
        f"{name}={_short(getattr(cleaner, name))}"
        for name, argument in arguments.items()
        if repr(getattr(cleaner, name, argument.default)) != repr(argument.default)
    ]
    return [
        "import tfbilevel as tb",
        f"cleaner = tb.{type(cleaner).__name__}({', '.join(given)})",
        "cleaner.fit(x, y, trusted=(x_trusted, y_trusted))",
        'cleaner.report("report.html", x=x)',
    ]


def _short(value: Any) -> str:
    """As it is written in Python; a model or a function by its name."""
    if isinstance(value, (str, int, float, bool, type(None), tuple, list)):
        return repr(value)
    return getattr(value, "__name__", None) or getattr(value, "name", repr(value))
