"""The data of one outer step."""

from typing import Any, NamedTuple

import tensorflow as tf

from tfbilevel._calculus.aliases import Nest


class Batches(NamedTuple):
    """The data of one outer step, with names so that the levels cannot be swapped.

    Attributes:
        upper: the batch that `upper_loss` receives (validation data).
        lower: the batch that `lower_loss` receives (training data).
    """

    upper: Nest
    lower: Nest

    def lower_at(self, draw: Any) -> Any:
        """The lower batch with number `draw` (the inner step); here always the same."""
        del draw
        return self.lower


class StackedBatches(Batches):
    """Batches whose lower part has a leading axis, with one slice per lower batch.

    Inner step t takes slice t, and a stochastic linear solve continues after the last
    inner step. Numbers beyond the last slice start again at the first. Leaves may be
    sparse if their entries are sorted, as in datasets.

    Attributes:
        upper: data of the upper loss.
        lower: data of the lower loss, every leaf [lower batches, ...].
    """

    __slots__ = ()

    def lower_at(self, draw: Any) -> Any:
        leaves = [leaf for leaf in tf.nest.flatten(self.lower) if leaf is not None]
        if not leaves:
            return self.lower
        count = tf.shape(leaves[0])[0]
        index = tf.math.floormod(tf.cast(draw, tf.int32), count)
        return tf.nest.map_structure(lambda leaf: _slice(leaf, index), self.lower)


def count_lower(batches: Batches) -> Any:
    """The number of lower batches, a tensor if it is not static."""
    leaves = [leaf for leaf in tf.nest.flatten(batches.lower) if leaf is not None]
    if not isinstance(batches, StackedBatches) or not leaves:
        return 1
    known = leaves[0].shape[0]
    return tf.shape(leaves[0])[0] if known is None else known


def successive_lower(batches: Batches, first: Any, count: int) -> Any:
    """The lower batches first, ..., first + count - 1, as a lower part of the same kind
    of batches."""
    if not isinstance(batches, StackedBatches):
        return batches.lower
    taken = [batches.lower_at(first + number) for number in range(count)]

    def together(*leaves: Any) -> Any:
        if leaves[0] is None:
            return None
        if isinstance(leaves[0], tf.SparseTensor):
            return tf.sparse.concat(0, [tf.sparse.expand_dims(v, 0) for v in leaves])
        return tf.stack(leaves)

    return tf.nest.map_structure(together, *taken)


def _slice(leaf: Any, index: tf.Tensor) -> Any:
    """leaf[index] along the first axis of a dense, ragged or sparse tensor."""
    if leaf is None:
        return None
    if not isinstance(leaf, tf.SparseTensor):
        return tf.gather(leaf, index)
    # The slice's entries are contiguous; `tf.sparse.slice` would read all entries.
    index = tf.cast(index, tf.int64)
    begin, end = (_first_entry(leaf.indices, number) for number in (index, index + 1))
    made = tf.SparseTensor(
        leaf.indices[begin:end, 1:], leaf.values[begin:end], leaf.dense_shape[1:]
    )
    made.set_shape(leaf.shape[1:])
    return made


def _first_entry(indices: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
    """The position of the first entry of slice `number`, searched on a coarse grid and
    then between two grid points, so that no long column is copied."""
    stride = 1024
    before = tf.searchsorted(indices[::stride, 0], number[None], out_type=tf.int64)[0]
    first = tf.maximum(before - 1, 0) * stride
    near = indices[first : first + stride, 0]
    return first + tf.searchsorted(near, number[None], out_type=tf.int64)[0]


def require_batches(batches: Any, name: str = "`batches`") -> None:
    """Raise unless `batches` is a `tb.Batches`."""
    if not isinstance(batches, Batches):
        raise ValueError(
            f"{name} must be tb.Batches(upper=..., lower=...), so that the levels "
            "cannot be swapped. Build it by name, or make a dataset of them with "
            f"tb.pair(upper_dataset, lower_dataset). Received: {type(batches)}"
        )


def count_tasks(batches: Batches) -> Any:
    """The number of tasks in the batches, a tensor if it is not static."""
    require_dense(batches)
    axis = int(isinstance(batches, StackedBatches))
    for part, where in ((batches.upper, 0), (batches.lower, axis)):
        for leaf in tf.nest.flatten(part):
            if leaf is None:
                continue
            leaf = tf.convert_to_tensor(leaf)
            if leaf.shape.rank is not None and leaf.shape.rank > where:
                known = leaf.shape[where]
                return tf.shape(leaf)[where] if known is None else known
    raise ValueError(
        "`batches` must carry the tasks along a leading axis of every tensor. Stack "
        f"each task's data. Received: {batches!r}"
    )


def apart(batches: Batches) -> tuple[Any, Any]:
    """The upper and the lower batches with the tasks along the first axis."""
    require_dense(batches)
    stacked = isinstance(batches, StackedBatches)
    return batches.upper, _swapped(batches.lower) if stacked else batches.lower


def together(upper: Nest, lower: Nest, like: Batches) -> Batches:
    """The inverse of `apart`."""
    stacked = isinstance(like, StackedBatches)
    return type(like)(upper, _swapped(lower) if stacked else lower)


def first_task(batches: Batches) -> Batches:
    """The batches of the first task only."""

    def first(leaf: Any) -> Any:
        return None if leaf is None else leaf[0]

    return type(batches)(*tf.nest.map_structure(first, apart(batches)))


def require_dense(tasks: Any) -> None:
    """Raise if a leaf is sparse, because it cannot be split into tasks."""
    if any(isinstance(leaf, tf.SparseTensor) for leaf in tf.nest.flatten(tasks)):
        raise ValueError(
            "The batches of `tb.over_tasks` must be dense: tasks are split along the "
            "leading axis. Convert them with tf.sparse.to_dense. "
            f"Received: {tasks!r}"
        )


def _swapped(batch: Nest) -> Any:
    """The batch with its two leading axes (lower batches and tasks) exchanged."""

    def swap(leaf: Any) -> Any:
        if leaf is None:
            return None
        leaf = tf.convert_to_tensor(leaf)
        return tf.transpose(leaf, [1, 0, *range(2, leaf.shape.rank)])

    return tf.nest.map_structure(swap, batch)
