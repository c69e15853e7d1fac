"""The single loop with recursive momentum on the upper gradient."""

import dataclasses
import functools

import tensorflow as tf
from keras.optimizers.schedules import LearningRateSchedule

from tfbilevel._calculus import structure
from tfbilevel._calculus.aliases import Nest, State
from tfbilevel._core.batches import Batches
from tfbilevel._core.method import Step
from tfbilevel._core.prepared import Prepared
from tfbilevel._core.problem import Problem
from tfbilevel._core.projection import fixed_projection
from tfbilevel._core.schedules import Schedule
from tfbilevel._methods.stochastic.directions import followed
from tfbilevel._methods.stochastic.followed_solution import FollowedSolution
from tfbilevel._methods.stochastic.recursive_momentum import as_momentum, recursive
from tfbilevel._methods.stochastic.series import mixed_product


@dataclasses.dataclass(frozen=True, eq=False)
class FSLA(FollowedSolution):
    r"""Steps of y, v and x, one after the other, with recursive momentum for x (FSLA).

        y_{k+1} = y_k - update( g_y(x_k, y_k; S) )
        v_{k+1} = v_k - rho_k ( g_yy(x_k, y_{k+1}; B) v_k - f_y(x_k, y_{k+1}) )
        h_k     = f_x - g_xy(D) v_{k+1}   at (x_k, y_{k+1})
        d_k     = h_k + m_k ( d_{k-1} - h'_k ),     x_{k+1} = x_k - update( d_k )

    h'_k is h at the point of the step before, (x_{k-1}, y_k, v_k), from the batches of
    this step. Their common noise cancels in h_k - h'_k, so d_k is less noisy than h_k
    where x moves slowly (STORM). S, B and D are successive slices of a stacked lower
    batch (`tb.pair(..., lower_batches=3)`); with fewer slices they repeat.

    Cost: a lower gradient, one product with g_yy, two upper gradients and two products
    with g_xy. Memory: v, and two more copies of x. Assumes g strongly convex in y, and
    rho below 2 / (largest eigenvalue of g_yy on any batch). Prefer `SOBA` where upper
    batches are large: it costs half.

    The metrics hold `stationarity` (|g_y|), `residual` (|g_yy v - f_y| / |f_y|) and
    `diverged`: 1 if |g_yy v - f_y| exceeds ten times the largest |f_y| so far.

    Args:
        lower_optimizer: a Keras optimizer for y that `tb.differentiable` supports; SGD
            in the paper.
        rate: rho, positive: a number or a schedule of the outer step.
        momentum: m, from 0 to below 1: a number, or a schedule that may end at 1. 0: no
            momentum. (The paper's eta is 1 - m.)

    Raises:
        ValueError: for an unsupported optimizer, a rate that is not positive, or a
            momentum out of its range.

    Example:
        >>> problem = tb.Problem(
        ...     upper_loss=lambda x, y, batch: 0.5 * (y - 1.0) ** 2 + 0.5 * x**2,
        ...     lower_loss=lambda x, y, batch: 0.5 * (y - x) ** 2,
        ... )
        >>> method = tb.FSLA(keras.optimizers.SGD(0.5), rate=0.5, momentum=0.9)
        >>> result = tb.minimize(problem, method, tf.constant(3.0), tf.constant(0.0),
        ...     keras.optimizers.SGD(0.1), tb.Batches(None, None), steps=200)
        >>> round(float(result.upper), 2), round(float(result.lower), 2)
        (0.5, 0.5)

    References:
        Li, Gu, Huang (2022), A fully single loop algorithm for bilevel optimization
        without Hessian inverse. arXiv:2112.04660.
    """

    momentum: float | Schedule | LearningRateSchedule = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.momenta  # raises for an invalid momentum

    @functools.cached_property
    def momenta(self) -> Schedule:
        """m at every outer step."""
        return as_momentum(self.momentum, "momentum")

    @property
    def draws(self) -> int:
        """The number of lower batches that one step uses."""
        return 3

    def init(self, problem: Problem, upper: Nest, lower: Nest) -> State:
        return {
            **super().init(problem, upper, lower),
            "before": structure.copied(upper),
            "direction": structure.zeros_like(structure.to_tensors(upper)),
        }

    def step(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: State
    ) -> Step:
        here = problem.prepared(upper, batches)
        before = problem.prepared(state["before"], batches)
        lower, solution = structure.to_tensors(lower), state["solution"]
        _, gradient = here.lower_gradient(lower, 0)
        moved, optimizer = self.rule.update(gradient, state["optimizer"], lower)
        moved = fixed_projection(problem, upper, moved, "FSLA")

        upper_loss, partial, adjoint = here.upper_partials(moved)
        _, _, products = here.lower_gradient_pullback(moved, 1)
        curved = products(solution, mixed=False)[1]
        against = structure.subtract(curved, adjoint)
        rate = self.rates(state["step"])
        after = structure.add_scaled(solution, -rate, against)

        now, lower_loss = _upper_gradient(here, moved, after, partial)
        _, partial_before, _ = before.upper_partials(lower)
        old, _ = _upper_gradient(before, lower, solution, partial_before)
        direction = recursive(self.momenta, state["step"], now, old, state["direction"])
        metrics, largest = followed(
            here.norm,
            {"upper_loss": upper_loss, "lower_loss": lower_loss},
            lower=gradient,
            solution=against,
            slope=here.norm(adjoint),
            largest=state["largest"],
        )
        return Step(
            upper_gradient=direction,
            lower=moved,
            state={
                "step": state["step"] + 1,
                "optimizer": optimizer,
                "solution": after,
                "largest": largest,
                "before": structure.to_tensors(upper),
                "direction": direction,
            },
            metrics=metrics,
        )


def _upper_gradient(
    here: Prepared, lower: Nest, solution: Nest, partial: Nest
) -> tuple[Nest, tf.Tensor]:
    """f_x - g_xy v on the last lower batch, and the lower loss there."""
    mixed, lower_loss = mixed_product(here, lower, structure.scale(-1, solution), 2)
    return here.gradient(partial, mixed), lower_loss
