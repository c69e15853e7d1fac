"""Scales of the inputs."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbilevel._core.arguments import require_choice
from tfbilevel._jobs.tuning.hyperparameter import Hyperparameter, Setting

PER = ("global", "per-feature")


class InputScale(Hyperparameter):
    r"""Factors of the inputs, v x, in training, validation and prediction.

    With a penalty on the weights, features that do not help get a small factor.
    The tuned network begins with a `keras.layers.Rescaling` of these factors.

    Args:
        per: "per-feature": one factor for each entry of the last axis (columns,
            channels). "global": one.
        start, range, name: see `tb.hyper.Hyperparameter`; on a log scale.
    """

    def __init__(
        self,
        per: str = "per-feature",
        start: Any = 1.0,
        range: tuple[float, float] = (0.01, 10.0),
        name: str | None = None,
    ):
        super().__init__(start, range, name, "log")
        self.per = per

    def entries(self, setting: Setting) -> Sequence[str] | None:
        require_choice(self.per, "per", PER)
        if self.per == "global":
            return None
        return [str(k) for k in range(setting.shape[-1])]

    def features(self, value: Any, x: Any, setting: Setting) -> Any:
        return x * tf.cast(value, x.dtype)

    def built_in(self, value: np.ndarray, network: keras.Model) -> keras.Model:
        # A list, which a saved model can hold.
        scale = keras.layers.Rescaling(np.asarray(value).tolist())
        shape = network.input_shape[1:]
        return keras.Sequential([keras.Input(shape), scale, network])
