"""The truncated Neumann series."""

import dataclasses
from typing import Any

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
)


@renamed(TOLERANCE)
@dataclasses.dataclass(frozen=True, eq=False)
class Neumann(WithRate, IterativeSolver):
    r"""The Neumann series of the inverse, truncated after K products.

        v = rate * sum_{j=0}^{K} (I - rate A)^j b

    One Hessian-vector product per term, three vectors of memory, error ratio
    max |1 - rate lambda| per term. Needs 0 < rate < 2 / (largest eigenvalue of A).
    `Neumann(K)` equals `FixedPoint(K + 1)` from zero, and equals backpropagation
    through K + 1 gradient steps at the lower solution. Prefer `ConjugateGradient` for
    well-behaved convex lower problems.

    Args:
        max_steps: K, products with A.
        rate: step size; `None`: the inner solver's learning rate.
        rtol: stop when the next term's relative size falls below it.
        damping: solve (A + damping I) v = b.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> solver = tb.Neumann(30, rate=0.25)
        >>> b = tf.constant([2.0, 4.0])
        >>> solution = solver.solve(tb.LinearSystem(lambda v: 2.0 * v), b)
        >>> solution.value.numpy().round(3).tolist()
        [1.0, 2.0]

    References:
        Lorraine, Vicol, Duvenaud (2020), Optimizing millions of hyperparameters by
        implicit differentiation. arXiv:1911.02590.
    """

    max_steps: int = 10
    rate: float | None = None

    def solve(
        self, system: LinearSystem, rhs: Nest, state: State = ()
    ) -> LinearSolution:
        del state
        product, _ = self.damped(system)
        rate = self.rate_of(system)
        rhs_norm = system.norm(rhs)
        goal = self.goal(system, rhs_norm.dtype) * rhs_norm

        def unfinished(step: Any, term: Any, total: Nest, size: Any) -> Any:
            del step, term, total
            return tf.reduce_any(size > goal)

        def body(step: Any, term: Any, total: Nest, size: Any) -> tuple:
            before, going = (term, total, size), size > goal
            term = structure.subtract(term, structure.scale(rate, product(term)))
            after = (term, structure.add(total, term), system.norm(term))
            return step + 1, *system.stepped(going, before, after)

        # The j-th term is also the residual of the previous partial sum.
        begin = (tf.constant(0), rhs, rhs, rhs_norm)
        steps, _, total, size = self.repeated(unfinished, body, begin, self.max_steps)
        return self.solution(system, structure.scale(rate, total), size, rhs, steps)
