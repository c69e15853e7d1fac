"""Experiment scripts as modules: they are run as files, not installed."""

import importlib.util
import pathlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

ROOT = pathlib.Path(__file__).resolve().parents[1]


def load_experiment(name: str) -> ModuleType:
    """The script `experiments/<name>.py`, imported once."""
    if name not in sys.modules:
        path = ROOT / "experiments" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


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
