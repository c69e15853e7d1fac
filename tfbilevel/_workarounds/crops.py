"""`tf.image.crop_and_resize` with a second derivative in the image.

Its gradient in the image is the transpose of the crop; that has the crop for its
derivative, and the boxes' gradient of the crop. TensorFlow has no entry for it. Learned
boxes have a first derivative only.
"""

from typing import Any

import tensorflow as tf

from tfbilevel._workarounds.swap import gradient


def _cropped(operation: Any, upstream: Any) -> list:
    """Of CropAndResizeGradImage(gradient, boxes, index, size of the image)."""
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
