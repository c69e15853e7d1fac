"""Checks of an inner solver's learning rates and learned options."""

from typing import Any

from tfbilevel._core.schedules import is_schedule


def is_function(rate: Any) -> bool:
    """Whether the rate is a function of the upper variables, not a schedule."""
    return callable(rate) and not is_schedule(rate)


def require_rates(inner: Any) -> None:
    """Raise unless the rate is set in at most one of the three possible ways, and
    options that are learned are a function."""
    rate, learned = inner.learning_rate, inner.learned_rate
    if rate is not None and not is_schedule(rate):
        raise ValueError(
            "`learning_rate` must be a schedule of the outer step, such as "
            "tb.CosineDecay(0.1, 0.01, 1000). Set a constant rate on the optimizer "
            "instead; one rate per inner step too: "
            "keras.optimizers.schedules.PiecewiseConstantDecay. "
            f"Received: learning_rate={rate!r}"
        )
    if learned is not None and not is_function(learned):
        raise ValueError(
            "`learned_rate` must be a function of the upper variables. A schedule of "
            "the outer step is a `learning_rate`. "
            f"Received: learned_rate={learned!r}"
        )
    if rate is not None and learned is not None:
        raise ValueError(
            "`learning_rate` and `learned_rate` exclude each other. Give one of them. "
            f"Received: learning_rate={rate!r}, "
            f"learned_rate={learned!r}"
        )
    if inner.rule.scheduled and not (rate is None and learned is None):
        name = "learning_rate" if learned is None else "learned_rate"
        raise ValueError(
            f"`{name}` and a LearningRateSchedule of the optimizer exclude each other. "
            f"Give the optimizer a number. Received: optimizer={inner.optimizer!r}"
        )
    options = inner.hyperparameters
    if options is not None and not is_function(options):
        raise ValueError(
            "`hyperparameters` must be a function of the upper variables that returns "
            "options of the optimizer, such as lambda x: {'momentum': tf.sigmoid(x)}. "
            f"Set constants on the optimizer. Received: hyperparameters={options!r}"
        )
