"""Keeps batches that do not change from step to step on the device."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf


class Resident:
    """Reads a dataset's elements, and copies a repeated one to the device only once.

    If a dataset repeats a single element (a full batch), tf.data returns the same
    tensor again, not a copy. Its buffer then has the same address as the last one's,
    and since that one is still held, it contains the same numbers. All other elements
    are passed on unchanged. A generator that yields the same NumPy array again with
    changed numbers breaks this, but it also breaks tf.data, which reads ahead.

    Memory: one element's tensors on the host, the repeated ones on the device too.

    Args:
        device: the device on which the step runs.
    """

    def __init__(self, device: str):
        self.device = device
        self._last: list = []  # per leaf: its numbers on the host, its device copy

    def read(self, iterator: Iterator, count: int) -> Iterator:
        """The next elements, at most `count`; raises StopIteration if there is none."""
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
    """A tensor's own memory; `None` for a scalar or if it is not accessible."""
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
