"""A sample of the corpus of damaged and foreign files; `tests/fuzz_data_files.py`."""

import pickle

import fuzz_data_files
import pytest

from data_prep import idx, label_noise, pickles


def test_a_sample_is_read_or_refused_in_one_line():
    counts, bad = fuzz_data_files.run(range(10_000, 10_080))
    assert not bad
    assert {said for _, said in counts} == {"read", "other values", "one line"}


@pytest.mark.slow
def test_the_whole_corpus():
    _, bad = fuzz_data_files.run(range(2000))
    assert not bad


def test_a_reader_that_runs_pickles_is_found(monkeypatch):
    def unsafe(path):
        try:
            return pickle.loads(path.read_bytes())
        except Exception as error:
            raise ValueError("a pickle") from error

    monkeypatch.setattr(pickles, "load", unsafe)
    _, bad = fuzz_data_files.run(range(60))
    assert any("executed" in line for line in bad)


def test_a_reader_that_reads_something_else_is_found(monkeypatch):
    def wrong(path, labels):
        """All are kept as soon as a byte was changed: no checksum is looked at."""
        return labels == (0 if path.stat().st_size % 2 else 1)

    monkeypatch.setattr(label_noise, "load_kept", wrong)
    _, bad = fuzz_data_files.run(range(60))
    assert any("kept" in line and "read as" in line for line in bad)


def test_a_reader_without_bounds_is_found(monkeypatch):
    def greedy(path, axes):
        return bytes(4 * 2**30)

    monkeypatch.setattr(idx, "read", greedy)
    _, bad = fuzz_data_files.run(range(30))
    assert any("MemoryError" in line for line in bad)
