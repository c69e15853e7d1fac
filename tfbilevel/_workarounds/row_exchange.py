"""One row of a large table read and replaced, in a loop without a copy of the table."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import tensorflow as tf
from tensorflow.python.ops import control_flow_util
from tensorflow.python.ops.control_flow_v2_func_graphs import (
    CondBranchFuncGraph,
    WhileBodyFuncGraph,
)

_in_loop = contextvars.ContextVar("_in_loop", default=False)


@contextlib.contextmanager
def called_in_loop() -> Iterator[None]:
    """Says of a function that is traced within, or decorated by it, that a loop calls
    it with what the loop carries."""
    token = _in_loop.set(True)
    try:
        yield
    finally:
        _in_loop.reset(token)


def exchanged(tables: Any, number: tf.Tensor, rows: Any) -> tuple[Any, Any]:
    """The former rows of that number, and the tables with other ones there.

    Tables that a loop carries, and that have no other use in it, are changed in place.
    `tf.gather` and `tf.tensor_scatter_nd_update` would copy them in every turn. Without
    XLA the second one always does in a loop. XLA reads a row again in every operation
    that needs it, also after it has been replaced, and so it keeps the former table.

    Args:
        tables: a nest of tensors with a leading axis.
        number: an index into all these axes, an integer scalar.
        rows: a nest like `tables`, without that axis.
    """
    graph = tf.compat.v1.get_default_graph()
    if not (_in_loop.get() or _is_body(graph)):
        return _read(tables, number), _replaced(_scattered, tables, number, rows)
    if control_flow_util.GraphOrParentsInXlaContext(graph):
        former, number = _read_once(tables, number)
        return former, _replaced(_scattered, tables, number, rows)
    former = _read(tables, number)
    with tf.control_dependencies(tf.nest.flatten(former)):
        return former, _replaced(_assigned, tables, number, rows)


def _is_body(graph: Any) -> bool:
    """Whether it is the body of a loop, or a branch in one.

    A function that a loop calls is none: what it is given belongs to the caller.
    """
    while isinstance(graph, CondBranchFuncGraph):
        graph = graph.outer_graph
    return isinstance(graph, WhileBodyFuncGraph)


def _read(tables: Any, number: tf.Tensor) -> Any:
    return tf.nest.map_structure(lambda table: tf.gather(table, number), tables)


def _read_once(tables: Any, number: tf.Tensor) -> tuple[Any, tf.Tensor]:
    """The rows, read in a loop of one turn, and the number, which waits for it.

    XLA does not know how often that loop turns, so it keeps it, and what needs a row
    has it from there.
    """
    empty = tf.nest.map_structure(lambda t: tf.zeros(t.shape[1:], t.dtype), tables)
    after, rows = tf.while_loop(
        lambda i, _: i <= number,
        lambda i, _: (i + 1, _read(tables, i)),
        (number, empty),
    )
    return rows, after - 1


def _replaced(replace: Any, tables: Any, number: tf.Tensor, rows: Any) -> Any:
    return tf.nest.map_structure(lambda t, row: replace(t, number, row), tables, rows)


def _scattered(table: tf.Tensor, number: tf.Tensor, row: tf.Tensor) -> tf.Tensor:
    return tf.tensor_scatter_nd_update(table, number[None, None], row[None])


def _assigned(table: tf.Tensor, number: tf.Tensor, row: tf.Tensor) -> tf.Tensor:
    """XLA has it for constant numbers alone."""
    begin = number[None]
    return tf.raw_ops.TensorStridedSliceUpdate(
        input=table,
        begin=begin,
        end=begin + 1,
        strides=tf.ones_like(begin),
        value=row[None],
    )
