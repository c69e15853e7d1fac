"""Nesterov's accelerated sequence, stored after an optimizer's own slots.

u_{t+1} = y_{t+1} + (s_t - 1) / s_{t+1} * (y_{t+1} - y_t)
s_{t+1} = (1 + sqrt(1 + 4 s_t^2)) / 2,      s_0 = 1,   u_0 = y_0
"""

from typing import Any, NamedTuple

import tensorflow as tf

from tfbilevel._calculus import structure
from tfbilevel._optimizers.update_rule import OptimizerState


class Accelerated(NamedTuple):
    """The parts of an accelerated optimizer's state.

    Attributes:
        own: the optimizer's own state.
        ahead: u_t - y_t.
        sequence: s_t.
    """

    own: OptimizerState
    ahead: Any
    sequence: tf.Tensor


def begun(own: OptimizerState, lower: Any, shape: Any) -> OptimizerState:
    """The state at step 0, with s_0 of the given shape."""
    ahead = tf.nest.flatten(structure.zeros_like(structure.to_tensors(lower)))
    sequence = tf.ones(shape, ahead[0].dtype)
    return own._replace(slots=[*own.slots, *ahead, sequence])


def split(state: OptimizerState, lower: Any) -> Accelerated:
    """The state's parts."""
    leaves = len(tf.nest.flatten(lower))
    *slots, sequence = state.slots
    ahead = tf.nest.pack_sequence_as(lower, slots[-leaves:])
    return Accelerated(state._replace(slots=slots[:-leaves]), ahead, sequence)


def extrapolated(
    own: OptimizerState, sequence: tf.Tensor, before: Any, after: Any
) -> OptimizerState:
    """The state after the step from y_t, `before`, to y_{t+1}, `after`."""
    following = (1 + tf.sqrt(1 + 4 * sequence * sequence)) / 2
    ahead = structure.scale(
        (sequence - 1) / following, structure.subtract(after, before)
    )
    return own._replace(slots=[*own.slots, *tf.nest.flatten(ahead), following])
