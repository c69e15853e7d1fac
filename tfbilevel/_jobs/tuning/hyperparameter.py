"""What a hyperparameter is, for those that are ready and for a user's own."""

import contextlib
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from tfbilevel._jobs.tuning.interval import SCALES, Interval


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
    """What a hyperparameter may read of the job.

    Attributes:
        network: the network that is trained.
        classes: the number of classes of each output; `None` for a regression.
        deviation: the standard deviation of the training inputs.
        shape: the shape of one example.
        optimizer: the optimizer that trains the network.
    """

    network: keras.Model
    classes: tuple[int | None, ...]
    deviation: float
    shape: tuple[int, ...]
    optimizer: keras.optimizers.Optimizer


class Hyperparameter:
    r"""A number, or several, that `tb.HyperparameterTuner` learns.

    The value v lies in a range from a to b. An upper variable u without bounds moves
    it:

        linear       v = a + (b - a) sigmoid(u)
        log          v = a (b / a)^sigmoid(u)
        complement   1 - v on a log scale, for numbers close below one

    To write your own, override one of the methods below; `value` is a tensor, a scalar
    or one number for each of `entries`. Use differentiable TensorFlow operations: the
    result is differentiated in the value and in the weights.

    - `examples(value, x, y, setting) -> (x, y)`: changes a training batch
      (augmentation). y has one row of class probabilities per example, or numbers.
    - `features(value, x, setting) -> x`: changes the inputs in training, validation and
      prediction alike; override `built_in` too.
    - `losses(value, losses, y, setting) -> losses`: changes the training losses, a list
      with one tensor [n] for each output of the network.
    - `penalty(value, setting) -> scalar`: is added to the training loss.
    - `options(value) -> {name: scalar}`: options of the optimizer.
    - `during(value, setting)`: a context in which the network is called in training.
    - `entries(setting) -> names`: of the numbers, if there are several; `None` (the
      default): one number. Raise a `ValueError` if the hyperparameter does not fit.

    Args:
        start: the first value; in a range on a linear scale an end of the range is
            moved inside by 2 percent of it, because the derivative at an end is zero.
        range: the smallest and the largest value, (a, b).
        name: its name in the results; `None`: made of the name of the class.
        scale: "linear", "log" or "complement".

    Example:
        >>> class Hue(tb.hyper.Hyperparameter):
        ...     def __init__(self, start=0.1, range=(0.0, 0.5)):
        ...         super().__init__(start, range)
        ...     def examples(self, value, x, y, setting):
        ...         shift = tf.random.normal([tf.shape(x)[0], 1, 1, x.shape[-1]])
        ...         return x + value * shift, y
        >>> Hue().name
        'hue'
    """

    def __init__(
        self,
        start: Any,
        range: tuple[float, float],
        name: str | None = None,
        scale: str = "linear",
    ):
        self.start, self.range, self.scale = start, range, scale
        self.name = name or _snake(type(self).__name__)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(start={self.start!r}, range={self.range!r})"

    def entries(self, setting: Setting) -> Sequence[str] | None:
        """The names of its numbers; `None`: it is one number."""
        return None

    def first(self, setting: Setting) -> Any:
        """The value at the start."""
        return self.start

    def examples(self, value: Any, x: Any, y: Any, setting: Setting) -> tuple[Any, Any]:
        """A changed training batch."""
        return x, y

    def features(self, value: Any, x: Any, setting: Setting) -> Any:
        """Inputs changed everywhere."""
        return x

    def losses(self, value: Any, losses: list, y: Any, setting: Setting) -> list:
        """Changed training losses, [n] for each output."""
        return losses

    def validation_losses(self, losses: list) -> list:
        """The validation losses that count, [n] for each output."""
        return losses

    def penalty(self, value: Any, setting: Setting) -> Any:
        """A term of the training loss, or `None`."""
        return None

    def options(self, value: Any) -> dict[str, Any]:
        """Options of the optimizer."""
        return {}

    def during(self, value: Any, setting: Setting) -> Any:
        """A context in which the network is called in training."""
        return contextlib.nullcontext()

    def built_in(self, value: np.ndarray, network: keras.Model) -> keras.Model:
        """The trained network with the value in it, to predict and to train on."""
        return network

    def interval(self) -> Interval:
        """Its range.

        Raises:
            ValueError: for a start outside of the range, or a range that is none.
        """
        if self.scale not in SCALES:
            raise ValueError(
                f"`scale` of {self.name} must be one of {', '.join(SCALES)}. "
                f"Received: scale={self.scale!r}"
            )
        return Interval(self.name, *_pair(self.name, self.range), self.scale)


def _pair(name: str, value: Any) -> tuple[float, float]:
    try:
        low, high = (float(v) for v in value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`range` of {name} must be two numbers, (smallest, largest). "
            f"Received: range={value!r}"
        ) from error
    return low, high


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
