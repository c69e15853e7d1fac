"""Non-trainable state, which is fixed within an outer step and updated after it."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf


def assigned(variable: Any, value: Any) -> None:
    variable.assign(value)


def moved_on(
    evaluate: Callable[[Any], Any],
    held: list,
    lower: Any,
    trained: list,
    steps: int,
    assign: Callable[[Any, Any], None] = assigned,
) -> None:
    """Assign what evaluations of the lower loss write to statistics and seeds.

    One evaluation at given lower variables updates the seeds and most statistics. The
    moving statistics of the lower model are updated by `steps` evaluations, each on the
    batch of its inner step, because a training loop would update them at every step.

    Args:
        evaluate: number of the lower batch -> anything; calls the models.
        held: the variables that may be written.
        lower: the lower model.
        trained: pairs (variable, value) at which the loss is evaluated.
        steps: number of steps that the lower variables made.
        assign: (variable, value) -> assigns what was written.
    """

    def evaluated(draw: Any, state: list) -> list:
        with keras.StatelessScope([*trained, *state]) as scope:
            evaluate(draw)
        return [scope.get_current_value(variable) for variable in held]

    values = evaluated(0, [])
    written = [(v, new) for v, new in zip(held, values, strict=True) if new is not None]
    own = {id(variable) for variable in lower.variables}
    moving = [(v, new) for v, new in written if id(v) in own and "float" in v.dtype]
    if moving and steps > 1:
        variables, begun = (list(part) for part in zip(*moving, strict=True))

        def body(t: tf.Tensor, now: list) -> tuple:
            state = list(zip(variables, now, strict=True))
            after = dict(zip(map(id, held), evaluated(t, state), strict=True))
            return t + 1, [after[id(variable)] for variable in variables]

        _, ended = tf.while_loop(
            lambda t, now: t < steps,
            body,
            (tf.constant(1), begun),
            maximum_iterations=steps - 1,
            parallel_iterations=1,
        )
        for variable, value in zip(variables, ended, strict=True):
            assign(variable, value)
        done = {id(variable) for variable in variables}
        written = [(v, new) for v, new in written if id(v) not in done]
    for variable, value in written:
        assign(variable, value)
