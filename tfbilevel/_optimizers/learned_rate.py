"""Learning rates that are functions of the upper variables."""

from typing import Any

import keras
import tensorflow as tf

from tfbilevel._optimizers.update_rule import OptimizerState


def rated(state: OptimizerState, made: Any, lower: Any) -> tuple[OptimizerState, Any]:
    """The optimizer's state at a learned rate, and the rates of single entries (`None`
    if all entries have one rate)."""
    rate = state.learning_rate
    if not tf.nest.is_nested(made) and tf.convert_to_tensor(made).shape.rank == 0:
        return state._replace(learning_rate=tf.cast(made, rate.dtype)), None
    try:
        tf.nest.assert_same_structure(made, lower)
        rates = tf.nest.map_structure(
            lambda r, y: tf.broadcast_to(tf.cast(r, y.dtype), tf.shape(y)), made, lower
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            "`learned_rate` must return a scalar or rates that broadcast to the lower "
            "variables, in a nest like theirs. Return one rate, or one tensor for each "
            "lower variable. One rate per inner step is a function of two arguments, "
            f"(x, t), t the step. Received: {made!r} for {lower!r}"
        ) from error
    return state._replace(learning_rate=tf.ones_like(rate)), rates


def stretched(
    optimizer: keras.optimizers.Optimizer, rates: Any, before: Any, after: Any
) -> Any:
    """A step of rate 1, with each entry scaled by its own rate."""
    if isinstance(optimizer, keras.optimizers.Ftrl):
        raise ValueError(
            "`learned_rate` must return a scalar with Ftrl, whose shrinkage depends "
            "on the rate: its step is not a multiple of a step of rate 1. Use another "
            f"optimizer for rates of single entries. Received: {rates!r}"
        )
    return tf.nest.map_structure(
        lambda y, rate, z: y + rate * (z - y), before, rates, after
    )
