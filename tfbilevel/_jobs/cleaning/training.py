"""One network, trained again and again on the same examples with other targets."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbilevel._jobs.last_layer import LastLayer, log_probabilities_of
from tfbilevel._jobs.networks import SMALLEST, log_probabilities
from tfbilevel._keras.index_batches import index_batches
from tfbilevel._keras.replicas.workers import has_workers
from tfbilevel._randomness.operations import fixed_randomness
from tfbilevel._randomness.seeds import as_seed, of_step


@dataclasses.dataclass(frozen=True)
class Targets:
    """What a network is to say about each example, [n, 2, K].

        l_i(p) = -b_i log sum_k p_k r_ik - sum_k t_ik log p_k,    b_i = 1 - sum_k t_ik

    r_ik is the probability of the given label if the class is k (forward correction),
    t a second opinion about the class, times its weight.
    """

    values: np.ndarray

    @classmethod
    def of(
        cls,
        likelihoods: np.ndarray,
        opinion: np.ndarray | None = None,
        weight: float = 0.0,
    ) -> "Targets":
        """r = `likelihoods`, t = `weight` * `opinion`, both [n, K]."""
        second = np.zeros_like(likelihoods) if opinion is None else weight * opinion
        return cls(np.stack([likelihoods, second], axis=1).astype(np.float32))

    @classmethod
    def labels(cls, indices: np.ndarray, classes: int) -> "Targets":
        """Plain cross-entropy with these labels."""
        return cls.of(np.eye(classes)[indices])


def target_loss(targets: Any, log_p: Any) -> tf.Tensor:
    """The losses l_i above, [n]."""
    targets = tf.cast(targets, log_p.dtype)
    likelihoods, second = targets[:, 0], targets[:, 1]
    first = 1 - tf.reduce_sum(second, axis=1)
    explained = tf.reduce_sum(tf.exp(log_p) * likelihoods, axis=1)
    forward = -tf.math.log(tf.maximum(explained, SMALLEST))
    return first * forward - tf.reduce_sum(second * log_p, axis=1)


@keras.saving.register_keras_serializable("tfbilevel")
class _Cosine(keras.optimizers.schedules.LearningRateSchedule):
    """rate * (1 + cos(pi * step / steps)) / 2, with `steps` set for each training."""

    def __init__(self, rate: float):
        self.rate = rate
        self.steps = tf.Variable(tf.constant(1.0), trainable=False)

    def __call__(self, step: Any) -> Any:
        part = tf.minimum(tf.cast(step, tf.float32) / self.steps, 1.0)
        return self.rate * 0.5 * (1 + tf.cos(math.pi * part))

    def get_config(self) -> dict:
        return {"rate": self.rate}


class Training:
    """Trains one network several times; it is traced once.

    Args:
        network: the classifier.
        probabilities: whether its outputs are probabilities.
        x: the doubtful examples, [n, ...].
        trusted: the trusted ones, [m, ...], m may be 0.
        augmentation: batch of examples -> batch, for training only.
        batch_size: doubtful examples in a batch; a quarter as many trusted ones.
        optimizer: any Keras optimizer, or a learning rate for Adam with a cosine decay.
        seed: the seed of the batches.
    """

    def __init__(
        self,
        network: keras.Model,
        probabilities: bool,
        x: np.ndarray,
        trusted: np.ndarray,
        augmentation: Callable | None,
        batch_size: int,
        optimizer: keras.optimizers.Optimizer | float,
        seed: int,
    ):
        self.network = network
        self.probabilities = probabilities
        self.x, self.trusted = x, trusted
        self.augmentation = augmentation
        self.batch_size = batch_size
        self.seed = seed
        self.schedule = None
        if isinstance(optimizer, keras.optimizers.Optimizer):
            self.optimizer = type(optimizer).from_config(optimizer.get_config())
        else:
            self.schedule = _Cosine(float(optimizer))
            self.optimizer = keras.optimizers.Adam(self.schedule)
        self.optimizer.build(network.trainable_variables)
        self._fresh = [variable.numpy() for variable in self.optimizer.variables]

        def loss(targets: Any, outputs: Any) -> tf.Tensor:
            return target_loss(targets, log_probabilities(outputs, probabilities))

        self.last = LastLayer(network, probabilities)
        # Several steps per call cost less, but the bar of a short epoch counts them.
        # On several replicas TensorFlow cannot read a batch within a loop over steps.
        alone = tf.distribute.get_strategy().num_replicas_in_sync == 1
        together = min(8, max(1, len(x) // batch_size // 8)) if alone else 1
        network.compile(
            self.optimizer, loss, jit_compile=False, steps_per_execution=together
        )

    def run(
        self,
        weights: list,
        targets: Targets,
        trusted_targets: Targets,
        trust: float,
        number: int,
        steps: int,
        epochs: int,
        rows: np.ndarray | None = None,
        callbacks: list | None = None,
        verbose: Any = 0,
    ) -> dict[str, list]:
        """Train from `weights`; returns Keras's history.

        Args:
            weights: the network's weights at the start.
            targets: of all doubtful examples.
            trusted_targets: of the trusted examples that take part, the first ones.
            trust: their weight in the loss, from 0 to 1.
            number: of the training; each has random augmentation of its own.
            steps: number of steps in all.
            epochs: number of epochs in which they are counted.
            rows: the doubtful examples that take part; `None`: all.
            callbacks, verbose: as for `fit`.
        """
        self.network.set_weights(weights)
        for variable, value in zip(self.optimizer.variables, self._fresh, strict=True):
            variable.assign(value)
        if self.schedule is not None:
            self.schedule.steps.assign(steps)
        per_epoch = max(1, steps // epochs)
        data = self._batches(targets, trusted_targets, trust, rows, number)
        history = self.network.fit(
            data,
            epochs=max(1, round(steps / per_epoch)),
            steps_per_epoch=per_epoch,
            shuffle=False,  # the batches are shuffled already
            callbacks=callbacks,
            verbose=verbose,
        )
        return history.history

    def probabilities_of(self, x: np.ndarray) -> np.ndarray:
        """P(class) as the network sees it now, [n, K]."""
        return self.seen(x)[0]

    def seen(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """P(class), [n, K]; the features of the last layer, and its weights."""
        features, weights = self.last.features(x), self.last.weights()
        return np.exp(log_probabilities_of(features, weights)), features, weights

    def _batches(
        self, targets: Targets, trusted: Targets, trust: float, rows: Any, number: int
    ) -> tf.data.Dataset:
        with tf.device("CPU:0"):
            x, values = tf.constant(self.x), tf.constant(targets.values)
            sure, sure_values = tf.constant(self.trusted), tf.constant(trusted.values)
            rows = np.arange(len(self.x)) if rows is None else rows
            rows = tf.constant(rows, tf.int32)
        few = len(trusted.values) if trust > 0 else 0
        count = 0 if trust == 1 else min(self.batch_size, len(rows))
        size = self.batch_size if trust == 1 else max(1, self.batch_size // 4)
        size = min(size, few)
        total = count + size
        _require_even_parts(total)
        shares = [(1 - trust if few else 1.0) * total / count] * count if count else []
        shares += [trust * total / size] * size if size else []
        weights = tf.constant(shares, tf.float32)
        seed = of_step(as_seed(self.seed), number)

        def batch(at: tf.Tensor, indices: tuple) -> tuple:
            index, sure_index = indices
            parts, wanted = [], []
            if count:
                index = tf.gather(rows, index)
                parts.append(tf.gather(x, index))
                wanted.append(tf.gather(values, index))
            if size:
                parts.append(tf.gather(sure, sure_index))
                wanted.append(tf.gather(sure_values, sure_index))
            inputs = tf.concat(parts, axis=0)
            if self.augmentation is not None:
                # The state of its random numbers would depend on how many batches are
                # read ahead, which differs between runs and strategies.
                with fixed_randomness(of_step(seed, at)):
                    inputs = self.augmentation(inputs)
            return inputs, tf.concat(wanted, axis=0), weights

        first = index_batches(len(rows), max(count, 1), self.seed)
        second = index_batches(max(few, 1), max(size, 1), self.seed + 1)
        both = tf.data.Dataset.zip((first, second))
        return both.enumerate().map(batch).prefetch(2)


def _require_even_parts(size: int) -> None:
    """Raise if Keras's `fit` cannot divide batches among the replicas of a scope."""
    strategy = tf.distribute.get_strategy()
    if has_workers(strategy):
        raise ValueError(
            "A tb.LabelCleaner trains on the devices of one machine: on several "
            "workers Keras trains on other batches than on one. Use "
            "tf.distribute.MirroredStrategy, or no strategy. "
            f"Received: the scope of {type(strategy).__name__}"
        )
    replicas = strategy.num_replicas_in_sync
    if size % replicas:
        raise ValueError(
            "`batch_size` must be such that a batch, trusted examples (a quarter of "
            f"`batch_size`) included, can be divided evenly among {replicas} replicas: "
            "Keras takes means over even parts. With 2, 4 or 8 replicas multiples of "
            f"32 can, if there are as many examples. Received: a batch of {size}"
        )
