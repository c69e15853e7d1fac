"""How TensorFlow runs the compiled outer loops."""

import contextlib
from collections.abc import Iterator

import tensorflow as tf
from tensorflow.python.eager import context

NO_MEMORY_OPTIMIZATION = 1  # of the proto's RewriterConfig.MemOptType


@contextlib.contextmanager
def without_memory_rewrites() -> Iterator[None]:
    """Functions called within are compiled without Grappler's memory optimizer.

    Where it believes that more than some 200 MB are alive, it makes of a sum of three
    and more tensors a temporary variable, to which they are added one after the other.
    In a loop the variable is made once more than it is used if one of them does not
    change in the loop, and the next run of that loop, in another outer step or call,
    ends with AlreadyExistsError (tensorflow/tensorflow#23780).
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
