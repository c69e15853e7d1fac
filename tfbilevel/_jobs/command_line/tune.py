"""`tfbilevel tune`."""

import argparse
import json
import pathlib
import time
from typing import Any

import keras
import numpy as np

import tfbilevel as tb
from tfbilevel._jobs.command_line.bad_input import BadInput, nearest
from tfbilevel._jobs.command_line.csv_files import write_csv
from tfbilevel._jobs.command_line.inputs import (
    features,
    known_classes,
    read_source,
    with_preparation,
)
from tfbilevel._jobs.command_line.output_folder import output_folder
from tfbilevel._jobs.command_line.said import say, versions
from tfbilevel._jobs.intervals import wilson_interval
from tfbilevel._jobs.optional_packages import optional_package
from tfbilevel._jobs.report.training import Table, write_training_report

# The names of --search.
SEARCHES = {
    "l2": tb.hyper.L2,
    "label-smoothing": tb.hyper.LabelSmoothing,
    "noise": tb.hyper.Noise,
    "mixup": tb.hyper.Mixup,
    "brightness": tb.hyper.Brightness,
    "contrast": tb.hyper.Contrast,
    "shift": tb.hyper.Shift,
}
# What is searched where nothing is said.
SEARCHED = {
    "tabular": ("l2", "label-smoothing", "noise"),
    "image": ("l2", "label-smoothing", "shift", "brightness", "contrast"),
    "text": ("l2", "label-smoothing"),
}
TEST, VALIDATION = 0.2, 0.16  # shares of the data
EPOCHS, BATCH = 20, 64


def tune(options: argparse.Namespace) -> None:
    """Reads, tunes, compares with plain training, and writes the folder of results."""
    start = time.perf_counter()
    optional_package("jinja2", "The report")
    with output_folder(options.out, options.overwrite) as folder:
        source = read_source(options, options.validation)
        data = source.data
        classes = known_classes(data, source.trusted, must_be_complete=False)
        labels = classes.indices(data.labels, "labels")
        preparation = source.prepare()
        search = _search(options.search, preparation.kind)
        x = features(preparation, data)
        part = _parts(labels, source.trusted is None, options.seed)
        train, test = (
            (x[part == 0], labels[part == 0]),
            (x[part == 2], labels[part == 2]),
        )
        if not len(test[0]) or not len(train[0]) or not (source.trusted or 1 in part):
            raise BadInput(
                f"{data.source} has too few examples, {len(data)}: three of a class "
                "are needed, to train, to tune and to measure"
            )
        if source.trusted is None:
            validation = x[part == 1], labels[part == 1]
        else:
            validation = (
                features(preparation, source.trusted),
                classes.indices(source.trusted.labels, "labels"),
            )
        counts = [len(each[0]) for each in (train, validation, test)]
        say(options, preparation.note)
        say(
            options,
            "{:,} examples to train, {:,} to tune, {:,} to measure".format(*counts),
        )

        def network() -> keras.Model:
            return preparation.network(x, len(classes))

        training: dict[str, Any] = {
            "epochs": options.epochs or EPOCHS,
            "batch_size": options.batch_size or BATCH,
            "verbose": 0 if options.quiet else "auto",
        }
        tuner = tb.HyperparameterTuner(network, search, seed=options.seed)
        try:
            tuner.fit(*train, validation_data=validation, **training)
        except ValueError as error:
            raise BadInput(str(error)) from error
        say(options, "The same network is trained without tuning, to compare")
        plain = _plain(network, train, training, options.seed)
        seconds = time.perf_counter() - start
        with_preparation(preparation, tuner.model_, x).save(folder / "model.keras")
        table = {k: np.asarray(v).tolist() for k, v in _columns(tuner).items()}
        write_csv(folder / "hyperparameters.csv", table)
        summary = {
            "command": options.command_line,
            "classes": classes.values.tolist(),
            "examples": dict(
                zip(("training", "validation", "test"), counts, strict=True)
            ),
            "best": _best(tuner),
            "choice": tuner.choice_,
            "scores": tuner.scores_,
            "accuracy": {
                "plain": _accuracy(plain, test),
                "tuned": _accuracy(tuner.model_, test),
            },
            "seed": options.seed,
            "seconds": round(seconds, 1),
            "versions": versions(),
        }
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        _report(folder, summary, table)
    say(options, _found(summary))
    say(options, f"Open {pathlib.Path(options.out) / 'report.html'}")


