"""`ImageProjectiveTransform`, used by Keras's affine and random geometric layers, with
a correct gradient.

The transform is linear in the images. As its transpose, TensorFlow uses the transform
by the inverse matrix, which is not the transpose where it interpolates: even the first
derivative is wrong, by as much as the interpolation smooths. This file finds the source
pixels of each output and adds the gradient there: four scatters for a bilinear
transform, one for nearest neighbours. The matrices get no gradient, as in TensorFlow.
"""

from typing import Any

import tensorflow as tf

from tfbilevel._workarounds.swap import Replacement, gradient


def _transposed(operation: Any, upstream: Any) -> list:
    images = operation.inputs[0]
    count, height, width, channels = tf.unstack(tf.shape(images))
    # The pixels of all images in one column.
    offset = tf.reshape(tf.range(count) * height * width, [-1, 1, 1])
    total = tf.zeros([count * height * width, channels], upstream.dtype)
    for index, weight in _sources(operation, upstream):
        part = upstream * tf.cast(weight, upstream.dtype)[..., None]
        total += tf.math.unsorted_segment_sum(
            tf.reshape(part, [-1, channels]),
            tf.reshape(offset + index, [-1]),
            count * height * width,
        )
    made = tf.reshape(total, tf.shape(images))
    return [made, *([None] * (len(operation.inputs) - 1))]


def _sources(operation: Any, outputs: Any) -> list:
    """Pairs of [n, height, width]: the pixel that each output reads, and its weight."""
    images = operation.inputs[0]
    count, height, width, _ = tf.unstack(tf.shape(images))
    row, column = tf.meshgrid(tf.range(height), tf.range(width), indexing="ij")

    def transformed(image: Any) -> Any:
        """The image transformed by TensorFlow's kernel; -1 where it reads nothing."""
        image = tf.cast(image, tf.float32)
        return tf.raw_ops.ImageProjectiveTransformV3(
            images=tf.broadcast_to(image[None, ..., None], [count, height, width, 1]),
            transforms=operation.inputs[1],
            output_shape=tf.shape(outputs)[1:3],
            fill_value=-1.0,
            interpolation=operation.get_attr("interpolation"),
            fill_mode=operation.get_attr("fill_mode"),
        )[..., 0]

    if _text(operation.get_attr("interpolation")) == "NEAREST":
        index = tf.cast(tf.round(transformed(row * width + column)), tf.int32)
        return [(tf.maximum(index, 0), index >= 0)]
    if _text(operation.get_attr("fill_mode")) == "CONSTANT":
        y, x = _positions(operation.inputs[1], outputs)
    else:  # within the image, interpolating the coordinates gives the position
        y, x = transformed(row), transformed(column)

    sources = []
    for top in (tf.floor(y), tf.floor(y) + 1.0):
        for left in (tf.floor(x), tf.floor(x) + 1.0):
            weight = (1.0 - tf.abs(y - top)) * (1.0 - tf.abs(x - left))
            i, j = tf.cast(top, tf.int32), tf.cast(left, tf.int32)
            there = (i >= 0) & (i < height) & (j >= 0) & (j < width)
            index = tf.where(there, i * width + j, 0)
            sources.append((index, tf.where(there, weight, 0.0)))
    return sources


def _positions(transforms: Any, outputs: Any) -> tuple[Any, Any]:
    """Where an output lies in the image: (a0 x + a1 y + a2) / (c0 x + c1 y + 1), ..."""
    height, width = tf.unstack(tf.cast(tf.shape(outputs)[1:3], tf.float32))
    y, x = tf.meshgrid(tf.range(height), tf.range(width), indexing="ij")
    a, b, c, d, e, f, g, h = tf.unstack(transforms[:, None, None, :], axis=-1)
    depth = g * x + h * y + 1.0
    far = tf.constant(-10.0)  # outside the image: reads nothing
    at_y = tf.where(depth == 0.0, far, (d * x + e * y + f) / depth)
    at_x = tf.where(depth == 0.0, far, (a * x + b * y + c) / depth)
    # Far positions would overflow integers.
    limit = tf.cast(2**30, tf.float32)
    return tf.clip_by_value(at_y, -limit, limit), tf.clip_by_value(at_x, -limit, limit)


def _text(attribute: Any) -> str:
    text = attribute.decode() if isinstance(attribute, bytes) else attribute
    return text.upper() or "CONSTANT"  # an empty fill mode


REPLACEMENTS: list[Replacement] = [
    gradient("ImageProjectiveTransformV2", _transposed),
    gradient("ImageProjectiveTransformV3", _transposed),
]
