"""Datasets of outer steps that were distributed before `fit` got them."""

import copy
from collections.abc import Iterator
from typing import Any

import tensorflow as tf
from tensorflow.python.distribute import input_lib

from tfbilevel._calculus.collectives import total
from tfbilevel._core.batches import Batches, StackedBatches
from tfbilevel._core.examples import number_of_examples
from tfbilevel._core.parts import Part
from tfbilevel._keras.replicas.dealing import divided, lower_axis, of_any_size
from tfbilevel._keras.replicas.strategies import is_replicated


def is_given(x: Any) -> bool:
    """Whether this is a distributed dataset of batches."""
    distributed = isinstance(x, tf.distribute.DistributedDataset)
    return distributed and isinstance(x.element_spec, Batches)


def require_given_for(x: Any, strategy: Any) -> None:
    """Raise unless a model's replicas can take their parts from a distributed dataset.

    Args:
        x: a distributed dataset of batches.
        strategy: that of the model; `None`: it was created outside of any scope.
    """
    if x._strategy is not strategy or not is_replicated(strategy):
        raise ValueError(
            "`x` must be distributed by the strategy in whose scope the "
            "tb.BilevelModel was created, a MirroredStrategy or "
            "MultiWorkerMirroredStrategy. Create the models in this scope, or pass the "
            "tf.data.Dataset. Received: a dataset distributed by a "
            f"{type(x._strategy).__name__}, a model of "
            f"{type(strategy).__name__ if strategy else 'no strategy'}"
        )
    split = isinstance(x, input_lib.DistributedDataset)  # by TensorFlow
    if split and isinstance(x.element_spec, StackedBatches):
        raise ValueError(
            "`x` must not be distributed by experimental_distribute_dataset if "
            "`lower_batches` is above 1: TensorFlow gives each replica some of the "
            "lower batches, not some examples of each. Pass the tf.data.Dataset, "
            "which `fit` divides, or use strategy.distribute_datasets_from_function. "
            f"Received: {type(x).__name__}, lower batches of {x.element_spec.lower}"
        )


def in_steps(x: Any) -> Any:
    """The dataset with its length in outer steps, which Keras reads.

    In a dataset that was made by a function, each local replica's part is an element.
    """
    if isinstance(x, input_lib.DistributedDataset) or int(x.cardinality) < 0:
        return x
    local = len(x._strategy.extended.worker_devices)
    x = copy.copy(x)
    x._cardinality = -(-int(x.cardinality) // local)
    return x


def specification_of_part(spec: Batches) -> Batches:
    """What all parts have in common: they may be of any size.

    Args:
        spec: specifications of all local replicas' batches.
    """

    def first(leaf: Any) -> Any:
        return leaf._value_specs[0] if hasattr(leaf, "_value_specs") else leaf

    return tf.nest.map_structure(first, of_any_sizes(spec))


def of_any_sizes(spec: Batches) -> Batches:
    """The specifications of parts with any number of examples."""
    upper, lower = of_any_size(spec.upper, 0), of_any_size(spec.lower, lower_axis(spec))
    return type(spec)(upper, lower)


def local_parts(x: Any) -> Iterator[Batches]:
    """The batches of this machine's replicas."""
    for element in x:
        for replica in range(len(x._strategy.extended.worker_devices)):
            yield tf.nest.map_structure(
                lambda leaf, at=replica: x._strategy.experimental_local_results(leaf)[
                    at
                ],
                element,
            )


def part_given(batches: Batches) -> Part:
    """A replica's part, from its batches alone.

    The sizes of all parts are gathered, in one collective.
    """
    context: Any = tf.distribute.get_replica_context()
    replicas, own = context.num_replicas_in_sync, context.replica_id_in_sync_group
    counts = [_count(batches.upper, 0), _count(batches.lower, lower_axis(batches))]
    mine = tf.one_hot(own, replicas, dtype=tf.float64)[:, None] * tf.stack(counts)
    sizes = total([mine])[0]
    enough = tf.debugging.assert_positive(
        sizes,
        "Every replica must have at least one example (or task) of each level in "
        "every step, the last one of an epoch too. Make larger batches, or drop the "
        "remainder. Numbers of each replica's upper and lower examples:",
        summarize=1000,
    )
    with tf.control_dependencies([] if enough is None else [enough]):
        shares = tf.stack(counts) / tf.reduce_sum(sizes, axis=0)
    first = tf.cast(tf.cumsum(sizes[:, 0], exclusive=True)[own], tf.int64)
    return Part(batches, shares[0], shares[1], first)


def _count(batch: Any, axis: int) -> Any:
    """The number of examples; 1 if the batch is of none, the same on all replicas."""
    leaves = divided(batch, axis)
    count = number_of_examples(leaves[0], axis) if leaves else 1
    return tf.cast(count, tf.float64)
