"""The folder of a run."""

import argparse
import atexit
import contextlib
import csv
import importlib.metadata
import json
import os
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import filelock

import tfbilevel as tb

LOCK = ".lock"  # exists while a process works in the folder
PARTIAL = ".partial"  # suffix of a file that is being written


def begin(args: argparse.Namespace, config: Mapping[str, Any]) -> "Run":
    """The run of a script's flags; prints its folder, which `--resume` needs.

    Args:
        args: flags with `out` and `resume`.
        config: as for `Run`.
    """
    run = Run(args.out, config, args.resume)
    print(f"{'Continuing' if args.resume else 'Writing to'} {run.out}", flush=True)
    return run


class Run:
    """The folder of a run.

    Args:
        out: the folder; it must be new or empty, or hold the run to resume.
        config: every setting, JSON-serialisable.
        resume: continue the run; `config` must equal the stored one.

    Raises:
        ValueError: if the folder is in use (by any process), there is nothing to
            resume, or the settings differ from the run's.
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
            try:
                before = dict(json.loads(stored.read_text())["settings"])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{stored} was not written by a run of these scripts ({error!r}). "
                    f"Start in a new folder. Received: --out {self.out}"
                ) from None
            changed = sorted(
                key
                for key in {*before, *settings}
                if before.get(key) != settings.get(key)
            )
            hold(self.out)
            if changed:
                raise ValueError(
                    "--resume needs the settings of the run it continues. Repeat "
                    "its flags or start in a new folder. Received: other "
                    f"{', '.join(changed)}"
                )
        else:
            # A kill during the writing of `config.json` leaves a partial file, no run.
            begun = {stored.with_name(stored.name + PARTIAL), self.out / LOCK}
            if self.out.exists() and {*self.out.iterdir()} - begun:
                raise ValueError(
                    "--out must be a new or empty folder. Name another one or pass "
                    f"--resume. Received: --out {self.out}"
                )
            self.out.mkdir(parents=True, exist_ok=True)
            hold(self.out)
            write_json(stored, {"settings": settings, "versions": _versions()})

    def rows(self) -> list[dict[str, str]]:
        """The rows of `metrics.csv` so far, without one that a kill cut short."""
        return rows_of(self.out)

    def column(self, name: str) -> list[float]:
        """One column of `metrics.csv` as numbers."""
        return [float(row[name]) for row in self.rows()]

    def log(self, values: Mapping[str, Any]) -> None:
        """Append a row; the first one determines the columns."""
        columns = None
        if self._metrics.exists():
            with self._metrics.open(newline="") as file:
                columns = next(csv.reader(file), None)  # a kill may leave it empty
        with self._metrics.open("a", newline="") as file:
            # An unknown column raises an error before anything is written.
            writer = csv.DictWriter(file, fieldnames=columns or list(values))
            if columns is None:
                writer.writeheader()
            writer.writerow(values)

    def rewind(self, step: int) -> float:
        """Drop the rows after `step` and return the seconds of the last one kept."""
        kept = [row for row in self.rows() if int(row["step"]) <= step]
        self.replace(kept)
        return float(kept[-1]["seconds"]) if kept else 0.0

    def replace(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replace the rows of `metrics.csv` atomically; without rows, remove it."""
        if not rows:
            self._metrics.unlink(missing_ok=True)
            return
        partial = self._metrics.with_suffix(PARTIAL)
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        os.replace(partial, self._metrics)

    def summarise(self, values: Mapping[str, Any]) -> None:
        """Write `summary.json`."""
        write_json(self.out / "summary.json", values)

    def summary(self) -> dict[str, Any] | None:
        """The result of `summarise`; `None` if the run is not complete."""
        path = self.out / "summary.json"
        return json.loads(path.read_text()) if path.exists() else None

    def files(self) -> str:
        """The names of the files in the folder, in one line."""
        names = sorted(path.name for path in self.out.iterdir() if path.name != LOCK)
        return f"Files in {self.out}: {', '.join(names)}"


def rows_of(out: pathlib.Path) -> list[dict[str, str]]:
    """The rows of a run's `metrics.csv`, without one that was cut short by a kill."""
    metrics = out / "metrics.csv"
    if not metrics.exists():
        return []
    with metrics.open(newline="") as file:
        return [
            row
            for row in csv.DictReader(file)
            if None not in row and None not in row.values()
        ]


def numbers(rows: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Rows of a file, with numeric strings converted to numbers."""

    def number(text: str) -> float | str:
        try:
            return float(text)
        except ValueError:
            return text

    return [{name: number(text) for name, text in row.items()} for row in rows]


def best_row(
    rows: Sequence[Mapping[str, Any]], by: str, lowest: bool = False
) -> Mapping[str, Any]:
    """The first row whose column `by` is largest, or smallest if `lowest`."""
    choose = min if lowest else max
    return choose(rows, key=lambda row: row[by])


_held: dict[pathlib.Path, filelock.BaseFileLock] = {}  # until this process ends


def hold(folder: pathlib.Path) -> None:
    """Lock the folder until this process ends; raises if another process holds it.

    Two writers would mix their rows: a comparison that was killed may have left a
    method's process running.
    """
    path = folder.resolve() / LOCK
    if path in _held:
        return
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ValueError(
            "--out must not be in use: another process is writing there. End it "
            f"or wait for it. Received: --out {folder}"
        ) from None
    _held[path] = lock
    atexit.register(let_go, path)


def let_go(path: pathlib.Path) -> None:
    """Release a folder, given the path of its lock, and delete the lock file."""
    lock = _held.pop(path)
    with contextlib.suppress(OSError):  # Windows cannot delete an open file
        path.unlink(missing_ok=True)
    lock.release()


def write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    """Write JSON atomically."""
    partial = path.with_name(path.name + PARTIAL)
    partial.write_text(json.dumps(dict(values), indent=2, default=float) + "\n")
    os.replace(partial, path)


def _versions() -> dict[str, str]:
    names = ("tensorflow", "keras", "numpy")
    return {
        "tfbilevel": tb.__version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
    }
