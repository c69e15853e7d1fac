"""The single loop of three stochastic gradient steps."""

import dataclasses
from collections.abc import Callable

import tensorflow as tf

from tfbilevel._calculus import structure
from tfbilevel._calculus.aliases import Nest, State
from tfbilevel._core.batches import Batches
from tfbilevel._core.method import Step
from tfbilevel._core.problem import Problem
from tfbilevel._core.projection import fixed_projection
from tfbilevel._methods.stochastic.directions import directions, followed, lagrangian
from tfbilevel._methods.stochastic.followed_solution import FollowedSolution


@dataclasses.dataclass(frozen=True, eq=False)
class SOBA(FollowedSolution):
    r"""One stochastic gradient step of y, of v and of x per outer step (SOBA).

        y_{k+1} = y_k - update( g_y )
        v_{k+1} = v_k - rho_k ( g_yy v_k - f_y )
        x_{k+1} = x_k - update( f_x - g_xy v_k )

    all at (x_k, y_k, v_k), from one lower and one upper batch. v follows the solution
    of g_yy v = f_y, which `Implicit` solves at every step. Each direction is linear in
    the batch losses, so with random batches it is an unbiased estimate of the full one:
    stochastic gradient descent on three problems at once. With constant rates it ends
    near a solution, with decaying ones in it; x should be the slowest.

    Cost: two gradients and one pair of products, all on minibatches; as much as four
    gradients. Memory: v. Assumes g strongly convex in y, and rho below 2 / (largest
    eigenvalue of g_yy on any batch). Prefer `StocBiO` if several lower steps per outer
    step are affordable, `Implicit` for full batches.

    The metrics hold `stationarity` (|g_y|), `residual` (|g_yy v - f_y| / |f_y|) and
    `diverged`: 1 if |g_yy v - f_y| exceeds ten times the largest |f_y| so far. `rate`
    is too large then.

    Args:
        lower_optimizer: a Keras optimizer for y that `tb.differentiable` supports; SGD
            in the paper.
        rate: rho, positive: a number or a schedule of the outer step, such as
            tb.InversePower(0.1, 0.5). The paper takes that of the lower SGD.

    Raises:
        ValueError: for an unsupported optimizer, or a rate that is not positive.

    Example:
        >>> problem = tb.Problem(
        ...     upper_loss=lambda x, y, batch: 0.5 * (y - 1.0) ** 2 + 0.5 * x**2,
        ...     lower_loss=lambda x, y, batch: 0.5 * (y - x) ** 2,
        ... )
        >>> method = tb.SOBA(keras.optimizers.SGD(0.5), rate=0.5)
        >>> result = tb.minimize(problem, method, tf.constant(3.0), tf.constant(0.0),
        ...     keras.optimizers.SGD(0.1), tb.Batches(None, None), steps=100)
        >>> round(float(result.upper), 2), round(float(result.lower), 2)
        (0.5, 0.5)

    References:
        Dagréou, Ablin, Vaiter, Moreau (2022), A framework for bilevel optimization that
        enables stochastic and global variance reduction algorithms. arXiv:2201.13409.
    """

    @property
    def draws(self) -> int:
        """The number of lower batches that one step uses."""
        return 1

    def step(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: State
    ) -> Step:
        here = problem.prepared(upper, batches)
        lower, solution = structure.to_tensors(lower), state["solution"]
        made = directions(here, lower, solution)
        metrics, largest = followed(
            here.norm,
            made.losses,
            lower=made.lower,
            solution=made.solution,
            slope=made.slope,
            largest=state["largest"],
        )
        moved, optimizer = self.rule.update(made.lower, state["optimizer"], lower)
        rate = self.rates(state["step"])
        return Step(
            upper_gradient=made.upper,
            lower=fixed_projection(problem, upper, moved, "SOBA"),
            state={
                "step": state["step"] + 1,
                "optimizer": optimizer,
                "solution": structure.add_scaled(solution, -rate, made.solution),
                "largest": largest,
            },
            metrics=metrics,
        )

    def objective(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: State
    ) -> Callable[[Nest], tf.Tensor]:
        return lambda x: lagrangian(
            problem.prepared(x, batches), lower, state["solution"]
        )
