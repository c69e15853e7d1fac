"""Pickles of data: read in every protocol; whatever else they name is not called."""

import collections
import os
import pathlib
import pickle
import subprocess

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
            "bz2",
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


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        pickles.load(tmp_path / "a.pkl")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        pickles.load(tmp_path)
