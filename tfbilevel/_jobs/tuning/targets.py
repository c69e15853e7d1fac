"""Targets and losses: smooth labels, weights of classes and of outputs."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tfbilevel._jobs.tuning.hyperparameter import Hyperparameter, Setting


class LabelSmoothing(Hyperparameter):
    r"""Training labels (1 - v) y + v / K, for K classes.

    Args:
        start, range, name: see `tb.hyper.Hyperparameter`; on a linear scale.

    Example:
        >>> tb.hyper.LabelSmoothing(start=0.05, range=(0.0, 0.5)).name
        'label_smoothing'
    """

    def __init__(
        self,
        start: float = 0.05,
        range: tuple[float, float] = (0.0, 0.5),
        name: str | None = None,
    ):
        super().__init__(start, range, name)

    def entries(self, setting: Setting) -> Sequence[str] | None:
        _require_classes(self, setting)
        return None

    def examples(self, value: Any, x: Any, y: Any, setting: Setting) -> tuple[Any, Any]:
        smooth = [
            target if k is None else (1 - value) * target + value / k
            for target, k in zip(tf.nest.flatten(y), setting.classes, strict=True)
        ]
        return x, tf.nest.pack_sequence_as(y, smooth)


class ClassWeights(Hyperparameter):
    r"""Weights of the classes in the training loss, v_k / mean(v).

    An example with class probabilities y has the weight sum_k y_k v_k / mean(v). For a
    network with one output.

    Args:
        start, range, name: see `tb.hyper.Hyperparameter`; on a log scale. `start` is
            one number, or one for each class.
    """

    def __init__(
        self,
        start: Any = 1.0,
        range: tuple[float, float] = (0.1, 10.0),
        name: str | None = None,
    ):
        super().__init__(start, range, name, "log")

    def entries(self, setting: Setting) -> Sequence[str] | None:
        _require_classes(self, setting)
        if len(setting.classes) > 1:
            raise ValueError(
                f"`search` must not hold {self.name} for a network with several "
                "outputs. Use tb.hyper.LossWeights, or a network with one output. "
                f"Received: {len(setting.classes)} outputs"
            )
        return [str(k) for k in range(sum(k or 0 for k in setting.classes))]

    def losses(self, value: Any, losses: list, y: Any, setting: Setting) -> list:
        weights = value / tf.reduce_mean(value)
        return [losses[0] * tf.linalg.matvec(tf.nest.flatten(y)[0], weights)]


class LossWeights(Hyperparameter):
    r"""Weights of a network's outputs in the training loss, v_k / mean(v).

    The validation loss is the plain sum of the outputs' losses, or, with `main`, the
    loss of this output alone: the others are then auxiliary tasks.

    Args:
        start, range, name: see `tb.hyper.Hyperparameter`; on a log scale.
        main: the number of the output that counts; `None`: all.
    """

    def __init__(
        self,
        start: Any = 1.0,
        range: tuple[float, float] = (0.01, 100.0),
        name: str | None = None,
        main: int | None = None,
    ):
        super().__init__(start, range, name, "log")
        self.main = main

    def entries(self, setting: Setting) -> Sequence[str] | None:
        outputs = len(setting.classes)
        if outputs < 2:
            raise ValueError(
                f"`search` must not hold {self.name} for a network with one output. "
                "Leave it out. Received: 1 output"
            )
        if self.main is not None and self.main not in range(outputs):
            raise ValueError(
                f"`main` of {self.name} must be the number of an output, 0 to "
                f"{outputs - 1}. Received: main={self.main!r}"
            )
        return [str(k) for k in range(outputs)]

    def losses(self, value: Any, losses: list, y: Any, setting: Setting) -> list:
        weights = tf.unstack(value / tf.reduce_mean(value))
        return [w * loss for w, loss in zip(weights, losses, strict=True)]

    def validation_losses(self, losses: list) -> list:
        return losses if self.main is None else [losses[self.main]]


def _require_classes(one: Hyperparameter, setting: Setting) -> None:
    if all(k is None for k in setting.classes):
        raise ValueError(
            f"`search` must hold {one.name} for a classification only. Leave it out. "
            "Received: a regression"
        )
