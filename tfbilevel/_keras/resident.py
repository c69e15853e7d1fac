"""Batches that do not change from step to step stay on the device."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf


class Resident:
    """Reads a dataset's elements; what comes again is copied to the device once.

    tf.data hands a tensor out again, not a copy of it, where a dataset has one element
    that is repeated: a full batch. Its buffer is then where the last one's was, and as
    that is still held, it holds the same numbers. Anything else is passed on as it is.
    A generator that yields one NumPy array again and again, with other numbers, breaks
    this, as it breaks tf.data, which reads ahead.

    Memory: one element's tensors on the host, the repeated ones on the device too.

    Args:
        device: where the step runs.
    """

    def __init__(self, device: str):
        self.device = device
        self._last: list = []  # per leaf: the numbers on the host, and on the device

    def read(self, iterator: Iterator, count: int) -> Iterator:
        """The next elements, at most `count`; StopIteration if there is none."""
        first = self._resident(next(iterator))
        return self._rest(first, iterator, count - 1)

    def _rest(self, first: Any, iterator: Iterator, more: int) -> Iterator:
        yield first
        for _, element in zip(range(more), iterator, strict=False):
            yield self._resident(element)

    def _resident(self, element: Any) -> Any:
        leaves = tf.nest.flatten(element)
        last = self._last or [(None, None)] * len(leaves)
        self._last = [
            self._seen(leaf, *known) for leaf, known in zip(leaves, last, strict=True)
        ]
        made = [
            leaf if copy is None else copy
            for leaf, (_, copy) in zip(leaves, self._last, strict=True)
        ]
        return tf.nest.pack_sequence_as(element, made)

    def _seen(self, leaf: Any, before: Any, copy: Any) -> tuple:
        here = _numbers(leaf)
        if here is None or before is None or not _is(here, before):
            return here, None
        if copy is None:
            with tf.device(self.device):
                copy = tf.identity(leaf)
        return before, copy


def _numbers(leaf: Any) -> np.ndarray | None:
    """A tensor's own memory; `None` if it is one number, or cannot be looked at."""
    if not isinstance(leaf, tf.Tensor) or not leaf.shape.rank:
        return None
    if "CPU:" not in leaf.backing_device or leaf.dtype in (tf.string, tf.variant):
        return None
    try:
        return np.asarray(memoryview(leaf))  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):  # bfloat16 has no buffer
        return None


def _is(one: np.ndarray, other: np.ndarray) -> bool:
    return (
        one.shape == other.shape
        and one.dtype == other.dtype
        and one.ctypes.data == other.ctypes.data
    )
