"""Seeds, which make a loss that samples a fixed function within an outer step."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfbilevel._randomness.operations import current_seed, fixed_randomness, wrapped

# A seed is a pair of 32-bit numbers. The first is a sum of multiples of these numbers
# and says where in the run the seed is used; the second is the base that the user or
# the model chose.
STEP, TASK, DRAW, ROLE = 0x9E3779B1, 0xC2B2AE3D, 0x85EBCA6B, 0x27D4EB2F
TURN, REPLICA, MICROBATCH = 0x2C1B3C6D, 0x165667B1, 0xFD7046C5
# The roles: functions that are evaluated, each with samples of its own.
UPPER_LOSS, LOWER_LOSS, PREPARE, START, PROJECT_UPPER, PROJECT_LOWER = range(1, 7)


def as_seed(given: Any) -> Any:
    """The seed, int32, [2], of a base; a seed is returned unchanged."""
    if tf.is_tensor(given):
        if given.shape.rank == 1:
            return given
        base = tf.cast(given, tf.int32)
        return tf.stack([tf.zeros_like(base), base])
    if isinstance(given, np.ndarray) and given.ndim == 1:
        return given
    return np.array([0, wrapped(int(given))], np.int32)


def folded(seed: Any, factor: int, number: Any) -> Any:
    """The seed for a numbered part: a step, a task, a sample, a role.

    Args:
        seed: int32, [2] or [tasks, 2].
        factor: which kind of part, one of `STEP`, `TASK`, `DRAW`, `ROLE`.
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
    """The seed of an outer step or of a run; calls can be nested in any order."""
    # Step a of run b must not get the seed of step b of run a.
    if isinstance(seed, np.ndarray):
        turned: Any = np.array([wrapped(int(seed[0]) * TURN), seed[1]], np.int32)
    else:
        turned = seed * np.array([wrapped(TURN), 1], np.int32)
    return folded(turned, STEP, number)


def of_tasks(seed: Any, tasks: Any) -> tf.Tensor:
    """The seeds of all tasks, int32, [tasks, 2]."""
    return folded(seed, TASK, tf.range(tasks))


class Noisy(NamedTuple):
    """The batch that a loss receives when its randomness is fixed.

    Attributes:
        batch: the batch; for several tasks, with the task axis in front.
        seed: int32, [2]; for several tasks, [tasks, 2].
    """

    batch: Any
    seed: Any


def noisy(loss: Callable) -> Callable:
    """The loss of one task, which accepts a batch or a `Noisy` batch."""

    def at(x: Any, y: Any, batch: Any) -> Any:
        if not isinstance(batch, Noisy):
            return loss(x, y, batch)
        with fixed_randomness(batch.seed):
            return loss(x, y, batch.batch)

    return at


def with_seed(seed: Any, role: int, function: Callable) -> Callable:
    """The function with its randomness fixed by the seed and the role."""

    @functools.wraps(function)  # keeps the signature, which callers inspect
    def at(*arguments: Any) -> Any:
        with fixed_randomness(folded(seed, ROLE, role)):
            return function(*arguments)

    return at


@contextlib.contextmanager
def of_replica() -> Iterator[None]:
    """A context with samples of its own on each replica but the first, if a seed is
    set. The first one's are those of a single device."""
    seed, context = current_seed(), tf.distribute.get_replica_context()
    if seed is None or context is None:
        yield
        return
    number = tf.convert_to_tensor(context.replica_id_in_sync_group)
    with fixed_randomness(folded(seed, REPLICA, number)):
        yield


def of_entries(function: Callable) -> Callable:
    """A function of (entry, number) that evaluates `function(entry)`; if a seed is
    set, each entry has samples of its own."""

    def at(numbered: tuple) -> Any:
        entry, number = numbered
        seed = current_seed()
        if seed is None:
            return function(entry)
        with fixed_randomness(folded(seed, TASK, number)):
            return function(entry)

    return at
