"""`tb.LabelCleaner` against what people use now, on real data with wrong labels.

    PYTHONPATH=folder/with/cleanlab python benchmarks/label_cleaning.py --out OUT
    ... --cells fashion_mnist/class-60/200/0 newsgroups/sym-40/200/0
    ... --table

78 cells: MNIST and FashionMNIST with 10,000 doubtful images, six kinds of noise, 200
or 1,000 trusted images, three seeds; 20 Newsgroups, symmetric 40. One default setting,
and the control (`learn=False`): the same trainings up to the learned belief, and the
final one with the belief as at the start. Each cell is one JSON file in OUT/peers and
one in OUT/cleaner; a run that was stopped goes on with the missing ones. `--table`
trains nothing and prints, for every cell, what the best other way had. CPU seconds are
of one thread.

`--published` measures the published split instead: MNIST, 5,000 doubtful, 5,000
trusted, 10,000 test images, 784-300-10. Data: $TFDS_DATA_DIR and $SCIKIT_LEARN_DATA.
"""

import argparse
import json
import os
import pathlib
import shutil
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from cleaning_cells import SEEDS, Cell, Data, all_cells, load, published
from cleaning_peers import EPOCHS, Peers, scores

import tfbilevel as tb
from data_prep import label_noise

WAYS = ("learned", "control")
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


def on_published(seed: int, epochs: int = 30) -> dict[str, float]:
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


def table(out: pathlib.Path) -> list[dict]:
    """One row per cell that is measured, with the best other way in each column."""
    rows = []
    for cell in all_cells():
        name = str(cell).replace("/", "_") + ".json"
        if not all((out / way / name).exists() for way in ("peers", "cleaner")):
            continue
        peers, own = (
            json.loads((out / way / name).read_text()) for way in ("peers", "cleaner")
        )
        others = {k: v for k, v in peers.items() if k not in NOT_COMPARED}
        row = {"cell": str(cell)}
        for column in MARGINS:
            best = max(others, key=lambda k: others[k][column])
            row[column] = own["learned"][column]
            row[f"{column}_control"] = own["control"][column]
            row[f"{column}_best"] = others[best][column]
            row[f"{column}_by"] = best
        row["times"] = own["learned"]["cpu"] / peers["plain"]["cpu"]
        rows.append(row)
    return rows


def show(out: pathlib.Path) -> None:
    """The table as Markdown, and the means over the cells."""
    rows = table(out)
    print(
        "| cell | `LabelCleaner` | control | best other in each column | times plain |"
    )
    print("|---|---|---|---|---|")
    for row in rows:
        marks = {
            column: "**" if row[column] >= row[f"{column}_best"] - margin else ""
            for column, margin in MARGINS.items()
        }
        own = " / ".join(f"{m}{row[c]:.1f}{m}" for c, m in marks.items())
        control = " / ".join(f"{row[f'{c}_control']:.1f}" for c in MARGINS)
        best = " / ".join(f"{row[f'{c}_best']:.1f} {row[f'{c}_by']}" for c in MARGINS)
        print(f"| {row['cell']} | {own} | {control} | {best} | {row['times']:.1f} |")
    if not rows:
        return
    for column, margin in MARGINS.items():
        near = [row[column] >= row[f"{column}_best"] - margin for row in rows]
        print(f"{column}: within {margin} of the best in {sum(near)} of {len(rows)}")
    print("means over these cells, accuracy / right:")
    totals: dict[str, list] = {}
    for row in rows:
        name = row["cell"].replace("/", "_") + ".json"
        for way in ("cleaner", "peers"):
            for key, value in json.loads((out / way / name).read_text()).items():
                totals.setdefault(key, []).append([value[c] for c in MARGINS])
    for key, values in totals.items():
        mean = np.mean(values, axis=0)
        print(f"  {key:18}{mean[0]:6.2f} / {mean[1]:.2f}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--cells", nargs="+", type=Cell.of, default=all_cells())
    parser.add_argument("--ways", nargs="+", default=["peers", "cleaner"])
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--published", action="store_true")
    args = parser.parse_args(argv)
    if args.table:
        show(args.out)
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
