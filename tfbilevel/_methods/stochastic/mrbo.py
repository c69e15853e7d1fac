"""Recursive momentum on a Neumann series."""

import dataclasses
from typing import Any

import tensorflow as tf

from tfbilevel._calculus.aliases import Metrics, Nest
from tfbilevel._core.prepared import Prepared
from tfbilevel._methods.stochastic.double_momentum import DoubleMomentum
from tfbilevel._methods.stochastic.series import require_series, series_gradient


@dataclasses.dataclass(frozen=True, eq=False)
class MRBO(DoubleMomentum):
    r"""Recursive momentum for both levels, on a Neumann series over minibatches (MRBO).

        u_k = g_y(x_k, y_k; S) + l_k ( u_{k-1} - g_y(x_{k-1}, y_{k-1}; S) )
        d_k = h(x_k, y_k)      + m_k ( d_{k-1} - h(x_{k-1}, y_{k-1}) )
        y_{k+1} = y_k - eta_k update( u_k ),    x_{k+1} = x_k - eta_k update( d_k )

    h is the hypergradient of `StocBiO`: f_x - g_xy v, v a series of `terms` + 1 terms.
    The same batches serve at both points, so their noise cancels in the difference:
    u and d are less noisy than single estimates as long as x and y move slowly.
    S, the factors' batches and that of g_xy are successive slices of a stacked lower
    batch, from `tb.pair(..., lower_batches=method.draws)`; with fewer they repeat.

    The paper has eta_k = a / (b + k)^{1/3} and 1 - l, 1 - m proportional to eta^2: with
    `scale=tb.InversePower(1.0, 1 / 3)`, its default here, that is for example
    1 - m_k = c (k + 1)^{-2/3}.

    Cost: two lower gradients, two upper gradients and 2 (`terms` + 1) products. Memory:
    two more copies of x and of y. Assumes g strongly convex in y, and `rate` below 1 /
    (largest eigenvalue of g_yy on any batch). Prefer `SOBA` where noise is small;
    `SUSTAIN` makes fewer products, with more noise.

    Args:
        lower_optimizer: a Keras optimizer for y that `tb.differentiable` supports; SGD
            in the paper. Its steps are scaled by eta.
        terms: number of terms of the series after the first.
        rate: the series' step size.
        scale: eta, a factor on the steps of both levels: a number or a schedule of the
            outer step.
        lower_momentum: l, from 0 to below 1: a number, or a schedule that may end at 1.
        upper_momentum: m, likewise.

    Raises:
        ValueError: for an unsupported optimizer or an argument out of its range.

    Example:
        >>> problem = tb.Problem(
        ...     upper_loss=lambda x, y, batch: 0.5 * (y - 1.0) ** 2 + 0.5 * x**2,
        ...     lower_loss=lambda x, y, batch: 0.5 * (y - x) ** 2,
        ... )
        >>> method = tb.MRBO(keras.optimizers.SGD(0.5), terms=10, rate=0.5, scale=1.0)
        >>> result = tb.minimize(problem, method, tf.constant(3.0), tf.constant(0.0),
        ...     keras.optimizers.SGD(0.1), tb.Batches(None, None), steps=100)
        >>> round(float(result.upper), 2), round(float(result.lower), 2)
        (0.5, 0.5)

    References:
        Yang, Ji, Liang (2021), Provably faster algorithms for bilevel optimization.
        arXiv:2106.04692.
    """

    terms: int = 3
    rate: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_series(self.terms, self.rate, "terms")

    @property
    def draws(self) -> int:
        """The number of lower batches that one step uses."""
        return self.terms + 2

    def _estimate(
        self, here: Prepared, lower: Nest, step: tf.Tensor
    ) -> tuple[Any, Metrics]:
        del step
        return series_gradient(here, lower, self.terms, self.rate, first=1)
