"""Bilevel stochastic approximation with a random number of factors."""

import dataclasses
from typing import Any

import tensorflow as tf

from tfbilevel._calculus import structure
from tfbilevel._calculus.aliases import Metrics, Nest, State
from tfbilevel._core.arguments import require_count
from tfbilevel._core.batches import Batches
from tfbilevel._core.inner_solver import InnerSolver, require_inner
from tfbilevel._core.method import Method, Step
from tfbilevel._core.prepared import Prepared
from tfbilevel._core.problem import Problem
from tfbilevel._core.projection import fixed_projection
from tfbilevel._methods.stochastic.series import (
    factors,
    growth_metrics,
    mixed_product,
    require_series,
)


@dataclasses.dataclass(frozen=True, eq=False)
class BSA(Method):
    r"""Stochastic hypergradient with a product of random length (BSA).

        v = Q eta prod_{j < p} (I - eta g_yy(x, y; B_j)) f_y,   p ~ uniform{0, ..., Q-1}
        dF/dx ~ f_x - g_xy(x, y; D) v

    whose expectation over p is the Neumann series with Q terms. Cost: (Q - 1) / 2
    products on average and two vectors like y, but a large variance. The inner steps of
    `inner` each use their own slice of a stacked lower batch
    (`tb.pair(..., lower_batches=draws)`); the slices of the factors and of D follow.
    Prefer `StocBiO`, which adds up all terms.

    Args:
        inner: the inner solver; warm-started in the paper.
        max_steps: Q.
        rate: eta; needs eta * (largest eigenvalue of g_yy) < 1.
        seed: the seed of p.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> problem = tb.Problem(
        ...     upper_loss=lambda x, y, batch: 0.5 * (y - 1.0) ** 2,
        ...     lower_loss=lambda x, y, batch: 0.5 * (y - x) ** 2,
        ... )
        >>> inner = tb.InnerSolver(keras.optimizers.SGD(0.5), steps=40)
        >>> method = tb.BSA(inner, max_steps=1, rate=0.5)
        >>> x, y = tf.constant(3.0), tf.constant(0.0)
        >>> step = method.step(problem, x, y, tb.Batches(None, None), method.init(
        ...     problem, x, y))
        >>> round(float(step.upper_gradient), 4)
        1.0

    References:
        Ghadimi, Wang (2018), Approximation methods for bilevel programming.
        arXiv:1802.02246.
    """

    inner: InnerSolver
    max_steps: int = 3
    rate: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        require_inner(self.inner)
        require_series(self.max_steps, self.rate)
        require_count(self.seed, "seed", least=0)

    @property
    def draws(self) -> int:
        """The largest number of lower batches that one step uses."""
        return self.inner.steps + self.max_steps

    @property
    def couples_tasks(self) -> bool:
        # All tasks have series of the same random length.
        return True

    def init(self, problem: Problem, upper: Nest, lower: Nest) -> State:
        return {
            "inner": self.inner.init(problem, upper, lower),
            "step": tf.constant(0, tf.int64),
        }

    def step(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: State
    ) -> Step:
        here = problem.prepared(upper, batches)
        lower, inner_state, _ = self.inner.solve(here, lower, state["inner"])
        fixed_projection(here.problem, here.upper, lower, "BSA")
        gradient, metrics = random_product(
            here,
            lower,
            self.max_steps,
            self.rate,
            self.inner.steps,
            (self.seed, state["step"]),
        )
        return Step(
            upper_gradient=gradient,
            lower=lower,
            state={"inner": inner_state, "step": state["step"] + 1},
            metrics=metrics,
        )


def random_product(
    here: Prepared,
    lower: Nest,
    most: int,
    rate: float,
    first: int,
    key: tuple[int, tf.Tensor],
) -> tuple[Any, Metrics]:
    """The hypergradient estimate at y from lower batches first, first + 1, ...; and
    its metrics."""
    seed = tf.stack([tf.cast(part, tf.int64) for part in key])
    count = tf.random.stateless_uniform([], seed, 0, most, tf.int32)
    upper_loss, partial, adjoint = here.upper_partials(lower)
    term, _ = factors(
        here, lower, adjoint, rate, first=first, count=count, most=most - 1
    )
    solution = structure.scale(-rate * most, term)
    mixed, lower_loss = mixed_product(here, lower, solution, first + most - 1)
    metrics = {
        "upper_loss": upper_loss,
        "lower_loss": lower_loss,
        **growth_metrics(here.norm, term, adjoint),
    }
    return here.gradient(partial, mixed), metrics
