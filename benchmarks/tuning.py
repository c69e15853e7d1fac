"""`tb.HyperparameterTuner` compared with keras-tuner's and scikit-learn's searches.

    PYTHONPATH=folder/with/keras_tuner python benchmarks/tuning.py --out runs/tuning

Three problems (`tuning_problems.py`): `images`, a CNN on 5,000 images of FashionMNIST
with 13 numbers, and `text`, a linear classifier of 20 Newsgroups with 30 numbers, both
against keras-tuner's random and Bayesian search; `table`, a network on scikit-learn's
digits with 16 numbers, against its RandomizedSearchCV and HalvingRandomSearchCV. All
have the same ranges and validation data. One run of the tuner; 30 trials of a search,
each one training of the same length (`halving`: some shorter), of which that with the
best validation accuracy counts. `plain` is the training at the smallest values (of
factors: 1), `starts` that at the tuner's starts. Seconds are of the processor, with one
thread. Every training is written to OUT/PROBLEM-SEED.json when it ends, and what was
interrupted goes on there.

Data: FashionMNIST of tensorflow-datasets in $TFDS_DATA_DIR, and 20 Newsgroups of
scikit-learn in $SCIKIT_LEARN_DATA.
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
import tensorflow as tf

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from tuning_problems import PROBLEMS, Problem  # noqa: E402
from tuning_searches import (  # noqa: E402
    Row,
    Trainer,
    keras_tuner_search,
    scikit_learn_search,
)

import tfbilevel as tb  # noqa: E402

OWN = ("plain", "starts", "tuner", "tuner of the search")
SEARCHES = ("random", "bayesian", "randomized", "halving")


def tuned(trainer: Trainer, **options: Any) -> Row:
    """One run of the tuner."""
    problem, ((x, y), held, _) = trainer.problem, trainer.parts
    keras.utils.set_random_seed(trainer.seed)
    begun = time.process_time()
    tuner = tb.HyperparameterTuner(
        problem.network,
        problem.search(),
        optimizer=trainer.optimizer(problem.epochs),
        seed=trainer.seed,
        **options,
    )
    tuner.fit(
        x,
        y,
        validation_data=held,
        epochs=problem.epochs,
        batch_size=problem.batch_size,
        verbose=0,
    )
    seconds = time.process_time() - begun
    found = trainer.measured(tuner.model_, tuner.best_)
    return {"seconds": seconds, "choice": tuner.choice_, **found}


def make(trainer: Trainer, way: str) -> Row:
    """The row of a way that has one; a training is traced, as a user's is."""
    trainer.prepared.clear()
    if way == "plain":
        return trainer(trainer.values(lambda name, one: _without(one)))
    if way == "starts":
        return trainer(trainer.values(lambda name, one: one.start))
    return tuned(trainer, **({} if way == "tuner" else {"guard": False}))


def _without(one: Any) -> float:
    """The smallest value; of a factor, 1."""
    return 1.0 if one.start == 1.0 else one.range[0]


def best(rows: list[Row], epochs: int) -> Row:
    """That with the best validation accuracy, of the trainings of full length."""
    whole = [row for row in rows if row.get("epochs", epochs) == epochs]
    return max(whole, key=lambda row: row["validation_accuracy"])


def report(rows: dict[str, list[Row]], epochs: int) -> None:
    """Prints a line for each way."""
    one = rows["starts"][0]["seconds"] if rows.get("starts") else float("nan")
    for way, trials in rows.items():
        if trials:
            row = best(trials, epochs)
            ratio = sum(each["seconds"] for each in trials) / one
            print(
                f"{way:20} {len(trials):3} runs  test {row['test_accuracy']:.4f} loss "
                f"{row['test_loss']:.4f}  validation {row['validation_accuracy']:.4f} "
                f"loss {row['validation_loss']:.4f}  {ratio:.1f} trainings "
                f"of {one:.1f} s"
            )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--problem", choices=PROBLEMS, default="images")
    parser.add_argument("--ways", nargs="+", choices=OWN + SEARCHES)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{args.problem}-{args.seed}.json"
    rows = json.loads(path.read_text()) if path.exists() else {}
    problem: Problem = PROBLEMS[args.problem]()
    trainer = Trainer(problem, args.seed)
    for way in args.ways or OWN + problem.against:
        done = rows.setdefault(way, [])

        def record(row: Row, done: list = done) -> None:
            done.append(row)
            path.write_text(json.dumps(rows, indent=1) + "\n")

        if way in ("random", "bayesian"):
            folder = args.out / f"keras-tuner-{args.problem}"
            if len(done) < args.trials:
                keras_tuner_search(trainer, way, args.trials, folder, record)
        elif way in ("randomized", "halving"):
            scikit_learn_search(trainer, way, args.trials, done, record)
        elif not done:
            record(make(trainer, way))
    report(rows, problem.epochs)


if __name__ == "__main__":
    main()
