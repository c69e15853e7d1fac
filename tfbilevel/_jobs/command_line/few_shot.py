"""`tfbilevel few-shot`."""

import argparse
import json
import pathlib
import time
from typing import Any

import keras
import numpy as np

import tfbilevel as tb
from tfbilevel._jobs.command_line.bad_input import BadInput
from tfbilevel._jobs.command_line.inputs import (
    features,
    known_classes,
    read_source,
    with_preparation,
)
from tfbilevel._jobs.command_line.output_folder import output_folder
from tfbilevel._jobs.command_line.said import say, versions
from tfbilevel._jobs.default_networks import default_network
from tfbilevel._jobs.optional_packages import optional_package
from tfbilevel._jobs.report.training import Table, write_training_report

QUERIES = 5
# The published network halves its images four times.
SMALLEST_IMAGE = 16


def few_shot(options: argparse.Namespace) -> None:
    """Reads, learns, adapts to new classes, and writes the folder of results."""
    start = time.perf_counter()
    optional_package("jinja2", "The report")
    with output_folder(options.out, options.overwrite) as folder:
        source = read_source(options, options.new)
        data = source.data
        labels = known_classes(data, None, False).indices(data.labels, "labels")
        held = _held_out(labels, options.ways, data.source, options.seed)
        preparation = source.prepare()
        x = features(preparation, data)
        say(options, f"{len(data):,} examples of {labels.max() + 1} classes are read")
        say(options, f"{preparation.note} {held.sum()} classes are kept to measure by")
        training, measuring = ~held[labels], held[labels]
        sizes = np.bincount(labels)
        queries = int(min(QUERIES, sizes.min() - options.shots))
        if queries < 1:
            raise BadInput(
                f"a class of {data.source} has only {sizes.min()} examples: there must "
                f"be at least {options.shots + 1}, --shots {options.shots} to learn "
                "from and one to ask about"
            )
        learner = tb.FewShotLearner(
            _network(preparation, x), method=options.method, seed=options.seed
        )
        fitting: dict[str, Any] = {"verbose": 0 if options.quiet else "auto"}
        for name in "epochs", "steps_per_epoch":
            if getattr(options, name) is not None:
                fitting[name] = getattr(options, name)
        try:
            learner.fit(
                x[training],
                labels[training],
                ways=options.ways,
                shots=options.shots,
                queries=queries,
                **fitting,
            )
            score = learner.score(
                x[measuring], labels[measuring], episodes=options.episodes
            )
            if source.trusted is None:
                rows = _first_task(labels, held, options.ways, options.shots)
                support, names = x[rows], data.labels[rows]
            else:
                support = features(preparation, source.trusted)
                names = source.trusted.labels
            model = learner.adapt(support, names)
        except ValueError as error:
            raise BadInput(str(error)) from error
        seconds = time.perf_counter() - start
        with_preparation(preparation, model, support).save(folder / "model.keras")
        summary = {
            "command": options.command_line,
            "examples": len(data),
            "classes_learned_from": int((~held).sum()),
            "classes_measured_by": int(held.sum()),
            "ways": options.ways,
            "shots": options.shots,
            "method": options.method,
            "accuracy": score.accuracy,
            "margin_95": score.margin,
            "episodes": options.episodes,
            "classes": np.asarray(model.classes_).tolist(),
            "adapted_to": options.new or "the first held-out classes, as an example",
            "seed": options.seed,
            "seconds": round(seconds, 1),
            "versions": versions(),
        }
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        _report(folder, summary, learner.history_)
    say(options, _found(summary))
    say(options, f"Open {pathlib.Path(options.out) / 'report.html'}")


def _held_out(labels: np.ndarray, ways: int, source: str, seed: int) -> np.ndarray:
    """Which classes are kept to measure by: a fifth, and enough for a task."""
    count = int(labels.max()) + 1
    held = max(ways, count // 5)
    if count - held < ways:
        raise BadInput(
            f"{source} has {count} classes, but --ways {ways} needs at least "
            f"{2 * ways}: {ways} to learn from, and as many others to measure by"
        )
    chosen = np.random.default_rng(seed).permutation(count)[:held]
    return np.isin(np.arange(count), chosen)


def _network(preparation: Any, x: np.ndarray) -> Any:
    """The published network for images that are large enough; else the default one."""
    if preparation.kind == "image" and min(x.shape[1:3]) >= SMALLEST_IMAGE:
        return None

    def network(ways: int) -> keras.Model:
        return default_network(
            x.shape[1:],
            ways,
            preparation.kind,
            examples=x if preparation.kind == "image" else None,
            vocabulary=preparation.vocabulary,
        )

    return network


def _first_task(
    labels: np.ndarray, held: np.ndarray, ways: int, shots: int
) -> np.ndarray:
    """The first examples of the first held-out classes."""
    chosen = np.flatnonzero(held)[:ways]
    return np.concatenate([np.flatnonzero(labels == c)[:shots] for c in chosen])


def _found(summary: dict[str, Any]) -> str:
    examples = (
        "one example" if summary["shots"] == 1 else f"{summary['shots']} examples"
    )
    return (
        f"From {examples} of each of {summary['ways']} new classes, "
        f"{100 * summary['accuracy']:.1f}\u00a0% of others are recognised."
    )


def _report(folder: pathlib.Path, summary: dict[str, Any], history: dict) -> None:
    low, high = (
        100 * (summary["accuracy"] + sign * summary["margin_95"]) for sign in (-1, 1)
    )
    measured = [
        ("accuracy", f"{100 * summary['accuracy']:.2f}\u00a0%"),
        ("95\u00a0% interval", f"{low:.2f} to {high:.2f}\u00a0%"),
        ("by chance", f"{100 / summary['ways']:.1f}\u00a0%"),
        ("tasks", f"{summary['episodes']:,}"),
        ("classes to measure by", summary["classes_measured_by"]),
        ("classes to learn from", summary["classes_learned_from"]),
    ]
    write_training_report(
        folder / "report.html",
        title="Learning from few examples",
        found=_found(summary),
        notes=["Measured on classes that training did not see."],
        tables=[Table("Accuracy on new classes", ("", ""), measured)],
        curves=history,
        first_epoch=1,
        done=[
            f"Method {summary['method']}; {summary['ways']} classes in a task, "
            f"{summary['shots']} of each to learn from.",
            f"model.keras is adapted to: {summary['adapted_to']}. Its classes: "
            f"{', '.join(map(str, summary['classes']))}.",
        ],
        commands=[summary["command"]],
        facts={
            "seconds": f"{summary['seconds']:.0f}",
            "seed": summary["seed"],
            "versions": ", ".join(f"{k} {v}" for k, v in summary["versions"].items()),
        },
    )
