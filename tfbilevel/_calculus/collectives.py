"""Sums over the replicas of a tf.distribute strategy, with derivatives of every order.

A value that all replicas have alike is one vector. Values that each replica has for
itself are the parts of a longer vector. `spread` copies the first kind to the second,
`total` sums the second kind to the first. Each is the other's transpose, and is defined
as the other's derivative.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import tensorflow as tf


def several_replicas() -> bool:
    """Whether this is computed on one of several replicas."""
    context = tf.distribute.get_replica_context()
    return context is not None and context.num_replicas_in_sync > 1


class _ThreadState(threading.local):
    """Whether this thread, a replica, evaluates losses whose values nobody reads."""

    unread = False


_here = _ThreadState()


@contextlib.contextmanager
def unread_losses() -> Iterator[None]:
    """A context for losses that are only differentiated: `total_loss` does not sum.

    TensorFlow keeps a sum over replicas that nobody reads.
    """
    before, _here.unread = _here.unread, True
    try:
        yield
    finally:
        _here.unread = before


def total_loss(own: Any) -> Any:
    """The sum over replicas of each replica's own loss.

    In `unread_losses` it is the replica's own one, which has the same derivatives: the
    derivative of a sum in each of its terms is one.
    """
    return own if _here.unread else total(own)


def spread(values: Any) -> Any:
    """The same values as each replica's own: their derivatives are summed.

    Args:
        values: a nest of tensors, alike on all replicas.
    """
    leaves = tf.nest.flatten(values)
    return tf.nest.pack_sequence_as(values, _spread(*leaves)) if leaves else values


def total(values: Any) -> Any:
    """The sums over replicas of each replica's own values.

    One collective for all tensors of one dtype.

    Args:
        values: a nest of tensors.
    """
    leaves = tf.nest.flatten(values)
    return tf.nest.pack_sequence_as(values, _total(*leaves)) if leaves else values


@tf.custom_gradient
def _spread(*leaves: tf.Tensor) -> tuple:
    def upstream(*gradients: Any) -> Any:
        return _total(*_dense(gradients))

    return [tf.identity(leaf) for leaf in leaves], upstream


@tf.custom_gradient
def _total(*leaves: tf.Tensor) -> tuple:
    def upstream(*gradients: Any) -> Any:
        return _spread(*_dense(gradients))

    return _sums(leaves), upstream


def _dense(gradients: tuple) -> list:
    # Gradients of gathers are IndexedSlices, whose rows differ between replicas.
    return [tf.convert_to_tensor(gradient) for gradient in gradients]


def _sums(leaves: tuple) -> list:
    if not several_replicas():
        return [tf.identity(leaf) for leaf in leaves]
    sums: list = [None] * len(leaves)
    for dtype in dict.fromkeys(leaf.dtype for leaf in leaves):
        places = [i for i, leaf in enumerate(leaves) if leaf.dtype == dtype]
        made = _collective([leaves[i] for i in places])
        for i, value in zip(places, made, strict=True):
            value.set_shape(leaves[i].shape)
            sums[i] = value
    return sums


def _collective(leaves: list) -> list:
    """The sums of tensors of one dtype."""
    context = tf.distribute.get_replica_context()
    reduction = tf.distribute.ReduceOp.SUM
    if tf.executing_eagerly():
        return context.all_reduce(reduction, leaves)
    # The public call waits for the Python code of the other replicas, which TensorFlow
    # refuses within loops. This is the collective that it ends in.
    extended = context.strategy.extended
    launchers = getattr(extended, "_collective_ops", None) or extended._cross_device_ops
    options = tf.distribute.experimental.CommunicationOptions()
    return launchers._all_reduce(reduction, leaves, context._replica_id, options)


def apart(function: Any) -> Any:
    """The function as a graph of its own on this replica, in a graph for all of them.

    A collective in a loop finds its partners by the loop's name. Two loops in one graph
    have different names, and would wait for each other for ever.
    """
    return tf.function(
        function, autograph=False, experimental_attributes={"_noinline": True}
    )
