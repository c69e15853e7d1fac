"""The upper variables: one layer that holds all hyperparameters."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbilevel._jobs.tuning.hyperparameter import Hyperparameter, Setting


class Values(keras.layers.Layer):
    """The values of hyperparameters, from one variable for each.

    Attributes:
        search: the hyperparameters.
        entries: name -> the names of its numbers; `None`: it is one number.
    """

    def __init__(self, search: Sequence[Hyperparameter], setting: Setting):
        super().__init__(dtype="float32", name="hyperparameters")
        self.search, self.entries, self._own = tuple(search), {}, []
        for one in search:
            names = one.entries(setting)
            self.entries[one.name] = names if names is None else tuple(names)
            shape = () if names is None else (len(names),)
            start = np.asarray(one.first(setting), np.float64)
            try:
                start = np.broadcast_to(start, shape)
            except ValueError as error:
                raise ValueError(
                    f"`start` of {one.name} must be one number"
                    + (f", or {shape[0]}, one for each of its entries" if shape else "")
                    + f". Received: shape {start.shape}"
                ) from error
            position = one.interval().position(start)
            weight = self.add_weight(name=one.name, shape=shape)
            weight.assign(position)
            self._own.append(weight)
        self.built = True

    def values(self) -> dict[str, Any]:
        """Name -> value, as tensors."""
        return {
            one.name: one.interval().value(tf.convert_to_tensor(weight.value))
            for one, weight in zip(self.search, self._own, strict=True)
        }

    def numbers(self) -> dict[str, np.ndarray]:
        """Name -> value, as arrays."""
        return {name: value.numpy() for name, value in self.values().items()}

    def positions(self) -> dict[str, np.ndarray]:
        """Name -> the variable without bounds, as an array."""
        pairs = zip(self.search, self._own, strict=True)
        return {one.name: weight.numpy() for one, weight in pairs}

    def assign(self, positions: dict[str, np.ndarray]) -> None:
        """Set the variables."""
        for one, weight in zip(self.search, self._own, strict=True):
            weight.assign(positions[one.name])

    def options(self) -> dict[str, Any]:
        """All options of the optimizer."""
        return options_of(self.search, self.values())


def options_of(
    search: Sequence[Hyperparameter], values: dict[str, Any]
) -> dict[str, Any]:
    """The options of the optimizer at these values."""
    return {k: v for one in search for k, v in one.options(values[one.name]).items()}
