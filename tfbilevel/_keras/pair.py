"""Datasets with the batches of both levels."""

import math
from typing import Any

import tensorflow as tf

from tfbilevel._core.arguments import require_count
from tfbilevel._core.batches import Batches, StackedBatches


def pair(
    upper_dataset: tf.data.Dataset,
    lower_dataset: tf.data.Dataset,
    lower_batches: int = 1,
) -> tf.data.Dataset:
    """Zip an upper and a lower dataset into a dataset of `tb.Batches`.

    One element is the data of one outer step. The shorter dataset is repeated until
    the longer one ends; a dataset of unknown length counts as the longer one. If both
    have unknown length, neither is repeated, and the first to end ends the epoch
    (repeat it, or set its length with tf.data.experimental.assert_cardinality).

    Args:
        upper_dataset: upper batches (validation data).
        lower_dataset: lower batches (training data).
        lower_batches: n, number of lower batches in an outer step. With n > 1 the
            lower batch has a leading axis n: inner step t takes slice t, and a
            stochastic linear solve continues from there. With n = 1 every inner step
            sees the same batch.

    No example is left out. With n > 1, if the number of lower batches is not a multiple
    of n, the last step of an epoch is completed from the beginning of the next pass.
    Batches of `.batch(size)` must then all be as large as the first, so the smaller
    last one of a pass is filled up from the next pass. (`pair` reads one element to
    know the size, and none may be larger. With `.batch(size, drop_remainder=True)` it
    need not read one, and the remainder is left out.)

    Returns:
        A dataset of `tb.Batches`, with one element prefetched. Unless the options of
        one of the two say otherwise, tf.data's autotuning is off: `AUTOTUNE` means as
        many parallel calls as there are cores, and a `map` without
        `num_parallel_calls` is not made parallel.

    Raises:
        ValueError: for anything but two datasets, an empty dataset, fewer than
            `lower_batches` lower batches, or, with n > 1, lower batches that may differ
            in another axis than the first.

    Example:
        >>> validation = tf.data.Dataset.range(2)
        >>> training = tf.data.Dataset.range(10, 16)
        >>> for batches in tb.pair(validation, training, lower_batches=2):
        ...     print(int(batches.upper), batches.lower.numpy().tolist())
        0 [10, 11]
        1 [12, 13]
        0 [14, 15]
    """
    require_count(lower_batches, "lower_batches")
    for name, dataset in (
        ("upper_dataset", upper_dataset),
        ("lower_dataset", lower_dataset),
    ):
        if not isinstance(dataset, tf.data.Dataset):
            raise ValueError(
                f"`{name}` must be a tf.data.Dataset. Make one with "
                "tf.data.Dataset.from_tensors(full_batch) or "
                ".from_tensor_slices(arrays).batch(n). "
                f"Received: {name}={type(dataset)}"
            )
        if int(dataset.cardinality()) == 0:
            raise ValueError(f"`{name}` must not be empty. Received: 0 elements")
    if lower_batches > 1:
        count = int(lower_dataset.cardinality())
        if 0 <= count < lower_batches:
            raise ValueError(
                "`lower_batches` must not exceed the lower dataset's length. Repeat "
                "the dataset or take fewer. Received: "
                f"lower_batches={lower_batches} of {count}"
            )
    upper_length = _length(upper_dataset)
    lower_length = _length(lower_dataset, lower_batches)
    if upper_length < lower_length:
        upper_dataset = upper_dataset.repeat()
    again = lower_length < upper_length
    if lower_batches > 1:
        lower_dataset = _groups(lower_dataset, lower_batches, again)
        if upper_length == lower_length < math.inf:  # there may be more groups
            upper_dataset = upper_dataset.repeat()
    elif again:
        lower_dataset = lower_dataset.repeat()
    kind = StackedBatches if lower_batches > 1 else Batches
    zipped = tf.data.Dataset.zip(kind(upper=upper_dataset, lower=lower_dataset))
    return _untuned(zipped.prefetch(1))


