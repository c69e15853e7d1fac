"""The context of all differentiation in the library: it corrects TensorFlow's faults.

Not corrected: operations whose first derivative has no derivative, which raise a
LookupError that names the operation. These are Dilation2D, FractionalMaxPool,
FractionalAvgPool, CropAndResize in its boxes, BlockLSTM, Igamma in a, RandomGamma,
SparseSlice, SparseFillEmptyRows and RaggedTensorToVariant; CTCLoss has an error of its
own. TensorFlow declares the derivative of SparseAddGrad to be zero, which is silently
wrong. HSVToRGB, AdjustHue and AdjustSaturation have no first derivative.
`tf.grad_pass_through` and every `tf.custom_gradient` have the derivatives of the
gradient that they were given.
"""

import contextlib
from collections.abc import Iterator

from tfbilevel._workarounds import (
    crops,
    fake_quantization,
    max_pooling_3d,
    moments,
    pooling_with_argmax,
    projective_transforms,
    recompute_grad,
    resizes,
    response_normalization,
    softmax_cross_entropy,
    softmax_outputs,
    softsign,
    sparse_segments,
    spectral_normalization,
)
from tfbilevel._workarounds.inline_functions import functions_inline
from tfbilevel._workarounds.swap import Swap

_right = Swap(
    [
        *crops.REPLACEMENTS,
        *fake_quantization.REPLACEMENTS,
        *max_pooling_3d.REPLACEMENTS,
        *moments.REPLACEMENTS,
        *pooling_with_argmax.REPLACEMENTS,
        *projective_transforms.REPLACEMENTS,
        *recompute_grad.REPLACEMENTS,
        *resizes.REPLACEMENTS,
        *response_normalization.REPLACEMENTS,
        *softmax_cross_entropy.REPLACEMENTS,
        *softmax_outputs.REPLACEMENTS,
        *softsign.REPLACEMENTS,
        *sparse_segments.REPLACEMENTS,
        *spectral_normalization.REPLACEMENTS,
    ]
)


@contextlib.contextmanager
def right_derivatives() -> Iterator[None]:
    """While it is open, TensorFlow's derivatives of every order are right.

    Function values are unchanged to the last bit. Everything that the library
    differentiates is evaluated and differentiated in this context, because a tape looks
    up an operation's gradient only when the gradient is computed. When the last user
    leaves, TensorFlow's own entries are restored. The user's `tf.function`s run as
    Python code, because they would keep the derivatives of their first trace.
    """
    with _right.in_use(), functions_inline():
        yield
