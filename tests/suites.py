"""Which cases of a test `make test` runs; `make test-slow` runs the others."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def fast_where(chosen: Callable[..., bool], values: Iterable[Any]) -> list[Any]:
    """Parameters, those that are not chosen marked slow.

    Args:
        chosen: of a parameter, or of all parts of one that is a tuple or a
            `pytest.param`: whether `make test` runs it.
        values: the parameters.

    Returns:
        What `pytest.mark.parametrize` takes, in the same order.
    """
    made = []
    for value in values:
        known = isinstance(value, _PARAMETER)
        parts = value.values if known else value if type(value) is tuple else (value,)
        marks = () if chosen(*parts) else (pytest.mark.slow,)
        if known:
            marks = (*value.marks, *marks)
        made.append(pytest.param(*parts, marks=marks, id=value.id if known else None))
    return made


_PARAMETER = type(pytest.param())
