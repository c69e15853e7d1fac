"""Experiment scripts as modules: they are run as files, not installed."""

import importlib
import pathlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

ROOT = pathlib.Path(__file__).resolve().parents[1]


def load_experiment(name: str) -> ModuleType:
    """The script `experiments/<name>.py`, imported once."""
    return importlib.import_module(name)


def drawn(monkeypatch: Any, draw: Callable[[], Any]) -> Figure:
    """The one figure that a function of a script draws, and saves."""
    with monkeypatch.context() as patch:
        patch.setattr(plt, "close", lambda figure: None)
        before = plt.get_fignums()
        draw()
        (number,) = {*plt.get_fignums()} - {*before}
    figure = plt.figure(number)
    plt.close(figure)
    return figure


def arrays_of(path: pathlib.Path) -> dict[str, Any]:
    """Everything in an .npz file, which is closed again."""
    with np.load(path) as file:
        return dict(file)
