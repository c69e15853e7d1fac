"""Pickles of data sets, read without executing anything that they contain."""

import math
import mmap
import pathlib
import pickle
import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from data_prep.errors import one_line

_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")
_BUFFERS = ("numpy.core.numeric", "numpy._core.numeric")
_CODES = re.compile(r"[biufcSUO?][0-9]{0,9}")  # no fields, no dates
_KEYS = (str, bytes, int, float, bool, type(None))
_PLAIN = (int, float, complex, bool, type(None))
DEPTH = 50  # deepest nesting of lists
EMPTY = 10**6  # longest array without entries
TIMES = 100  # most entries, counting repetitions, per byte of the file


class Foreign(pickle.UnpicklingError):
    """Something in a pickle that is not data."""


class _Type:
    """Stands for a class that a pickle uses as an argument."""


class _Kind:
    """The type of an array's entries.

    It is converted to a NumPy dtype only when used, because NumPy does not check the
    state that a pickle gives to a dtype. The state could declare that bytes are object
    pointers, which would execute them.
    """

    def __init__(self, code: Any, align: Any = False, copy: Any = False):
        del align, copy
        code = code.decode("latin1") if type(code) is bytes else code
        if type(code) is not str or not _CODES.fullmatch(code):
            said = repr(code[:20]) if type(code) is str else type(code).__name__
            raise Foreign(f"numbers of the type {said}")
        self.type = np.dtype("O" if code[0] == "O" else code)

    def set(self, state: Any) -> None:
        """Set the byte order; everything else is in the code."""
        right = type(state) is tuple and len(state) == 8
        if not right or state[2:5] != (None, None, None):
            raise Foreign("numbers of a type with fields or dates")
        if state[1] not in ("<", ">", "|", "=") or state[5] not in (
            -1,
            self.type.itemsize,
        ):
            raise Foreign("numbers of a type that contradicts itself")
        self.type = self.type.newbyteorder(state[1])


def _new_array(kind: Any, shape: Any, code: Any) -> np.ndarray:
    """An array without entries: the state that follows has its shape and numbers."""
    del shape, code
    if kind is not _Type:
        raise Foreign("an array of another class")
    return np.empty(0, np.uint8)


def _scalar(kind: Any, content: Any) -> Any:
    content = _bytes(content)
    _require_entries(kind, (), content)
    return np.frombuffer(content, _plain(kind), 1)[0]


def _from_buffer(content: Any, kind: Any, shape: Any, order: Any) -> np.ndarray:
    # Never from an array, whose memory is freed when its state is set.
    if type(content) not in (bytes, bytearray) or order not in ("C", "F"):
        raise Foreign("an array of no bytes")
    _require_entries(kind, shape, content)
    return np.frombuffer(content, _plain(kind)).reshape(shape, order=order)


def _plain(kind: Any) -> np.dtype:
    if type(kind) is not _Kind or kind.type.hasobject:
        raise Foreign("numbers of no plain type")
    return kind.type


def _bytes(text: Any, encoding: Any = "latin1") -> bytes:
    """Bytes in the form that Python 3 writes for Python 2."""
    if encoding != "latin1":
        raise Foreign("text in another encoding than Latin-1")
    if type(text) not in (str, bytes):  # an integer would give that many bytes
        raise Foreign("bytes of what is no text")
    return text.encode("latin1") if isinstance(text, str) else text


def _no_bytes() -> bytes:
    return b""


# The names that a pickle of plain data may use, with safe substitutes for each.
ADMITTED: dict[tuple[str, str], Callable] = {
    ("numpy", "ndarray"): _Type,
    ("numpy", "dtype"): _Kind,
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
    pickle.EMPTY_SET,
    pickle.FROZENSET,
    pickle.ADDITEMS,
)


