"""Training with hyperparameters that do not change."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbilevel._jobs.tuning.hyperparameter import Hyperparameter
from tfbilevel._jobs.tuning.job import Job
from tfbilevel._jobs.tuning.losses import Losses
from tfbilevel._jobs.tuning.optimizers import with_options
from tfbilevel._jobs.tuning.values import options_of


class FixedTraining(keras.Model):
    """A network in training at fixed hyperparameters, for Keras's `fit`.

    Its input is (x, y) and its output the loss. Compile it without a loss.
    """

    def __init__(self, losses: Losses, values: dict[str, Any]):
        super().__init__(name="training")
        self._losses_of, self._values = losses, values
        self.network = losses.setting.network
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        values = {k: tf.constant(v, tf.float32) for k, v in self._values.items()}
        return self._losses_of.training(values, *inputs)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        return tf.add_n([y_pred, *(tf.cast(t, y_pred.dtype) for t in self.losses)])


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """A trained network, in its losses, and the hyperparameters that belong to it."""

    losses: Losses
    values: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Trainer:
    """Trains new networks of a job at fixed hyperparameters.

    Attributes:
        job: what is trained on what.
        search: the hyperparameters.
        optimizer: number of steps -> optimizer.
        epochs, batch_size, seed, jit_compile, verbose: of the tuner.
    """

    job: Job
    search: Sequence[Hyperparameter]
    optimizer: Any
    epochs: int
    batch_size: int
    seed: int
    jit_compile: bool | str
    verbose: Any

    def __call__(
        self, values: dict[str, np.ndarray], everything: bool = False
    ) -> Trained:
        """A network trained with these values.

        Args:
            values: name -> value.
            everything: on the validation data too.
        """
        job, size = self.job, self.batch_size
        batches, number = job.training, job.counts(size)[0]
        if everything:
            batches, number = job.everything, job.counts(size)[2]
        optimizer = self.optimizer(self.epochs * number)
        options = {k: float(v) for k, v in options_of(self.search, values).items()}
        losses = Losses.of(job, self.search, optimizer)
        training = FixedTraining(losses, values)
        training.compile(
            optimizer=with_options(optimizer, options), jit_compile=self.jit_compile
        )
        training.fit(
            batches(size, self.seed).map(lambda x, y: ((x, y),)),
            epochs=self.epochs,
            steps_per_epoch=number,
            shuffle=False,
            verbose=self.verbose,
        )
        return Trained(losses, values)
