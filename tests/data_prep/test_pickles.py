"""Pickles of data: read in every protocol; whatever else they name is not called."""

import collections
import os
import pathlib
import pickle
import struct
import subprocess
import tracemalloc

import numpy as np
import pytest

from data_prep import pickles

CONTENT = {
    "images": np.arange(24, dtype=np.uint8).reshape(2, 3, 2, 2),
    "turned": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "labels": [0, 1, -3, 10**30, 2.5, True, None],
    b"names": ("a", b"\xff\x00", "\u00e9\u0416"),
    "number": np.int64(7),
    "nothing": b"",
    "empty": np.zeros((0, 3), np.float32),
    "objects": np.array(["a", 1, None], object),
}


def same(a, b) -> bool:
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and bool(np.all(a == b))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data_of_every_protocol(tmp_path, protocol):
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(CONTENT, protocol))
    found = pickles.load(path)
    assert list(found) == list(CONTENT)
    for name, value in CONTENT.items():
        assert same(found[name], value), name


def test_a_pickle_of_python_2_and_of_numpy_1(tmp_path):
    """Written by hand: text as bytes, and the module's old name."""
    path = tmp_path / "a.pkl"
    path.write_bytes(
        b"(dp0\nS'data'\np1\ncnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n"
        b"(I0\ntS'b'\ntR(I1\n(I2\ntcnumpy\ndtype\n(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\n"
        b"I-1\nI0\ntbI00\nS'\\x05\\xff'\ntbs."
    )
    found = pickles.load(path)
    assert list(found) == ["data"] and found["data"].tolist() == [5, 255]


def calls(function, *arguments):
    class Call:
        def __reduce__(self):
            return function, arguments

    return Call()


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("wrap", [lambda c: c, lambda c: {"image_data": [c]}])
def test_nothing_is_called(tmp_path, protocol, wrap):
    mark = tmp_path / "called"
    path = tmp_path / "a.pkl"
    for call in (
        calls(os.mkdir, str(mark)),
        calls(os.system, f"touch {mark}"),
        calls(eval, f"open({str(mark)!r}, 'w')"),
        calls(getattr, os, "sep"),
        calls(np.memmap, str(mark), "uint8", "w+", 0, (4,)),
        calls(np.load, str(mark)),
        calls(subprocess.Popen, ["touch", str(mark)]),
        calls(pathlib.Path, str(mark)),
    ):
        try:
            content = pickle.dumps(wrap(call), protocol)
        except (TypeError, AttributeError, pickle.PicklingError):
            continue  # this protocol has no such call
        path.write_bytes(content)
        with pytest.raises(ValueError, match="was not read") as caught:
            pickles.load(path)
        assert not mark.exists()
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


class Own:
    def __init__(self):
        self.data = [1]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (pickle.dumps(Own()), "Own"),
        (pickle.dumps(collections.OrderedDict(a=1)), "OrderedDict"),
        (b"\x80\x02cbuiltins\neval\n.", "eval"),
        (b"(S'touch x'\nios\nsystem\n.", "class of its own"),  # INST
        (b"\x80\x02\x82\x01.", "class of its own"),  # an extension
        (b"Pfile\n.", "class of its own"),  # a persistent name
        (b"\x80\x02]q\x00}b.", "state of something"),  # a list's state
        (b"\x80\x02cnumpy\nndarray\n(K\x05tR.", "a call of something"),
        (
            b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00bz2\x86R.",
            "another encoding",
        ),
        (b"\x80\x02c__builtin__\nbytes\nJ\xff\xff\xff\x7f\x85R.", "cannot be read"),
    ],
)
def test_what_is_no_data_is_refused_by_name(tmp_path, content, said):
    path = tmp_path / "a.pkl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=said) as caught:
        pickles.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80",
        b"no pickle at all\n",
        b"\x80\x04]r\xff\xff\xff\xff.",  # object number 2^32 - 1
        b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.",  # 2^63 bytes to come
        b"\x80\x04\x8b\xff\xff\xff\x7f.",  # a number of 2 GB
        b"I" + b"9" * 100_000 + b"\n.",
        b"(" * 100_000 + b".",
    ],
)
def test_damaged_files_are_one_line(tmp_path, content):
    path = tmp_path / "a.pkl"
    path.write_bytes(content)
    try:
        assert pickles.load(path) == []  # the first of them is right but for a number
    except ValueError as error:
        assert "cannot be read" in str(error) and "\n" not in str(error)


