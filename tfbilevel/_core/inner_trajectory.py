"""All iterates of an inner solver, for inspection."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfbilevel._calculus.aliases import Nest
from tfbilevel._calculus.loops import serial_loop
from tfbilevel._core.prepared import Prepared


def trajectory(
    inner: Any,
    here: Prepared,
    lower: Nest,
    state: dict,
    of: Callable[[Nest], Nest] | None = None,
) -> Any:
    """`InnerSolver.trajectory`, for the solver `inner`."""
    if inner.atol is not None:
        raise ValueError(
            "`inner.atol` must be None for `trajectory`, which makes all steps. "
            "Leave it out, or use `solve`. "
            f"Received: atol={inner.atol!r}"
        )
    kept = of or (lambda y: y)
    begin = inner.begin(here, lower, state)
    like = tf.nest.map_structure(tf.convert_to_tensor, kept(begin.lower))
    arrays = [
        tf.TensorArray(leaf.dtype, inner.steps, element_shape=leaf.shape)
        for leaf in tf.nest.flatten(like)
    ]

    def body(t: tf.Tensor, now: Any, arrays: list) -> tuple:
        after, _ = inner.advance(here, now, t)
        leaves = tf.nest.flatten(kept(after.lower))
        written = [
            array.write(t, leaf) for array, leaf in zip(arrays, leaves, strict=True)
        ]
        return t + 1, after, written

    _, _, arrays = serial_loop(
        lambda t, *_: t < inner.steps,
        body,
        (tf.constant(0), begin, arrays),
        inner.steps,
    )
    return tf.nest.pack_sequence_as(like, [array.stack() for array in arrays])