# Python's own reader, in which each instruction can be replaced. The C version also
# allocates a list as long as the largest index in a damaged file.
class _Reader(pickle._Unpickler):  # type: ignore[name-defined]
    dispatch: dict[int, Any] = dict(pickle._Unpickler.dispatch)  # type: ignore

    def __init__(self, file: Any):
        super().__init__(file, encoding="latin1")
        self.begun: dict[int, np.ndarray] = {}  # arrays without their state

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
        made = self.stack[-1] = function(*arguments)
        if function is _new_array:
            self.begun[id(made)] = made

    def build(self) -> None:
        state = self.stack.pop()
        made = self.stack[-1]
        if type(made) is _Kind:
            made.set(state)
        elif self.begun.pop(id(made), None) is made:  # once only
            made.__setstate__(_plain_state(state))
        else:
            raise Foreign("the state of something that is no array")

    def append_one(self) -> None:
        self._extend([self.stack.pop()])

    def append_all(self) -> None:
        self._extend(self.pop_mark())

    def _extend(self, items: list) -> None:
        if type(self.stack[-1]) is not list:
            raise Foreign("entries of something that is no list")
        self.stack[-1].extend(items)

    def set_one(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def set_all(self) -> None:
        self._update(self.pop_mark())

    def make_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._update(items)

    def _update(self, items: list) -> None:
        # Hashing deeply nested tuples would crash the process.
        if type(self.stack[-1]) is not dict or not all(
            type(key) in _KEYS for key in items[::2]
        ):
            raise Foreign("a dictionary whose keys are no names or numbers")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def make_bytearray(self) -> None:
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(length)))  # `read` is limited by the file

    dispatch |= dict.fromkeys((code[0] for code in _REFUSED), refuse)
    dispatch |= {
        pickle.REDUCE[0]: reduce,
        pickle.BUILD[0]: build,
        pickle.APPEND[0]: append_one,
        pickle.APPENDS[0]: append_all,
        pickle.SETITEM[0]: set_one,
        pickle.SETITEMS[0]: set_all,
        pickle.DICT[0]: make_dict,
        pickle.BYTEARRAY8[0]: make_bytearray,
    }


def _plain_state(state: Any) -> tuple:
    """An array's state, after a check that its content has the declared size."""
    if type(state) is not tuple or len(state) != 5:
        raise Foreign("an array of no state")
    _, shape, kind, fortran, content = state
    if type(content) is not list:
        content = _bytes(content)
    _require_entries(kind, shape, content)
    return 1, shape, kind.type, bool(fortran), content


def _require_entries(kind: Any, shape: Any, content: Any) -> None:
    """Raise unless an array of this shape and kind can have this content."""
    if type(kind) is not _Kind or (type(content) is list) != kind.type.hasobject:
        raise Foreign("an array of no plain type")
    if type(shape) is not tuple or not all(type(n) is int and n >= 0 for n in shape):
        raise Foreign("an array of no shape")
    size = 1 if kind.type.hasobject else max(kind.type.itemsize, 1)
    count = math.prod(shape)
    if count * size != len(content):
        raise Foreign(f"an array of shape {shape} with {len(content) // size} entries")
    if not count and math.prod(n for n in shape if n) > EMPTY:
        raise Foreign(f"an array of shape {shape}")  # empty, but with a huge axis


def _size(value: Any, known: dict[int, int | None], depth: int = 0) -> int:
    """The number of bytes and entries in a value, counting repeated parts repeatedly.

    A list that contains one list ten times, which contains another ten times, and so
    on, is small in a file and in memory, but too large as an array.
    """
    if isinstance(value, (str, bytes, bytearray)):
        return 1 + len(value)
    if isinstance(value, (*_PLAIN, np.generic)):
        return 1
    if isinstance(value, np.ndarray):
        if not value.dtype.hasobject:
            return 1 + value.nbytes
        inner = value.ravel().tolist()
    elif isinstance(value, (list, tuple)):
        inner = value
    elif isinstance(value, dict):
        inner = [*value, *value.values()]
    else:
        raise Foreign(f"{type(value).__name__.strip('_')} where data must be")
    size = known.get(id(value), 0)
    if size is None or depth > DEPTH:
        raise Foreign("lists in lists without end")
    if not size:
        known[id(value)] = None
        size = 1 + sum(_size(one, known, depth + 1) for one in inner)
        known[id(value)] = size
    return size


def load(path: pathlib.Path) -> Any:
    """The contents of a pickle of Python 2 or 3: NumPy arrays, numbers, text, bytes,
    lists, tuples, dictionaries and None. Text of Python 2 is read as Latin-1.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is truncated, not a pickle, or contains anything else. None of
            the functions that it names is called.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. Point --data-dir at its folder"
        )
    try:
        with (
            path.open("rb") as file,
            # The map limits reading, and allocations, to the size of the file.
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        ):
            found = _Reader(mapped).load()
            if _size(found, {}) > TIMES * (1000 + len(mapped)):
                raise Foreign("lists in lists in lists, too long for their file")
            return found
    except Foreign as error:
        raise ValueError(
            f"{path} was not read: a pickle runs what it names, and this one names "
            f"more than arrays and plain Python values ({one_line(error)}). Save its "
            "arrays again with np.savez, in an environment that trusts it"
        ) from None
    except Exception as error:  # noqa: BLE001  (a damaged pickle can raise any)
        raise ValueError(
            f"{path} cannot be read: it is cut short or not a pickle "
            f"({one_line(error)})"
        ) from None
