"""Shared by the command lines of tools and scripts: types, one-line errors."""

import argparse
import contextlib
import math
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def one_line_errors(script: str) -> Iterator[None]:
    """Print errors in the preparation as one line, and exit with status 2.

    Args:
        script: the script's `__file__`.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        print(f"{pathlib.Path(script).name}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def positive(kind: type) -> Callable[[str], Any]:
    """An argparse type for finite numbers above zero."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not (math.isfinite(value) and value > 0):
            rule = "must be above zero" + (" and finite" if kind is float else "")
            raise argparse.ArgumentTypeError(f"{rule}, got {text}")
        return value

    parse.__name__ = f"positive {kind.__name__}"
    return parse


def seed(text: str) -> int:
    """An argparse type for seeds that NumPy, TensorFlow and Keras accept; so must be
    the seeds of further trials (`--trials`), which follow it."""
    value = int(text)
    if not 0 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"must be from 0 to 2^31 - 1, got {text}")
    return value
