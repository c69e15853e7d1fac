"""Where every derivative of the library is taken: TensorFlow's faults made right."""

import contextlib
from collections.abc import Iterator

from tfbilevel._workarounds import (
    moments,
    resizes,
    softmax_cross_entropy,
    softsign,
)
from tfbilevel._workarounds.inline_functions import functions_inline
from tfbilevel._workarounds.swap import Swap

_right = Swap(
    [
        *moments.REPLACEMENTS,
        *resizes.REPLACEMENTS,
        *softmax_cross_entropy.REPLACEMENTS,
        *softsign.REPLACEMENTS,
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
