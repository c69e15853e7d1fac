"""`tb.LabelCleaner` against what people use now, on real data with wrong labels.

    PYTHONPATH=folder/with/cleanlab python benchmarks/label_cleaning.py --out OUT
    ... --cells fashion_mnist/class-60/200/0 newsgroups/sym-40/200/0
    ... --table

78 cells: MNIST and FashionMNIST with 10,000 doubtful images, six kinds of noise, 200
or 1,000 trusted images, three seeds; 20 Newsgroups, symmetric 40. One default setting,
and the control (`learn=False`): the same trainings up to the learned belief, and the
final one with the belief as at the start. Each cell is one JSON file in OUT/peers and
one in OUT/cleaner; a run that was stopped goes on with the missing ones. CPU seconds
are of one thread.

`--table` trains nothing and prints, for every setting, the mean over the seeds and what
the best other way had. With `--results FILE` it adds the cells of OUT to those in FILE
(docs/results/label_cleaning.json), so that seeds can be measured one after the other.

`--published` measures the published split instead: MNIST, 5,000 doubtful, 5,000
trusted, 10,000 test images, 784-300-10, 200 epochs of each training.

Data: $TFDS_DATA_DIR and $SCIKIT_LEARN_DATA.
"""

import argparse
import json
import os
import pathlib
import shutil
import tempfile
import time
from typing import NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from cleaning_cells import SEEDS, Cell, Data, all_cells, load, published
from cleaning_peers import EPOCHS, Peers, scores

import tfbilevel as tb
from data_prep import label_noise

WAYS = ("learned", "control")
FOLDERS = ("peers", "cleaner")
COLUMNS = {
    "accuracy": "accuracy",
    "right": "right labels",
    "f1": "F1 of wrong labels",
    "cpu": "CPU seconds",
}
MARGINS = {"accuracy": 0.5, "right": 1.0}
NOT_COMPARED = ("plain", "oracle")  # no way of cleaning, and one that knows the truth


class Copied(keras.callbacks.Callback):
    """At the start of the final training the others are kept for the control, too."""

    def __init__(self, kept: pathlib.Path, copy: pathlib.Path):
        super().__init__()
        self.kept, self.copy = kept, copy

    def on_train_begin(self, logs: dict | None = None) -> None:
        if not self.copy.exists():
            shutil.copytree(self.kept, self.copy)


