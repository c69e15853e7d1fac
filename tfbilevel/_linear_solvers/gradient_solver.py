"""A linear solver that makes steps of a Keras optimizer."""

import dataclasses
import functools
from typing import Any

import keras
import tensorflow as tf

from tfbilevel._calculus import structure
from tfbilevel._calculus.aliases import Nest, State
from tfbilevel._calculus.loops import serial_loop
from tfbilevel._core.arguments import require_choice
from tfbilevel._core.former_arguments import renamed
from tfbilevel._linear_solvers.base import (
    TOLERANCE,
    IterativeSolver,
    LinearSolution,
    LinearSystem,
)
from tfbilevel._optimizers.update_rule import UpdateRule, differentiable


@renamed(TOLERANCE)
@dataclasses.dataclass(frozen=True, eq=False)
class GradientSolver(IterativeSolver):
    r"""Steps of a Keras optimizer on the linear system (ApproxGrad, stochastic AID).

        "quadratic":   v <- v - update( A v - b )            one product per step
        "residual":    v <- v - update( 2 A'(A v - b) )      two products per step

    `tb.Implicit` makes the system A v = b: by default A is the Hessian of the lower
    loss, and b the gradient of the upper loss in y. `objective` chooses the step.
    "quadratic" follows the gradient of v'Av/2 - b'v, and A must be positive definite.
    "residual" follows the gradient of |A v - b|^2. There A need only be invertible, but
    the condition number is squared, which can take more steps. Memory: three vectors
    and the optimizer's slots. By default v and the slots are carried from one outer
    step to the next, so a few steps are enough while the problem changes slowly. For
    convex lower problems without noise prefer `ConjugateGradient`: it is faster, and
    there is no rate to choose.

    Args:
        optimizer: a Keras optimizer that `tb.differentiable` supports.
        max_steps: maximal number of steps per outer step.
        objective: "quadratic" or "residual".
        warm_start: continue from the previous outer step; otherwise start at zero.
        rtol: stop at this relative residual.
        damping: solve (A + damping I) v = b.

    Raises:
        ValueError: for an unsupported optimizer or an argument out of its range.

    Example:
        >>> solver = tb.GradientSolver(keras.optimizers.SGD(0.25), max_steps=30)
        >>> b = tf.constant([2.0, 4.0])
        >>> solution = solver.solve(tb.LinearSystem(lambda v: 2.0 * v), b)
        >>> solution.value.numpy().round(3).tolist()
        [1.0, 2.0]

    References:
        Mehra, Hamm (2021), Penalty method for inversion-free deep bilevel
        optimization. arXiv:1911.03432. Grazzi, Pontil, Salzo (2021), Convergence
        properties of stochastic hypergradients. arXiv:2011.07122.
    """

    optimizer: keras.optimizers.Optimizer
    max_steps: int = 10
    objective: str = "quadratic"
    warm_start: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.rule  # raises if the optimizer is not supported
        require_choice(self.objective, "objective", ("quadratic", "residual"))

    @functools.cached_property
    def rule(self) -> UpdateRule:
        """The update of `optimizer`."""
        return differentiable(self.optimizer)

    def init(self, like: Nest) -> State:
        zeros = structure.zeros_like(like)
        optimizer = self.rule.init(zeros)
        return {"solution": zeros, "optimizer": optimizer} if self.warm_start else ()

    def init_blocks(self, like: Nest) -> State:
        state = self.init(like)
        if not self.warm_start or not self.ends_early:
            return state
        # Blocks (tasks) stop at different steps, so each counts its own.
        blocks = tf.nest.flatten(state["solution"])[0].shape[0]
        return {**state, "optimizer": self.rule.counted(state["optimizer"], blocks)}

    @property
    def transposes(self) -> bool:
        return self.objective == "residual"

    def solve(
        self, system: LinearSystem, rhs: Nest, state: State = ()
    ) -> LinearSolution:
        product, transposed = self.damped(system)
        rhs_norm = system.norm(rhs)
        goal = self.goal(system, rhs_norm.dtype) * rhs_norm
        if isinstance(state, dict):
            start = self.start(system, rhs, state["solution"])
            optimizer = state["optimizer"]
        else:
            start = structure.zeros_like(rhs)
            optimizer = self.rule.init(start)

        def unfinished(step: Any, v: Any, optimizer: Any, size: Any, first: Any) -> Any:
            del step, v, optimizer, first
            return tf.reduce_any(size > goal)

        def body(step: Any, v: Any, optimizer: Any, size: Any, first: Any) -> tuple:
            going = size > goal
            before = (v, optimizer, size)
            gradient = structure.subtract(product(v), rhs)
            size = system.norm(gradient)
            first = tf.where(step == 0, size, first)
            if self.objective == "residual":
                gradient = structure.scale(2.0, transposed(gradient))
            v, optimizer = self.rule.update(gradient, optimizer, v)
            after = (v, optimizer, size)
            return step + 1, *system.stepped(going, before, after), first

        steps, value, optimizer, size, first = serial_loop(
            unfinished,
            body,
            (
                tf.constant(0),
                start,
                optimizer,
                # Unknown before the first product, so it starts above the goal.
                tf.where(rhs_norm > 0, tf.constant(float("inf"), rhs_norm.dtype), 0),
                rhs_norm,
            ),
            self.max_steps,
        )
        carried = {"solution": value, "optimizer": optimizer}
        made = self.solution(system, value, size, rhs, steps, first_norm=first)
        return made._replace(state=carried if self.warm_start else ())
