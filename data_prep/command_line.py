"""What command lines of tools and scripts share: argument types, one-line errors."""

import argparse
import contextlib
import math
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def one_line_errors(script: str) -> Iterator[None]:
    """What goes wrong before any work is done: one line, exit status 2.

    Args:
        script: the script's `__file__`.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        print(f"{pathlib.Path(script).name}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def positive(kind: type) -> Callable[[str], Any]:
    """An argparse type: a finite number of this kind, above zero."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not (math.isfinite(value) and value > 0):
            raise argparse.ArgumentTypeError(f"must be above zero, got {text}")
        return value

    parse.__name__ = f"positive {kind.__name__}"
    return parse


def seed(text: str) -> int:
    """An argparse type: a seed that NumPy, TensorFlow and Keras all take, and the next
    ones after it too (`--trials`)."""
    value = int(text)
    if not 0 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"must be from 0 to 2^31 - 1, got {text}")
    return value
