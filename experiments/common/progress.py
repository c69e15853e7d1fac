"""The progress of a long job: a bar on a terminal, log lines elsewhere."""

import sys
import time
from typing import Any

import keras


class Progress:
    """Shows a bar on a terminal, otherwise a line on standard error every half minute.

    The line has the name, how much is done, and the seconds so far. A shorter job
    prints no line.

    Args:
        name: the name of the job, such as the run's folder.
        total: the number of units of work.
        unit: the unit, in the plural, such as "outer steps".
        every: seconds between two lines.
    """

    def __init__(self, name: Any, total: int, unit: str, every: float = 30.0):
        self.name, self.total, self.unit, self.every = name, total, unit, every
        self._bar = keras.utils.Progbar(total)
        self._begun = self._said = time.monotonic()

    def update(self, done: int) -> None:
        """Show that `done` units are done."""
        done = min(done, self.total)
        if sys.stdout.isatty():
            self._bar.update(done)
            return
        now = time.monotonic()
        if now - self._said < self.every:
            return
        self._said = now
        print(
            f"{self.name}: {done} of {self.total} {self.unit} after "
            f"{now - self._begun:.0f} s",
            file=sys.stderr,
            flush=True,
        )


class FitProgress(keras.callbacks.Callback):
    """Shows the `Progress` of plain Keras training on arrays.

    Args:
        name: the name of the job.
    """

    def __init__(self, name: Any):
        super().__init__()
        self.name, self._done = name, 0
        self._progress: Progress | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        total = self.params["epochs"] * self.params["steps"]
        self._progress, self._done = Progress(self.name, total, "batches"), 0

    # Counted when the next one begins: at a batch's end Keras would wait for its loss.
    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if batch:
            self._count()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._count()

    def _count(self) -> None:
        assert self._progress is not None
        self._done += 1
        self._progress.update(self._done)
