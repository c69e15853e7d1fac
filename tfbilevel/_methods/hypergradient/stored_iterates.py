"""Iterates stored in arrays of tensors, on the device or in the host's memory."""

import contextlib
from typing import Any

import tensorflow as tf
from tensorflow.python.ops import control_flow_util

from tfbilevel._core.inner_solver import Iterate

HOST = "/device:CPU:0"


def arrays(iterate: Iterate, size: int, host: bool) -> list[tf.TensorArray]:
    """Empty arrays for `size` iterates like this one."""
    if host:
        _require_no_xla()
    with _place(host):
        return [
            tf.TensorArray(
                leaf.dtype, size, element_shape=leaf.shape, clear_after_read=False
            )
            for leaf in _stored(iterate)
        ]


def write(kept: list, index: tf.Tensor, iterate: Iterate, host: bool) -> list:
    leaves = _stored(iterate)
    with _place(host):
        if host:  # an array that is not traced would keep the device's own tensors
            leaves = [tf.identity(leaf) for leaf in leaves]
        return [a.write(index, leaf) for a, leaf in zip(kept, leaves, strict=True)]


def read(
    kept: list, index: tf.Tensor, start: Iterate, passed: Any, host: bool
) -> Iterate:
    """The stored iterate at `index`, `passed` steps after the loop's start."""
    like = (start.lower, start.optimizer.slots)
    with _place(host):
        leaves = [array.read(index) for array in kept]
    lower, slots = tf.nest.pack_sequence_as(like, leaves)
    iteration = start.optimizer.iteration
    iteration += tf.cast(passed, iteration.dtype)
    return Iterate(lower, start.optimizer._replace(iteration=iteration, slots=slots))


def _stored(iterate: Iterate) -> list[tf.Tensor]:
    """The stored part of an iterate; the rest follows from the step number."""
    return tf.nest.flatten((iterate.lower, iterate.optimizer.slots))


def _place(host: bool) -> Any:
    return tf.device(HOST) if host else contextlib.nullcontext()


def _require_no_xla() -> None:
    graph = tf.compat.v1.get_default_graph()
    within = control_flow_util.GraphOrParentsInXlaContext(graph)
    if within and not tf.executing_eagerly():
        raise ValueError(
            "`jit_compile` must be False for memory='host': XLA compiles a step for "
            "one device and would keep the iterates there. Leave it out, or use "
            "memory='checkpoint'. Received: jit_compile=True, memory='host'"
        )
