"""Few-shot tasks sampled from classes, as a tf.data pipeline of meta-batches."""

import numpy as np
import tensorflow as tf

import tfbilevel as tb
from data_prep.classes import Classes
from tfbilevel._jobs.few_shot.episodes import labels, sampler


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

    The tasks are those of the library's `sampler`, which `tb.FewShotLearner` uses:
    `shots` images of each class are for the lower level (support), `queries` others for
    the upper level (query).

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
    sample = sampler(sizes, ways, shots, queries, tasks, seed)

    def batches(number: tf.Tensor) -> tb.Batches:
        def part(places: tf.Tensor, each: int) -> tuple[tf.Tensor, tf.Tensor]:
            pixels = tf.cast(tf.gather(images, places), tf.float32) / 255
            return pixels, labels(ways, each, tasks)

        support, query = sample(number)
        return tb.Batches(upper=part(query, queries), lower=part(support, shots))

    numbers = tf.data.Dataset.counter(first)
    return numbers.map(batches, tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)
