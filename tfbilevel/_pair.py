"""Datasets of both levels' batches."""

import tensorflow as tf

from tfbilevel._arguments import require_count
from tfbilevel._problem import Batches, StackedBatches


def pair(
    upper_dataset: tf.data.Dataset,
    lower_dataset: tf.data.Dataset,
    lower_batches: int = 1,
) -> tf.data.Dataset:
    """Zip an upper and a lower dataset into a dataset of `tb.Batches`.

    One element is the data of one outer step. The shorter dataset is repeated until
    the longer one ends; a dataset of unknown length counts as the longer one. Of two of
    unknown length none is repeated: what ends first ends the epoch (repeat it, or tell
    its length by tf.data.experimental.assert_cardinality).

    Args:
        upper_dataset: upper batches (validation data).
        lower_dataset: lower batches (training data).
        lower_batches: n, how many lower batches an outer step takes. With n > 1 the
            lower batch has a leading axis n: inner step t takes slice t, a
            stochastic linear solve goes on from there; a pass over a dataset that is
            not repeated ends with the last n. All lower batches must then have one
            shape: .batch(size, drop_remainder=True). With n = 1 every inner step sees
            the same batch.

    Returns:
        A dataset of `tb.Batches`, one element prefetched. Unless one of the two says
        otherwise in its options, tf.data does not tune it: `AUTOTUNE` means as many
        calls at once as there are cores, and a `map` without `num_parallel_calls` is
        not made parallel.

    Raises:
        ValueError: for anything but two datasets, an empty dataset, or fewer than
            `lower_batches` lower batches.

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
    kind = Batches
    if lower_batches > 1:
        count = int(lower_dataset.cardinality())
        if 0 <= count < lower_batches:
            raise ValueError(
                "`lower_batches` must not exceed the lower dataset's length. Repeat "
                "the dataset or take fewer. Received: "
                f"lower_batches={lower_batches} of {count}"
            )
        kind = StackedBatches
    upper_length = _length(upper_dataset)
    lower_length = _length(lower_dataset, lower_batches)
    if upper_length < lower_length:
        upper_dataset = upper_dataset.repeat()
    elif lower_length < upper_length:
        lower_dataset = lower_dataset.repeat()
    if lower_batches > 1:  # after repeating: none is left out at the end of a pass
        lower_dataset = lower_dataset.batch(lower_batches, drop_remainder=True)
    zipped = tf.data.Dataset.zip(kind(upper=upper_dataset, lower=lower_dataset))
    return _untuned(zipped.prefetch(1))


def _untuned(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """The dataset without tf.data's autotuning, unless its owner has decided.

    The thread that tunes sleeps for 10 ms, then for twice as long each time, up to a
    minute, and an iterator is not deleted before it wakes (the signal to stop is sent
    before the flag is set that it looks for): fits and epochs of a finite dataset took
    up to twice their time.
    """
    if dataset.options().autotune.enabled is not None:
        return dataset
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def _length(dataset: tf.data.Dataset, group: int = 1) -> float:
    count = int(dataset.cardinality())
    return float(count // group) if count >= 0 else float("inf")
