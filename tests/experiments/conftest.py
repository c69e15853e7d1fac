"""What the experiments' tests share."""

import contextlib
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest


@pytest.fixture(autouse=True)
def cleared(monkeypatch):
    """Stands for Keras's clearing between runs, which collects the garbage of all tests
    of the process: half a second each time."""
    import keras

    stand_in = mock.Mock()
    monkeypatch.setattr(keras.backend, "clear_session", stand_in)
    return stand_in


@pytest.fixture
def no_pictures(monkeypatch):
    """Everything is drawn, and no picture is made of it: that takes longer than a small
    run. For tests that look at no picture."""
    from matplotlib.figure import Figure

    def save(figure: Figure, path: pathlib.Path, **options: Any) -> None:
        pathlib.Path(path).touch()

    monkeypatch.setattr(Figure, "savefig", save)
    monkeypatch.setattr(Figure, "tight_layout", lambda figure: None)


@pytest.fixture
def power_fails(monkeypatch):
    """Copies a run's folder as it is on the disk at one moment.

    That is all that a run which is killed there leaves: the copy is resumed, and the
    run itself, which goes on to its end, is what the copy must arrive at.
    """

    @contextlib.contextmanager
    def at(
        owner: Any, name: str, *, call: int, run: pathlib.Path, copy: pathlib.Path
    ) -> Iterator[None]:
        """Before the given call of `owner.name`, from 1."""
        function: Callable = getattr(owner, name)
        calls = []

        def watched(*arguments: Any, **keywords: Any) -> Any:
            calls.append(1)
            if len(calls) == call:
                shutil.copytree(run, copy)
            return function(*arguments, **keywords)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, watched)
            yield
        assert copy.exists()

    return at
