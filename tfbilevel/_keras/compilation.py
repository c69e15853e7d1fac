"""Which way of compiling an outer step is the faster one."""

import contextlib
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from tfbilevel._workarounds.memory_optimizer import without_memory_rewrites

ROUNDS, SECONDS = 5, 1.0  # of timing: whichever is over first
# Nothing can stop XLA once it compiles, so what would take long is not tried. It takes
# 2 to 12 ms per operation of the traced step, the slower the more there are.
MOST_OPERATIONS = 4000
# Where a step takes so long its kernels do, which XLA does not make faster; on a bad
# day it takes 20 times as long, and twice the memory.
LONGEST_STEP = 2.0  # seconds
PATIENCE = 3.0  # seconds until a word is said
CONVOLUTIONS = ("Conv2D", "Conv3D", "DepthwiseConv")


@without_memory_rewrites()
def faster_with_xla(
    function: Callable, arguments: tuple, data: Any, announce: bool = False
) -> bool:
    """Whether XLA makes calls of a pure function faster than the plain graph does.

    Not, without a trial: convolutions on a CPU (XLA's take 18 times as long in a small
    network, and minutes to compile), functions of more than MOST_OPERATIONS operations
    (they would take minutes to compile), and calls that take longer than LONGEST_STEP.

    Args:
        function: (*arguments, data) -> nest of tensors. What it returns is dropped.
        arguments: the same in every call.
        data: a nest; every timed call has its values in another order.
        announce: print a line if the trial takes more than PATIENCE seconds.

    Warns:
        UserWarning: if XLA fails, with the reason.
    """
    graph = tf.function(function, autograph=False)
    operations = _operations(graph.get_concrete_function(*arguments, data))
    if len(operations) > MOST_OPERATIONS:
        return False
    if _on_cpu(arguments) and any(kind.startswith(CONVOLUTIONS) for kind in operations):
        return False
    _seconds(graph, arguments, data)  # TensorFlow prepares the graph
    if _seconds(graph, arguments, data) > LONGEST_STEP:
        return False
    compiled = tf.function(function, jit_compile=True, autograph=False)
    try:
        with _announced() if announce else contextlib.nullcontext():
            _seconds(compiled, arguments, data)
            return _faster(compiled, graph, arguments, data)
    except (
        Exception
    ) as error:  # of any kind: no such operation, no memory, no libdevice
        lines = str(error).strip().splitlines() or ["no reason given"]
        warnings.warn(
            'jit_compile="auto" leaves the outer step to the plain graph, since XLA '
            "could not compile or run it. Pass jit_compile=False, and nothing is "
            f"tried. Received: {type(error).__name__}: {lines[0]}",
            stacklevel=2,
        )
        return False


def _faster(compiled: Callable, graph: Callable, arguments: tuple, data: Any) -> bool:
    """Whether the best call of the first is shorter than the second's."""
    # In turns, so that a busy moment of the machine hits both; on values not seen
    # before, so that the compilation shows which XLA repeats for every new value where
    # an operation needs it beforehand (a shape, say).
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
    """The kinds of all operations of a traced function, those of loops too."""
    definition = function.graph.as_graph_def()
    bodies = [definition.node, *(f.node_def for f in definition.library.function)]
    return [node.op for body in bodies for node in body]


def _on_cpu(arguments: tuple) -> bool:
    return all("CPU:" in leaf.device for leaf in tf.nest.flatten(arguments))


def _seconds(way: Callable, arguments: tuple, data: Any) -> float:
    """Of a call and its end."""
    before = time.perf_counter()
    tf.nest.flatten(way(*arguments, data))[0].numpy()
    return time.perf_counter() - before


@contextlib.contextmanager
def _announced() -> Iterator[None]:
    """A line on the terminal for whoever waits."""
    line = (
        "XLA compiles the outer step, to see whether it is faster than the plain graph "
        "(jit_compile=True or False: no trial) ..."
    )
    timer = threading.Timer(PATIENCE, print, (line,), {"flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _turned(leaf: Any) -> Any:
    """The same entries, the last first."""
    # Sparse and ragged batches stay: they cannot be rolled.
    if not isinstance(leaf, tf.Tensor) or not leaf.shape.rank:
        return leaf
    return tf.roll(leaf, 1, axis=0)