def test_an_array_larger_than_its_file_is_refused(tmp_path):
    path = tmp_path / "a.pkl"
    state = (1, (10**12,), np.dtype("u1"), False, b"ab")

    class Array:
        def __reduce__(self):
            return np.zeros(0).__reduce__()[0], (np.ndarray, (0,), b"b"), state

    path.write_bytes(pickle.dumps(Array()))
    with pytest.raises(ValueError, match=r"shape \(1000000000000,\) with 2 entries"):
        pickles.load(path)


def put(value) -> bytes:
    """What puts plain data on the stack."""
    return pickle.dumps(value, 2)[2:-1]


def name(module: str, what: str) -> bytes:
    return f"c{module}\n{what}\n".encode()


def kind(code, state=None) -> bytes:
    """An array's type; its state is not checked by NumPy."""
    made = name("numpy", "dtype") + put((code, False, True)) + b"R"
    return made if state is None else made + put(state) + b"b"


def raw(content: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(content)) + content


def array(kind: bytes, shape, content: bytes) -> bytes:
    begun = name("numpy.core.multiarray", "_reconstruct") + name("numpy", "ndarray")
    return begun + b"K\x00\x85U\x01b\x87R" + state(kind, shape, content)


def state(kind: bytes, shape, content: bytes) -> bytes:
    return b"(K\x01" + put(shape) + kind + b"\x89" + content + b"tb"


def buffer(content: bytes, kind: bytes, shape, order="C") -> bytes:
    made = name("numpy._core.numeric", "_frombuffer") + b"("
    return made + content + kind + put(shape) + put(order) + b"tR"


EIGHT = raw(b"AAAAAAAA")
LIES = (3, "|", None, None, None, -1, -1, 0)  # that no entry is an object
FIELDS = b"(K\x03U\x01|N" + put(("a",)) + b"}U\x01a" + kind("f8")
FIELDS += b"J\x00\x00\x00\x70\x86sK\x08K\x01K\x00tb"  # one begins at 1.9 GB


ATTACKS = {
    "bytes as objects": array(kind("O8", LIES), (1,), EIGHT),
    "a buffer as objects": buffer(EIGHT, kind("O8", LIES), (1,)),
    "a number as object": name("numpy.core.multiarray", "scalar")
    + b"("
    + kind("O8", LIES)
    + EIGHT
    + b"tR",
    "a field out of reach": array(kind("V8") + FIELDS, (1,), EIGHT),
    "memory of an array that is given another": b"("
    + array(kind("u1"), (8,), EIGHT)
    + b"q\x63"
    + buffer(b"h\x63", kind("u1"), (8,))
    + b"h\x63"
    + state(kind("u1"), (1,), raw(b"A"))
    + b"t",
    "a buffer of an array": buffer(
        array(kind("u1"), (8,), EIGHT), kind("u1"), (8,)
    ),
    "an array's state twice": array(kind("u1"), (8,), EIGHT)
    + state(kind("u1"), (1,), raw(b"A")),
    "everybody's integers": kind("i8", (3, ">", None, None, None, -1, -1, 0)),
    "a type as data": kind("u1"),
    "a class as data": name("numpy", "ndarray"),
    "a function as data": name("_codecs", "encode"),
    "6 GB of nothing": name("_codecs", "encode") + put((6 << 30,)) + b"R",
    "a million fields": kind("u1," * 10**6),
    "fields": name("numpy", "dtype") + put(({"names": [], "formats": []},)) + b"R",
    "a type of a gigabyte": name("numpy", "dtype") + put((("u1", (2**30,)),)) + b"R",
    "another size than its code": array(
        kind("U1", (3, "<", None, None, None, 400, 4, 8)), (2,), EIGHT
    ),
    "dates": kind("M8[ns]"),
    "a negative length": buffer(EIGHT, kind("u1"), (-1,)),
    "a length that is none": buffer(EIGHT, kind("u1"), (8.0,)),
    "many entries of no size": array(kind("S0"), (10**12,), raw(b"")),
    "many rows of nothing": array(kind("u1"), (10**12, 0), raw(b"")),
    "a list in itself": b"]q\x01h\x01ah\x01a",
    "an array in itself": name("numpy.core.multiarray", "_reconstruct")
    + name("numpy", "ndarray")
    + b"K\x00\x85U\x01b\x87Rq\x63"
    + state(kind("O8"), (1,), b"]h\x63a"),
    "ten lists of ten lists of ...": b"]K\x00aq\x00"
    + b"".join(
        b"](" + bytes([104, i]) * 10 + b"eq" + bytes([i + 1]) for i in range(12)
    ),
    "tuples without end as a key": b"}N" + b"\x85" * 10**6 + b"Ns",
    "lists without end": b"]" * 1000 + b"a" * 999,
    "a set": b"\x8f",
    "an array's entries": array(kind("u1"), (8,), EIGHT) + b"K\x00K\x01s",
    "entries of a name": name("_codecs", "encode") + b"K\x00a",
}  # fmt: skip


