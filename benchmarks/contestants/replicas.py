"""One process of `scaling.py`: a number of replicas, which train by any method.

The replicas are the variant: 0 means one device without a strategy. The data file holds
the `Sizes`.
"""

import argparse
import collections
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import protocol
import tensorflow as tf
from library import StartAfterFirst
from replica_sizes import CLASSES, INPUTS, Sizes
from tensorflow_losses import use_threads

import tfbilevel as tb
import tfbilevel._calculus.collectives as collectives

SITES = 200  # places of the graph with a collective, at most


def sgd() -> keras.optimizers.Optimizer:
    return keras.optimizers.SGD(0.05)


def inner(steps: int) -> tb.InnerSolver:
    return tb.InnerSolver(sgd(), steps)


METHODS: dict[str, Callable[[Sizes], tb.Method]] = {
    "v-pbgd": lambda s: tb.ValueGap(inner(1), sgd(), 1.0),
    "unroll": lambda s: tb.Unroll(inner(s.steps)),
    "implicit-cg": lambda s: tb.Implicit(
        # A damped system, because the network's Hessian is indefinite.
        inner(s.steps),
        tb.ConjugateGradient(s.products, rtol=0.0, damping=1.0),
    ),
    "stocbio": lambda s: tb.StocBiO(inner(s.steps), s.products, 0.05),
    "maml": lambda s: tb.Unroll(inner(s.steps)),
}


class Collectives(NamedTuple):
    """Those of one outer step, on each replica.

    Attributes:
        number: how many.
        numbers: how many numbers they sum.
        bytes: the size of these.
        of_upper, of_lower: how many of them sum vectors like x, and like y.
    """

    number: int = 0
    numbers: int = 0
    bytes: int = 0
    of_upper: int = 0
    of_lower: int = 0


class Replicas:
    """Trains by one method after the other."""

    def __init__(self, arguments: argparse.Namespace, sizes: Sizes):
        replicas = int(arguments.variant)
        if arguments.device == "cpu":
            tf.config.threading.set_intra_op_parallelism_threads(
                1 if replicas else arguments.threads
            )
            tf.config.threading.set_inter_op_parallelism_threads(max(replicas, 1))
            tf.config.set_logical_device_configuration(
                tf.config.list_physical_devices("CPU")[0],
                [tf.config.LogicalDeviceConfiguration()] * max(replicas, 1),
            )
        else:
            use_threads(arguments.threads)
        kind = arguments.device.upper()
        devices = [f"{kind}:{number}" for number in range(replicas)]
        strategy = tf.distribute.MirroredStrategy(devices) if replicas else None
        self.training = Training(strategy, sizes)

    def use(self, method: str) -> dict[str, int]:
        return self.training.use(method)._asdict()

    def run(self, steps: int, clock: protocol.Clock) -> int:
        return self.training.run(steps, clock)

    def hypergradient(self) -> np.ndarray:
        raise NotImplementedError("scaling.py compares no gradients")


class Training:
    """A method's `fit`, under a strategy or without any."""

    def __init__(self, strategy: Any, sizes: Sizes):
        self.strategy = strategy or tf.distribute.get_strategy()
        self.sizes = sizes

    def use(self, method: str) -> Collectives:
        """Train by this method from now on; returns the collectives of a step."""
        self.data = self._data(method)
        found = Collectives()
        if self.strategy.num_replicas_in_sync > 1:
            found = self._counted(method)
        self.model = self._model(method)
        return found

    def run(self, steps: int, clock: protocol.Clock) -> int:
        self.model.fit(
            self.data,
            # The first step includes the start of `fit` and is not timed.
            steps_per_epoch=1 + steps,
            callbacks=[StartAfterFirst(clock)],
            verbose=0,
        )
        return steps

    def _counted(self, method: str) -> Collectives:
        """One step of a model that counts: each place of the graph, how often it is
        passed on the first replica."""
        place = self.strategy.extended.worker_devices[0]
        with tf.device(place):
            counts = tf.Variable(tf.zeros([SITES], tf.int64), trainable=False)
        sums, sites = collectives._collective, []

        def counted(leaves: list) -> list:
            made = sums(leaves)
            context = tf.distribute.get_replica_context()
            if context._replica_id == 0:
                one = tf.one_hot(len(sites), SITES, dtype=tf.int64)
                sites.append(leaves)
                with tf.control_dependencies(made):
                    counts.assign_add(one)
            return made

        collectives._collective = counted
        try:
            model = self._model(method)
            model.fit(self.data, steps_per_epoch=1, verbose=0)
            before = counts.numpy()
            model.fit(self.data, steps_per_epoch=1, verbose=0)
        finally:
            collectives._collective = sums
        passed = counts.numpy() - before
        assert len(sites) <= SITES
        total = collections.Counter()
        upper, lower = self.sizes.upper(method), self.sizes.lower
        for times, leaves in zip(passed[: len(sites)].tolist(), sites, strict=True):
            numbers = sum(leaf.shape.num_elements() for leaf in leaves)
            total["number"] += times
            total["numbers"] += times * numbers
            total["bytes"] += times * numbers * leaves[0].dtype.size
            if numbers >= lower:  # with some numbers more, or without
                total["of_lower"] += times
                numbers -= lower
            if numbers >= upper:
                total["of_upper"] += times
        return Collectives(**total)

    def _model(self, method: str) -> tb.BilevelModel:
        keras.utils.set_random_seed(0)
        with self.strategy.scope():
            lower = self._network()
            upper, options = tb.ExampleWeights(self.sizes.weights), {}
            losses = (mean_loss, weighted_loss)
            if method == "maml":
                upper, losses = self._network(), (mean_loss, mean_loss)
                options = {
                    "tasks": self.sizes.tasks,
                    "lower_start": lambda start: start.trainable_variables,
                }
            model = tb.BilevelModel(upper, lower, *losses, **options)
            # XLA compiles no replicas: none of them, to compare like with like.
            model.compile(METHODS[method](self.sizes), sgd(), jit_compile=False)
        return model

    def _network(self) -> keras.Model:
        return keras.Sequential(
            [
                keras.Input((INPUTS,)),
                keras.layers.Dense(self.sizes.hidden, "sigmoid"),
                keras.layers.Dense(CLASSES),
            ]
        )

    def _data(self, method: str) -> tf.data.Dataset:
        sizes, generator = self.sizes, np.random.default_rng(0)
        maml = method == "maml"
        shape = (sizes.tasks, sizes.shots) if maml else (sizes.batch,)
        draws = sizes.steps + sizes.products + 1 if method == "stocbio" else 1

        def level() -> tf.data.Dataset:
            images = generator.uniform(size=(*shape, INPUTS)).astype("float32")
            labels = generator.integers(CLASSES, size=shape)
            index = np.broadcast_to(np.arange(shape[-1]), shape)
            return tf.data.Dataset.from_tensors((images, labels, index))

        return tb.pair(level(), level().repeat(draws), draws).repeat()


def mean_loss(upper: Any, lower: Any, batch: tuple) -> tf.Tensor:
    return tf.reduce_mean(tb.sparse_cross_entropy(lower(batch[0]), batch[1]))


def weighted_loss(upper: Any, lower: Any, batch: tuple) -> tf.Tensor:
    losses = tb.sparse_cross_entropy(lower(batch[0]), batch[1])
    return upper.mean(losses, batch[2])


def read(path: pathlib.Path) -> Sizes:
    return Sizes(**json.loads(path.read_text()))


if __name__ == "__main__":
    protocol.serve(Replicas, read, ("all",))