def _search(names: str | None, kind: str) -> list[Any]:
    chosen = names.split(",") if names else SEARCHED[kind]
    for name in chosen:
        if name not in SEARCHES:
            raise BadInput(f"--search cannot tune {name!r}. {nearest(name, SEARCHES)}")
    if kind == "text" and set(chosen) - set(SEARCHED["text"]):
        raise BadInput(
            "--search can only tune l2 and label-smoothing for texts: changes of the "
            "inputs make no sense for numbers of words"
        )
    return [SEARCHES[name]() for name in chosen]


def _parts(labels: np.ndarray, validation: bool, seed: int) -> np.ndarray:
    """0 to train, 1 to tune, 2 to measure: the same shares of every class, [n]."""
    order = np.random.default_rng(seed).permutation(len(labels))
    position = np.empty(len(labels))
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        position[rows] = np.arange(len(rows)) / len(rows)
    tuning = validation * ((position >= TEST) & (position < TEST + VALIDATION))
    return np.where(position < TEST, 2, tuning.astype(int))


def _plain(
    network: Any, train: tuple, training: dict[str, Any], seed: int
) -> keras.Model:
    """The network as most people would train it: Adam, its rate decayed by a cosine."""
    keras.utils.set_random_seed(seed)
    model = network()
    steps = training["epochs"] * -(-len(train[0]) // training["batch_size"])
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(1e-3, steps)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.fit(*train, **training)
    return model


def _accuracy(model: keras.Model, test: tuple) -> dict[str, float]:
    predicted = model.predict(test[0], batch_size=512, verbose=0).argmax(axis=1)
    share = float((predicted == test[1]).mean())
    low, high = wilson_interval(share, len(predicted))
    return {"share": share, "low": low, "high": high}


def _columns(tuner: Any) -> dict[str, Any]:
    table = tuner.hyperparameters_
    return {str(name): table[name] for name in table}


def _best(tuner: Any) -> dict[str, float]:
    """Every number by its name, l2[dense] for instance."""
    best = {}
    for name, value in tuner.best_.items():
        entries = tuner.names_[name]
        if entries is None:
            best[name] = float(value)
        else:
            values = np.ravel(value).tolist()
            pairs = zip(entries, values, strict=True)
            best |= {f"{name}[{entry}]": number for entry, number in pairs}
    return best


def _found(summary: dict[str, Any]) -> str:
    plain, tuned = (summary["accuracy"][name] for name in ("plain", "tuned"))
    shares = (
        f"{100 * tuned['share']:.1f}\u00a0% tuned, {100 * plain['share']:.1f}\u00a0%"
    )
    return f"Accuracy on examples that neither training nor tuning saw: {shares} plain."


def _report(folder: pathlib.Path, summary: dict[str, Any], table: dict) -> None:
    names = {"plain": "plain training", "tuned": "tuned"}
    accuracies = [
        (
            names[name],
            f"{100 * each['share']:.1f}\u00a0%",
            f"{100 * each['low']:.1f} to {100 * each['high']:.1f}\u00a0%",
        )
        for name, each in summary["accuracy"].items()
    ]
    plain, tuned = (summary["accuracy"][name] for name in ("plain", "tuned"))
    notes = []
    if plain["low"] <= tuned["high"] and tuned["low"] <= plain["high"]:
        count = summary["examples"]["test"]
        notes.append(f"With {count:,} examples such a difference can be chance.")
    if summary["choice"] == "starts":
        notes.append(
            "The network trained with the values at the start predicted the tuning "
            "examples best, so it was kept. The search minimises the loss, in which it "
            "may be ahead."
        )
    rows = [(name, f"{value:.4g}") for name, value in summary["best"].items()]
    counts = summary["examples"]
    write_training_report(
        folder / "report.html",
        title="Tuned hyperparameters",
        found=_found(summary),
        notes=notes,
        tables=[
            Table("Accuracy", ("", "accuracy", "95\u00a0% interval"), accuracies),
            Table(
                "The values of the network that was kept",
                ("hyperparameter", "value"),
                rows,
            ),
        ],
        curves={name: values for name, values in table.items() if name != "epoch"},
        first_epoch=0,
        done=[
            f"{counts['training']:,} examples trained the network, "
            f"{counts['validation']:,} others tuned {len(rows)} numbers by "
            f"hypergradients, {counts['test']:,} others measured both networks."
        ],
        commands=[summary["command"]],
        facts={
            "seconds": f"{summary['seconds']:.0f}",
            "seed": summary["seed"],
            "versions": ", ".join(f"{k} {v}" for k, v in summary["versions"].items()),
        },
    )
