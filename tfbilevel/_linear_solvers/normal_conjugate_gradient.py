"""Conjugate gradients on the normal equations."""

import dataclasses
from typing import Any

import tensorflow as tf

from tfbilevel._calculus import structure
from tfbilevel._calculus.aliases import Nest, State
from tfbilevel._calculus.loops import serial_loop
from tfbilevel._core.former_arguments import renamed
from tfbilevel._linear_solvers.base import (
    TOLERANCE,
    IterativeSolver,
    LinearSolution,
    LinearSystem,
)


@renamed(TOLERANCE)
@dataclasses.dataclass(frozen=True, eq=False)
class NormalConjugateGradient(IterativeSolver):
    r"""Conjugate gradients on A'A v = A'b, for any invertible A (CGNR).

        s = A'r,   alpha = <s, s> / <A p, A p>,   v <- v + alpha p,
        r <- r - alpha A p,   p <- s' + (<s', s'> / <s, s>) p

    Two products per step (one with A, one with its transpose) and five vectors of
    memory. The residual never grows, even for indefinite and unsymmetric A; for a
    singular A, v is the least-squares solution of least norm. The condition number is
    squared: prefer `ConjugateGradient` where A is positive definite.

    Args:
        max_steps: maximal number of steps.
        warm_start: start at the previous outer step's solution.
        rtol: stop at this relative residual.
        damping: solve (A + damping I) v = b.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> solver = tb.NormalConjugateGradient(5)
        >>> b = tf.constant([2.0, 4.0])
        >>> indefinite = tf.constant([2.0, -1.0])
        >>> solver.solve(tb.LinearSystem(lambda v: indefinite * v), b).value.numpy()
        array([ 1., -4.], dtype=float32)

    References:
        Hestenes, Stiefel (1952), Methods of conjugate gradients for solving linear
        systems. For hypergradients: Grazzi et al. (2020), arXiv:2006.16218.
    """

    max_steps: int = 20
    warm_start: bool = False

    @property
    def transposes(self) -> bool:
        return True

    def solve(
        self, system: LinearSystem, rhs: Nest, state: State = ()
    ) -> LinearSolution:
        product, transposed = self.damped(system)
        start, residual = self.start_and_residual(system, product, rhs, state)
        first_norm = system.norm(residual)
        gradient = transposed(residual)
        rhs_square = system.dot(rhs, rhs)
        goal = tf.square(self.goal(system, rhs_square.dtype)) * rhs_square

        def going(r: Any, square: Any) -> tf.Tensor:
            # Continue for NaN, which is not zero: it must reach v. (TensorFlow's graphs
            # simplify `~(square <= 0)` to `square > 0`.)
            return (system.dot(r, r) > goal) & tf.not_equal(square, 0)

        def body(step: Any, v: Any, r: Any, p: Any, square: Any) -> tuple:
            before, active = (v, r, p, square), going(r, square)
            moved = product(p)
            length = structure.ratio(square, system.dot(moved, moved))
            v = structure.add_scaled(v, length, p)
            r = structure.add_scaled(r, -length, moved)
            s = transposed(r)
            new_square = system.dot(s, s)
            p = structure.add_scaled(s, structure.ratio(new_square, square), p)
            after = (v, r, p, new_square)
            return step + 1, *system.stepped(active, before, after)

        steps, value, residual, _, _ = serial_loop(
            lambda step, v, r, p, square: tf.reduce_any(going(r, square)),
            body,
            (
                tf.constant(0),
                start,
                residual,
                gradient,
                system.dot(gradient, gradient),
            ),
            self.max_steps,
        )
        norm = system.norm(residual)
        return self.solution(system, value, norm, rhs, steps, first_norm=first_norm)
