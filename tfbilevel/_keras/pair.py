"""Datasets with the batches of both levels."""

import functools
import math
from typing import Any

import tensorflow as tf

from tfbilevel._core.arguments import require_count
from tfbilevel._core.batches import Batches, StackedBatches
from tfbilevel._keras.arrays import Examples, examples_of
from tfbilevel._keras.index_batches import require_seed
from tfbilevel._keras.passes import Passes, Shuffled

NAMES = Batches("upper_dataset", "lower_dataset")  # of the arguments, in messages


def pair(
    upper_dataset: Any,
    lower_dataset: Any,
    lower_batches: int = 1,
    *,
    batch_size: int | tuple | None = None,
    index: bool = False,
    seed: int = 0,
    first: int = 0,
) -> tf.data.Dataset:
    """A dataset of `tb.Batches` from the data of both levels: datasets or arrays.

    One element is the data of one outer step. Two datasets are zipped: the shorter one
    is repeated until the longer one ends; a dataset of unknown length counts as the
    longer one. If both have unknown length, neither is repeated, and the first to end
    ends the epoch (repeat it, or set its length with
    tf.data.experimental.assert_cardinality).

    Arrays are NumPy arrays, pandas columns and tables, tensors, or tuples and
    dictionaries of them with as many rows each. They are shuffled again for each pass:

        order of pass p = permutation p of the seed 2 seed (upper), 2 seed + 1 (lower)

    (those of `tb.index_batches`). An epoch is one pass over the lower data. All batches
    have the same size: the last step of a pass is completed with the first examples of
    its order. The upper arrays go on in the next epoch where they stopped. (An upper
    *dataset* begins again in every epoch, so an epoch ends only when it ends too.)

    With arrays, the batches of outer step s depend on the arguments and on s alone.
    `BilevelModel.fit` starts them at the model's outer step: each epoch has other
    batches, and a resumed run the same ones as an uninterrupted run. In a loop of your
    own, `.repeat(epochs)` gives passes that differ, and `first` the step to start at.
    `map`, `prefetch` and `with_options` keep all this, other methods of the dataset
    fix the order of the first pass.

    Args:
        upper_dataset: upper batches (validation data), or arrays.
        lower_dataset: lower batches (training data), or arrays.
        lower_batches: n, number of lower batches in an outer step. With n > 1 the
            lower batch has a leading axis n: inner step t takes slice t, and a
            stochastic linear solve continues from there. With n = 1 every inner step
            sees the same batch.
        batch_size: of arrays: the number of examples in a batch, or a pair of numbers,
            (upper, lower). `None`: all examples, in their order.
        index: whether the example numbers follow the lower arrays as the last part of
            the batch, (x, y, index), for `tb.ExampleWeights`.
        seed: of the permutations of arrays, an integer.
        first: of arrays: the outer step to start at. `fit` does not use it.

    No example is left out. With n > 1, if the number of lower batches is not a multiple
    of n, the last step of an epoch is completed from the beginning of the next pass.
    Batches of `.batch(size)` must then all be as large as the first, so the smaller
    last one of a pass is filled up from the next pass. (`pair` reads one element to
    know the size, and none may be larger. With `.batch(size, drop_remainder=True)` it
    need not read one, and the remainder is left out.)

    Memory of arrays: one copy on the host, and one permutation per level.

    Returns:
        A dataset of `tb.Batches`, with one element prefetched. Unless the options of
        one of the two say otherwise, tf.data's autotuning is off: `AUTOTUNE` means as
        many parallel calls as there are cores, and a `map` without
        `num_parallel_calls` is not made parallel.

    Raises:
        ValueError: for data of another kind, no example, arrays with different numbers
            of rows, a `batch_size` above the number of examples, fewer than
            `lower_batches` lower batches, `batch_size` or `index` for a dataset, or,
            with n > 1, lower batches that may differ in another axis than the first.

    Example:
        >>> validation = tf.data.Dataset.range(2)
        >>> training = tf.data.Dataset.range(10, 16)
        >>> for batches in tb.pair(validation, training, lower_batches=2):
        ...     print(int(batches.upper), batches.lower.numpy().tolist())
        0 [10, 11]
        1 [12, 13]
        0 [14, 15]
        >>> x, y = tf.random.normal([10, 3]), tf.range(10)
        >>> batches = tb.pair((x, y), (x, y), 2, batch_size=2, index=True)
        >>> len(batches)  # 5 lower batches, 2 in a step
        3
        >>> [part.shape.as_list() for part in next(iter(batches)).lower]
        [[2, 2, 3], [2, 2], [2, 2]]
    """
    require_count(first, "first", 0)
    data = Batches(upper_dataset, lower_dataset)
    return paired(data, lower_batches, batch_size, index, seed, first, NAMES, "index")


