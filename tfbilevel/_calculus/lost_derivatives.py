"""Operations whose second derivative TensorFlow lacks or has wrong."""

from collections.abc import Sequence
from typing import NamedTuple

FIRST_ORDER = (
    "a method that takes first derivatives only (tb.ValueGap, "
    "tb.Unroll(first_order=True), tb.FiniteDifference, tb.RankOne)"
)
ALIGNED = "a loss of labels that are aligned in time"
CUDNN = "use_cudnn=False in the recurrent layer"
PATCHES = "tf.reduce_max over tf.image.extract_patches"

# Operation, or function with a gradient of its own -> what to use instead.
INSTEAD = {
    "CTCLoss": ALIGNED,
    "CropAndResizeGradBoxes": "boxes that depend on no variable",
    "CudnnRNNBackprop": CUDNN,
    "CudnnRNNBackpropV2": CUDNN,
    "CudnnRNNBackpropV3": CUDNN,
    "Dilation2DBackpropFilter": PATCHES,
    "Dilation2DBackpropInput": PATCHES,
    "FractionalAvgPoolGrad": "tf.nn.avg_pool2d",
    "FractionalMaxPoolGrad": "tf.nn.max_pool2d",
    "HSVToRGB": "colours in RGB, changed by sums and products",
    "SparseFillEmptyRowsGrad": "tf.nn.embedding_lookup_sparse, no row empty",
    "ctc_loss_dense": ALIGNED,
    "grad_pass_through": (
        "x + tf.stop_gradient(f(x) - x), which has the value f(x) and takes f for the "
        "identity in derivatives of every order"
    ),
    "tf.stop_gradient": "a gradient without it, or tf.stop_gradient in the loss itself",
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
    if name == "PreventGradient":
        name = "CTCLoss"  # which is all that has one
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
