"""Recursive momentum: noise that two estimates share cancels in their difference."""

from typing import Any

import tensorflow as tf

from tfbilevel._calculus import structure
from tfbilevel._calculus.aliases import Nest
from tfbilevel._core.schedules import Schedule, as_schedule, at_ends


def as_momentum(value: Any, name: str) -> Schedule:
    """The schedule of a momentum: from 0 to below 1 at its start, at most 1 later."""
    schedule = as_schedule(value, name)
    start, end = at_ends(schedule)
    if not (0 <= start < 1 and 0 <= end <= 1):
        raise ValueError(
            f"`{name}` must be from 0 to below 1: it is the share of the former "
            "direction that is kept. 0.9 is usual; a schedule may end at 1. "
            f"Received: {name}={value!r}, from {start:g} to {end:g}"
        )
    return schedule


def recursive(
    momentum: Schedule, step: tf.Tensor, now: Nest, old: Nest, direction: Nest
) -> Any:
    """d_k = h_k + m_k (d_{k-1} - h'_k), and h_0 in the first step (STORM).

    Args:
        momentum: m.
        step: k.
        now: h_k, the estimate at this point.
        old: h'_k, that of the same batches at the point of the step before.
        direction: d_{k-1}.
    """
    kept = tf.where(step > 0, momentum(step), 0)
    return structure.add_scaled(now, kept, structure.subtract(direction, old))