def paired(
    data: Batches,
    lower_batches: int,
    batch_size: int | tuple | None,
    index: bool,
    seed: int,
    first: int,
    names: Batches,
    index_name: str,
) -> tf.data.Dataset:
    """`pair`, with the data of both levels and the names of arguments in messages."""
    require_count(lower_batches, "lower_batches")
    require_seed(seed)
    sizes = _sizes(batch_size, data)
    if index and isinstance(data.lower, tf.data.Dataset):
        raise ValueError(
            f"`{index_name}` needs the lower data as arrays, because a dataset's "
            "elements have no numbers. Give arrays, or number the examples yourself: "
            ".enumerate() before .batch(n). "
            f"Received: {index_name}={index!r}, {names.lower}={data.lower!r}"
        )
    upper = _level(data.upper, names.upper, sizes.upper, 2 * seed)
    lower = _level(
        data.lower,
        names.lower,
        sizes.lower,
        2 * seed + 1,
        lower_batches,
        index_name if index else None,
    )
    arrays = not any(isinstance(level, tf.data.Dataset) for level in data)
    if arrays or isinstance(upper, Shuffled) or isinstance(lower, Shuffled):
        make = functools.partial(_passes, upper, lower, lower_batches)
        return Passes(make, arrays, first)
    return _zipped(upper, lower, lower_batches)


def _sizes(batch_size: Any, data: Batches) -> Batches:
    """The batch size of each level."""
    both = isinstance(batch_size, tuple) and len(batch_size) == 2
    sizes = Batches(*batch_size) if both else Batches(batch_size, batch_size)
    for size in sizes:
        if size is not None and not isinstance(size, tuple):
            require_count(size, "batch_size")
        elif size is not None:
            raise ValueError(
                "`batch_size` must be a number, None, or a pair of them, (upper, "
                f"lower). Received: batch_size={batch_size!r}"
            )
    whole = [isinstance(level, tf.data.Dataset) for level in data]
    if any(s is not None and w for s, w in zip(sizes, whole, strict=True)) and (
        both or all(whole)
    ):
        raise ValueError(
            "`batch_size` is for arrays: a dataset has batches of its own. Give None "
            "for it, or make other batches of it with .unbatch().batch(n). "
            f"Received: batch_size={batch_size!r}"
        )
    return sizes


def _level(
    data: Any,
    name: str,
    size: int | None,
    seed: int,
    draws: int = 1,
    index_name: str | None = None,
) -> tf.data.Dataset | Shuffled:
    """A level's batches: a dataset, or shuffled batches of arrays.

    Args:
        data: a dataset, arrays, or `Examples`.
        name: the name of the argument.
        size: number of examples in a batch of arrays; `None`: all.
        seed: of the permutations.
        draws: number of batches in a step.
        index_name: the name of the argument that asked for example numbers.
    """
    if isinstance(data, tf.data.Dataset):
        count = int(data.cardinality())
        if count == 0:
            raise ValueError(f"`{name}` must not be empty. Received: 0 elements")
        _require_enough(draws, count, name)
        return data
    examples = data if isinstance(data, Examples) else examples_of(data, name)
    count = examples.count
    if size is not None and size > count:
        raise ValueError(
            f"`batch_size` must not exceed the {count} examples of `{name}`. Take "
            f"{count}, None for all of them, or one size per level: batch_size=(upper, "
            f"lower). Received: batch_size={size}"
        )
    _require_enough(draws, math.ceil(count / (size or count)), name)
    if index_name:
        examples = examples.numbered(name, f"Or leave `{index_name}` out.")
    if size is None:
        return tf.data.Dataset.from_tensors(examples.data)
    if any(isinstance(v, tf.SparseTensor) for v in tf.nest.flatten(examples.data)):
        raise ValueError(
            f"`{name}` must be dense for batches of examples. Take the full batch "
            "(batch_size=None), convert it with tf.sparse.to_dense, or make a dataset: "
            "tf.data.Dataset.from_tensor_slices(data).batch(n). Received: a sparse "
            f"tensor, batch_size={size}"
        )
    return Shuffled(examples, size, seed, draws if draws > 1 else None)


def _require_enough(draws: int, count: int, name: str) -> None:
    if draws > 1 and 0 <= count < draws:
        raise ValueError(
            f"`lower_batches` must not exceed the number of batches of `{name}`. Take "
            "fewer, make smaller batches, or repeat a dataset. "
            f"Received: lower_batches={draws} of {count}"
        )


def _passes(
    upper: tf.data.Dataset | Shuffled,
    lower: tf.data.Dataset | Shuffled,
    draws: int,
    position: Any,
    passes: int | None,
) -> tf.data.Dataset:
    """Passes over the lower data, and over an upper dataset.

    Args:
        upper, lower: the levels.
        draws: number of lower batches in a step.
        position: the first outer step.
        passes: number of passes; `None`: without end.
    """
    shuffled = isinstance(upper, Shuffled)
    endless = upper.batches(position) if shuffled else upper.repeat()
    if isinstance(lower, tf.data.Dataset):
        below = lower.repeat(passes)
        if draws > 1:
            below = _groups(below, draws, again=passes is None)
        return _joined(endless, below, draws)
    below = lower.batches(position)
    if not shuffled and _length(upper) > lower.steps:  # or unknown
        return _joined(upper.repeat(passes), below, draws)
    joined = _joined(endless, below, draws)
    return joined if passes is None else joined.take(passes * lower.steps)


def _zipped(
    upper_dataset: tf.data.Dataset, lower_dataset: tf.data.Dataset, lower_batches: int
) -> tf.data.Dataset:
    """Two datasets, the shorter one repeated until the longer one ends."""
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
    return _joined(upper_dataset, lower_dataset, lower_batches)


def _joined(
    upper: tf.data.Dataset, lower: tf.data.Dataset, draws: int
) -> tf.data.Dataset:
    """The batches of both levels, step by step, until one of them ends."""
    kind = StackedBatches if draws > 1 else Batches
    zipped = tf.data.Dataset.zip(kind(upper=upper, lower=lower))
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
