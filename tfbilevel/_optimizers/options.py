"""Numbers among an optimizer's options, given as tensors instead of constants."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

# Of these, Keras asks whether the momentum is zero before each update.
WITH_MOMENTUM = (keras.optimizers.SGD, keras.optimizers.RMSprop)
# Options that no update reads, or whose derivative is zero: Lion takes a sign.
_NONE = ("ema_momentum", "initial_accumulator_value")
_NONE_OF_LION = ("beta_1", "beta_2")


def option_names(optimizer: keras.optimizers.Optimizer) -> list[str]:
    """The options that can be tensors, besides the learning rate."""
    without = _NONE
    if isinstance(optimizer, keras.optimizers.Lion):
        without += _NONE_OF_LION
    numbers = (k for k, v in vars(optimizer).items() if isinstance(v, float))
    return sorted({*numbers, "weight_decay"} - {*without})


def with_options(
    optimizer: keras.optimizers.Optimizer, options: dict[str, Any]
) -> keras.optimizers.Optimizer:
    """The same optimizer with other options; it shares its variables."""
    twin = object.__new__(type(optimizer))
    vars(twin).update(vars(optimizer))
    if isinstance(optimizer, WITH_MOMENTUM) and "momentum" in options:
        # Keras's own update is then that without momentum, which `_moved` adds.
        options = {**options, "momentum": 0.0, "factor": options["momentum"]}
    vars(twin).update(options)
    return twin


def momentum_methods(kind: type) -> dict[str, Callable]:
    """Methods of an optimizer whose momentum is a tensor, `factor`.

    v <- factor v + d,      w <- w - v,     with Nesterov   w <- w - (factor v + d)

    d is the step without momentum: Keras subtracts it from a variable by `assign_sub`,
    and uses `assign_sub` for nothing else.
    """
    if not issubclass(kind, WITH_MOMENTUM):
        return {}

    def assign_sub(self: Any, variable: Any, step: Any) -> None:
        index = self._get_variable_index(variable)
        slot = self.momentums if hasattr(self, "momentums") else self._momentums
        factor = tf.cast(self.factor, variable.dtype)
        velocity = factor * slot[index].value + step
        slot[index].assign(velocity)
        if getattr(self, "nesterov", False):
            velocity = factor * velocity + step
        variable.assign(variable.value - velocity)

    return {"assign_sub": assign_sub}
