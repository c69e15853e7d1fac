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
    """The result of a method's outer step.

    Attributes:
        upper_gradient: the gradient for the upper optimizer, like the upper variables.
        lower: the lower variables after the step.
        state: the method's state for the next outer step.
        metrics: name -> scalar tensor, for logs and diagnosis; over tasks, some have
            one value per task.
        upper_scale: factor on the upper optimizer's step, a scalar or one value per
            entry of a leading axis; `()` counts as 1. For methods whose schedule also
            slows down the upper level. Scaling the gradient would not do that, because
            most optimizers normalise it.
    """

    upper_gradient: Nest
    lower: Nest
    state: State
    metrics: Metrics
    upper_scale: Any = ()

    def scaled(self, before: Nest, after: Nest) -> Nest:
        """The upper variables after the optimizer's step, scaled by `upper_scale`."""
        if isinstance(self.upper_scale, tuple):
            return after
        move = structure.subtract(after, before)
        return structure.add_scaled(before, self.upper_scale, move)

    def damped(self, before: Nest, after: Nest) -> Nest:
        # The former name of `scaled`.
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
        """The state before the first step: a nest of tensors, `()` if there is none."""
        del problem, upper, lower
        return ()

    @property
    def moves_lower(self) -> bool:
        """Whether a step continues from the current y instead of solving again."""
        return False

    @property
    def couples_tasks(self) -> bool:
        """Whether a step for one task depends on the other tasks.

        If False, sequential tasks (`tb.over_tasks`) make the whole step for one task
        before the next, with the memory of one task. If True, the step is made once for
        all tasks, and only the losses are sequential.
        """
        return False

    @property
    def mean_metrics(self) -> tuple[str, ...]:
        """The metrics that are means over tasks; for sequential tasks, all others have
        one value per task."""
        return ("upper_loss", "lower_loss")

    @property
    def lower_steps(self) -> int:
        """The number of steps of the lower variables in one outer step, by which a
        Keras model's moving statistics are updated."""
        inner = None if self.moves_lower else getattr(self, "inner", None)
        return getattr(inner, "steps", 1)

    @property
    def takes_second_derivatives(self) -> bool:
        """Whether a step differentiates the gradient of the lower loss.

        If so, `BilevelModel.fit`, `tb.minimize` and `tb.check_hypergradient` first
        check that TensorFlow has these derivatives. Methods that use only first
        derivatives return False.
        """
        return True

    @property
    def keeps_on_host(self) -> bool:
        """Whether a step keeps tensors in the memory of the host.

        XLA compiles for one device, so it cannot compile such a step:
        `jit_compile="auto"` then means False.
        """
        return False

    @abc.abstractmethod
    def step(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: State
    ) -> Step:
        """One outer step: the upper gradient and the new lower variables.

        Call it through `problem.step(method, ...)`, which handles tasks. The caller
        applies the upper gradient, scaled by `upper_scale`, and then
        `problem.project_upper`.
        """

    def objective(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: State
    ) -> Callable[[Nest], tf.Tensor]:
        """The function of x whose derivative at `upper` is estimated by `step`.

        Whatever the method holds constant is computed once, at `upper`. The default is
        f(x, y(x)), where y(x) are the lower variables after a step from x.
        `tb.check_hypergradient` takes central differences of this function.
        """

        def value(x: Nest) -> tf.Tensor:
            lower_after = problem.step(self, x, lower, batches, state).lower
            return problem.prepared(x, batches).upper_loss(lower_after)

        return value
