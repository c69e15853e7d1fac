"""Few-shot tasks sampled from classes, one meta-batch per number."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfbilevel._core.arguments import require_count
from tfbilevel._core.batches import Batches


class Sizes(NamedTuple):
    """The numbers of classes, and of examples of each, in a task."""

    ways: int
    shots: int
    queries: int


def sizes_of(ways: int, shots: int, queries: int) -> Sizes:
    """The numbers, checked."""
    require_count(ways, "ways", 2)
    require_count(shots, "shots")
    require_count(queries, "queries")
    return Sizes(ways, shots, queries)


def sampler(
    counts: np.ndarray, ways: int, shots: int, queries: int, tasks: int, seed: int
) -> Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]:
    """A function: number of a meta-batch -> which examples it consists of.

    A task consists of `ways` classes, labelled 0, ..., ways - 1 in the order sampled.
    Each class has `shots` examples for the support set and `queries` others for the
    query set. Tasks of a meta-batch have no class in common until the classes are used
    up; then all classes are used again. A meta-batch depends only on the arguments and
    its number, so a resumed run gets the same ones as an uninterrupted run.

    Args:
        counts: the number of examples of every class, each at least shots + queries.
            The examples are ordered by class.
        ways, shots, queries, tasks: positive; `ways` at most the number of classes.
        seed: seed of all sampling.

    Returns:
        int64 scalar -> the places of the support examples, int32 [tasks, ways * shots],
        and of the query examples, [tasks, ways * queries], both ordered by class.
    """
    count, most = len(counts), int(counts.max())
    starts = tf.constant(np.cumsum(counts) - counts, tf.int32)
    known = tf.constant(counts, tf.int32)
    # The number of tasks without a common class; then the classes are shuffled again.
    per_shuffle = count // ways
    shuffles = -(-tasks // per_shuffle)

    def sample(number: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        keys = tf.random.experimental.stateless_split(
            tf.stack([tf.constant(seed, tf.int64), number]), shuffles + 1
        )
        chosen = [
            tf.random.experimental.stateless_shuffle(tf.range(count), keys[i])
            for i in range(shuffles)
        ]
        chosen = [some[: per_shuffle * ways] for some in chosen]
        sampled = tf.concat(chosen, axis=0)[: tasks * ways]
        # The examples with the largest of random numbers, one per example of the class.
        noise = tf.random.stateless_uniform([tasks * ways, most], keys[-1])
        own = tf.range(most) < tf.gather(known, sampled)[:, None]
        _, places = tf.math.top_k(tf.where(own, noise, -1.0), shots + queries)
        numbers = tf.gather(starts, sampled)[:, None] + places
        support, query = numbers[:, :shots], numbers[:, shots:]
        return (
            tf.reshape(support, [tasks, ways * shots]),
            tf.reshape(query, [tasks, ways * queries]),
        )

    return sample


def labels(ways: int, each: int, tasks: int) -> tf.Tensor:
    """The labels of `each` examples of every class, int32 [tasks, ways * each]."""
    return tf.tile(tf.repeat(tf.range(ways), [each])[None], [tasks, 1])


def meta_batches(
    x: np.ndarray,
    counts: np.ndarray,
    sizes: Sizes,
    tasks: int,
    seed: int,
    first: Callable[[], Iterator],
    dtype: Any,
) -> tf.data.Dataset:
    """Endless meta-batches of tasks, as `Tasks` takes them.

    Args:
        x: the examples, ordered by class.
        counts: the number of examples of every class.
        sizes: of a task.
        tasks: tasks of a meta-batch.
        seed: seed of all sampling.
        first: () -> the numbers of the meta-batches; called when one iterates.
        dtype: of the examples in a batch.
    """
    ways, shots, queries = sizes
    sample = sampler(counts, ways, shots, queries, tasks, seed)
    examples = tf.constant(x)
    known, asked = labels(ways, shots, tasks), labels(ways, queries, tasks)

    def batches(number: tf.Tensor) -> Batches:
        support, query = (
            tf.cast(tf.gather(examples, places), dtype) for places in sample(number)
        )
        return Batches(upper=(query, asked, support), lower=(support, known))

    spec = tf.TensorSpec([], tf.int64)
    numbers = tf.data.Dataset.from_generator(first, output_signature=spec)
    return numbers.map(batches, tf.data.AUTOTUNE).prefetch(2)
