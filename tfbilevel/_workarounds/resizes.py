"""Resizes of images with second derivatives.

A resize is linear in the image, and its gradient operation is linear in the gradient
that it receives: each is the derivative of the other. TensorFlow has no such entry for
nearest neighbours, bicubic resizes and `ScaleAndTranslate` (`antialias=True`). It
declares that the bilinear resize's gradient has no derivative, which silently drops
that part.

The kernels are TensorFlow's. XLA supports only those of the bilinear resize, and
`ScaleAndTranslate` has no float64 kernel: such a loss raises TensorFlow's error, as it
would without this library.
"""

from typing import Any

import tensorflow as tf

from tfbilevel._workarounds.swap import Replacement, gradient


def _bilinear(operation: Any, upstream: Any) -> list:
    """The gradient of the resize, with a derivative of its own.

    An eager tape does not record the gradient operation, since TensorFlow declares that
    it has no derivative. Its derivative can therefore not be registered as an entry and
    is attached as a custom gradient.
    """
    image, resized = operation.inputs[0], tf.shape(upstream)[1:3]
    how = {
        "align_corners": operation.get_attr("align_corners"),
        "half_pixel_centers": operation.get_attr("half_pixel_centers"),
    }

    @tf.custom_gradient
    def transposed(grads: Any) -> Any:
        def of_grads(upstream: Any) -> Any:
            return tf.raw_ops.ResizeBilinear(images=upstream, size=resized, **how)

        fixed = tf.stop_gradient(image)  # only its shape is read
        made = tf.raw_ops.ResizeBilinearGrad(grads=grads, original_image=fixed, **how)
        return made, of_grads

    return [transposed(upstream), None]


def _of_gradient(forward: Any) -> Any:
    def resized(operation: Any, upstream: Any) -> list:
        """The gradient of `XxxGrad(gradient, image or its size)`: the resize itself."""
        made = forward(
            images=upstream,
            size=tf.shape(operation.inputs[0])[1:3],
            align_corners=operation.get_attr("align_corners"),
            half_pixel_centers=operation.get_attr("half_pixel_centers"),
        )
        return [made, None]

    return resized


def _scaled_and_translated(operation: Any, upstream: Any) -> list:
    grads, _, scale, translation = operation.inputs
    made = tf.raw_ops.ScaleAndTranslate(
        images=upstream,
        size=tf.shape(grads)[1:3],
        scale=scale,
        translation=translation,
        kernel_type=operation.get_attr("kernel_type"),
        antialias=operation.get_attr("antialias"),
    )
    return [made, None, None, None]


REPLACEMENTS: list[Replacement] = [
    gradient("ResizeBilinear", _bilinear),
    gradient(
        "ResizeNearestNeighborGrad", _of_gradient(tf.raw_ops.ResizeNearestNeighbor)
    ),
    gradient("ResizeBicubicGrad", _of_gradient(tf.raw_ops.ResizeBicubic)),
    gradient("ScaleAndTranslateGrad", _scaled_and_translated),
]
