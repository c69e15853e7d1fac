"""The optimizer that trains the network."""

from collections.abc import Sequence
from typing import Any

import keras

from tfbilevel._jobs.tuning.hyperparameter import Hyperparameter
from tfbilevel._jobs.tuning.optimizer_options import OptimizerOption
from tfbilevel._optimizers.update_rule import UpdateRule, configuration, optimizer_of

RATE = 1e-3
UPPER_RATE = 0.1


def optimizer_for(
    model: Any, given: Any, search: Sequence[Hyperparameter], steps: int
) -> keras.optimizers.Optimizer:
    """The tuner's optimizer, that of a compiled model, or the default.

    Args:
        model, given: of the tuner.
        search: what is learned.
        steps: number of training steps; the default's rate ends at zero.
    """
    if given is None and isinstance(model, keras.Model) and model.compiled:
        given = model.optimizer
    learned = {one.option for one in search if isinstance(one, OptimizerOption)}
    if given is None:
        decay = keras.optimizers.schedules.CosineDecay(RATE, steps)
        rate: Any = RATE if "learning_rate" in learned else decay
        if "weight_decay" in learned:
            return keras.optimizers.AdamW(rate)
        if "momentum" in learned:
            return keras.optimizers.SGD(0.05, momentum=0.9)
        return keras.optimizers.Adam(rate)
    optimizer = optimizer_of(given, "optimizer")
    rule = UpdateRule(optimizer)  # raises for one that cannot be differentiated
    if "learning_rate" in learned and rule.scheduled:
        raise ValueError(
            "`optimizer` must have a number as its rate where the learning rate is "
            "learned. Replace its schedule by a number. Received: "
            f"{type(optimizer).__name__} with a LearningRateSchedule"
        )
    return optimizer


def upper_optimizer(
    given: Any, warmup: float, steps: int
) -> keras.optimizers.Optimizer:
    """The optimizer of the hyperparameters: a copy of the tuner's, or the default.

    Args:
        given: of the tuner. A copy, because Keras's serve one set of variables only.
        warmup: the share of the steps without a change.
        steps: number of all steps.
    """
    if given is not None:
        optimizer = optimizer_of(given, "upper_optimizer")
        if not isinstance(optimizer, keras.optimizers.Optimizer):
            return optimizer  # `BilevelModel.compile` says what is wrong
        return with_options(optimizer, {})
    rate: Any = UPPER_RATE
    if round(warmup * steps):
        rate = keras.optimizers.schedules.PiecewiseConstantDecay(
            [round(warmup * steps) - 1], [0.0, UPPER_RATE]
        )
    # A short memory: hypergradients of the beginning are much larger than later ones.
    return keras.optimizers.Adam(rate, beta_2=0.9)


def with_options(
    optimizer: keras.optimizers.Optimizer, options: dict[str, float]
) -> keras.optimizers.Optimizer:
    """A new optimizer like this one, with other values of some options."""
    return type(optimizer).from_config(configuration(optimizer) | options)
