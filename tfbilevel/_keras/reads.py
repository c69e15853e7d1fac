"""When the host reads what compiled steps record: on an accelerator not every step."""

import time
from typing import Any

import keras

INTERVAL = 0.05  # seconds, as between two updates of Keras's progress bar


class Reads:
    """Whether a read is due: each one waits for the device to finish all steps so far.

    A step after the first NaN assigns nothing, so a late read loses nothing.

    Args:
        often: after every step. Free on the host; and workers that wait for each other
            must all stop at the same step.
    """

    def __init__(self, often: bool):
        self.often = often
        self._next = 0.0

    def due(self) -> bool:
        """Whether to read now, after a step."""
        now = time.monotonic()
        due = self.often or now >= self._next
        if due:
            self._next = now + INTERVAL
        return due

    def start(self) -> None:
        """The next read is due at once."""
        self._next = 0.0


class ReadAtEpochEnd(keras.callbacks.Callback):
    """Reads what the epoch's last steps recorded, before other callbacks save them."""

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.model._outer.check(logs or {})
