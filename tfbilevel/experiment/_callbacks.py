"""Keras callbacks: rows of a run, and backups that survive a kill."""

import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import keras

from tfbilevel.experiment._run import Run


class Evaluate(keras.callbacks.Callback):
    """Measures a model before training, every so many outer steps and at the end.

    A row of the run holds `step`, `seconds`, the training metrics (means over the
    steps since the last row; not known at step 0) and what the function returns.
    `seconds` are those of outer steps over all sittings, with their data and with
    TensorFlow's tracing in the first one; evaluations and backups take none.
    On a terminal a bar shows how far training is.

    Args:
        run: where rows go.
        function: () -> dict of what to log.
        every: outer steps between rows.
        steps: outer steps in all, `None` if only the seconds end training.
        limit: seconds after which training stops, `None` for no limit.
    """

    def __init__(
        self,
        run: Run,
        function: Callable[[], Mapping],
        every: int,
        steps: int | None = None,
        limit: float | None = None,
    ):
        super().__init__()
        self.run, self.function, self.every, self.limit = run, function, every, limit
        self.steps = steps
        self.seconds: float | None = None
        self._begun = 0.0
        self._logged = -1
        self._first: dict | None = None
        self._bar = keras.utils.Progbar(steps or math.ceil(limit or 1))

    def on_train_begin(self, logs: Any = None) -> None:
        self.seconds = None

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self.seconds is None:
            # Not at the start of training: a backup is restored there.
            self._logged = self.model.outer_step
            self.seconds = self.run.rewind(self._logged)
            if not self.run.rows():
                self._first = {"step": self._logged, "seconds": 0.0, **self.function()}
        self._begun = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        assert self.seconds is not None
        self.seconds += time.perf_counter() - self._begun
        step = self.model.outer_step
        over = self.limit is not None and self.seconds >= self.limit
        if over:
            self.model.stop_training = True
        if (
            over
            or step // self.every > self._logged // self.every
            or step == self.steps
        ):
            self._log(step, logs or {})
        if sys.stdout.isatty():
            done = int(self.seconds) if self.steps is None else step
            self._bar.update(min(done, self._bar.target))

    def _log(self, step: int, logs: Mapping) -> None:
        self._logged = step
        training = {name: float(value) for name, value in logs.items()}
        self.model.reset_metrics()
        row = {"step": step, "seconds": round(self.seconds or 0.0, 4)}
        row |= training | dict(self.function())
        if self._first is not None:
            # Only now are the names of the training metrics known.
            self.run.log(dict.fromkeys(row, float("nan")) | self._first)
            self._first = None
        self.run.log(row)


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
