"""Which way of compiling an outer step is the faster one."""

import time
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfbilevel._workarounds.memory_optimizer import without_memory_rewrites

ROUNDS, SECONDS = 5, 1.0  # of timing: whichever is over first


@without_memory_rewrites()
def faster_with_xla(function: Callable, arguments: tuple, data: Any) -> bool:
    """Whether XLA makes calls of a pure function faster than the plain graph does.

    Args:
        function: (*arguments, data) -> nest of tensors. What it returns is dropped.
        arguments: the same in every call.
        data: a nest; every timed call has its values in another order.
    """
    ways = {}
    for xla in (False, True):
        compiled = tf.function(function, jit_compile=xla, autograph=False)
        try:
            _run(compiled, arguments, data)
        except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError):
            if not xla:
                raise
            return False  # XLA has no such operation
        ways[xla] = compiled
    # In turns, so that a busy moment of the machine hits both; on values not seen
    # before, so that the compilation shows which XLA repeats for every new value where
    # an operation needs it beforehand (a shape, say).
    best = dict.fromkeys(ways, float("inf"))
    start = time.perf_counter()
    for _ in range(ROUNDS):
        data = tf.nest.map_structure(_turned, data)
        for xla, compiled in ways.items():
            before = time.perf_counter()
            _run(compiled, arguments, data)
            best[xla] = min(best[xla], time.perf_counter() - before)
        if time.perf_counter() - start > SECONDS:
            break
    return best[True] < best[False]


def _run(compiled: Callable, arguments: tuple, data: Any) -> None:
    """Call it and wait for the end."""
    tf.nest.flatten(compiled(*arguments, data))[0].numpy()


def _turned(leaf: Any) -> Any:
    """The same entries, the last first."""
    # Sparse and ragged batches stay: they cannot be rolled.
    if not isinstance(leaf, tf.Tensor) or not leaf.shape.rank:
        return leaf
    return tf.roll(leaf, 1, axis=0)
