"""Searches of keras-tuner and scikit-learn, one training per trial, for `tuning.py`."""

import pathlib
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tuning_problems import Problem

import tfbilevel as tb
from tfbilevel._jobs.tuning.fixed_training import FixedTraining
from tfbilevel._jobs.tuning.hyperparameter import Hyperparameter, Setting
from tfbilevel._jobs.tuning.job import of_arrays
from tfbilevel._jobs.tuning.losses import Losses

Row = dict[str, Any]


class Trainer:
    """One training at fixed values, as `tb.HyperparameterTuner` makes for its guard.

    Args:
        problem: what is trained.
        seed: of the data, the weights and the batches.
    """

    def __init__(self, problem: Problem, seed: int):
        self.problem, self.seed = problem, seed
        self.search, self.parts = problem.search(), problem.data(seed)
        (x, y), held, _ = self.parts
        self.job = of_arrays(problem.network, None, x, y, held, 0.2, seed)
        self.steps = len(x) // problem.batch_size
        setting = self.setting(self.job.network(), problem.epochs)
        self.names = {one.name: one.entries(setting) for one in self.search}
        self.prepared: dict[int, tuple] = {}

    def optimizer(self, epochs: int) -> keras.optimizers.Optimizer:
        steps = epochs * self.steps
        decay = keras.optimizers.schedules.CosineDecay(self.problem.rate, steps)
        return keras.optimizers.Adam(decay)

    def setting(self, net: keras.Model, epochs: int) -> Setting:
        job, optimizer = self.job, self.optimizer(epochs)
        return Setting(net, job.classes, job.deviation, job.shape, optimizer)

    def ranges(self) -> list[tuple[str, Hyperparameter]]:
        """Every number by its name, with what it belongs to."""
        return [
            (name, one)
            for one in self.search
            for name in self._labels(one, self.names[one.name])
        ]

    def values(self, number: Callable[[str, Any], float]) -> dict[str, np.ndarray]:
        """Values of all hyperparameters, from a function of each number's name."""
        made = {}
        for one in self.search:
            entries = self.names[one.name]
            numbers = [number(name, one) for name in self._labels(one, entries)]
            flat = numbers[0] if entries is None else numbers
            made[one.name] = np.asarray(flat, np.float32)
        return made

    def _labels(self, one: Hyperparameter, entries: Any) -> list[str]:
        return [one.name] if entries is None else [f"{one.name}_{e}" for e in entries]

    def __call__(self, values: dict[str, np.ndarray], epochs: int = 0) -> Row:
        """A training of a new network, but traced only for the first of its length."""
        epochs = epochs or self.problem.epochs
        begun = time.process_time()
        if epochs not in self.prepared:
            self.prepared[epochs] = self._prepare(values, epochs)
        training, beginning = self.prepared[epochs]
        for name, value in values.items():
            training.numbers[name].assign(value)
        for variable, first in beginning:
            variable.assign(first)
        stream = self.job.training(self.problem.batch_size, self.seed)
        training.fit(
            stream.map(lambda x, y: ((x, y),)),
            epochs=epochs,
            steps_per_epoch=self.steps,
            shuffle=False,
            verbose=0,
        )
        seconds = time.process_time() - begun
        found = self.measured(
            lambda x: training.losses_of.predicted(values, x)[0], values
        )
        return {"seconds": seconds, "epochs": epochs, **found}

    def _prepare(self, values: dict[str, np.ndarray], epochs: int) -> tuple:
        """A training, and each of its variables with its value at the beginning."""
        net = self.job.network()
        losses = Losses(self.search, self.job.outputs, self.setting(net, epochs))
        training = Training(losses, values)
        optimizer = self.optimizer(epochs)
        optimizer.build(training.trainable_variables)
        training.compile(optimizer, jit_compile=False)
        variables = [*training.trainable_variables, *optimizer.variables]
        return training, [(v, np.array(v.value)) for v in variables]

    def measured(self, logits_of: Callable[[Any], Any], values: dict[str, Any]) -> Row:
        """The accuracy and loss on validation and test data."""
        found: Row = {}
        for name, (x, y) in zip(("validation", "test"), self.parts[1:], strict=True):
            batches = [x[k : k + 1000] for k in range(0, len(x), 1000)]
            logits = np.concatenate([logits_of(tf.constant(b)) for b in batches])
            losses = tb.sparse_cross_entropy(logits, y)
            found[f"{name}_accuracy"] = float(np.mean(logits.argmax(1) == y))
            found[f"{name}_loss"] = float(tf.reduce_mean(losses))
        found["values"] = {k: np.asarray(v).tolist() for k, v in values.items()}
        return found


