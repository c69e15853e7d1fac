"""A low-rank approximation of the Hessian, inverted in closed form."""

import dataclasses

import numpy as np
import tensorflow as tf

from tfbilevel._calculus import structure
from tfbilevel._calculus.aliases import Nest, State
from tfbilevel._core.arguments import require_count
from tfbilevel._linear_solvers.base import LinearSolution, LinearSolver, LinearSystem


@dataclasses.dataclass(frozen=True, eq=False)
class Nystrom(LinearSolver):
    r"""The inverse of a low-rank approximation of a symmetric A (Nystrom).

        C = A W,   A ~ C (W'C)^{-1} C',       W [n, rank] random, orthonormal
        v = (C (W'C)^{-1} C' + damping I)^{-1} b
          = (b - C (damping W'C + C'C)^{-1} C' b) / damping

    `rank` products with A, which do not depend on each other, and one more for the
    residual; no steps, and no step size. Memory: 3 `rank` vectors like y. The
    approximation is exact for a Hessian of this rank. Lower Hessians of networks have a
    few large eigenvalues and many near zero, for which it is made: along the large ones
    v is right, along the others A counts as zero, so `damping` must be positive.
    Assumes A symmetric, with no eigenvalue near -`damping`. Prefer `ConjugateGradient`
    where a small residual matters and A is positive definite.

    Args:
        rank: number of random vectors.
        seed: of these; every outer step has others.
        damping: rho, positive: solve (A + damping I) v = b.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> direction = tf.constant([0.6, 0.8])
        >>> system = tb.LinearSystem(  # rank 1, with the eigenvalue 9
        ...     lambda v: 9.0 * tf.reduce_sum(direction * v) * direction)
        >>> found = tb.Nystrom(rank=1, damping=1.0).solve(system, 10.0 * direction)
        >>> found.value.numpy().round(3)
        array([0.6, 0.8], dtype=float32)

    References:
        Hataya, Yamada (2023), Nystrom method for accurate and scalable implicit
        differentiation. arXiv:2302.09726 (which samples columns of A instead).
    """

    rank: int = 10
    seed: int = 0
    damping: float = dataclasses.field(default=0.01, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count(self.rank, "rank")
        require_count(self.seed, "seed", least=0)
        if self.damping == 0:
            raise ValueError(
                "`damping` must be positive for tb.Nystrom: the approximation has no "
                "inverse without it. Use a tenth of the curvature that matters, such "
                f"as 0.01. Received: damping={self.damping!r}"
            )

    @property
    def needs_symmetric(self) -> bool:
        return True

    @property
    def scheduled(self) -> bool:
        # Every outer step has its own random vectors.
        return True

    def solve(
        self, system: LinearSystem, rhs: Nest, state: State = ()
    ) -> LinearSolution:
        del state
        space = system.inner_product
        b = space.to_vector(rhs)
        size = int(b.shape[-1] or 0)
        key = tf.stack(
            [tf.cast(self.seed, tf.int64), tf.cast(system.outer_step, tf.int64)]
        )
        # Of length 1 and orthogonal, so that W'C is as well conditioned as A.
        normal = tf.random.stateless_normal([size, self.rank], key, dtype=b.dtype)
        random = tf.transpose(tf.linalg.qr(normal).q)

        def image(row: tf.Tensor) -> tf.Tensor:
            # The same vector for every block.
            vector = space.from_vector(tf.broadcast_to(row, b.shape), rhs)
            return space.to_vector(system.product(vector))

        rows = tf.map_fn(image, random)  # C', [rank, (blocks,) n]
        rows = tf.transpose(
            rows, [*range(1, rows.shape.rank - 1), 0, rows.shape.rank - 1]
        )
        # In float64: the small matrix is as badly conditioned as A A.
        rows, random, wide = (tf.cast(each, tf.float64) for each in (rows, random, b))
        # A little of the identity keeps it invertible if A has a smaller rank.
        epsilon = np.finfo(b.dtype.name).eps
        shift = epsilon * tf.norm(rows, axis=[-2, -1])
        rows += shift[..., None, None] * random
        inner = tf.matmul(rows, self.damping * random + rows, transpose_b=True)
        inner = (inner + tf.linalg.matrix_transpose(inner)) / 2
        shares = tf.linalg.solve(inner, tf.linalg.matvec(rows, wide)[..., None])
        along = tf.matmul(rows, shares, transpose_a=True)[..., 0]
        value = tf.cast((wide - along) / self.damping, b.dtype)
        value = space.from_vector(value, rhs)
        product, _ = self.damped(system)
        left = system.norm(structure.subtract(rhs, product(value)))
        residual = structure.ratio(left, system.norm(rhs))
        return LinearSolution(
            value, residual, tf.constant(min(self.rank, size)), diverged=residual > 1
        )
