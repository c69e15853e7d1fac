"""A function of one task applied to many: vectorized, sequentially or unrolled."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfbilevel._calculus.aliases import Nest
from tfbilevel._calculus.derivatives import require_scalar
from tfbilevel._core.batches import require_dense
from tfbilevel._core.loss import Loss
from tfbilevel._workarounds import right_derivatives
from tfbilevel._workarounds.vectorized_map import vectorized_map

# Sequential tasks overlap a little: the next starts during the last operations of one.
OVERLAPPED = 2


def mapped_loss(loss: Loss, sequential: Callable[[Any], bool]) -> Loss:
    """One task's loss, evaluated for every task.

    Args:
        loss: (x, y, batch) -> scalar, of one task.
        sequential: stacked y -> whether tasks run one after the other.
    """

    def each(x: Nest, y: Nest, batch: Nest) -> tf.Tensor:
        batch = of_same_tasks({"lower variables": y, "batch": batch})["batch"]
        dtype = tf.nest.flatten(y)[0].dtype

        def one(task: tuple) -> tf.Tensor:
            # Also here, because the trace below is kept and reused outside the context.
            with right_derivatives():
                value = require_scalar(loss(x, task[0], task[1]))
            return tf.cast(value, dtype)

        if not sequential(y):
            return map_tasks(one, (y, batch))
        return map_tasks(one, (y, batch), tf.TensorSpec([], dtype))

    # Eagerly the mapping would be traced at every call, which takes 0.3 seconds.
    traced = tf.function(each, autograph=False)

    def mapped(x: Nest, y: Nest, batch: Nest) -> Any:
        return (traced if tf.executing_eagerly() else each)(x, y, batch)

    return mapped


def of_same_tasks(named: dict[str, Any]) -> dict[str, Any]:
    """The nests, after a check that all have the same number of tasks.

    Unknown numbers are checked when the graph runs. Without the check, TensorFlow's
    mappings would repeat a single entry, or silently ignore surplus entries.

    Args:
        named: nests with the tasks along the leading axis, by the names used in errors.
    """
    require_dense(named)
    named = tf.nest.map_structure(
        lambda leaf: None if leaf is None else tf.convert_to_tensor(leaf), named
    )
    leaves = {
        name: [v for v in tf.nest.flatten(nest) if v is not None and v.shape.rank]
        for name, nest in named.items()
    }
    known = {
        name: [leaf.shape[0] for leaf in some if leaf.shape[0] is not None]
        for name, some in leaves.items()
    }
    counts = {count for some in known.values() for count in some}
    if len(counts) > 1:
        raise ValueError(
            "The lower variables and the batches of `tb.over_tasks` must carry the "
            "same tasks along the leading axis of every tensor. Stack one entry per "
            f"task. Received: {known}"
        )
    every = [leaf for some in leaves.values() for leaf in some]
    if not every:
        return named
    tasks = counts.pop() if counts else tf.shape(every[0])[0]

    def checked(leaf: Any) -> Any:
        if leaf is None or not leaf.shape.rank or leaf.shape[0] is not None:
            return leaf
        if isinstance(tasks, int):
            return tf.ensure_shape(leaf, [tasks, *leaf.shape[1:]])
        # XLA drops assertions, and TensorFlow's graphs drop a reshape to the same rank.
        count, *rest = tf.unstack(tf.shape(leaf))
        error = "The batches of `tb.over_tasks` must carry the same tasks."
        tf.debugging.assert_equal(count, tasks, error)
        return tf.ensure_shape(tf.reshape(leaf, [tasks, *rest]), leaf.shape)

    return tf.nest.map_structure(checked, named)


def map_tasks(function: Callable, tasks: Any, specs: Any = None) -> Any:
    """A function applied to every entry of the leading axis that all leaves share.

    Args:
        function: nest -> nest of tensors. `None` leaves are passed unchanged.
        tasks: a nest with the leading axis.
        specs: the specification of the function's result, a nest of `tf.TensorSpec`,
            to run one entry after the other; `None`: all at once.
    """
    require_dense(tasks)
    leaves = tf.nest.flatten(tasks)
    present = [index for index, leaf in enumerate(leaves) if leaf is not None]

    def entry(parts: list) -> Any:
        whole: list[Any] = [None] * len(leaves)
        for index, part in zip(present, parts, strict=True):
            whole[index] = part
        return function(tf.nest.pack_sequence_as(tasks, whole))

    stacked = [tf.convert_to_tensor(leaves[index]) for index in present]
    if specs is None:
        return vectorized_map(entry, stacked)
    return tf.map_fn(
        entry, stacked, fn_output_signature=specs, parallel_iterations=OVERLAPPED
    )


def map_sequentially(function: Callable, tasks: Any) -> Any:
    """`map_tasks` for one entry after the other, with the result's specification traced
    first."""
    traced, specs = _outcome(function, tasks)
    return map_tasks(traced, tasks, specs)


def map_unrolled(function: Callable, tasks: Any) -> Any:
    """`map_tasks` as an unrolled loop: the function is traced for every task.

    Args:
        function: nest -> nest of tensors. `None` leaves are passed unchanged.
        tasks: a nest with a leading axis of known length.
    """
    leaves = [None if v is None else tf.unstack(v) for v in tf.nest.flatten(tasks)]
    count = max(len(leaf) for leaf in leaves if leaf is not None)
    rows = [
        function(
            tf.nest.pack_sequence_as(tasks, [v if v is None else v[i] for v in leaves])
        )
        for i in range(count)
    ]
    return tf.nest.map_structure(
        lambda *row: None if row[0] is None else tf.stack(row), *rows
    )


def _outcome(function: Callable, tasks: Any) -> tuple[Callable, Any]:
    """The function traced for one task, and the specification of its result."""

    def spec(leaf: Any) -> Any:
        if leaf is None:
            return None
        leaf = tf.convert_to_tensor(leaf)
        return tf.TensorSpec(leaf.shape[1:], leaf.dtype)

    one = tf.nest.map_structure(spec, tasks)
    traced = tf.function(function, autograph=False)
    made = traced.get_concrete_function(one).structured_outputs
    specs = tf.nest.map_structure(lambda t: tf.TensorSpec(t.shape, t.dtype), made)
    return traced, specs