class Training(FixedTraining):
    """A training whose values are variables, so that one trace is enough."""

    def __init__(self, losses: Losses, values: dict[str, np.ndarray]):
        super().__init__(losses, {})
        self.losses_of = losses
        self.numbers = {
            k: keras.Variable(v, trainable=False, dtype="float32")
            for k, v in values.items()
        }

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        values = {k: tf.convert_to_tensor(v.value) for k, v in self.numbers.items()}
        return self.losses_of.training(values, *inputs)


def keras_tuner_search(
    trainer: Trainer,
    kind: str,
    trials: int,
    folder: pathlib.Path,
    record: Callable[[Row], None],
) -> None:
    """A search of keras-tuner, "random" or "bayesian", with its state in a folder."""
    import keras_tuner

    kinds = {
        "random": keras_tuner.RandomSearch,
        "bayesian": keras_tuner.BayesianOptimization,
    }

    def build(found: Any) -> keras.Model:
        """Declares the ranges."""
        for name, one in trainer.ranges():
            sampling = "log" if one.scale == "log" else "linear"
            found.Float(name, *one.range, sampling=sampling)
        return keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])

    class Search(kinds[kind]):
        def run_trial(self, trial: Any, *arguments: Any, **options: Any) -> float:
            found = trial.hyperparameters
            row = trainer(trainer.values(lambda name, one: found.get(name)))
            record(row)
            return row["validation_accuracy"]

    # By default 3 random trials per number come first, which would be all of them.
    options = {"num_initial_points": max(1, trials // 3)} if kind == "bayesian" else {}
    Search(
        hypermodel=build,
        objective=keras_tuner.Objective("default_objective", "max"),
        max_trials=trials,
        seed=trainer.seed,
        directory=folder,
        project_name=f"{kind}-{trainer.seed}",
        overwrite=False,
        **options,
    ).search()


def scikit_learn_search(
    trainer: Trainer,
    kind: str,
    trials: int,
    done: list[Row],
    record: Callable[[Row], None],
) -> None:
    """A search of scikit-learn, "randomized" or "halving" (resource: the epochs).

    All trainings use the same validation rows. Those that are done are read from their
    record: the search chooses the same values again.
    """
    from scipy.stats import loguniform, uniform
    from sklearn.base import BaseEstimator
    from sklearn.experimental import enable_halving_search_cv  # noqa: F401
    from sklearn.model_selection import (
        HalvingRandomSearchCV,
        PredefinedSplit,
        RandomizedSearchCV,
    )

    earlier = iter(list(done))

    class Trial(BaseEstimator):
        """A training as an estimator, whose parameters are the numbers."""

        def __init__(self, numbers: dict[str, float]):
            self.numbers = numbers

        def get_params(self, deep: bool = True) -> dict[str, float]:
            return dict(self.numbers)

        def set_params(self, **numbers: Any) -> "Trial":
            self.numbers = {**self.numbers, **numbers}
            return self

        def __sklearn_clone__(self) -> "Trial":
            return Trial(dict(self.numbers))

        def fit(self, x: Any, y: Any) -> "Trial":
            values = trainer.values(lambda name, one: self.numbers[name])
            epochs = int(self.numbers["epochs"])
            row = next(earlier, None)
            if row is None:
                row = trainer(values, epochs)
                record(row)
            assert row["epochs"] == epochs
            for name, value in values.items():
                np.testing.assert_allclose(row["values"][name], value, rtol=1e-6)
            self.row = row
            return self

        def score(self, x: Any, y: Any) -> float:
            return self.row["validation_accuracy"]

    ranges: dict[str, Any] = {}
    for name, one in trainer.ranges():
        low, high = one.range
        log = one.scale == "log"
        ranges[name] = loguniform(low, high) if log else uniform(low, high - low)
    epochs = trainer.problem.epochs
    start = Trial({name: one.start for name, one in trainer.ranges()})
    start.set_params(epochs=epochs)
    (x, y), (xv, yv), _ = trainer.parts
    common: dict[str, Any] = {
        "cv": PredefinedSplit([-1] * len(x) + [0] * len(xv)),
        "refit": False,
        "random_state": trainer.seed,
    }
    if kind == "randomized":
        search: Any = RandomizedSearchCV(start, ranges, n_iter=trials, **common)
    else:
        search = HalvingRandomSearchCV(
            start,
            ranges,
            n_candidates=trials,
            resource="epochs",
            min_resources=max(1, epochs // 9),
            max_resources=epochs,
            **common,
        )
    search.fit(np.concatenate([x, xv]), np.concatenate([y, yv]))
