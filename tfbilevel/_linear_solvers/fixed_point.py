"""Fixed-point (Richardson) iteration."""

import dataclasses
from typing import Any

import numpy as np
import tensorflow as tf

from tfbilevel._calculus import structure
from tfbilevel._calculus.aliases import Nest, State
from tfbilevel._core.former_arguments import renamed
from tfbilevel._linear_solvers.base import (
    TOLERANCE,
    IterativeSolver,
    LinearSolution,
    LinearSystem,
    WithRate,
    is_cold,
)


@renamed(TOLERANCE)
@dataclasses.dataclass(frozen=True, eq=False)
class FixedPoint(WithRate, IterativeSolver):
    r"""Fixed-point iteration for the adjoint of a gradient step (AID-FP).

        v <- v + rate (b - A v)

    One Hessian-vector product per step (none in the first, from v = 0), two vectors of
    memory, error ratio max |1 - rate lambda| per step. Needs
    0 < rate < 2 / (largest eigenvalue of A). Slower than `ConjugateGradient` on a
    fixed convex system, but it needs no exact symmetry and gains from a warm start.

    Args:
        max_steps: maximal number of steps.
        rate: step size; `None`: the inner solver's learning rate.
        warm_start: start at the previous outer step's solution.
        rtol: stop at this relative residual.
        damping: solve (A + damping I) v = b.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> solver = tb.FixedPoint(30, rate=0.25)
        >>> b = tf.constant([2.0, 4.0])
        >>> solution = solver.solve(tb.LinearSystem(lambda v: 2.0 * v), b)
        >>> solution.value.numpy().round(3).tolist()
        [1.0, 2.0]

    References:
        Grazzi, Franceschi, Pontil, Salzo (2020), On the iteration complexity of
        hypergradient computation. arXiv:2006.16218.
    """

    max_steps: int = 10
    rate: float | None = None
    warm_start: bool = False

    def solve(
        self, system: LinearSystem, rhs: Nest, state: State = ()
    ) -> LinearSolution:
        product, _ = self.damped(system)
        rate = self.rate_of(system)
        rhs_norm = system.norm(rhs)
        goal = self.goal(system, rhs_norm.dtype) * rhs_norm

        def unfinished(step: Any, value: Any, size: Any, first: Any) -> Any:
            del step, value, first
            return tf.reduce_any(size > goal)

        def body(step: Any, value: Any, size: Any, first: Any) -> tuple:
            before, going = (value, size), size > goal
            residual = structure.subtract(rhs, product(value))
            value = structure.add(value, structure.scale(rate, residual))
            after = (value, system.norm(residual))
            first = tf.where(step == 0, after[1], first)
            return step + 1, *system.stepped(going, before, after), first

        if is_cold(state):
            # From zero the first step gives rate * b, without a product.
            made = tf.cast(tf.reduce_any(rhs_norm > 0), tf.int32)
            begin = (made, structure.scale(rate, rhs), rhs_norm, rhs_norm)
        else:
            # Unknown before the first product, so it starts above the goal.
            size = tf.where(rhs_norm > 0, structure.scalar(np.inf, rhs_norm.dtype), 0)
            begin = (tf.constant(0), self.start(system, rhs, state), size, rhs_norm)
        most = self.max_steps - is_cold(state)
        steps, value, size, first = self.repeated(unfinished, body, begin, most)
        return self.solution(system, value, size, rhs, steps, first_norm=first)