def _groups(dataset: tf.data.Dataset, count: int, again: bool) -> tf.data.Dataset:
    """Groups of `count` batches of the same size.

    Args:
        dataset: the batches of one pass.
        count: number of batches in a group.
        again: True: repeat without end. False: one pass, with the last group completed
            from the next pass.
    """
    size = _common_size(dataset)
    length = int(dataset.cardinality())
    endless = again or length == tf.data.INFINITE_CARDINALITY
    if endless or (length >= 0 and not size):
        dataset = dataset.repeat()
        if size:
            dataset = dataset.rebatch(size, drop_remainder=True)
        groups = dataset.batch(count, drop_remainder=True)
        return groups if endless else groups.take(math.ceil(length / count))

    # Only the elements can tell where a pass ends, so they are marked.
    def marked(dataset: tf.data.Dataset, mark: bool) -> tf.data.Dataset:
        marks = tf.data.Dataset.from_tensors(mark).repeat()
        return tf.data.Dataset.zip((dataset, marks))

    def mark_each(batch: Any, mark: tf.Tensor) -> tuple:
        return batch, tf.fill([tf.shape(tf.nest.flatten(batch)[0])[0]], mark)

    marks = marked(dataset, True).concatenate(marked(dataset.repeat(), False))
    if size:
        marks = marks.map(mark_each).rebatch(size, drop_remainder=True)
    groups = marks.batch(count, drop_remainder=True)
    groups = groups.take_while(lambda *group: tf.reduce_any(group[1]))
    return groups.map(lambda *group: group[0])


def _common_size(dataset: tf.data.Dataset) -> int:
    """The number of examples in the first batch; 0 if all batches have one size."""
    nothing = tf.type_spec_from_value(None)  # TensorFlow 2.18 does not export its class
    leaves = tf.nest.flatten(dataset.element_spec)
    specs = [spec for spec in leaves if spec != nothing]
    if all(_alike(spec) for spec in specs):
        return 0
    if all(_alike(s, first=1) and s.shape.rank and s.shape[0] is None for s in specs):
        first = next(iter(dataset), None)
        if first is None:
            raise ValueError("`lower_dataset` must not be empty. Received: 0 elements")
        leaves = [v for v in tf.nest.flatten(first) if v is not None]
        sizes = {int(tf.shape(leaf)[0]) for leaf in leaves}
        if len(sizes) == 1 and sizes != {0}:
            return sizes.pop()
    raise ValueError(
        "`lower_dataset` must have batches of one shape with `lower_batches` above 1, "
        "because they are stacked. Only their first axis, that of the examples, may "
        "vary (for all parts of a batch alike). Pad them to one length, or "
        "set the shape by .map(lambda batch: tf.ensure_shape(batch, shape)). "
        f"Received: lower_dataset of {dataset.element_spec}"
    )


def _alike(spec: Any, first: int = 0) -> bool:
    """Whether the specification has the size of every axis from the `first` on."""
    if isinstance(spec, tf.RaggedTensorSpec):
        return first > 0 or spec.shape[0] is not None
    shape = getattr(spec, "shape", None)
    if shape is None or shape.rank is None:
        return False
    return shape[first:].is_fully_defined()


def _untuned(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """The dataset without tf.data's autotuning, unless its options set autotuning.

    The tuning thread sleeps for 10 ms, then twice as long each time, up to a minute,
    and an iterator is not deleted before the thread wakes (the signal to stop is sent
    before the flag that it checks is set). Fits, and epochs of a finite dataset, took
    up to twice as long.
    """
    if dataset.options().autotune.enabled is not None:
        return dataset
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def _length(dataset: tf.data.Dataset, group: int = 1) -> float:
    count = int(dataset.cardinality())
    return math.ceil(count / group) if count >= 0 else math.inf
