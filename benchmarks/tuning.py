"""`tb.HyperparameterTuner` compared with keras-tuner's searches over the same ranges.

    PYTHONPATH=folder/with/keras_tuner python benchmarks/tuning.py --out runs/tuning

A CNN on 5,000 images of FashionMNIST with 1,000 for validation; 13 numbers: L2 per
layer, label smoothing, three dropout rates, and the strengths of brightness, contrast,
noise, shift and mix-up. One run of the tuner, and 30 trials of the random and of the
Bayesian search, each trial one training of the same length. Every trial is written to
OUT/seed-0.json at once, and a search that was interrupted goes on where it stopped.
Data: FashionMNIST of tensorflow-datasets, in $TFDS_DATA_DIR.
"""

import argparse
import json
import os
import pathlib
import sys
import time
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import tfbilevel as tb  # noqa: E402
from tfbilevel._jobs.tuning.hyperparameter import Setting  # noqa: E402
from tfbilevel._jobs.tuning.job import of_arrays  # noqa: E402
from tfbilevel._jobs.tuning.losses import FixedTraining, Losses  # noqa: E402

WAYS = ("plain", "tuner", "random", "bayesian")


def network() -> keras.Model:
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(32, 3, padding="same", activation="relu", name="conv1"),
            layers.MaxPooling2D(),
            layers.Dropout(0.1, name="drop1"),
            layers.Conv2D(64, 3, padding="same", activation="relu", name="conv2"),
            layers.MaxPooling2D(),
            layers.Dropout(0.1, name="drop2"),
            layers.Flatten(),
            layers.Dense(128, activation="relu", name="dense1"),
            layers.Dropout(0.1, name="drop3"),
            layers.Dense(10, name="dense2"),
        ]
    )


def search() -> list:
    hyper = tb.hyper
    return [
        hyper.L2("per-layer"),
        hyper.LabelSmoothing(),
        hyper.Dropout("per-layer"),
        hyper.Brightness(),
        hyper.Contrast(),
        hyper.Noise(),
        hyper.Shift(),
        hyper.Mixup(),
    ]


def data(args: argparse.Namespace) -> tuple:
    """Training, validation and test examples; which are training ones, by the seed."""
    import tensorflow_datasets as tfds

    parts = tfds.as_numpy(tfds.load("fashion_mnist", batch_size=-1))
    x, y = (
        ((parts[k]["image"] / 255.0).astype("float32") for k in ("train", "test")),
        [parts[k]["label"].astype(int) for k in ("train", "test")],
    )
    (x, xt), (y, yt) = x, y
    rows = np.random.default_rng(args.seed).permutation(len(x))
    train, held = rows[: args.images], rows[args.images :][: args.validation]
    return (x[train], y[train]), (x[held], y[held]), (xt, yt)


