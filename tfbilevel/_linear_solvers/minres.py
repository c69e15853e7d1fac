"""Minimal residuals for symmetric systems."""

import dataclasses
from typing import Any

import numpy as np
import tensorflow as tf

from tfbilevel._calculus import structure
from tfbilevel._calculus.aliases import Nest, State
from tfbilevel._linear_solvers.base import (
    IterativeSolver,
    LinearSolution,
    LinearSystem,
)

# A direction is lost if so many roundings are all that is left of its image.
ROUNDING = 100


@dataclasses.dataclass(frozen=True, eq=False)
class MINRES(IterativeSolver):
    r"""Minimal residuals for a symmetric system, which may be indefinite (MINRES).

        v_k = argmin ||b - A v||   over   v_0 + span(r, A r, ..., A^{k-1} r)
        with r = b - A v_0

    Each direction p is made so that A p is orthogonal to that of the two before, and
    hence to all. One Hessian-vector product per step, and eight vectors of memory. The
    residual never grows. Assumes A symmetric; eigenvalues may have either sign, as
    lower Hessians have far from a minimum. Prefer `ConjugateGradient` where A is
    positive definite (less memory); `NormalConjugateGradient` where A is not symmetric:
    it makes two products per step, and its steps grow with the square of the condition
    number.

    Args:
        max_steps: maximal number of products with A.
        warm_start: start at the previous outer step's solution.
        rtol: stop at this relative residual.
        damping: solve (A + damping I) v = b.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> solver = tb.MINRES(5)
        >>> signs = tf.constant([2.0, -4.0])
        >>> b = tf.constant([2.0, 4.0])
        >>> found = solver.solve(tb.LinearSystem(lambda v: signs * v), b).value
        >>> found.numpy().round(4).tolist()
        [1.0, -1.0]

    References:
        Paige, Saunders (1975), Solution of sparse indefinite systems of linear
        equations.
    """

    max_steps: int = 20
    warm_start: bool = False

    @property
    def needs_symmetric(self) -> bool:
        return True

    def solve(
        self, system: LinearSystem, rhs: Nest, state: State = ()
    ) -> LinearSolution:
        product, _ = self.damped(system)
        rhs_norm = system.norm(rhs)
        goal = self.goal(system, rhs_norm.dtype) * rhs_norm
        start, residual = self.start_and_residual(system, product, rhs, state)
        first_norm = system.norm(residual)
        epsilon = np.finfo(rhs_norm.dtype.name).eps

        def unfinished(step: Any, now: Any, size: Any, ok: Any) -> Any:
            del step, now
            return tf.reduce_any(ok & (size > goal))

        def body(step: Any, now: Any, size: Any, ok: Any) -> tuple:
            going = ok & (size > goal)
            v, r, seed, (p, image), (p_before, image_before) = now
            made, image_made = seed, product(seed)
            least = system.dot(image_made, image_made) * ROUNDING**2 * epsilon**2
            for along, of_along in ((p, image), (p_before, image_before)):
                share = structure.ratio(
                    system.dot(image_made, of_along), system.dot(of_along, of_along)
                )
                made = structure.add_scaled(made, -share, along)
                image_made = structure.add_scaled(image_made, -share, of_along)
            square = system.dot(image_made, image_made)
            # Otherwise nothing is left in the space but rounding.
            ok = square > least
            length = structure.ratio(system.dot(r, image_made), square)
            length = tf.where(ok, length, 0)
            v = structure.add_scaled(v, length, made)
            r = structure.add_scaled(r, -length, image_made)
            # Of length 1: products would grow with the powers of A.
            seed = structure.scale(
                tf.math.reciprocal_no_nan(tf.sqrt(square)), image_made
            )
            after = (v, r, seed, (made, image_made), (p, image))
            ends = (after, system.norm(r), ok)
            return step + 1, *system.stepped(going, (now, size, ok), ends)

        zeros = structure.zeros_like(rhs)
        begin = (
            tf.constant(0),
            (start, residual, residual, (zeros, zeros), (zeros, zeros)),
            first_norm,
            tf.ones_like(rhs_norm, tf.bool),
        )
        steps, (value, *_), size, _ = self.repeated(
            unfinished, body, begin, self.max_steps
        )
        return self.solution(system, value, size, rhs, steps, first_norm=first_norm)
