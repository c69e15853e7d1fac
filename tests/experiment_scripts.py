"""Experiment scripts as modules: they are run as files, not installed."""

import importlib.util
import pathlib
import sys
from types import ModuleType
from typing import Any

import numpy as np

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


def arrays_of(path: pathlib.Path) -> dict[str, Any]:
    """Everything in an .npz file, which is closed again."""
    with np.load(path) as file:
        return dict(file)
