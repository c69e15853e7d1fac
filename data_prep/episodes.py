"""Few-shot tasks sampled from classes, as a tf.data pipeline of meta-batches."""

import numpy as np
import tensorflow as tf

import tfbilevel as tb
from data_prep.classes import Classes


def episodes(
    classes: Classes,
    ways: int,
    shots: int,
    queries: int,
    tasks: int,
    seed: int,
    first: int = 0,
) -> tf.data.Dataset:
    """An endless dataset of meta-batches, starting with the `first` one.

    A task consists of `ways` classes, labelled 0, ..., ways - 1 in the order sampled.
    Each class has `shots` images for the lower level (support) and `queries` other
    images for the upper level (query). Tasks of a meta-batch have no class in common
    until the classes are used up; then all classes are used again. Meta-batch n depends
    only on the arguments and n, so a resumed run gets the same ones as an uninterrupted
    run.

    Args:
        classes: the classes to sample from; images stay uint8 in memory.
        ways, shots, queries, tasks: positive.
        seed: seed of all sampling.
        first: number of the first meta-batch.

    Returns:
        A dataset of `tb.Batches`: upper (query) and lower (support), each a pair of
        images and labels. Images are float32 in [0, 1], [tasks, ways * n, height,
        width, channels], ordered by class; labels are int32, [tasks, ways * n].

    Raises:
        ValueError: if there are too few classes, or too few images in one.
    """
    sizes = np.diff(classes.starts)
    smallest = int(sizes.argmin())
    if min(ways, shots, queries, tasks) < 1:
        raise ValueError(
            "ways, shots, queries and tasks must be at least 1, got "
            f"{ways}, {shots}, {queries}, {tasks}"
        )
    if ways > len(sizes):
        raise ValueError(
            f"--ways must not exceed the {len(sizes)} classes to draw from, got {ways}"
        )
    if shots + queries > sizes[smallest]:
        raise ValueError(
            "--shots and query images must fit in every class, got "
            f"{shots} + {queries} where {classes.names[smallest]} has "
            f"{sizes[smallest]} images"
        )
    images = tf.constant(classes.images)
    starts = tf.constant(classes.starts[:-1], tf.int32)
    counts = tf.constant(sizes, tf.int32)
    # The number of tasks without a common class; then the classes are shuffled again.
    per_shuffle = len(sizes) // ways
    shuffles = -(-tasks // per_shuffle)
    labels = tf.repeat(tf.range(ways), [shots]), tf.repeat(tf.range(ways), [queries])

    def draw(number: tf.Tensor) -> tb.Batches:
        keys = tf.random.experimental.stateless_split(
            tf.stack([tf.constant(seed, tf.int64), number]), shuffles + 1
        )
        chosen = [
            tf.random.experimental.stateless_shuffle(tf.range(len(sizes)), keys[i])
            for i in range(shuffles)
        ]
        chosen = [some[: per_shuffle * ways] for some in chosen]
        drawn = tf.concat(chosen, axis=0)[: tasks * ways]
        # The images with the largest of random numbers, one per image of the classes.
        noise = tf.random.stateless_uniform([tasks * ways, int(sizes.max())], keys[-1])
        own = tf.range(int(sizes.max())) < tf.gather(counts, drawn)[:, None]
        _, places = tf.math.top_k(tf.where(own, noise, -1.0), shots + queries)
        numbers = tf.gather(starts, drawn)[:, None] + places

        def part(these: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            flat = tf.reshape(these, [tasks, -1])
            pixels = tf.cast(tf.gather(images, flat), tf.float32) / 255
            return pixels, tf.tile(label[None], [tasks, 1])

        support = part(numbers[:, :shots], labels[0])
        query = part(numbers[:, shots:], labels[1])
        return tb.Batches(upper=query, lower=support)

    numbers = tf.data.Dataset.counter(first)
    return numbers.map(draw, tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)
