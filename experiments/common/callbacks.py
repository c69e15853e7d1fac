"""Keras callbacks that write the rows of a run."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

import tfbilevel as tb
from common.flags import one_line_nonfinite
from common.progress import Progress
from common.run import Run, write_json


def train(
    model: keras.Model,
    batches: Callable[[int], tf.data.Dataset],
    run: Run,
    function: Callable[[], Mapping],
    *,
    every: int,
    epoch: int,
    steps: int | None = None,
    seconds: float | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> None:
    """Fit a compiled `tb.BilevelModel`, continuing from the run's backup if any.

    Args:
        model: a compiled model.
        batches: first outer step -> endless dataset from that step on.
        run: receives the rows and the backup.
        function: () -> dict of values to log.
        every: outer steps between rows.
        epoch: outer steps between backups, the most that a kill can cost.
        steps: outer steps in total, `None` if only the seconds end training.
        seconds: training time after which to stop, `None` for no limit.
        callbacks: further callbacks, called first.

    Raises:
        SystemExit: with status 1 and one line on stderr, at NaN or infinity.
    """
    backup = tb.Backup(run.out / "backup", epoch)
    backup.set_model(model)
    backup.restore()
    clock = Evaluate(run, function, every, steps, seconds)
    if clock.is_over(model.outer_step):
        return
    silent: Any = 0  # Keras declares `verbose` a str
    with one_line_nonfinite():
        model.fit(
            batches(model.outer_step),
            steps_per_epoch=epoch,
            epochs=10**9 if steps is None else math.ceil(steps / epoch),
            callbacks=[*callbacks, clock, backup],
            verbose=silent,
        )


class Evaluate(keras.callbacks.Callback):
    """Measures a model before training, at intervals of outer steps and at the end.

    A row of the run holds `step`, `seconds`, the training metrics (means over the steps
    since the last row; unknown at step 0) and the function's result. `seconds` is the
    time of outer steps in all sittings, including their data and TensorFlow's tracing
    in each sitting, but not evaluations and backups. On a terminal a bar shows the
    progress, otherwise a line every half minute.

    What a resumed run needs between two rows is written to `clock.json` at the end of
    every epoch. The file holds the last two epochs, since a kill may come before the
    backup's weights are written.

    Args:
        run: receives the rows.
        function: () -> dict of values to log.
        every: outer steps between rows.
        steps: outer steps in total, `None` if only the seconds end training.
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
        self._file = run.out / "clock.json"
        self._begun = 0.0
        self._logged = self._reset = -1
        self._before: dict = {}  # the entry of the previous end of an epoch
        # The steps and mean metrics of those Keras epochs that belong to the next row.
        self._first: dict | None = None
        # The steps and the mean metrics of what Keras's epochs left of a row.
        self._parts: list[tuple[int, dict]] = []
        self._logs: dict = {}
        total, unit = steps, "outer steps"
        if total is None:
            total, unit = math.ceil(limit or 1), "seconds of training"
        self._progress = Progress(run.out, total, unit)

    def is_over(self, step: int) -> bool:
        """Whether training already ended at this step in an earlier sitting."""
        rows = self.run.rows()
        if not rows or int(rows[-1]["step"]) != step:
            return False
        return self._ends(step, float(rows[-1]["seconds"]))

    def _ends(self, step: int, seconds: float) -> bool:
        made = self.steps is not None and step >= self.steps
        return made or (self.limit is not None and seconds >= self.limit)

    def on_train_begin(self, logs: Any = None) -> None:
        self.seconds = None

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._reset = self.model.outer_step  # Keras resets its metrics here

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._put_aside()
        entry = {"seconds": self.seconds, "parts": self._parts}
        now = {str(self.model.outer_step): entry}
        write_json(self._file, self._before | now)
        self._before = now

    def _recall(self, step: int) -> None:
        """Restore what was saved at this step, if anything."""
        kept = json.loads(self._file.read_text()) if self._file.exists() else {}
        entry = kept.get(str(step))
        if entry is not None:
            self._before = {str(step): entry}
            self.seconds = entry["seconds"]
            self._parts = [(count, part) for count, part in entry["parts"]]

    def _put_aside(self) -> None:
        count = self.model.outer_step - self._reset
        if count > 0:
            self._parts.append((count, self._logs))
        self._reset, self._logs = self.model.outer_step, {}

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self.seconds is None:
            # Not at the start of training, because a backup is restored then.
            step = self._logged = self._reset = self.model.outer_step
            self.seconds = self.run.rewind(step)
            self._recall(step)
            if not self.run.rows():
                self._first = {"step": step, "seconds": 0.0, **self.function()}
        self._begun = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        assert self.seconds is not None
        self.seconds += time.perf_counter() - self._begun
        self._logs = {name: float(value) for name, value in (logs or {}).items()}
        if self._first is not None:
            # The names of the training metrics are known only now.
            first, self._first = self._first, None
            unknown = dict.fromkeys(self._logs, float("nan"))
            place = {name: first.pop(name) for name in ("step", "seconds")}
            self.run.log(place | unknown | first)
        step = self.model.outer_step
        over = self._ends(step, self.seconds)
        if over:
            self.model.stop_training = True
        if over or step // self.every > self._logged // self.every:
            self._log(step)
        self._progress.update(int(self.seconds) if self.steps is None else step)

    def _log(self, step: int) -> None:
        self._put_aside()
        training = _means(self._parts)
        self._logged, self._parts = step, []
        self.model.reset_metrics()
        place = {"step": step, "seconds": round(self.seconds or 0.0, 4)}
        self.run.log(place | training | dict(self.function()))


class EvaluateEpochs(keras.callbacks.Callback):
    """Writes a row of the run after every epoch of plain Keras training.

    A row holds `step` (the epoch), `seconds` (of training only), `loss` and the
    function's result.

    Args:
        run: receives the rows; those of an earlier sitting are dropped.
        function: () -> dict of values to log.
    """

    def __init__(self, run: Run, function: Callable[[], Mapping]):
        super().__init__()
        self.run, self.function = run, function
        self.seconds = self._begun = 0.0

    def on_train_begin(self, logs: Any = None) -> None:
        self.run.rewind(-1)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._begun = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seconds += time.perf_counter() - self._begun
        row = {"step": epoch + 1, "seconds": round(self.seconds, 4)}
        self.run.log(row | {"loss": (logs or {})["loss"]} | dict(self.function()))


def _means(parts: list[tuple[int, dict]]) -> dict[str, float]:
    """Weighted means of metrics, each over some steps; NaN if all steps were skipped.

    The number of skipped steps is summed instead of averaged.
    """
    means = {}
    for name in parts[-1][1] if parts else ():
        if name == "skipped":
            means[name] = sum(part[name] for _, part in parts)
            continue
        known = [(n, part[name]) for n, part in parts if not math.isnan(part[name])]
        total = sum(n for n, _ in known)
        means[name] = sum(n * v for n, v in known) / total if total else math.nan
    return means
