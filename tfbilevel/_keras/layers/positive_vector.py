"""Learned numbers, each through an activation."""

from typing import Any

import keras

from tfbilevel._core.arguments import require_count
from tfbilevel._keras.layers.upper_layer import UpperLayer


class PositiveVector(UpperLayer):
    """activation(x) for a learned vector x that starts at zero."""

    def __init__(self, n: int, activation: str, **keywords: Any):
        require_count(n, "n")
        super().__init__(**keywords)
        self.n = n
        self.activation = keras.activations.get(activation)
        self.logits = self.add_weight(name="logits", shape=(n,), initializer="zeros")
        self.built = True

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "n": self.n,
            "activation": keras.activations.serialize(self.activation),
        }
