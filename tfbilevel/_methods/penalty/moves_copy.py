"""First-order methods in a single loop, which move a second copy of y."""

import functools

import keras

from tfbilevel._methods.moves_lower import MovesLower
from tfbilevel._optimizers.update_rule import UpdateRule


class MovesCopy(MovesLower):
    """A method that also moves a copy of y, by `auxiliary_optimizer`."""

    auxiliary_optimizer: keras.optimizers.Optimizer | None

    @functools.cached_property
    def auxiliary_rule(self) -> UpdateRule:
        """The update of the copy."""
        if self.auxiliary_optimizer is None:
            return self.rule
        return UpdateRule(self.auxiliary_optimizer, "auxiliary_optimizer")

    @property
    def takes_second_derivatives(self) -> bool:
        return False
