"""`tf.image.crop_and_resize` with a second derivative in the image.

The gradient in the image is the transpose of the crop. Its own derivatives are the crop
and the crop's gradient in the boxes, for which TensorFlow has no entry. Learned boxes
have a first derivative only.
"""

from typing import Any

import tensorflow as tf

from tfbilevel._workarounds.swap import gradient


def _cropped(operation: Any, upstream: Any) -> list:
    """The gradient of CropAndResizeGradImage(gradient, boxes, index, image size)."""
    grads, boxes, index, _ = operation.inputs
    crops = tf.raw_ops.CropAndResize(
        image=upstream,
        boxes=boxes,
        box_ind=index,
        crop_size=tf.shape(grads)[1:3],
        method=operation.get_attr("method"),
    )
    of_boxes = tf.raw_ops.CropAndResizeGradBoxes(
        grads=grads, image=upstream, boxes=boxes, box_ind=index
    )
    return [crops, of_boxes, None, None]


REPLACEMENTS = [gradient("CropAndResizeGradImage", _cropped)]