@pytest.mark.parametrize("content", ATTACKS.values(), ids=ATTACKS.keys())
def test_what_would_reach_beyond_the_data_is_refused(tmp_path, content):
    """Of these some ended the process, ran bytes, or filled the memory."""
    path = tmp_path / "a.pkl"
    path.write_bytes(b"\x80\x04" + content + b".")
    with pytest.raises(ValueError, match="was not read") as caught:
        pickles.load(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert np.arange(2, dtype="i8").tobytes()[8] == 1  # little-endian as before


def test_the_same_bytes_in_right_arrays_are_read(tmp_path):
    """So that the tests above do not pass on pickles that are wrong otherwise."""
    path = tmp_path / "a.pkl"
    objects = kind("O8", (3, "|", None, None, None, -1, -1, 63))
    text = kind("U1", (3, "<", None, None, None, 4, 4, 8))
    big = kind("i2", (3, ">", None, None, None, -1, -1, 0))
    for content, wanted in (
        (array(kind("u1"), (8,), EIGHT), [65] * 8),
        (array(big, (2, 1), raw(b"\x00\x01\x01\x00")), [[1], [256]]),
        (array(objects, (1,), put([7])), [7]),
        (array(text, (2,), raw(b"a\0\0\0b\0\0\0")), ["a", "b"]),
        (buffer(EIGHT, kind("u1"), (2, 4)), [[65] * 4] * 2),
        (buffer(raw(bytes(range(4))), kind("u1"), (2, 2), "F"), [[0, 2], [1, 3]]),
    ):  # fmt: skip
        path.write_bytes(b"\x80\x04" + content + b".")
        assert pickles.load(path).tolist() == wanted


def test_what_stands_twice_may_stand_twice(tmp_path):
    path = tmp_path / "a.pkl"
    labels, long = list(range(50)), "a name of many letters, as some have"
    path.write_bytes(
        pickle.dumps({"a": labels, "b": [labels, labels], "c": [long] * 99})
    )
    found = pickles.load(path)
    assert found["a"] is found["b"][1] and found["c"] == [long] * 99


def test_more_bytes_than_the_file_has_are_not_made_room_for(tmp_path):
    path = tmp_path / "a.pkl"
    path.write_bytes(b"\x80\x05\x96" + struct.pack("<Q", 1 << 33) + b"aa.")
    tracemalloc.start()
    with pytest.raises(ValueError, match="cannot be read"):
        pickles.load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        pickles.load(tmp_path / "a.pkl")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        pickles.load(tmp_path)
