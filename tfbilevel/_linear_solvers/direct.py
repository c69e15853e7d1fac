"""Dense elimination."""

import dataclasses

import tensorflow as tf

from tfbilevel._calculus import structure
from tfbilevel._calculus.aliases import Nest, State
from tfbilevel._linear_solvers.base import LinearSolution, LinearSolver, LinearSystem

LIMIT = 5000


@dataclasses.dataclass(frozen=True, eq=False)
class Direct(LinearSolver):
    r"""LU factorisation of the dense matrix, for small problems.

        A_ij = <e_i, A e_j>,      v = A^{-1} b   by LU

    n products, n^2 numbers of memory and n^3 operations for n lower variables in total
    (over tasks: per task); at most 5,000 of them. The only error is rounding, for all
    eigenvalues except zero, so it serves as the reference for the other solvers. Prefer
    `ConjugateGradient` beyond a few hundred variables, and `NormalConjugateGradient` or
    `damping` where A is singular.

    Args:
        damping: solve (A + damping I) v = b.

    Raises:
        ValueError: if `damping` is negative, or at the first step if there are more
            than 5,000 lower variables.
        tf.errors.InvalidArgumentError: from TensorFlow, if A + damping I is singular.

    Example:
        >>> b = tf.constant([2.0, 4.0])
        >>> tb.Direct().solve(tb.LinearSystem(lambda v: 4.0 * v), b).value.numpy()
        array([0.5, 1. ], dtype=float32)
    """

    def solve(
        self, system: LinearSystem, rhs: Nest, state: State = ()
    ) -> LinearSolution:
        del state
        product, _ = self.damped(system)
        space = system.inner_product
        vector = space.to_vector(rhs)
        size = int(vector.shape[-1] or 0)
        if size > LIMIT:
            raise ValueError(
                f"tb.Direct holds a dense matrix: at most {LIMIT} lower variables in "
                "all. Use tb.ConjugateGradient for more. "
                f"Received: {size} lower variables"
            )

        def column(unit: tf.Tensor) -> tf.Tensor:
            # The same column of every block at once.
            units = tf.broadcast_to(unit, vector.shape)
            return space.to_vector(product(space.from_vector(units, rhs)))

        columns = tf.map_fn(column, tf.eye(size, dtype=vector.dtype))
        axes = [*range(1, columns.shape.rank), 0]
        matrix = tf.transpose(columns, axes)
        value = tf.linalg.solve(matrix, tf.expand_dims(vector, -1))[..., 0]
        residual = tf.norm(vector - tf.linalg.matvec(matrix, value), axis=-1)
        return LinearSolution(
            space.from_vector(value, rhs),
            structure.ratio(residual, tf.norm(vector, axis=-1)),
            tf.constant(size),
            diverged=tf.zeros(residual.shape, tf.bool),
        )
