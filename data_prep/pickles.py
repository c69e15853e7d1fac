"""Pickles of data sets, read without running anything that they contain."""

import pathlib
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np

from data_prep.errors import one_line

_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")
_BUFFERS = ("numpy.core.numeric", "numpy._core.numeric")


class Foreign(pickle.UnpicklingError):
    """Something in a pickle that is no data."""


class _Type:
    """Stands for a class that a pickle names as an argument."""


def _new_array(kind: Any, shape: Any, code: Any) -> np.ndarray:
    """Of no entries: the state that follows has the shape and the numbers."""
    del shape, code
    if kind is not _Type:
        raise Foreign("an array of another class")
    return np.empty(0, np.uint8)


def _scalar(kind: Any, content: Any) -> Any:
    if not isinstance(kind, np.dtype) or kind.hasobject:
        raise Foreign("a number of no plain type")
    return np.frombuffer(_bytes(content), kind, 1)[0]


def _from_buffer(content: Any, kind: Any, shape: Any, order: Any) -> np.ndarray:
    if not isinstance(kind, np.dtype) or kind.hasobject:
        raise Foreign("an array of no plain type")
    return np.frombuffer(content, kind).reshape(shape, order=order)


def _bytes(text: Any, encoding: str = "latin1") -> bytes:
    """Bytes, as Python 3 writes them for Python 2."""
    if encoding != "latin1":
        raise Foreign(f"text in the encoding {encoding!r}")
    return text.encode("latin1") if isinstance(text, str) else bytes(text)


def _no_bytes() -> bytes:
    return b""


# What a pickle of plain data may name; none of it is what it is called elsewhere.
ADMITTED: dict[tuple[str, str], Callable] = {
    ("numpy", "ndarray"): _Type,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _bytes,
    ("__builtin__", "bytes"): _no_bytes,
    ("builtins", "bytes"): _no_bytes,
    **{(module, "_reconstruct"): _new_array for module in _NUMPY},
    **{(module, "scalar"): _scalar for module in _NUMPY},
    **{(module, "_frombuffer"): _from_buffer for module in _BUFFERS},
}
_REFUSED = (
    pickle.INST,
    pickle.OBJ,
    pickle.NEWOBJ,
    pickle.NEWOBJ_EX,
    pickle.PERSID,
    pickle.BINPERSID,
    pickle.EXT1,
    pickle.EXT2,
    pickle.EXT4,
)


# Python's own, in which each instruction can be replaced. The one in C also makes a
# list as long as the largest number that a damaged file gives an object.
class _Reader(pickle._Unpickler):  # type: ignore[name-defined]
    dispatch: dict[int, Any] = dict(pickle._Unpickler.dispatch)  # type: ignore

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ADMITTED:
            raise Foreign(f"{module}.{name}")
        return ADMITTED[module, name]

    def refuse(self) -> None:
        raise Foreign("an object of a class of its own")

    def reduce(self) -> None:
        arguments = self.stack.pop()
        function = self.stack[-1]
        called = any(function is one for one in ADMITTED.values())
        if not called or function is _Type or type(arguments) is not tuple:
            raise Foreign("a call of something that is no array")
        self.stack[-1] = function(*arguments)

    def build(self) -> None:
        state = self.stack.pop()
        made = self.stack[-1]
        if not isinstance(made, (np.ndarray, np.dtype)):
            raise Foreign("the state of something that is no array")
        if isinstance(made, np.ndarray):
            _require_plain_state(state)
        made.__setstate__(state)

    dispatch |= dict.fromkeys((code[0] for code in _REFUSED), refuse)
    dispatch[pickle.REDUCE[0]] = reduce
    dispatch[pickle.BUILD[0]] = build


def _require_plain_state(state: Any) -> None:
    """Raise unless the numbers are there that an array's state speaks of."""
    _, shape, kind, _, content = state
    count = 1
    for length in shape:
        if not isinstance(length, int) or length < 0:
            raise Foreign("an array of no shape")
        count *= length
    there = len(content) if kind.hasobject else len(content) // max(kind.itemsize, 1)
    if count != there:
        raise Foreign(f"an array of shape {shape} with {there} entries")


def load(path: pathlib.Path) -> Any:
    """What a pickle of Python 2 or 3 holds: NumPy arrays, numbers, text, bytes, lists,
    tuples, dictionaries and None. Text of Python 2 is read as Latin-1.

    Raises:
        FileNotFoundError: if the file is not there.
        ValueError: if it is cut short, no pickle, or holds anything else. Nothing that
            it names was called then.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. Point --data-dir at its folder"
        )
    try:
        with path.open("rb") as file:
            return _Reader(file, encoding="latin1").load()
    except Foreign as error:
        raise ValueError(
            f"{path} was not read: a pickle runs what it names, and this one names "
            f"more than arrays and plain Python values ({one_line(error)}). Save its "
            "arrays again with np.savez, in an environment that trusts it"
        ) from None
    except Exception as error:  # noqa: BLE001  (a damaged pickle raises whatever it met)
        raise ValueError(
            f"{path} cannot be read: it is cut short or not a pickle "
            f"({one_line(error)})"
        ) from None
