"""The matrix taken for a multiple of the identity."""

import dataclasses

import tensorflow as tf

from tfbilevel._calculus import structure
from tfbilevel._calculus.aliases import Nest, State
from tfbilevel._linear_solvers.base import (
    LinearSolution,
    LinearSolver,
    LinearSystem,
    WithRate,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Identity(WithRate, LinearSolver):
    r"""A taken for a multiple of the identity: nothing is solved (SAMA, T1-T2).

        v = rate b          as if A were (1 / rate) times the identity

    With `through="optimizer"` this is SAMA: the system there is (I - Phi_s') v =
    (f_y, 0), whose rate is 1, and Phi_x' v passes f_y through the inner optimizer's own
    step. So the hypergradient is

        f_x - g_xy D f_y,          D = d update / d gradient  at y and its slots

    where D is diagonal: the rate for SGD; for Adam, RMSprop and others it adapts f_y to
    every entry as the optimizer adapts g_y. It is found by differentiating the
    optimizer's rule. With `through="gradient"` it is f_x - rate g_xy f_y (T1-T2).

    Cost: one product with A, for the metric `residual` alone. Memory: two vectors. The
    result is the derivative of one more inner step from a constant y. With SGD each
    eigenvector of g_yy counts (rate * eigenvalue) times as much as it should: the sign
    is right, the size is not, so where f_x is not 0 it weighs too much. Assumes g_yy
    positive definite. Prefer `ConjugateGradient` or `Neumann` where a few products are
    affordable, and `FiniteDifference` for the same formula without second derivatives.

    Args:
        rate: the factor; `None`: the inner solver's learning rate (1 with
            `through="optimizer"`).
        damping: as if A were (1 / rate + damping) times the identity.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> solver = tb.Identity(rate=0.25)
        >>> b = tf.constant([2.0, 4.0])
        >>> found = solver.solve(tb.LinearSystem(lambda v: 2.0 * v), b)
        >>> found.value.numpy().tolist(), float(found.residual)
        ([0.5, 1.0], 0.5)

    References:
        Choe, Mehta, Ahn, Neiswanger, Xie, Strubell, Xing (2023), Making scalable meta
        learning practical. arXiv:2310.05674. Luketina, Berglund, Greff, Raiko (2016),
        Scalable gradient-based tuning of continuous regularization hyperparameters.
        arXiv:1511.06727.
    """

    rate: float | None = None

    def solve(
        self, system: LinearSystem, rhs: Nest, state: State = ()
    ) -> LinearSolution:
        del state
        rate = self.rate_of(system)
        value = structure.scale(rate / (1 + rate * self.damping), rhs)
        product, _ = self.damped(system)
        left = system.norm(structure.subtract(rhs, product(value)))
        residual = structure.ratio(left, system.norm(rhs))
        return LinearSolution(
            value,
            residual,
            tf.constant(0),
            diverged=tf.zeros_like(residual, tf.bool),  # there are no steps
        )
