"""Checks of constructor arguments."""

import inspect
import math
import numbers
from collections.abc import Callable
from typing import Any


def require_count(value: Any, name: str, least: int = 1) -> None:
    """Raise unless `value` is an integer of at least `least`."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < least:
        raise ValueError(
            f"`{name}` must be an integer of at least {least}. "
            f"Received: {name}={value!r}"
        )


def require_choice(value: Any, name: str, choices: tuple) -> None:
    """Raise unless `value` is one of the named choices."""
    if value not in choices:
        raise ValueError(
            f"`{name}` must be one of {', '.join(map(repr, choices))}. "
            f"Received: {name}={value!r}"
        )


def require_callable(value: Any, name: str) -> None:
    """Raise unless `value` can be called."""
    if not callable(value):
        raise ValueError(
            f"`{name}` must be callable. Pass a function. Received: {name}={value!r}"
        )


def require_number(
    value: Any, name: str, holds: Callable[[Any], bool], rule: str, remedy: str = ""
) -> None:
    """Raise unless `value` is a finite number for which `holds` is true.

    Args:
        value: the argument.
        name: its name.
        holds: number -> bool.
        rule: the condition in words, such as "above 0".
        remedy: a sentence that says what to do.
    """
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and holds(value)):
        remedy = remedy and f" {remedy}"
        raise ValueError(
            f"`{name}` must be a finite number, {rule}.{remedy} "
            f"Received: {name}={value!r}"
        )


def takes_two(function: Callable) -> bool:
    """Whether a function has at least two required positional parameters."""
    return takes(function, 2)


def takes(function: Callable, count: int) -> bool:
    """Whether a function has at least so many required positional parameters."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    )
    required = [p for p in parameters if p.kind in positional and p.default is p.empty]
    return len(required) >= count


def positive(value: Any) -> bool:
    return value > 0


def not_negative(value: Any) -> bool:
    return value >= 0


def share(value: Any) -> bool:
    """Above 0 and at most 1."""
    return 0 < value <= 1
