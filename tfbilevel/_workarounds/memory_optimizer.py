"""Compiled outer loops run without Grappler's memory optimizer, which breaks them."""

import contextlib
from collections.abc import Iterator

import tensorflow as tf
from tensorflow.python.eager import context

NO_MEMORY_OPTIMIZATION = 1  # a value of RewriterConfig.MemOptType


@contextlib.contextmanager
def without_memory_rewrites() -> Iterator[None]:
    """Functions called within are compiled without Grappler's memory optimizer.

    Where it estimates that more than about 200 MB are in use, it rewrites a sum of
    three or more tensors as a temporary variable to which they are added one by one.
    If one of these tensors does not change in a loop, the variable is created once more
    than it is destroyed, and the next run of that loop (in another outer step or call)
    fails with AlreadyExistsError (tensorflow/tensorflow#23780).
    """
    eager = context.context()
    before = eager.function_call_options
    config = tf.compat.v1.ConfigProto.FromString(before.config_proto_serialized)
    config.graph_options.rewrite_options.memory_optimization = NO_MEMORY_OPTIMIZATION
    eager.function_call_options = context.FunctionCallOptions(
        executor_type=before.executor_type, config_proto=config
    )
    try:
        yield
    finally:
        eager.function_call_options = before
