"""The interface of every bilevel method."""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from tfbilevel._calculus import structure
from tfbilevel._calculus.aliases import Metrics, Nest, State
from tfbilevel._core.batches import Batches
from tfbilevel._core.former_arguments import warn_renamed
from tfbilevel._core.problem import Problem


class Step(NamedTuple):
    """What one outer step of a method computes.

    Attributes:
        upper_gradient: like the upper variables: what the upper optimizer receives.
        lower: the lower variables after the step.
        state: what the method carries to the next outer step.
        metrics: name -> scalar tensor, for logs and diagnosis; over tasks some have
            one value per task.
        upper_scale: factor on the step that the upper optimizer makes, a scalar or
            one value per entry of a leading axis; `()` counts as 1. For methods whose
            schedule slows the upper level too: with most optimizers a scaled gradient
            would not.
    """

    upper_gradient: Nest
    lower: Nest
    state: State
    metrics: Metrics
    upper_scale: Any = ()

    def scaled(self, before: Nest, after: Nest) -> Nest:
        """The upper variables, which the upper optimizer moved from before to after."""
        if isinstance(self.upper_scale, tuple):
            return after
        move = structure.subtract(after, before)
        return structure.add_scaled(before, self.upper_scale, move)

    def damped(self, before: Nest, after: Nest) -> Nest:
        # Its name in the release before.
        warn_renamed("tb.Step", "damped", "`scaled`")
        return self.scaled(before, after)


def require_method(method: Any) -> None:
    """Raise unless it is a `tb.Method`."""
    if not isinstance(method, Method):
        raise ValueError(
            "`method` must be a tb.Method such as tb.Unroll(inner) or "
            f"tb.ValueGap(...). Received: method={method!r}"
        )


class Method(abc.ABC):
    """A way to solve bilevel problems: one frozen object with one pure `step`.

    A subclass is a frozen dataclass (`frozen=True, eq=False`) whose fields are its
    hyperparameters. `init` and `step` take tensors and return tensors; they create
    no variables and keep no Python state, so the same step runs eagerly, inside
    `tf.function`, under XLA, in `BilevelModel.fit` and in `tb.minimize`.
    """

    def init(self, problem: Problem, upper: Nest, lower: Nest) -> State:
        """The state before the first step: a nest of tensors, `()` if none."""
        del problem, upper, lower
        return ()

    @property
    def moves_lower(self) -> bool:
        """Whether a step moves y on from where it is, and does not solve again."""
        return False

    @property
    def couples_tasks(self) -> bool:
        """Whether what a step does to one task depends on the others.

        Over sequential tasks (`tb.over_tasks`) the whole step is made for one task
        before the next, which keeps one task's memory. With `True` it is made once for
        all, and only the losses are sequential.
        """
        return False

    @property
    def mean_metrics(self) -> tuple[str, ...]:
        """The metrics that are means over tasks; others have a value for each where
        tasks are sequential."""
        return ("upper_loss", "lower_loss")

    @property
    def lower_steps(self) -> int:
        """How many steps the lower variables make in one outer step: moving statistics
        of a Keras model advance as often."""
        inner = None if self.moves_lower else getattr(self, "inner", None)
        return getattr(inner, "steps", 1)

    @property
    def takes_second_derivatives(self) -> bool:
        """Whether a step differentiates the gradient of the lower loss.

        `BilevelModel.fit`, `tb.minimize` and `tb.check_hypergradient` then look first
        whether TensorFlow has these derivatives. A method of first derivatives only
        says False.
        """
        return True

    @abc.abstractmethod
    def step(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: State
    ) -> Step:
        """One outer step: the upper gradient and the new lower variables.

        Make it by `problem.step(method, ...)`, which knows about tasks. The caller
        applies the upper gradient, scaled as the step says, then
        `problem.project_upper`.
        """

    def objective(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: State
    ) -> Callable[[Nest], tf.Tensor]:
        """The scalar function of x whose derivative at `upper` `step` estimates.

        Whatever the method holds constant is computed at `upper` once. By default
        f(x, y(x)), where y(x) are the lower variables after a step from x.
        `tb.check_hypergradient` takes central differences of it.
        """

        def value(x: Nest) -> tf.Tensor:
            lower_after = problem.step(self, x, lower, batches, state).lower
            return problem.prepared(x, batches).upper_loss(lower_after)

        return value