class Trainer:
    """One training at fixed values, as `tb.HyperparameterTuner` makes its refit."""

    def __init__(self, args: argparse.Namespace, parts: tuple):
        self.args, self.parts, self.search = args, parts, search()
        (x, y), held, _ = parts
        self.job = of_arrays(network, None, x, y, held, 0.2, args.seed)

    def optimizer(self) -> keras.optimizers.Optimizer:
        steps = self.args.epochs * (self.args.images // self.args.batch_size)
        decay = keras.optimizers.schedules.CosineDecay(self.args.rate, steps)
        return keras.optimizers.Adam(decay)

    def setting(self, net: keras.Model) -> Setting:
        job = self.job
        return Setting(net, job.classes, job.deviation, job.shape, self.optimizer())

    def __call__(self, values: dict[str, Any]) -> dict[str, Any]:
        begun = time.perf_counter()
        net, args = self.job.network(), self.args
        losses = Losses(self.search, self.job.outputs, self.setting(net))
        training = FixedTraining(losses, values)
        training.compile(self.optimizer(), jit_compile=False)
        stream = self.job.training(args.batch_size, args.seed)
        training.fit(
            stream.map(lambda x, y: ((x, y),)),
            epochs=args.epochs,
            steps_per_epoch=args.images // args.batch_size,
            shuffle=False,
            verbose=0,
        )
        seconds = time.perf_counter() - begun
        values = {k: np.asarray(v).tolist() for k, v in values.items()}
        return {"seconds": seconds, **self.measured(net), "values": values}

    def measured(self, net: keras.Model) -> dict[str, float]:
        found = {}
        for name, (x, y) in zip(("validation", "test"), self.parts[1:], strict=True):
            logits = net.predict(x, batch_size=1000, verbose=0)
            losses = tb.sparse_cross_entropy(logits, y)
            found[f"{name}_accuracy"] = float(np.mean(logits.argmax(1) == y))
            found[f"{name}_loss"] = float(tf.reduce_mean(losses))
        return found


def plain(trainer: Trainer) -> list[dict]:
    """Without any of them: the smallest values of the ranges."""
    return [trainer(_values(trainer, lambda one, name: one.range[0]))]


def tuned(trainer: Trainer) -> list[dict]:
    """One run of the tuner: the network of the search, and that of the refit."""
    args, ((x, y), held, _) = trainer.args, trainer.parts
    rows = []
    for refit in (False, True):  # the second run repeats the search of the first
        tuner = tb.HyperparameterTuner(
            network,
            search(),
            optimizer=trainer.optimizer(),
            refit=refit,
            seed=args.seed,
        )
        begun = time.perf_counter()
        tuner.fit(
            x,
            y,
            validation_data=held,
            epochs=args.epochs,
            batch_size=args.batch_size,
            verbose=0,
        )
        seconds = time.perf_counter() - begun
        values = {k: np.asarray(v).tolist() for k, v in tuner.best_.items()}
        rows.append(
            {
                "refit": refit,
                "seconds": seconds,
                **trainer.measured(tuner.model_),
                "values": values,
            }
        )
    return rows


def searched(trainer: Trainer, kind: str, record: Any) -> None:
    """Trials of keras-tuner, each recorded when it ends."""
    import keras_tuner

    args = trainer.args
    base = {
        "random": keras_tuner.RandomSearch,
        "bayesian": keras_tuner.BayesianOptimization,
    }[kind]

    class Search(base):
        def run_trial(self, trial: Any, *arguments: Any, **options: Any) -> Any:
            found = trial.hyperparameters

            def value(one: Any, name: str) -> float:
                low, high = one.range
                sampling = "log" if one.scale == "log" else "linear"
                return found.Float(name, low, high, sampling=sampling)

            row = trainer(_values(trainer, value))
            record(row)
            return row["validation_accuracy"]

    def build(found: Any) -> keras.Model:
        """Declares the ranges."""
        for one in trainer.search:
            for name in _names(trainer, one):
                sampling = "log" if one.scale == "log" else "linear"
                found.Float(name, *one.range, sampling=sampling)
        return keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])

    Search(
        hypermodel=build,
        objective=keras_tuner.Objective("default_objective", "max"),
        max_trials=args.trials,
        seed=args.seed,
        directory=args.out / "keras-tuner",
        project_name=f"{kind}-{args.seed}",
        overwrite=False,
    ).search()


def _names(trainer: Trainer, one: Any) -> list[str]:
    entries = one.entries(trainer.setting(trainer.job.network()))
    return [one.name] if entries is None else [f"{one.name}[{e}]" for e in entries]


def _values(trainer: Trainer, value: Any) -> dict[str, np.ndarray]:
    made = {}
    for one in trainer.search:
        numbers = [value(one, name) for name in _names(trainer, one)]
        several = one.entries(trainer.setting(trainer.job.network())) is not None
        made[one.name] = np.asarray(numbers if several else numbers[0], np.float32)
    return made


def best(rows: list[dict]) -> dict:
    return max(rows, key=lambda row: row["validation_accuracy"])


def report(rows: dict[str, list[dict]]) -> None:
    one = rows["plain"][0]["seconds"] if rows.get("plain") else float("nan")
    for way, trials in rows.items():
        if not trials:
            continue
        chosen = trials if way == "tuner" else [best(trials)]
        total = sum(row["seconds"] for row in trials)
        for row in chosen:
            seconds = row["seconds"] if way == "tuner" else total
            name = f"{way}{' refit' if row.get('refit') else ''}"
            print(
                f"{name:14} {len(trials):3} trainings  test {row['test_accuracy']:.4f}"
                f"  loss {row['test_loss']:.4f}  validation "
                f"{row['validation_accuracy']:.4f}  {seconds:.0f} s, "
                f"{seconds / one:.1f} trainings"
            )


def main(argv: list[str] | None = None) -> dict[str, list[dict]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--validation", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    tf.config.threading.set_intra_op_parallelism_threads(args.threads)
    tf.config.threading.set_inter_op_parallelism_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"seed-{args.seed}.json"
    rows = json.loads(path.read_text()) if path.exists() else {}
    trainer = Trainer(args, data(args))
    for way in args.ways:
        done = rows.setdefault(way, [])

        def record(row: dict, done: list = done) -> None:
            done.append(row)
            path.write_text(json.dumps(rows, indent=1) + "\n")

        if way in ("random", "bayesian"):
            if len(done) < args.trials:
                searched(trainer, way, record)
        elif not done:
            for row in (plain if way == "plain" else tuned)(trainer):
                record(row)
    report(rows)
    return rows


if __name__ == "__main__":
    main()
