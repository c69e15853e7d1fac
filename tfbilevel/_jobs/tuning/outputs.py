"""The outputs of a network: their losses, targets and predictions."""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbilevel._jobs.labels import Classes, classes_of
from tfbilevel._jobs.networks import log_probabilities

CROSS_ENTROPIES = {
    "categorical_crossentropy",
    "sparse_categorical_crossentropy",
    "CategoricalCrossentropy",
    "SparseCategoricalCrossentropy",
}


@dataclasses.dataclass(frozen=True)
class Output:
    """One output of the network.

    Attributes:
        loss: (targets, outputs) -> losses, for a regression.
        classes: those of a classification, whose loss is the cross-entropy; else
            `None`.
        probabilities: whether the network ends with a softmax.
    """

    loss: Callable | None
    classes: Classes | None
    probabilities: bool = False

    def targets(self, y: Any, argument: str) -> np.ndarray:
        """One row of class probabilities per example, or the numbers, float32."""
        if self.classes is None:
            return _numbers(y, argument)
        rows = np.eye(len(self.classes), dtype=np.float32)
        return rows[self.classes.indices(y, argument)]

    def losses(self, targets: Any, outputs: Any) -> tf.Tensor:
        """The loss of each example, [n]."""
        if self.loss is None:
            logs = log_probabilities(outputs, self.probabilities)
            return -tf.reduce_sum(tf.cast(targets, logs.dtype) * logs, axis=-1)
        outputs = tf.convert_to_tensor(outputs)
        losses = self.loss(tf.reshape(targets, tf.shape(outputs)), outputs)
        return tf.reduce_mean(tf.reshape(losses, [tf.shape(outputs)[0], -1]), axis=1)

    def score(self, targets: np.ndarray, outputs: np.ndarray) -> float:
        """The accuracy, or R^2, 1 - (mean square of the errors) / variance."""
        if self.classes is not None:
            return float(np.mean(outputs.argmax(-1) == targets.argmax(-1)))
        outputs = outputs.reshape(targets.shape)
        spread = np.square(targets - targets.mean(axis=0)).sum()
        return float(1 - np.square(targets - outputs).sum() / spread)

    @property
    def metric(self) -> str:
        return "r2" if self.classes is None else "accuracy"


def output_of(loss: Any, labels: list, arguments: tuple[str, ...]) -> Output:
    """The kind of one output, from its loss and all labels that are known.

    Args:
        loss: a Keras loss or its name; `None`: cross-entropy for labels that are
            integers, text or one-hot rows, else the mean squared error.
        labels: arrays of labels.
        arguments: their names, for errors.
    """
    if loss is None:
        if all(_are_numbers(each) for each in labels):
            return Output(keras.losses.mean_squared_error, None)
        return Output(None, classes_of(*labels, arguments=arguments))
    if name_of(loss) in CROSS_ENTROPIES:
        return Output(None, classes_of(*labels, arguments=arguments))
    return Output(_per_example(loss), None)


def name_of(loss: Any) -> str:
    if isinstance(loss, str):
        return loss
    if isinstance(loss, keras.losses.Loss):
        return type(loss).__name__
    return getattr(loss, "__name__", type(loss).__name__)


def _per_example(loss: Any) -> Callable:
    try:
        found = keras.losses.get(loss)
    except ValueError as error:
        raise ValueError(
            "`loss` must be a Keras loss, its name, or a function of (targets, "
            f"outputs). Received: loss={loss!r}"
        ) from error
    # The function of a Keras loss has no reduction over examples.
    return found.call if isinstance(found, keras.losses.Loss) else found


def _are_numbers(labels: Any) -> bool:
    """Whether they are numbers of a regression: floating, and no one-hot rows."""
    array = np.asarray(labels)
    if array.dtype.kind != "f":
        return False
    one_hot = array.ndim == 2 and array.shape[1] > 1 and np.isin(array, (0, 1)).all()
    return not (one_hot and (array.sum(axis=1) == 1).all())


def _numbers(y: Any, argument: str) -> np.ndarray:
    try:
        array = np.asarray(y, np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`{argument}` must hold numbers for this loss. Received: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if not np.isfinite(array).all():
        raise ValueError(
            f"`{argument}` must not hold NaN or infinity. Remove these rows. "
            f"Received: {np.count_nonzero(~np.isfinite(array))} such numbers"
        )
    return array
