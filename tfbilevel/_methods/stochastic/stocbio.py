"""The stochastic bilevel optimizer with a Neumann series over different batches."""

import dataclasses

from tfbilevel._calculus.aliases import Nest, State
from tfbilevel._core.arguments import require_choice
from tfbilevel._core.batches import Batches
from tfbilevel._core.former_arguments import renamed
from tfbilevel._core.inner_solver import InnerSolver, require_inner
from tfbilevel._core.method import Method, Step
from tfbilevel._core.problem import Problem
from tfbilevel._core.projection import fixed_projection
from tfbilevel._methods.stochastic.series import require_series, series_gradient


@renamed({"max_steps": "terms"})
@dataclasses.dataclass(frozen=True, eq=False)
class StocBiO(Method):
    r"""Stochastic hypergradient by a Neumann series over minibatches (stocBiO).

        y_{t+1} = y_t - update( g_y(x, y_t; S_t) ),   t < T
        r_0 = f_y,   r_{j+1} = (I - eta g_yy(x, y_T; B_j)) r_j,   v = eta sum_{j<=Q} r_j
        dF/dx ~ f_x - g_xy(x, y_T; D) v

    S_t, B_j and D are successive slices of a stacked lower batch, from
    `tb.pair(..., lower_batches=draws)`; with fewer slices they repeat, and with a plain
    batch all are equal. Cost: T gradients and Q + 1 Hessian-vector products, all on
    minibatches. Memory: one step's graph and three vectors like y, besides the stacked
    batch. The bias falls like (1 - eta * curvature)^(Q + 1); needs
    eta * (largest eigenvalue of g_yy) < 1. Prefer `Implicit` for full batches.

    The metric `growth` is |r_Q| / |r_0|. If it is above 1, eta is too large, and
    `diverged` is 1.

    Args:
        inner: the inner solver; warm-started in the paper.
        terms: Q, number of terms of the series after r_0, with one Hessian-vector
            product each.
        rate: eta.
        factors: "fresh": every factor of the series uses a separate lower batch;
            "shared": all factors use the same one.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> problem = tb.Problem(
        ...     upper_loss=lambda x, y, batch: 0.5 * (y - 1.0) ** 2,
        ...     lower_loss=lambda x, y, batch: 0.5 * (y - x) ** 2,
        ... )
        >>> inner = tb.InnerSolver(keras.optimizers.SGD(0.5), steps=40)
        >>> method = tb.StocBiO(inner, terms=1, rate=0.5)
        >>> x, y = tf.constant(3.0), tf.constant(0.0)
        >>> step = method.step(problem, x, y, tb.Batches(None, None), method.init(
        ...     problem, x, y))
        >>> round(float(step.upper_gradient), 4)  # (0.5 + 0.25) * 2
        1.5

    References:
        Ji, Yang, Liang (2021), Bilevel optimization: convergence analysis and
        enhanced design. arXiv:2010.07962.
    """

    inner: InnerSolver
    terms: int = 3
    rate: float = 0.5
    factors: str = "fresh"

    def __post_init__(self) -> None:
        require_inner(self.inner)
        require_series(self.terms, self.rate, "terms")
        require_choice(self.factors, "factors", ("fresh", "shared"))

    @property
    def draws(self) -> int:
        """The number of lower batches that one step uses."""
        series = self.terms if self.factors == "fresh" else 1
        return self.inner.steps + series + 1

    def init(self, problem: Problem, upper: Nest, lower: Nest) -> State:
        return self.inner.init(problem, upper, lower)

    def step(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: State
    ) -> Step:
        here = problem.prepared(upper, batches)
        lower, after, _ = self.inner.solve(here, lower, state)
        fixed_projection(here.problem, here.upper, lower, "StocBiO")
        gradient, metrics = series_gradient(
            here,
            lower,
            self.terms,
            self.rate,
            first=self.inner.steps,
            stride=1 if self.factors == "fresh" else 0,
        )
        return Step(upper_gradient=gradient, lower=lower, state=after, metrics=metrics)
