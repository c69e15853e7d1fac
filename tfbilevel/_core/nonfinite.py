"""NaN and infinity: detected within the step and reported by name, never replaced."""

import warnings
from typing import Any

import tensorflow as tf

from tfbilevel._calculus import structure
from tfbilevel._calculus.aliases import Nest
from tfbilevel._core.method import Method, Step

QUANTITIES = (
    "the upper loss",
    "the lower loss",
    "the upper gradient",
    "the lower variables",
    "the upper variables",
)
UPPER_VARIABLES = 4


class NonFiniteError(FloatingPointError):
    """A quantity of an outer step was NaN or infinite.

    Attributes:
        quantity: the name of the quantity.
        step: the number of the outer step, from 0.
        point: in `tb.minimize`, the step, upper and lower variables before it;
            otherwise `None`, and the models keep their variables from before it.
    """

    def __init__(self, code: int, step: int, point: Any = None, in_fit: bool = False):
        self.quantity, self.step, self.point = QUANTITIES[code], step, point
        kept, skip = "All variables keep their values", ""
        if point is not None:
            kept = "The error's `point` has the variables"
        if in_fit:
            skip = ', or let fit skip such steps with compile(on_nonfinite="skip")'
        super().__init__(
            f"{self.quantity} became NaN or infinite at outer step {step}. {kept} from "
            "before that step. Usual causes: (a) a learning rate too large for the "
            "curvature, (b) log or division of zero in a loss, (c) NaN in the data, or "
            "an index out of tb.ExampleWeights' range. Lower the rates, guard the loss"
            f"{skip}. "
            f"Received: {self.quantity}, step={step}"
        )


class DivergenceWarning(UserWarning):
    """A method led away from the solution.

    Its linear solve ended further from the solution than it started; or the lower
    directions of a first-order method became ten times as long as the first one, or its
    lower variables stayed outside of a barrier.
    """


def warn_diverged(method: Method, step: int | None = None) -> None:
    """Warn that a method diverged, with the outer step if known."""
    when = "" if step is None else f" at outer step {step}"
    name = type(method).__name__
    if method.takes_second_derivatives:
        message = (
            f"The linear solve of {name} diverged{when}: its hypergradient is wrong "
            "there. Usual causes: (a) a rate (eta) above 2 / (largest eigenvalue of "
            "the lower Hessian), (b) an indefinite lower Hessian, (c) too few inner "
            "steps. Lower the rate; with tb.Implicit damping or "
            "tb.NormalConjugateGradient help too"
        )
    else:
        message = (
            f"{name} diverged{when}: the direction of the lower variables is ten times "
            "as long as in the first step, or they are outside of a barrier. Usual "
            "causes: (a) a rate of `lower_optimizer` above 2 / (largest curvature of "
            "the penalised loss), (b) a rate of the upper optimizer that is too large. "
            "Lower them; raise the `slack` of a barrier"
        )
    warnings.warn(
        f"{message}. The metric `diverged` counts such steps",
        DivergenceWarning,
        stacklevel=3,
    )


def first_nonfinite(step: Step, moved: Nest = ()) -> tf.Tensor:
    """The index into QUANTITIES of the first that is not finite; -1 if all are.

    Args:
        step: the step.
        moved: the upper variables after it, if known.
    """
    quantities: list[Any] = [
        [step.metrics[name]] if name in step.metrics else []
        for name in ("upper_loss", "lower_loss")
    ]
    quantities += [step.upper_gradient, step.lower, moved]
    code = tf.constant(-1)
    for index in reversed(range(len(quantities))):
        fine = structure.all_finite(quantities[index])
        code = tf.where(fine, code, index)
    return code
