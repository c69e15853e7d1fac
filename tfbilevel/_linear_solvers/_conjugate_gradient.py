"""Conjugate gradients."""

import dataclasses
from typing import Any

import tensorflow as tf

from tfbilevel import _structure as structure
from tfbilevel._linear_solvers._base import (
    LinearSolution,
    LinearSolver,
    Product,
    relative,
)


@dataclasses.dataclass(frozen=True, eq=False)
class ConjugateGradient(LinearSolver):
    r"""Conjugate gradients for a symmetric positive definite system.

        alpha = <r, r> / <p, A p>,   v <- v + alpha p,   r' <- r - alpha A p,
        p <- r' + (<r', r'> / <r, r>) p

    One Hessian-vector product a step and four vectors of memory; exact after as
    many steps as A has distinct eigenvalues, error ratio (sqrt(k) - 1)/(sqrt(k) + 1)
    a step for condition number k. Needs A positive definite: a step along which the
    curvature is not positive ends the solve at the iterate reached. Add `damping`
    for singular or noisy Hessians; prefer `Neumann` or `FixedPoint` where A is
    indefinite or changes between products.

    Args:
        max_steps: most products with A.
        warm_start: begin at the previous outer step's solution.
        tolerance: stop at this relative residual.
        damping: solve (A + damping I) v = b.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> solver = tb.ConjugateGradient(5)
        >>> b = tf.constant([2.0, 4.0])
        >>> solver.solve(lambda v: 4.0 * v, b, None, None).value.numpy().tolist()
        [0.5, 1.0]

    References:
        Hestenes, Stiefel (1952), Methods of conjugate gradients for solving linear
        systems. For hypergradients: Pedregosa (2016), arXiv:1602.02355.
    """

    max_steps: int = 20
    warm_start: bool = False

    @property
    def warm(self) -> bool:
        return self.warm_start

    def solve(
        self, product: Product, rhs: Any, start: Any, rate: Any
    ) -> LinearSolution:
        del rate
        product = self.damped(product)
        if start is None:
            value, residual = structure.zeros_like(rhs), rhs
        else:
            value, residual = start, structure.subtract(rhs, product(start))
        rhs_square = structure.dot(rhs, rhs)
        goal = structure.scalar(self.tolerance**2, rhs_square.dtype) * rhs_square

        def unfinished(step: Any, v: Any, r: Any, p: Any, square: Any, ok: Any) -> Any:
            del step, v, r, p
            return ok & (square > goal)

        def body(step: Any, v: Any, r: Any, p: Any, square: Any, ok: Any) -> tuple:
            del ok
            curved = product(p)
            curvature = structure.dot(p, curved)
            ok = curvature > 0
            length = tf.where(ok, tf.math.divide_no_nan(square, curvature), 0)
            # The new iterate is kept also when it is the one that converges: the
            # published copies of this loop return the one before it.
            v = structure.add_scaled(v, length, p)
            r = structure.add_scaled(r, -length, curved)
            new_square = structure.dot(r, r)
            p = structure.add_scaled(r, new_square / square, p)
            return step + 1, v, r, p, new_square, ok

        steps, value, _, _, square, _ = tf.while_loop(
            unfinished,
            body,
            (
                tf.constant(0),
                value,
                residual,
                residual,
                structure.dot(residual, residual),
                tf.constant(True),
            ),
            maximum_iterations=self.max_steps,
        )
        return LinearSolution(
            value, relative(tf.sqrt(square), tf.sqrt(rhs_square)), steps
        )
