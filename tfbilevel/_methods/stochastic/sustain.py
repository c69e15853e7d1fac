"""Recursive momentum on a product of random length."""

import dataclasses
from typing import Any

import tensorflow as tf

from tfbilevel._calculus.aliases import Metrics, Nest
from tfbilevel._core.arguments import require_count
from tfbilevel._core.prepared import Prepared
from tfbilevel._methods.stochastic.bsa import random_product
from tfbilevel._methods.stochastic.double_momentum import DoubleMomentum
from tfbilevel._methods.stochastic.series import require_series


@dataclasses.dataclass(frozen=True, eq=False)
class SUSTAIN(DoubleMomentum):
    r"""Recursive momentum for both levels, on a product of random length (SUSTAIN).

        u_k = g_y(x_k, y_k; S) + l_k ( u_{k-1} - g_y(x_{k-1}, y_{k-1}; S) )
        d_k = h(x_k, y_k)      + m_k ( d_{k-1} - h(x_{k-1}, y_{k-1}) )
        y_{k+1} = y_k - eta_k update( u_k ),    x_{k+1} = x_k - eta_k update( d_k )

    h is the hypergradient of `BSA`: f_x - g_xy v with a product of up to `max_steps`
    factors, whose random length is the same at both points. Momentum takes most of its
    large variance away. Lower batches: S, then the factors, then that of g_xy.

    Cost: two lower gradients, two upper gradients and `max_steps` + 1 products on
    average. Memory: two more copies of x and of y. Assumes g strongly convex in y, and
    `rate` below 1 / (largest eigenvalue of g_yy on any batch). Prefer `MRBO`
    if `terms` products are affordable.

    Args:
        lower_optimizer: a Keras optimizer for y that `tb.differentiable` supports; SGD
            in the paper. Its steps are scaled by eta.
        max_steps: the maximal number of factors, and of terms in expectation.
        rate: the series' step size.
        seed: the seed of the random length.
        scale: eta, a factor on the steps of both levels: a number or a schedule of the
            outer step; (k + 1)^{-1/3} in the paper.
        lower_momentum: l, from 0 to below 1: a number, or a schedule that may end at 1.
        upper_momentum: m, likewise.

    Raises:
        ValueError: for an unsupported optimizer or an argument out of its range.

    Example:
        >>> problem = tb.Problem(
        ...     upper_loss=lambda x, y, batch: 0.5 * (y - 1.0) ** 2 + 0.5 * x**2,
        ...     lower_loss=lambda x, y, batch: 0.5 * (y - x) ** 2,
        ... )
        >>> method = tb.SUSTAIN(
        ...     keras.optimizers.SGD(0.5), max_steps=1, rate=1.0, scale=1.0)
        >>> result = tb.minimize(problem, method, tf.constant(3.0), tf.constant(0.0),
        ...     keras.optimizers.SGD(0.1), tb.Batches(None, None), steps=100)
        >>> round(float(result.upper), 2), round(float(result.lower), 2)
        (0.5, 0.5)

    References:
        Khanduri, Zeng, Hong, Wai, Wang, Yang (2021), A near-optimal algorithm for
        stochastic bilevel optimization via double-momentum. arXiv:2102.07367.
    """

    max_steps: int = 3
    rate: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_series(self.max_steps, self.rate)
        require_count(self.seed, "seed", least=0)

    @property
    def draws(self) -> int:
        """The largest number of lower batches that one step uses."""
        return 1 + self.max_steps

    def _estimate(
        self, here: Prepared, lower: Nest, step: tf.Tensor
    ) -> tuple[Any, Metrics]:
        return random_product(
            here, lower, self.max_steps, self.rate, 1, (self.seed, step)
        )
