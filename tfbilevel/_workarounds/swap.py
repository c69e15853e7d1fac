"""Putting something of one's own in the place of something of TensorFlow's."""

import contextlib
import threading
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any, NamedTuple

from tensorflow.python.framework import ops

ABSENT: Any = object()


class Replacement(NamedTuple):
    """One entry of a mapping, and what stands there while the swap is in use."""

    where: MutableMapping
    key: str
    value: Any


def function(module: Any, name: str, value: Any) -> Replacement:
    """Another function under a module's name."""
    return Replacement(vars(module), name, value)


def gradient(operation: str, value: Any) -> Replacement:
    """Another gradient of an operation: (operation, *upstream) -> one per input.

    Eager tapes look it up when their gradient is asked for, graphs when the gradient
    is built, loops and functions in graphs when they are differentiated.
    """
    entry = {"type": value, "location": None}
    return Replacement(ops.gradient_registry._registry, operation, entry)


class Swap:
    """Replacements that are in place while at least one user is within.

    Threads may enter together and again from within: the last one to leave puts back
    what was there before.
    """

    def __init__(self, replacements: Sequence[Replacement]):
        self._replacements = replacements
        self._before: list[Any] = []
        self._users = 0
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        with self._lock:
            if self._users == 0:
                self._before = [
                    where.get(key, ABSENT) for where, key, _ in self._replacements
                ]
                for where, key, value in self._replacements:
                    where[key] = value
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    for (where, key, _), value in zip(
                        self._replacements, self._before, strict=True
                    ):
                        if value is ABSENT:
                            del where[key]
                        else:
                            where[key] = value
