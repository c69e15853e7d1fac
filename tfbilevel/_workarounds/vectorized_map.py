"""`tf.vectorized_map` under XLA, where its gradient would be compiled at every call."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf


def vectorized_map(function: Callable, elements: Any) -> Any:
    """`tf.vectorized_map`, whose gradient XLA compiles once."""
    with _outside_xla():
        return tf.vectorized_map(function, elements)


@contextlib.contextmanager
def _outside_xla() -> Iterator[None]:
    """Hides from TensorFlow that XLA will compile what is traced within.

    Under XLA, `tf.vectorized_map` puts its operations into a separate function. XLA
    must know the axes of reductions at compile time, but the gradient of that function
    takes them from the function's results. XLA would then treat every argument as a
    constant and compile again at every call.
    """
    with contextlib.ExitStack() as stack:
        graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
        while graph is not None:
            stack.enter_context(graph.control_dependencies(None))
            graph = getattr(graph, "outer_graph", None)
        yield
