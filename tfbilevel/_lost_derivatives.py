"""Operations whose second derivative TensorFlow lacks or has wrong."""

from collections.abc import Sequence
from typing import NamedTuple

FIRST_ORDER = (
    "a method that takes first derivatives only (tb.ValueGap, "
    "tb.Unroll(first_order=True), tb.FiniteDifference, tb.RankOne)"
)
AS_CONSTANT = (
    "x + tf.stop_gradient(f(x) - x), which has the value f(x) and takes f for the "
    "identity in derivatives of every order"
)
SEGMENTS = "tf.math.segment_mean(tf.gather(params, indices), segment_ids)"

# Operation, or function with a gradient of its own -> what to use instead.
INSTEAD = {
    "CTCLoss": "keras.losses.CTC, or tf.nn.ctc_loss with dense labels",
    "CudnnRNNBackprop": "use_cudnn=False in the recurrent layer",
    "CudnnRNNBackpropV2": "use_cudnn=False in the recurrent layer",
    "CudnnRNNBackpropV3": "use_cudnn=False in the recurrent layer",
    "Dilation2DBackpropFilter": "tf.reduce_max over tf.image.extract_patches",
    "Dilation2DBackpropInput": "tf.reduce_max over tf.image.extract_patches",
    "FakeQuantWithMinMaxArgsGradient": AS_CONSTANT,
    "FakeQuantWithMinMaxVarsGradient": AS_CONSTANT,
    "FakeQuantWithMinMaxVarsPerChannelGradient": AS_CONSTANT,
    "FractionalAvgPoolGrad": "tf.nn.avg_pool2d",
    "FractionalMaxPoolGrad": "tf.nn.max_pool2d",
    "LRNGrad": (
        "x / (bias + alpha * tf.nn.conv2d(x**2, band, 1, 'SAME'))**beta with a "
        "constant 1 x 1 kernel `band` of ones near the diagonal"
    ),
    "MaxPoolGradWithArgmax": "tf.nn.max_pool2d for the values",
    "SparseSegmentMeanGrad": SEGMENTS,
    "SparseSegmentMeanGradV2": SEGMENTS,
    "SparseSegmentSqrtNGrad": SEGMENTS + " times the root of the counts",
    "SparseSegmentSqrtNGradV2": SEGMENTS + " times the root of the counts",
    "grad_pass_through": AS_CONSTANT,
    "recompute_grad": (
        "the function itself; memory is saved by tb.Unroll(memory='checkpoint') or "
        "tb.Implicit"
    ),
}


class Operation(NamedTuple):
    """An operation on the way from a variable to the gradient of the lower loss.

    Attributes:
        name: TensorFlow's name of the operation, or of the Python function with a
            gradient of its own.
        layer: the name scope it stands in, which begins with the Keras model's and
            the layer's names; "" in none.
        verdict: "missing": TensorFlow has no derivative of it, which the second
            derivative needs. "wrong": it has, and it is not the right one. "right":
            TensorFlow's is wrong or missing, and this library puts it right. "own":
            the derivative is that of a function's own gradient, which nobody but its
            author can vouch for.
        reason: why.
        instead: what to use instead; "" if nothing needs to be done.
    """

    name: str
    layer: str
    verdict: str
    reason: str
    instead: str

    @property
    def place(self) -> str:
        return f"in {self.layer!r}" if self.layer else "in no known layer"


def lost(name: str, layer: str, verdict: str, reason: str) -> Operation:
    """An operation that must be replaced."""
    instead = INSTEAD.get(name, "other operations that compute the same")
    return Operation(name, layer, verdict, reason, instead)


class MissingSecondDerivativeError(ValueError):
    """A second derivative of the lower loss that TensorFlow lacks or has wrong.

    Attributes:
        operations: what was found, at least one.
    """

    def __init__(self, operations: Sequence[Operation]):
        self.operations = tuple(operations)
        first, *others = self.operations
        has = "has no" if first.verdict == "missing" else "has a wrong"
        listed = "".join(f"; {one.name}, {one.place}" for one in others)
        super().__init__(
            f"The method takes second derivatives of the lower loss, and TensorFlow "
            f"{has} second derivative of {first.name}, {first.place}: {first.reason}. "
            f"Use {first.instead}; or {FIRST_ORDER}. "
            "tb.check_second_derivatives(...) lists all such operations. "
            f"Received: {first.name}, {first.place}{listed}"
        )
