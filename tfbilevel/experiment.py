"""What every experiment script needs around its problem: flags, files, resuming.

A run writes into one folder: `config.json` (every setting, versions, seed),
`metrics.csv` (one row per evaluation, with `seconds`), `summary.json` and pictures.
Files appear whole or not at all.
"""

import argparse
import csv
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import keras

from tfbilevel._version import __version__


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with exit status 2.

    Flags that every experiment has are there from the start: `--out`, `--resume`,
    `--seed`.
    """

    def __init__(self, **keywords: Any):
        super().__init__(
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **keywords,
        )
        self.add_argument("--out", type=pathlib.Path, required=True, help="folder")
        self.add_argument(
            "--resume", action="store_true", help="continue the run in --out"
        )
        self.add_argument("--seed", type=int, default=0, help="of everything random")

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (see --help)", file=sys.stderr)
        raise SystemExit(2)


def positive(kind: type) -> Callable[[str], Any]:
    """An argparse type: a finite number of this kind, above zero."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not (math.isfinite(value) and value > 0):
            raise argparse.ArgumentTypeError(f"must be above zero, got {text}")
        return value

    parse.__name__ = f"positive {kind.__name__}"
    return parse


class Run:
    """One run's folder.

    Args:
        out: the folder; it must be new or empty, or hold the run to resume.
        config: every setting, JSON-serialisable.
        resume: continue: `config` must equal the stored one.

    Raises:
        ValueError: if the folder is in use, there is nothing to resume, or the
            settings differ from the run's.
    """

    def __init__(self, out: pathlib.Path, config: Mapping[str, Any], resume: bool):
        self.out = pathlib.Path(out)
        self._metrics = self.out / "metrics.csv"
        settings = json.loads(json.dumps(dict(config), default=str))
        stored = self.out / "config.json"
        if resume:
            if not stored.exists():
                raise ValueError(
                    "--resume needs a folder with a run in it. Start without "
                    f"--resume. Received: --out {self.out}"
                )
            before = json.loads(stored.read_text())["settings"]
            changed = sorted(
                key
                for key in {*before, *settings}
                if before.get(key) != settings.get(key)
            )
            if changed:
                raise ValueError(
                    "--resume needs the settings of the run it continues. Repeat "
                    "its flags or start in a new folder. Received: other "
                    f"{', '.join(changed)}"
                )
        else:
            if self.out.exists() and any(self.out.iterdir()):
                raise ValueError(
                    "--out must be a new or empty folder. Name another one or pass "
                    f"--resume. Received: --out {self.out}"
                )
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(stored, {"settings": settings, "versions": _versions()})

    def rows(self) -> list[dict[str, str]]:
        """The rows of `metrics.csv` so far."""
        if not self._metrics.exists():
            return []
        with self._metrics.open(newline="") as file:
            return list(csv.DictReader(file))

    def column(self, name: str) -> list[float]:
        """One column of `metrics.csv` as numbers."""
        return [float(row[name]) for row in self.rows()]

    def log(self, values: Mapping[str, Any]) -> None:
        """Append a row; the first one decides the columns."""
        columns, new = list(values), True
        if self._metrics.exists():
            new = False
            with self._metrics.open(newline="") as file:
                columns = next(csv.reader(file))
        with self._metrics.open("a", newline="") as file:
            # An unknown column is an error before anything is written.
            writer = csv.DictWriter(file, fieldnames=columns)
            if new:
                writer.writeheader()
            writer.writerow(values)

    def rewind(self, step: int) -> float:
        """Drop the rows after `step` and return the seconds of the last one kept."""
        kept = [row for row in self.rows() if int(row["step"]) <= step]
        if self._metrics.exists():
            partial = self._metrics.with_suffix(".partial")
            with partial.open("w", newline="") as file:
                if kept:
                    writer = csv.DictWriter(file, fieldnames=list(kept[0]))
                    writer.writeheader()
                    writer.writerows(kept)
            if kept:
                os.replace(partial, self._metrics)
            else:
                partial.unlink()
                self._metrics.unlink()
        return float(kept[-1]["seconds"]) if kept else 0.0

    def summarise(self, values: Mapping[str, Any]) -> None:
        """Write `summary.json`."""
        write_json(self.out / "summary.json", values)


class Evaluate(keras.callbacks.Callback):
    """Evaluates a model every so many outer steps and logs a row to the run.

    The row holds `step`, `seconds` (of training, evaluations included, over all
    sittings), the training metrics (means over the steps since the last evaluation;
    Keras's `history` then covers the last stretch of an epoch only) and what the
    function returns.

    Args:
        run: where rows go.
        function: () -> dict of numbers.
        every: outer steps between evaluations.
    """

    def __init__(self, run: Run, function: Callable[[], Mapping], every: int):
        super().__init__()
        self.run, self.function, self.every = run, function, every
        self._next: int | None = None
        self._before = self._start = 0.0

    def on_train_begin(self, logs: Any = None) -> None:
        self._next = None

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self._next is None:
            # Not at the start of training: a backup is restored there.
            step = self.model.outer_step
            self._before = self.run.rewind(step)
            self._start = time.perf_counter()
            self._next = (step // self.every + 1) * self.every

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        step = self.model.outer_step
        if self._next is None or step < self._next:
            return
        self._next = (step // self.every + 1) * self.every
        measured = dict(self.function())
        seconds = self._before + time.perf_counter() - self._start
        training = {name: float(value) for name, value in (logs or {}).items()}
        self.model.reset_metrics()
        self.run.log({"step": step, "seconds": round(seconds, 3)} | training | measured)


class Backup(keras.callbacks.BackupAndRestore):
    """`BackupAndRestore` at epochs that survives a kill at any moment.

    Keras writes the weights over the last good ones and then the epoch into another
    file: a kill between or during the two loses the run or repeats an epoch. Here
    the weights replace the old ones in one step, and the epoch is taken from them.

    Args:
        folder: where the backup lives until training ends.
        steps_per_epoch: outer steps of one epoch.
    """

    def __init__(self, folder: pathlib.Path, steps_per_epoch: int):
        super().__init__(str(folder), save_freq="epoch", delete_checkpoint=False)
        self.folder, self.steps_per_epoch = pathlib.Path(folder), steps_per_epoch

    @property
    def _file(self) -> pathlib.Path:
        return self.folder / "latest.weights.h5"

    def _save_model(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / "partial.weights.h5"
        self.model.save_weights(str(partial))
        os.replace(partial, self._file)

    def _load_model(self) -> None:
        if self._file.exists():
            self.model.load_weights(str(self._file))
            self.model._initial_epoch = self.model.outer_step // self.steps_per_epoch


def write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    """Write JSON so that the file is either whole or as before."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(dict(values), indent=2, default=float) + "\n")
    os.replace(partial, path)


def _versions() -> dict[str, str]:
    names = ("tensorflow", "keras", "numpy")
    return {
        "tfbilevel": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
    }
