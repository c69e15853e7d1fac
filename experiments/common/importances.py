"""Importances of training examples: s = (tanh(a) + 1) / 2 for a logit a."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf


def importance(a: Any) -> Any:
    return 0.5 * (tf.tanh(a) + 1)


def to_logits(importances: np.ndarray) -> np.ndarray:
    return np.arctanh(2 * importances - 1)


def renormalised(a: np.ndarray) -> np.ndarray:
    """Importances with mean 1/2, clipped to [1e-5, 1 - 1e-5]."""
    importances = 0.5 * (np.tanh(a.astype(np.float64)) + 1)
    importances *= 0.5 / max(importances.mean(), 1e-12)
    return to_logits(np.clip(importances, 1e-5, 1 - 1e-5)).astype(a.dtype)


class Renormalise(keras.callbacks.Callback):
    """Applies `renormalised` after each epoch, before the importances are evaluated."""

    def __init__(self, logits: keras.Variable, every: int):
        super().__init__()
        self.logits, self.every = logits, every

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self.model.outer_step % self.every == 0:
            self.logits.assign(renormalised(self.logits.numpy()))
