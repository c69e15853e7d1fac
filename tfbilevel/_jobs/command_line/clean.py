"""`tfbilevel clean`."""

import argparse
import json
import pathlib
import time
from typing import Any

import numpy as np

import tfbilevel as tb
from tfbilevel._jobs.command_line.bad_input import BadInput
from tfbilevel._jobs.command_line.csv_files import write_csv
from tfbilevel._jobs.command_line.data import Data
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
from tfbilevel._jobs.report.label_cleaning import (
    COLUMNS,
    measured_accuracy,
    write_cleaning_report,
)


def clean(options: argparse.Namespace) -> None:
    """Reads, cleans, and writes the folder of results."""
    start = time.perf_counter()
    optional_package("jinja2", "The report")
    with output_folder(options.out, options.overwrite) as folder:
        source = read_source(options, options.trusted)
        data, trusted = source.data, source.trusted
        classes = known_classes(data, trusted, must_be_complete=True)
        say(options, f"{len(data):,} examples of {len(classes)} classes are read")
        preparation = source.prepare()
        say(options, preparation.note)
        x = features(preparation, data)

        def network() -> Any:
            return default_network(
                x.shape[1:],
                len(classes),
                preparation.kind,
                examples=x if preparation.kind == "image" else None,
                vocabulary=preparation.vocabulary,
            )

        given = {"batch_size": options.batch_size, "seed": options.seed}
        cleaner = tb.LabelCleaner(
            network, **{k: v for k, v in given.items() if v is not None}
        )
        training: dict[str, Any] = {"verbose": 0 if options.quiet else "auto"}
        if trusted is not None:
            training["trusted"] = (features(preparation, trusted), trusted.labels)
        if options.epochs is not None:
            training["epochs"] = options.epochs
        try:
            cleaner.fit(x, data.labels, **training)
        except ValueError as error:
            raise BadInput(str(error)) from error
        seconds = time.perf_counter() - start
        say(options, "Training is done. The results are being written")
        _write(folder, options, source, cleaner, seconds)
        with_preparation(preparation, cleaner.model_, x).save(folder / "model.keras")
    count = len(cleaner.label_issues_["row"])
    say(options, f"{count:,} of {len(data):,} labels look wrong")
    say(options, f"Open {pathlib.Path(options.out) / 'report.html'}")


def _write(
    folder: pathlib.Path,
    options: argparse.Namespace,
    source: Any,
    cleaner: Any,
    seconds: float,
) -> None:
    data = source.data
    name, write = source.corrected(np.asarray(cleaner.corrected_labels_))
    write(folder / name)
    write_csv(folder / "issues.csv", _issues(cleaner, data))
    summary = {
        "command": options.command_line,
        "examples": len(data),
        "trusted": len(source.trusted) if source.trusted else 0,
        "classes": np.asarray(cleaner.classes_).tolist(),
        "issues": len(cleaner.label_issues_["row"]),
        "accuracy": measured_accuracy(getattr(cleaner, "accuracy_", None)),
        "noise_model": cleaner.choice_.name,
        "reason": cleaner.choice_.reason,
        "scores": {k: float(v) for k, v in (cleaner.choice_.scores or {}).items()},
        "transition": np.asarray(cleaner.transition_).tolist(),
        "seed": options.seed,
        "seconds": round(seconds, 1),
        "versions": versions(),
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    write_cleaning_report(
        folder / "report.html",
        cleaner,
        data.shown,
        commands=[options.command_line],
        facts={
            "data": data.source,
            "trusted": source.trusted.source if source.trusted else "none",
            "seconds": f"{seconds:.0f}",
            "seed": options.seed,
        },
        names=data.names,
        title=f"Labels of {pathlib.Path(options.data).name}",
    )


def _issues(cleaner: Any, data: Data) -> dict[str, list]:
    issues = cleaner.label_issues_
    columns = {name: np.asarray(issues[name]).tolist() for name in COLUMNS}
    if data.names is not None:
        columns["file"] = [data.names[row] for row in columns["row"]]
    return columns
