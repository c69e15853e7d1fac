"""One level of a BilevelModel in words."""

import math
from typing import Any

import keras


def print_level(title: str, level: Any, keywords: dict[str, Any]) -> None:
    """Print how many variables a level trains, and its layers.

    Args:
        title: what the level is called.
        level: its model or layer.
        keywords: the arguments of `keras.Model.summary`.
    """
    write = keywords["print_fn"] or print
    trained = level.trainable_variables
    numbers = sum(math.prod(variable.shape) for variable in trained)
    write(
        f'{title}: "{level.name}" ({type(level).__name__}), '
        f"{_count(len(trained), 'trainable variable')} of {_count(numbers, 'number')}"
    )
    if isinstance(level, keras.Model):
        level.summary(**keywords)
        return
    for variable in trained:
        write(f"    {variable.path}: {tuple(variable.shape)}, {variable.dtype}")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
