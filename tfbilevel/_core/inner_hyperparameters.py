"""Options of an inner optimizer that are functions of the upper variables."""

from typing import Any

import tensorflow as tf

from tfbilevel._calculus.aliases import Nest
from tfbilevel._core.arguments import takes_two
from tfbilevel._core.prepared import Prepared
from tfbilevel._optimizers.learned_rate import rated, stretched
from tfbilevel._optimizers.options import option_names
from tfbilevel._optimizers.update_rule import OptimizerState

RATE = "learning_rate"


def named_options(inner: Any, problem: Any, upper: Nest) -> dict[str, Any]:
    """The inner optimizer's learned options, by their names; none without a function.

    Raises:
        ValueError: for a name that the optimizer does not have, a value that is not a
            floating scalar, or a learning rate that is also set elsewhere.
    """
    if inner.hyperparameters is None:
        return {}
    made = problem._reading(inner.hyperparameters, upper)
    if not isinstance(made, dict):
        raise ValueError(
            "`hyperparameters` must return a dictionary of scalars, such as "
            f"{{'momentum': m}}. Received: {type(made).__name__}"
        )
    names = [RATE, *option_names(inner.optimizer)]
    for name, value in made.items():
        if name not in names:
            raise ValueError(
                f"`hyperparameters` must name options of the inner optimizer that can "
                f"be learned: {type(inner.optimizer).__name__} has {', '.join(names)}. "
                f"Received: {name!r}"
            )
        value = tf.convert_to_tensor(value)
        if value.shape.rank != 0 or not value.dtype.is_floating:
            raise ValueError(
                "`hyperparameters` must return floating scalars, one for each option. "
                "For rates of single layers or weights use `learned_rate`. Received: "
                f"{name} of shape {value.shape} and dtype {value.dtype.name}"
            )
    others = (inner.learning_rate, inner.learned_rate)
    if RATE in made and (inner.rule.scheduled or any(o is not None for o in others)):
        raise ValueError(
            "'learning_rate' in `hyperparameters`, `learning_rate`, `learned_rate` and "
            "a LearningRateSchedule of the optimizer exclude each other. Give one of "
            f"them. Received: {inner!r}"
        )
    return dict(made)


def updated(
    inner: Any, here: Prepared, gradient: Nest, state: OptimizerState, point: Nest
) -> tuple[Any, OptimizerState]:
    """One update from `point`, with what is learned of the optimizer."""
    options = named_options(inner, here.problem, here.upper)
    made = options.pop(RATE, None)
    if inner.learned_rate is not None:
        learned = inner.learned_rate
        if takes_two(learned):
            if state.iteration.shape.rank:
                raise ValueError(
                    "`learned_rate` must be a function of x alone with `atol` over "
                    "tasks, whose steps have other numbers. Leave `atol` out. "
                    f"Received: atol={inner.atol!r}"
                )
            learned = lambda x: inner.learned_rate(x, state.iteration)  # noqa: E731
        made = here.problem._reading(learned, here.upper)
        if made is None:
            raise ValueError(
                "`learned_rate` must return a scalar or rates that broadcast to the "
                "lower variables. Does the function end without `return`? "
                "Received: None"
            )
    if made is None:
        return inner.rule.update(gradient, state, point, options)
    at, rates = rated(state, made, point)
    lower, after = inner.rule.update(gradient, at, point, options)
    after = after._replace(learning_rate=state.learning_rate)
    if rates is not None:
        lower = stretched(inner.optimizer, rates, point, lower)
    return lower, after
