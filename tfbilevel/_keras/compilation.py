"""Whether an outer step is faster with XLA."""

import contextlib
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from tfbilevel._workarounds.memory_optimizer import without_memory_rewrites

ROUNDS, SECONDS = 5, 1.0  # of timing, whichever ends first
# A running XLA compilation cannot be stopped, so one that would take long is not
# started. It takes 2 to 12 ms per operation of the traced step, more for larger steps.
MOST_OPERATIONS = 4000
# The time of a step this long is spent in its kernels, which XLA does not make faster;
# in the worst case XLA takes 20 times as long and twice the memory.
LONGEST_STEP = 2.0  # seconds
PATIENCE = 3.0  # seconds before a message is printed
CONVOLUTIONS = ("Conv2D", "Conv3D", "DepthwiseConv")


@without_memory_rewrites()
def faster_with_xla(
    function: Callable, arguments: tuple, data: Any, announce: bool = False
) -> bool:
    """Whether XLA makes calls of a pure function faster than the plain graph does.

    Returns False without a trial for convolutions on a CPU (XLA's take 18 times as long
    in a small network, and minutes to compile), for functions with more than
    MOST_OPERATIONS operations (which would take minutes to compile), and for calls that
    take longer than LONGEST_STEP.

    Args:
        function: (*arguments, data) -> nest of tensors. Its results are dropped.
        arguments: the same in every call.
        data: a nest; in every timed call its entries are in a different order.
        announce: print a message if the trial takes more than PATIENCE seconds.

    Warns:
        UserWarning: if XLA fails, with the reason.
    """
    graph = tf.function(function, autograph=False)
    operations = _operations(graph.get_concrete_function(*arguments, data))
    if len(operations) > MOST_OPERATIONS:
        return False
    if _on_cpu(arguments) and any(kind.startswith(CONVOLUTIONS) for kind in operations):
        return False
    _seconds(graph, arguments, data)  # the first call includes TensorFlow's preparation
    if _seconds(graph, arguments, data) > LONGEST_STEP:
        return False
    compiled = tf.function(function, jit_compile=True, autograph=False)
    try:
        with _announced() if announce else contextlib.nullcontext():
            _seconds(compiled, arguments, data)
            return _faster(compiled, graph, arguments, data)
    except (
        Exception
    ) as error:  # of any kind: unsupported operation, out of memory, no libdevice
        lines = str(error).strip().splitlines() or ["no reason given"]
        warnings.warn(
            'jit_compile="auto" runs the outer step as a plain graph, because XLA '
            "could not compile or run it. Pass jit_compile=False to skip the trial. "
            f"Received: {type(error).__name__}: {lines[0]}",
            stacklevel=2,
        )
        return False


def _faster(compiled: Callable, graph: Callable, arguments: tuple, data: Any) -> bool:
    """Whether the fastest call of `compiled` is shorter than that of `graph`."""
    # The two alternate, so that load spikes of the machine affect both. Every call has
    # new values: where an operation must know a value at compile time (such as a
    # shape), XLA compiles again for each, and the timing must include that.
    ways = (compiled, graph)
    best = [float("inf")] * len(ways)
    start = time.perf_counter()
    for _ in range(ROUNDS):
        data = tf.nest.map_structure(_turned, data)
        for place, way in enumerate(ways):
            best[place] = min(best[place], _seconds(way, arguments, data))
        if time.perf_counter() - start > SECONDS:
            break
    return best[0] < best[1]


def _operations(function: Any) -> list[str]:
    """The types of all operations of a traced function, including those of loops."""
    definition = function.graph.as_graph_def()
    bodies = [definition.node, *(f.node_def for f in definition.library.function)]
    return [node.op for body in bodies for node in body]


def _on_cpu(arguments: tuple) -> bool:
    return all("CPU:" in leaf.device for leaf in tf.nest.flatten(arguments))


def _seconds(way: Callable, arguments: tuple, data: Any) -> float:
    """The duration of a call until its result is ready."""
    before = time.perf_counter()
    tf.nest.flatten(way(*arguments, data))[0].numpy()
    return time.perf_counter() - before


@contextlib.contextmanager
def _announced() -> Iterator[None]:
    """Prints a message for the user if the trial takes long."""
    line = (
        "XLA compiles the outer step, to see whether it is faster than the plain graph "
        "(no trial with jit_compile=True or False) ..."
    )
    timer = threading.Timer(PATIENCE, print, (line,), {"flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _turned(leaf: Any) -> Any:
    """The same entries in another order: the last one moves to the front."""
    # Sparse and ragged batches stay unchanged: they cannot be rolled.
    if not isinstance(leaf, tf.Tensor) or not leaf.shape.rank:
        return leaf
    return tf.roll(leaf, 1, axis=0)
