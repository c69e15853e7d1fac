"""`tf.sparse.segment_sum`, `_mean` and `_sqrt_n` with second derivatives.

Their gradient operations have no derivative in TensorFlow, and `tf.vectorized_map`
converts them wrongly where trailing segments are empty. They are replaced by a gather
and a sum over segments.
"""

from typing import Any

import tensorflow as tf

from tfbilevel._workarounds.swap import Replacement, gradient


def _spread(power: float) -> Any:
    """The gradient of segment sums, each divided by its size to the given power."""

    def of_data(operation: Any, upstream: Any) -> list:
        data, indices, segments, *_ = operation.inputs
        ones = tf.ones_like(segments, upstream.dtype)
        counts = tf.math.unsorted_segment_sum(ones, segments, tf.shape(upstream)[0])
        scale = tf.gather(tf.maximum(counts, 1.0) ** -power, segments)
        shape = tf.concat([tf.shape(scale), tf.ones_like(tf.shape(data)[1:])], 0)
        rows = tf.gather(upstream, segments) * tf.reshape(scale, shape)
        made = tf.math.unsorted_segment_sum(rows, indices, tf.shape(data)[0])
        return [made, *([None] * (len(operation.inputs) - 1))]

    return of_data


REPLACEMENTS: list[Replacement] = [
    gradient(f"SparseSegment{name}{suffix}", _spread(power))
    for name, power in (("Sum", 0.0), ("Mean", 1.0), ("SqrtN", 0.5))
    for suffix in ("", "WithNumSegments")
]
