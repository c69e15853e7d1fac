"""The named methods of a few-shot learner, and what they adapt."""

import dataclasses
from typing import Any

import keras

from tfbilevel._core.arguments import (
    positive,
    require_choice,
    require_count,
    require_number,
)
from tfbilevel._core.inner_solver import InnerSolver
from tfbilevel._core.method import Method
from tfbilevel._linear_solvers import ConjugateGradient
from tfbilevel._methods.hypergradient.implicit import Implicit
from tfbilevel._methods.hypergradient.unroll import Unroll

ADAPTS = ("head", "all")


@dataclasses.dataclass(frozen=True)
class Preset:
    """A named method's settings, where the user gives none."""

    adapts: str
    steps: int
    rate: float
    tasks: int
    outer_rate: float
    proximal: float = 0.0  # weight of |y - x|^2 / 2 in the lower loss


PRESETS = {
    "anil": Preset("head", 5, 0.4, 8, 2e-3),
    "iaptt": Preset("head", 10, 0.4, 4, 1e-3),
    "maml": Preset("all", 5, 0.1, 8, 1e-3),
    "fomaml": Preset("all", 5, 0.1, 8, 1e-3),
    "imaml": Preset("all", 16, 0.1, 16, 1e-3, proximal=2.0),
}
OTHERS = Preset("head", 0, 0.0, 8, 1e-3)  # for a method object
LINEAR_RATE = 0.1  # instead of 0.4: the logits of a cosine head are at most 10


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """How tasks are learned, from the learner's arguments.

    Attributes:
        method: the method.
        inner: its inner solver, which adapts to new classes too.
        adapts: "head" or "all", the lower variables.
        tasks: how many in an outer step.
        outer_rate: of Adam, where the user gives no other optimizer.
        proximal: weight of the squared distance to the start in the lower loss.
    """

    method: Method
    inner: InnerSolver
    adapts: str
    tasks: int
    outer_rate: float
    proximal: float


def plan(
    method: Any,
    adapts: str | None,
    inner_steps: int | None,
    inner_learning_rate: float | None,
    tasks: int | None,
    cosine: bool,
) -> Plan:
    """The plan for the learner's arguments; `cosine`: the head is one of cosines.

    Raises:
        ValueError: for an argument out of range, an unknown method, or arguments that
            contradict each other.
    """
    if tasks is not None:
        require_count(tasks, "tasks")
    if inner_steps is not None:
        require_count(inner_steps, "inner_steps")
    if inner_learning_rate is not None:
        name = "inner_learning_rate"
        require_number(inner_learning_rate, name, positive, "above 0")
    if adapts is not None:
        require_choice(adapts, "adapts", ADAPTS)
    if isinstance(method, Method):
        own = dataclasses.replace(OTHERS, adapts=adapts or "head")
        made, inner = method, _inner_of(method)
        _require_unset(inner_steps=inner_steps, inner_learning_rate=inner_learning_rate)
    else:
        if not isinstance(method, str) or method not in PRESETS:
            raise ValueError(
                f"`method` must be one of {', '.join(map(repr, PRESETS))}, or a method "
                "of the library such as tb.Unroll(tb.InnerSolver(...)). Received: "
                f"method={method!r}"
            )
        own = PRESETS[method]
        if adapts not in (None, own.adapts):
            raise ValueError(
                f'`adapts` must be "{own.adapts}" for method="{method}". Leave it '
                f"away, or pass a method of the library. Received: adapts={adapts!r}"
            )
        rate = own.rate if cosine else min(own.rate, LINEAR_RATE)
        optimized = keras.optimizers.SGD(inner_learning_rate or rate)
        inner = InnerSolver(optimized, inner_steps or own.steps)
        made = _named(method, inner)
    return Plan(
        made,
        inner,
        own.adapts,
        tasks or own.tasks,
        own.outer_rate,
        own.proximal,
    )


def cosine_head(method: Any, network: Any) -> bool:
    """Whether the network has the published head of cosines."""
    named = PRESETS.get(method) if isinstance(method, str) else None
    return network is None and named is not None and named.adapts == "head"


def _named(method: str, inner: InnerSolver) -> Method:
    if method == "imaml":
        return Implicit(inner, ConjugateGradient(5))
    if method == "iaptt":
        return Unroll(inner, end="pessimistic")
    return Unroll(inner, first_order=method == "fomaml")


def _inner_of(method: Method) -> InnerSolver:
    inner = getattr(method, "inner", None)
    if not isinstance(inner, InnerSolver):
        raise ValueError(
            "`method` must have an inner solver, by which new classes are learned, as "
            "tb.Unroll and tb.Implicit have. Take one of these. Received: "
            f"{type(method).__name__}"
        )
    return inner


def _require_unset(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(
                f"`{name}` is the inner solver's, for a method of the library. Leave "
                f"it away. Received: {name}={value!r}"
            )


def new_optimizer(optimizer: Any, rate: float) -> keras.optimizers.Optimizer:
    """The user's optimizer without its state, so that each `fit` starts from zero.

    Args:
        optimizer: a Keras optimizer or its name; `None`: Adam with this rate.
        rate: see there.

    Raises:
        ValueError: for anything else.
    """
    if optimizer is None:
        return keras.optimizers.Adam(rate)
    try:
        given = keras.optimizers.get(optimizer)
    except (ValueError, TypeError) as error:
        raise ValueError(
            "`optimizer` must be a Keras optimizer or its name. Received: "
            f"optimizer={optimizer!r}"
        ) from error
    return type(given).from_config(given.get_config())
