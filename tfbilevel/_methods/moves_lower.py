"""Methods with a lower optimizer of their own."""

import functools

import keras

from tfbilevel._core.method import Method
from tfbilevel._optimizers.update_rule import UpdateRule


class MovesLower(Method):
    """A method whose step continues from the current y, by `lower_optimizer`."""

    lower_optimizer: keras.optimizers.Optimizer

    @functools.cached_property
    def rule(self) -> UpdateRule:
        """The update of `lower_optimizer`."""
        return UpdateRule(self.lower_optimizer, "lower_optimizer")

    @property
    def moves_lower(self) -> bool:
        return True
