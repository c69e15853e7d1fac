"""`tf.quantization.fake_quant_*` with the derivatives of their straight-through rule.

The rule passes a gradient to the input where it lies within the range, and to the
bounds elsewhere. TensorFlow declares that this has no derivative and drops that part.
"""

from typing import Any

import tensorflow as tf

from tfbilevel._workarounds.swap import Replacement, gradient


def _attributes(operation: Any, *names: str) -> dict:
    common = ("num_bits", "narrow_range")
    return {name: operation.get_attr(name) for name in (*names, *common)}


def _fixed_bounds(operation: Any, upstream: Any) -> list:
    inside = tf.raw_ops.FakeQuantWithMinMaxArgsGradient(
        gradients=tf.ones_like(upstream),
        inputs=operation.inputs[0],
        **_attributes(operation, "min", "max"),
    )
    return [upstream * inside]


def _learned_bounds(kernel: Any) -> Any:
    def of_inputs(operation: Any, upstream: Any) -> list:
        inputs, low, high = operation.inputs
        inside, *_ = kernel(
            gradients=tf.ones_like(upstream),
            inputs=inputs,
            min=low,
            max=high,
            **_attributes(operation),
        )
        outside = 1.0 - inside
        below = outside * tf.cast(inputs < (low + high) / 2.0, inputs.dtype)
        axes = list(range(inputs.shape.rank - low.shape.rank))
        return [
            upstream * inside,
            tf.reduce_sum(upstream * below, axes),
            tf.reduce_sum(upstream * (outside - below), axes),
        ]

    return of_inputs


REPLACEMENTS: list[Replacement] = [
    gradient("FakeQuantWithMinMaxArgs", _fixed_bounds),
    gradient(
        "FakeQuantWithMinMaxVars",
        _learned_bounds(tf.raw_ops.FakeQuantWithMinMaxVarsGradient),
    ),
    gradient(
        "FakeQuantWithMinMaxVarsPerChannel",
        _learned_bounds(tf.raw_ops.FakeQuantWithMinMaxVarsPerChannelGradient),
    ),
]
