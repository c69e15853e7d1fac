"""Conjugate gradients."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfbilevel._calculus import structure
from tfbilevel._calculus.aliases import Nest, State
from tfbilevel._core.arguments import require_callable
from tfbilevel._core.former_arguments import renamed
from tfbilevel._linear_solvers.base import (
    TOLERANCE,
    IterativeSolver,
    LinearSolution,
    LinearSystem,
)

Preconditioner = Callable[[Any, Any, Any], Any]


@renamed(TOLERANCE)
@dataclasses.dataclass(frozen=True, eq=False)
class ConjugateGradient(IterativeSolver):
    r"""Conjugate gradients for a symmetric positive definite system.

        alpha = <r, z> / <p, A p>,   v <- v + alpha p,   r' <- r - alpha A p,
        z' = M^{-1} r',   p <- z' + (<r', z'> / <r, z>) p

    with z = r unless there is a preconditioner M. One Hessian-vector product per step
    and four vectors of memory. Exact after as many steps as M^{-1} A has distinct
    eigenvalues; error ratio (sqrt(k) - 1)/(sqrt(k) + 1) per step for the condition
    number k of M^{-1} A. Needs A positive definite: a direction whose curvature is not
    positive ends the solve at the current iterate. Add `damping` for singular or noisy
    Hessians; prefer `Neumann` or `FixedPoint` where A is indefinite or changes between
    products.

    Args:
        max_steps: maximal number of products with A.
        warm_start: start at the previous outer step's solution.
        preconditioner: (upper, lower, v) -> M^{-1} v at those variables, for a
            symmetric positive definite M that resembles A, such as its diagonal.
        rtol: stop at this relative residual.
        damping: solve (A + damping I) v = b.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> solver = tb.ConjugateGradient(5)
        >>> b = tf.constant([2.0, 4.0])
        >>> solver.solve(tb.LinearSystem(lambda v: 4.0 * v), b).value.numpy().tolist()
        [0.5, 1.0]

    References:
        Hestenes, Stiefel (1952), Methods of conjugate gradients for solving linear
        systems. For hypergradients: Pedregosa (2016), arXiv:1602.02355.
    """

    max_steps: int = 20
    warm_start: bool = False
    preconditioner: Preconditioner | None = dataclasses.field(
        default=None, kw_only=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preconditioner is not None:
            require_callable(self.preconditioner, "preconditioner")

    @property
    def needs_symmetric(self) -> bool:
        return True

    @property
    def needs_point(self) -> bool:
        return self.preconditioner is not None

    def solve(
        self, system: LinearSystem, rhs: Nest, state: State = ()
    ) -> LinearSolution:
        product, _ = self.damped(system)
        rhs_square = system.dot(rhs, rhs)
        goal = tf.square(self.goal(system, rhs_square.dtype)) * rhs_square
        start, residual = self.start_and_residual(system, product, rhs, state)

        def preconditioned(vector: Nest) -> Any:
            if self.preconditioner is None:
                return vector
            upper, lower = system.point
            precondition = functools.partial(self.preconditioner, upper)
            return system.inner_product.each(precondition, lower, vector)

        def unfinished(step: Any, v: Any, r: Any, p: Any, rz: Any, rr: Any, ok: Any):
            del step, v, r, p, rz
            return tf.reduce_any(ok & (rr > goal))

        def body(step: Any, v: Any, r: Any, p: Any, rz: Any, rr: Any, ok: Any) -> tuple:
            before = (v, r, p, rz, rr, ok)
            going = ok & (rr > goal)
            curved = product(p)
            curvature = system.dot(p, curved)
            ok = curvature > 0
            length = tf.where(ok, structure.ratio(rz, curvature), 0)
            # The new iterate is kept even if it is the one that converges. Published
            # versions of this loop return the previous one.
            v = structure.add_scaled(v, length, p)
            r = structure.add_scaled(r, -length, curved)
            z = preconditioned(r)
            new_rz = system.dot(r, z)
            p = structure.add_scaled(z, structure.ratio(new_rz, rz), p)
            after = (v, r, p, new_rz, system.dot(r, r), ok)
            return step + 1, *system.stepped(going, before, after)

        direction = preconditioned(residual)
        begin = (
            tf.constant(0),
            start,
            residual,
            direction,
            system.dot(residual, direction),
            system.dot(residual, residual),
            tf.ones_like(rhs_square, tf.bool),
        )
        steps, value, _, _, _, square, ok = self.repeated(
            unfinished, body, begin, self.max_steps
        )
        # The residual may rise on the way to the solution. Only a direction whose
        # curvature is not positive ends the solve early.
        broken = tf.logical_not(ok) & (square > goal)
        return self.solution(system, value, tf.sqrt(square), rhs, steps, broken)
