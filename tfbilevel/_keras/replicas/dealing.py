"""Batches of outer steps dealt to the replicas of a strategy, a part to each."""

from typing import Any

import tensorflow as tf

from tfbilevel._core.batches import Batches, StackedBatches
from tfbilevel._core.examples import number_of_examples, sparse_examples
from tfbilevel._core.parts import Part


def dealt(dataset: tf.data.Dataset, strategy: Any) -> Any:
    """The dataset's elements as parts, one for each replica.

    Every worker reads the whole dataset and keeps the parts of its own replicas. So the
    parts are those of the same batches only if the dataset has the same elements on all
    workers (a shuffle needs a seed).
    """
    replicas = strategy.num_replicas_in_sync
    require_enough(dataset.element_spec, replicas)

    def of_worker(context: Any) -> tf.data.Dataset:
        own = replicas // context.num_input_pipelines
        first = context.input_pipeline_id * own

        def parts(batches: Batches) -> tf.data.Dataset:
            numbers = tf.data.Dataset.range(first, first + own)
            return numbers.map(lambda number: part_of(batches, number, replicas))

        return dataset.flat_map(parts).prefetch(own)

    made = strategy.distribute_datasets_from_function(of_worker)
    # Otherwise Keras would take every part for an outer step.
    made._cardinality = dataset.cardinality().numpy()
    return made


class DealtOnce:
    """An iterator over one outer step, whose batches are parts, one for each replica.

    Args:
        batches: the batches of the step.
        strategy: the strategy.
    """

    def __init__(self, batches: Batches, strategy: Any):
        replicas = strategy.num_replicas_in_sync
        require_enough(batches, replicas)
        parts = strategy.experimental_distribute_values_from_function(
            lambda context: part_of(batches, context.replica_id_in_sync_group, replicas)
        )
        self._parts = iter([parts])
        spec = tf.nest.map_structure(_spec, parts)
        upper, lower = spec.batches
        if not _are_even(batches.upper, 0, replicas):
            upper = of_any_size(upper, 0)
        if not _are_even(batches.lower, lower_axis(batches), replicas):
            lower = of_any_size(lower, lower_axis(batches))
        self.element_spec = spec._replace(batches=type(batches)(upper, lower))

    def __iter__(self) -> "DealtOnce":
        return self

    def __next__(self) -> Any:
        return next(self._parts)


def of_any_size(specification: Any, axis: int) -> Any:
    """The specification of parts with any number of examples along an axis."""

    def unknown(spec: Any) -> Any:
        if hasattr(spec, "_value_specs"):  # one for each replica
            return type(spec)(*map(unknown, spec._value_specs))
        if not divided(spec, axis) or spec.shape.rank is None:
            return spec
        shape = _sized(spec.shape, axis, None)
        if isinstance(spec, tf.RaggedTensorSpec):
            rows = spec.ragged_rank, spec.row_splits_dtype
            return tf.RaggedTensorSpec(shape, spec.dtype, *rows)
        return type(spec)(shape, spec.dtype)

    return tf.nest.map_structure(unknown, specification)


def require_enough(batches: Any, replicas: int) -> None:
    """Raise if a replica would have no example.

    Args:
        batches: batches, or their specifications.
        replicas: the number of replicas.
    """
    levels = {"upper": (batches.upper, 0)}
    levels["lower"] = (batches.lower, lower_axis(batches))
    for name, (batch, along) in levels.items():
        shapes = [leaf.shape for leaf in divided(batch, along)]
        known = {shape[along] for shape in shapes if shape.rank is not None} - {None}
        if len(known) > 1:
            raise ValueError(
                f"The {name} batches must have the examples along axis {along} of "
                f"every tensor, to be divided among {replicas} replicas. Put data "
                "that are not of single examples into the loss, not into the batch. "
                f"Received: shapes {[tuple(shape) for shape in shapes]}"
            )
        if known and min(known) < replicas:
            raise ValueError(
                f"The {name} batches must have at least one example (or task) for "
                f"each of the {replicas} replicas: batch sizes are those of all "
                "replicas together. Make larger batches, or use fewer replicas. "
                f"Received: batches of {min(known)}"
            )


def part_of(batches: Batches, replica: Any, replicas: int) -> Part:
    """A replica's examples (or tasks): as many as the others have, or one more."""
    axis = lower_axis(batches)
    upper, upper_share, first = _slice(batches.upper, 0, replica, replicas)
    lower, lower_share, _ = _slice(batches.lower, axis, replica, replicas)
    return Part(type(batches)(upper, lower), upper_share, lower_share, first)


def lower_axis(batches: Batches) -> int:
    """The axis of the examples in lower batches."""
    return int(isinstance(batches, StackedBatches))


def divided(batch: Any, axis: int) -> list:
    """The leaves of a batch that have one entry per example."""
    leaves = [leaf for leaf in tf.nest.flatten(batch) if hasattr(leaf, "shape")]
    return [v for v in leaves if v.shape.rank is None or v.shape.rank > axis]


def _slice(batch: Any, axis: int, replica: Any, replicas: int) -> tuple:
    """The part of a batch, its share, and the number of its first example."""
    leaves = divided(batch, axis)
    if not leaves:
        nothing = tf.constant(0, tf.int64)
        return batch, tf.constant(1 / replicas, tf.float64), nothing
    count = tf.cast(number_of_examples(leaves[0], axis), tf.int64)
    enough = tf.debugging.assert_greater_equal(
        count,
        tf.constant(replicas, tf.int64),
        f"A batch must have an example for each of the {replicas} replicas.",
    )
    with tf.control_dependencies([] if enough is None else [enough]):
        replica = tf.cast(replica, tf.int64)
        begin, end = (count * r // replicas for r in (replica, replica + 1))
    mine = {id(leaf) for leaf in leaves}
    size = leaves[0].shape[axis] if _are_even(batch, axis, replicas) else None

    def own(leaf: Any) -> Any:
        if id(leaf) not in mine:
            return leaf
        part = _cut(leaf, axis, begin, end)
        if size is not None and isinstance(part, tf.Tensor):
            part = tf.ensure_shape(part, _sized(leaf.shape, axis, size // replicas))
        return part

    share = tf.cast(end - begin, tf.float64) / tf.cast(count, tf.float64)
    return tf.nest.map_structure(own, batch), share, begin


def _are_even(batch: Any, axis: int, replicas: int) -> bool:
    """Whether all parts are known to be of one size."""
    sizes = {leaf.shape[axis] for leaf in divided(batch, axis)}
    return all(size is not None and size % replicas == 0 for size in sizes)


def _sized(shape: Any, axis: int, size: int | None) -> list:
    return [size if n == axis else one for n, one in enumerate(shape)]


def _spec(leaf: Any) -> Any:
    return None if leaf is None else tf.type_spec_from_value(leaf)


def _cut(leaf: Any, axis: int, begin: Any, end: Any) -> Any:
    if isinstance(leaf, tf.SparseTensor):
        return sparse_examples(leaf, axis, begin, end - begin)
    return leaf[:, begin:end] if axis else leaf[begin:end]
