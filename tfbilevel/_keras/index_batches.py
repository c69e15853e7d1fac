"""Shuffled batches of example indices, which can start at any batch."""

import numbers
from typing import Any

import tensorflow as tf

from tfbilevel._core.arguments import require_count


def index_batches(
    count: int, size: int, seed: int = 0, first: int = 0
) -> tf.data.Dataset:
    """An endless dataset of batches of example indices, which a run can resume.

        permutation p of 0, ..., count - 1 = shuffle(seed, p),    p = 0, 1, 2, ...
        batch n = entries n' * size, ..., (n' + 1) * size - 1 of permutation p,
        p, n' = divmod(n, count // size)

    The last entries of a permutation that do not fill a batch are left out. The next
    permutation is shuffled anew. Batch n depends only on the arguments and on n, so a
    run that starts at batch `first` gets the same batches as an uninterrupted one.
    (`Dataset.shuffle` cannot start at a given batch.) Memory: one permutation, 4 bytes
    per example.

    The batches hold indices and no data: look up the examples in `map`, as below, and
    call `tb.ExampleWeights` with the indices.

    Args:
        count: number of examples, at least 1.
        size: number of examples in a batch, from 1 to `count`.
        seed: an integer; different seeds give different permutations.
        first: number of the first batch. To resume, pass `model.outer_step` times the
            number of lower batches per outer step.

    Returns:
        A `tf.data.Dataset` of int32 tensors [size]. It has no end: pass
        `steps_per_epoch` to `fit`.

    Raises:
        ValueError: for a `count` or `size` below 1, a `size` above `count`, a
            negative `first`, or a `seed` that is not an integer.

    Example:
        >>> x, y = tf.range(10.0), tf.range(10)
        >>> def gather(index):
        ...     return tf.gather(x, index), tf.gather(y, index), index
        >>> batches = tb.index_batches(len(x), 4, seed=1).map(gather)
        >>> through = [index.numpy().tolist() for _, _, index in batches.take(3)]
        >>> sorted(through[0] + through[1])[:3]  # 8 different ones of 10
        [0, 1, 2]
        >>> resumed = next(iter(tb.index_batches(10, 4, seed=1, first=2)))
        >>> resumed.numpy().tolist() == through[2]
        True
    """
    require_count(count, "count")
    require_count(size, "size")
    require_count(first, "first", 0)
    require_seed(seed)
    if size > count:
        raise ValueError(
            "`size` must be from 1 to `count`. Use smaller batches or more examples. "
            f"Received: size={size}, count={count}"
        )
    per_permutation = count // size
    permutations, rest = divmod(first, per_permutation)

    def batches(number: tf.Tensor) -> Any:
        order = permutation(count, seed, number)[: per_permutation * size]
        return tf.data.Dataset.from_tensor_slices(tf.reshape(order, [-1, size]))

    return tf.data.Dataset.counter(permutations).flat_map(batches).skip(rest)


def permutation(count: int, seed: int, number: tf.Tensor) -> tf.Tensor:
    """Permutation `number` of 0, ..., count - 1; the number is an int64 scalar."""
    key = tf.stack([tf.constant(seed, tf.int64), number])
    return tf.random.experimental.stateless_shuffle(tf.range(count), key)


def require_seed(seed: Any) -> None:
    """Raise unless the seed is an integer."""
    if not isinstance(seed, numbers.Integral) or isinstance(seed, bool):
        raise ValueError(f"`seed` must be an integer. Received: seed={seed!r}")
