"""The losses of both levels."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from tfbilevel._jobs.tuning.hyperparameter import Hyperparameter, Setting
from tfbilevel._jobs.tuning.job import Job
from tfbilevel._jobs.tuning.outputs import Output


@dataclasses.dataclass(frozen=True, eq=False)
class Losses:
    """The losses of a job as functions of the hyperparameters' values.

    Attributes:
        search: the hyperparameters.
        outputs: the network's outputs.
        setting: what hyperparameters may read; it has the network.
    """

    search: Sequence[Hyperparameter]
    outputs: Sequence[Output]
    setting: Setting

    @classmethod
    def of(
        cls,
        job: Job,
        search: Sequence[Hyperparameter],
        optimizer: keras.optimizers.Optimizer,
    ) -> "Losses":
        """The losses of a new network of the job."""
        network = job.network()
        setting = Setting(network, job.classes, job.deviation, job.shape, optimizer)
        return cls(tuple(search), tuple(job.outputs), setting)

    def training(self, values: dict[str, Any], x: Any, y: Any) -> tf.Tensor:
        """The loss of a training batch, without the network's own regularisers."""
        setting = self.setting
        for one in self.search:
            x, y = one.examples(values[one.name], x, y, setting)
        with contextlib.ExitStack() as stack:
            for one in self.search:
                stack.enter_context(one.during(values[one.name], setting))
            losses = self._of(values, x, y, training=True)
        for one in self.search:
            losses = one.losses(values[one.name], losses, y, setting)
        total = tf.reduce_mean(tf.add_n(losses))
        for one in self.search:
            term = one.penalty(values[one.name], setting)
            if term is not None:
                total += tf.cast(term, total.dtype)
        return total

    def validation(self, values: dict[str, Any], x: Any, y: Any) -> tf.Tensor:
        """The loss of a validation batch: no augmentation, no dropout, no penalty."""
        losses = self._of(values, x, y, training=False)
        for one in self.search:
            losses = one.validation_losses(losses)
        return tf.reduce_mean(tf.add_n(losses))

    def predicted(self, values: dict[str, Any], x: Any, training: bool = False) -> list:
        """The network's outputs."""
        for one in self.search:
            x = one.features(values[one.name], x, self.setting)
        return tf.nest.flatten(self.setting.network(x, training=training))

    def _of(self, values: dict, x: Any, y: Any, training: bool) -> list:
        outputs = self.predicted(values, x, training)
        each = zip(self.outputs, tf.nest.flatten(y), outputs, strict=True)
        return [one.losses(target, output) for one, target, output in each]
