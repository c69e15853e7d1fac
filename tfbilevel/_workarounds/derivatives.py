"""Where every derivative of the library is taken: TensorFlow's faults made right.

Left as they are, with a first derivative that cannot be differentiated, which ends in a
LookupError that names the operation: Dilation2D, FractionalMaxPool, FractionalAvgPool,
CropAndResize in its boxes, BlockLSTM, Igamma in a, RandomGamma, SparseSlice,
SparseFillEmptyRows, RaggedTensorToVariant; CTCLoss says so itself. SparseAddGrad has an
entry that says that it is constant, and is silently wrong. HSVToRGB, AdjustHue and
AdjustSaturation have no first derivative. `tf.grad_pass_through` and every
`tf.custom_gradient` have the derivatives of the gradient that they were given.
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
    """While it is open, TensorFlow has the right derivatives, as often as one likes.

    Same values, to the last bit. What the library differentiates is evaluated in here,
    and differentiated in here: the gradient of an operation is looked up when the tape
    is asked for it. The last one to leave puts back what TensorFlow had. The user's
    `tf.function`s run as Python code, since they keep the derivatives they were first
    differentiated with.
    """
    with _right.in_use(), functions_inline():
        yield
