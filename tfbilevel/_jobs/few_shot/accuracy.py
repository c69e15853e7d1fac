"""The accuracy on tasks of new classes."""

from collections.abc import Callable
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tfbilevel._jobs.few_shot.tasks import Tasks


class FewShotScore(NamedTuple):
    """The accuracy on new classes, as a mean over sampled tasks.

    Attributes:
        accuracy: the mean, from 0 to 1.
        margin: half the width of its 95 percent confidence interval.
    """

    accuracy: float
    margin: float

    def __str__(self) -> str:
        return f"{100 * self.accuracy:.2f} ± {100 * self.margin:.2f} percent"


def accuracies(solver: Tasks, dataset: tf.data.Dataset, episodes: int) -> np.ndarray:
    """The accuracy on every one of the dataset's first tasks."""
    parts: list[np.ndarray] = []
    found = 0
    for batch in dataset:
        parts.append(np.mean(solver.predicted(batch) == batch.upper[1], axis=1))
        found += len(parts[-1])
        if found >= episodes:
            break
    return np.concatenate(parts)[:episodes]


class Validation(keras.callbacks.Callback):
    """Adds `val_accuracy` to the log of every epoch, for the callbacks after it.

    Args:
        measure: () -> the accuracy.
    """

    def __init__(self, measure: Callable[[], float]):
        super().__init__()
        self.measure = measure

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        if logs is not None:
            logs["val_accuracy"] = self.measure()
