"""Temporary replacements of objects in TensorFlow and Keras."""

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tensorflow.python.framework import ops

_ABSENT: Any = object()


class Replacement(NamedTuple):
    """The value of a name while the swap is in use.

    Attributes:
        owner: a module, a class or a dictionary.
        name: the name of an attribute, or a key.
        value: the replacement.
    """

    owner: Any
    name: str
    value: Any


def gradient(operation: str, function: Any) -> Replacement:
    """Another gradient of an operation: (operation, *upstream) -> one per input.

    Eager tapes look it up when the gradient is computed, graphs when the gradient is
    built, and loops and functions in graphs when they are differentiated.
    """
    entry = {"type": function, "location": None}
    return Replacement(ops.gradient_registry._registry, operation, entry)


class Swap:
    """Replacements that are in place while at least one user is in the context.

    Several threads may enter at the same time, and enter again from within. The last
    one to leave restores the original values.
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
                    _entries(owner).get(name, _ABSENT)
                    for owner, name, _ in self._replacements
                ]
                for replacement in self._replacements:
                    _put(*replacement)
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    for (owner, name, _), value in zip(
                        self._replacements, self._before, strict=True
                    ):
                        _put(owner, name, value)


def _entries(owner: Any) -> Mapping[str, Any]:
    return owner if isinstance(owner, dict) else vars(owner)


def _put(owner: Any, name: str, value: Any) -> None:
    if not isinstance(owner, dict):
        if value is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, value)
    elif value is _ABSENT:
        del owner[name]
    else:
        owner[name] = value
