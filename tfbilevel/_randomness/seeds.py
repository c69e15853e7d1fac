"""Losses that sample: one fixed function each within an outer step."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfbilevel._randomness.operations import fixed_randomness, seed_here, wrapped

# A seed is a pair of 32-bit numbers: the first says where in the run it is, a sum of
# such multiples, the second is the base that the user or the model chose.
STEP, TASK, DRAW, ROLE = 0x9E3779B1, 0xC2B2AE3D, 0x85EBCA6B, 0x27D4EB2F
TURN = 0x2C1B3C6D
# What is evaluated, each with numbers of its own.
UPPER_LOSS, LOWER_LOSS, PREPARE, START, PROJECT_UPPER, PROJECT_LOWER = range(1, 7)


def as_seed(given: Any) -> Any:
    """The seed int32, [2], of a base, or as it is."""
    if tf.is_tensor(given):
        if given.shape.rank == 1:
            return given
        base = tf.cast(given, tf.int32)
        return tf.stack([tf.zeros_like(base), base])
    if isinstance(given, np.ndarray) and given.ndim == 1:
        return given
    return np.array([0, wrapped(int(given))], np.int32)


def folded(seed: Any, factor: int, number: Any) -> Any:
    """The seed of a number: a step's, a task's, a draw's, a role's.

    Args:
        seed: int32, [2] or [tasks, 2].
        factor: which of them.
        number: an integer, a scalar tensor, or one with an entry per task.
    """
    if not tf.is_tensor(number):
        number = wrapped(int(number) * factor)
        if isinstance(seed, np.ndarray):
            return np.array([wrapped(int(seed[0]) + number), seed[1]], np.int32)
        return seed + np.array([number, 0], np.int32)
    along = np.array([wrapped(factor), 0], np.int32)
    return seed + tf.cast(number, tf.int32)[..., None] * along


def of_step(seed: Any, number: Any) -> Any:
    """The seed of an outer step, or of a run: of each within the other too."""
    # A step after another number must not be that number after the step.
    if isinstance(seed, np.ndarray):
        turned: Any = np.array([wrapped(int(seed[0]) * TURN), seed[1]], np.int32)
    else:
        turned = seed * np.array([wrapped(TURN), 1], np.int32)
    return folded(turned, STEP, number)


def of_tasks(seed: Any, tasks: Any) -> tf.Tensor:
    """The seeds of all tasks, int32, [tasks, 2]."""
    return folded(seed, TASK, tf.range(tasks))


class Noisy(NamedTuple):
    """What a loss receives as its batch where its randomness is fixed.

    Attributes:
        batch: the batch, over tasks with their axis in front.
        seed: int32, [2], over tasks [tasks, 2].
    """

    batch: Any
    seed: Any


def noisy(loss: Callable) -> Callable:
    """The loss of one task, of a batch or a `Noisy` one."""

    def at(x: Any, y: Any, batch: Any) -> Any:
        if not isinstance(batch, Noisy):
            return loss(x, y, batch)
        with fixed_randomness(batch.seed):
            return loss(x, y, batch.batch)

    return at


def with_seed(seed: Any, role: int, function: Callable) -> Callable:
    """The function with its randomness fixed."""

    @functools.wraps(function)  # its signature says what it takes
    def at(*arguments: Any) -> Any:
        with fixed_randomness(folded(seed, ROLE, role)):
            return function(*arguments)

    return at


def of_entries(function: Callable) -> Callable:
    """The function of (entry, its number), each with numbers of its own where they are
    fixed."""

    def at(numbered: tuple) -> Any:
        entry, number = numbered
        seed = seed_here()
        if seed is None:
            return function(entry)
        with fixed_randomness(folded(seed, TASK, number)):
            return function(entry)

    return at
