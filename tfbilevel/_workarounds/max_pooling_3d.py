"""Second derivatives of 3-D max pooling that keeps the size, which are wrong in graphs.

If result and argument have the same shape (a stride of 1, padding "same") and nothing
else uses the argument, TensorFlow's kernel overwrites the argument with its result and
then reads the argument. Eagerly the argument is always in use. With explicit padding
the shapes differ.
"""

from typing import Any

import tensorflow as tf

from tfbilevel._workarounds.swap import gradient


def max_pool_3d_grad(operation: Any, upstream: Any) -> list:
    """The gradient of MaxPool3DGrad(x, y, g), which is linear in g."""
    x, y, _ = operation.inputs
    zeros = [tf.zeros_like(x), tf.zeros_like(y)]
    ksize, strides = operation.get_attr("ksize"), operation.get_attr("strides")
    padding, data_format = (
        tf.compat.as_str(operation.get_attr(name))
        for name in ("padding", "data_format")
    )
    if padding == "SAME" and all(stride == 1 for stride in strides):
        around = [[(k - 1) // 2, k // 2] for k in ksize]
        x = tf.pad(x, around, constant_values=x.dtype.min)
        upstream, padding = tf.pad(upstream, around), "VALID"
    of_g = tf.raw_ops.MaxPool3DGradGrad(
        orig_input=x,
        orig_output=y,
        grad=upstream,
        ksize=ksize,
        strides=strides,
        padding=padding,
        data_format=data_format,
    )
    return [*zeros, of_g]


REPLACEMENTS = [gradient("MaxPool3DGrad", max_pool_3d_grad)]