def cleaned(data: Data, seed: int, epochs: int = EPOCHS) -> dict[str, dict]:
    """`tb.LabelCleaner` with learned belief, and its control."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        kept = [pathlib.Path(folder) / way for way in WAYS]
        for way, backup in zip(WAYS, kept, strict=True):
            cleaner = tb.LabelCleaner(
                lambda: data.network(seed),
                augmentation=data.augment,
                learn=way == "learned",
                backup=backup,
                seed=seed,
            )
            began, wall = time.process_time(), time.perf_counter()
            cleaner.fit(
                data.x,
                data.given,
                trusted=(data.sure_x, data.sure_y),
                epochs=epochs,
                callbacks=[Copied(*kept)],
                verbose=0,
            )
            spent, wall = time.process_time() - began, time.perf_counter() - wall
            corrected = cleaner.corrected_labels_
            row = scores(
                data,
                cleaner.predict(data.test_x),
                corrected,
                corrected != data.given,
                spent,
            )
            choice = cleaner.choice_
            found[way] = {
                **row,
                "wall": round(wall, 1),
                "choice": choice.name,
                "scores": choice.scores,
                "belief": choice.belief,
            }
    return found


def measure(cell: Cell, out: pathlib.Path, ways: list[str]) -> None:
    """Write the missing files of a cell."""
    name = str(cell).replace("/", "_") + ".json"
    for way in ways:
        path = out / way / name
        if path.exists():
            continue
        data = load(cell)
        if way == "peers":
            found = Peers(data, cell.seed).run()
        else:
            found = cleaned(data, cell.seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(found, indent=1) + "\n")
        partial.rename(path)
        print(cell, way, {k: (v["accuracy"], v["right"]) for k, v in found.items()})
        keras.backend.clear_session()


def on_published(seed: int, epochs: int = 200) -> dict[str, float]:
    """Accuracy, and F1 of keeping what was not polluted, as the tables count it."""
    data, clean = published(seed)
    began = time.perf_counter()
    cleaner = tb.LabelCleaner(
        lambda: data.network(seed), augmentation=data.augment, epochs=epochs, seed=seed
    )
    trusted = (data.sure_x, data.sure_y)
    cleaner.fit(data.x, data.given, trusted=trusted, verbose=0)
    seconds = time.perf_counter() - began
    kept = cleaner.corrected_labels_ == data.given
    accuracy = 100 * cleaner.score(data.test_x, data.test_y)
    found = label_noise.cleaning_scores(kept, clean)
    return {"accuracy": accuracy, **found, "seconds": round(seconds, 1)}


def measured(out: pathlib.Path, results: pathlib.Path | None) -> dict[str, dict]:
    """Cell -> way -> column -> value: what is in `results`, and over it what is in OUT.

    A cell is left out while the other ways or the cleaner are missing.
    """
    found: dict[str, dict] = {}
    if results is not None and results.exists():
        kept = json.loads(results.read_text())
        kept.pop("columns")
        for cell, ways in kept.items():
            found[cell] = {
                k: dict(zip(COLUMNS, v, strict=True)) for k, v in ways.items()
            }
    for cell in map(str, all_cells()):
        paths = [out / way / f"{cell.replace('/', '_')}.json" for way in FOLDERS]
        if all(path.exists() for path in paths):
            found[cell] = {}
            for path in paths:
                found[cell] |= json.loads(path.read_text())
    return found


def save(found: dict[str, dict], results: pathlib.Path) -> None:
    """One line per cell; see `measured`."""
    rows = {"columns": list(COLUMNS.values())} | {
        cell: {k: [v[column] for column in COLUMNS] for k, v in sorted(ways.items())}
        for cell, ways in sorted(found.items())
    }
    lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in rows.items()]
    results.write_text("{\n" + ",\n".join(lines) + "\n}\n")


class Mean(NamedTuple):
    """A row of the table: the mean over the seeds of one setting.

    Attributes:
        setting: data, noise and number of trusted examples.
        seeds: how many were measured.
        ways: way -> column -> mean.
    """

    setting: str
    seeds: int
    ways: dict[str, dict[str, float]]

    def best(self, column: str) -> str:
        """The way of the others that is best in a column."""
        others = set(self.ways) - {*NOT_COMPARED, *WAYS}
        return max(sorted(others), key=lambda way: self.ways[way][column])

    def ahead(self, column: str) -> float:
        """The lead over the best other way."""
        own = self.ways[WAYS[0]][column]
        return own - self.ways[self.best(column)][column]

    @property
    def times(self) -> float:
        """Processor seconds in plain trainings."""
        return self.ways[WAYS[0]]["cpu"] / self.ways["plain"]["cpu"]


def means(found: dict[str, dict]) -> list[Mean]:
    """The settings, in the order of the cells."""
    seeds: dict[str, list] = {}
    for cell in map(str, all_cells()):
        if cell in found:
            seeds.setdefault(cell.rpartition("/")[0], []).append(found[cell])
    return [
        Mean(setting, len(rows), {
            way: {c: float(np.mean([row[way][c] for row in rows])) for c in COLUMNS}
            for way in rows[0]
        })
        for setting, rows in seeds.items()
    ]  # fmt: skip


def show(rows: list[Mean]) -> None:
    """The table as Markdown, and the means over its rows."""
    print("| setting | seeds | `LabelCleaner` | control | best other accuracy | "
          "best other labels | times plain |")  # fmt: skip
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        own, control = (row.ways[way] for way in WAYS)
        bold = {c: "**" * (row.ahead(c) >= -margin) for c, margin in MARGINS.items()}
        print(
            f"| {row.setting} | {row.seeds} |",
            " / ".join(f"{bold[c]}{own[c]:.1f}{bold[c]}" for c in MARGINS),
            "|",
            " / ".join(f"{control[c]:.1f}" for c in MARGINS),
            *(f"| {row.ways[row.best(c)][c]:.1f} ({row.best(c)})" for c in MARGINS),
            f"| {row.times:.1f} |",
        )
    for column, margin in MARGINS.items():
        near = sum(row.ahead(column) >= -margin for row in rows)
        print(f"{column}: within {margin} of the best in {near} of {len(rows)}")
    print("means over these settings, accuracy / right:")
    for way in rows[0].ways if rows else ():
        mean = [np.mean([row.ways[way][c] for row in rows]) for c in MARGINS]
        print(f"  {way:18}{mean[0]:6.2f} / {mean[1]:.2f}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--cells", nargs="+", type=Cell.of, default=all_cells())
    parser.add_argument("--ways", nargs="+", choices=FOLDERS, default=FOLDERS)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--results", type=pathlib.Path, help="of --table, see above")
    parser.add_argument("--published", action="store_true")
    args = parser.parse_args(argv)
    if args.table:
        found = measured(args.out, args.results)
        if args.results is not None:
            save(found, args.results)
        show(means(found))
        return
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    if args.published:
        for seed in SEEDS:
            print(seed, on_published(seed))
        return
    for cell in args.cells:
        measure(cell, args.out, args.ways)


if __name__ == "__main__":
    main()
