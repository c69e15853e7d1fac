"""Operations whose second derivative is missing or wrong in TensorFlow."""

from collections.abc import Sequence
from typing import NamedTuple

FIRST_ORDER = (
    "a method that takes first derivatives only (tb.ValueGap, "
    "tb.Unroll(first_order=True), tb.FiniteDifference, tb.RankOne)"
)
ALIGNED = "a loss of labels that are aligned in time"
CUDNN = "use_cudnn=False in the recurrent layer"
PATCHES = "tf.reduce_max over tf.image.extract_patches"

# Operation, or function with a custom gradient -> what to use instead.
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
    """An operation between a variable and the gradient of the lower loss.

    Attributes:
        name: TensorFlow's name of the operation, or of the Python function with a
            custom gradient.
        layer: its name scope, which begins with the names of the Keras model and the
            layer; "" if it has none.
        verdict: "missing": TensorFlow has no derivative of the operation, and the
            second derivative needs it. "wrong": TensorFlow has one, but it is wrong.
            "right": TensorFlow's is wrong or missing, and this library corrects it.
            "own": the function has a custom gradient, whose correctness only its
            author can judge.
        reason: the reason for the verdict.
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
        name = "CTCLoss"  # the only operation whose gradient contains it
    instead = INSTEAD.get(name, "other operations that compute the same")
    return Operation(name, layer, verdict, reason, instead)


class MissingSecondDerivativeError(ValueError):
    """A second derivative of the lower loss is missing or wrong in TensorFlow.

    Attributes:
        operations: the operations found, at least one.
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
