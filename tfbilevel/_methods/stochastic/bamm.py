"""The single loop with a dual multiplier and averaged losses."""

import dataclasses
from collections.abc import Callable

import keras
import tensorflow as tf

from tfbilevel._calculus import structure
from tfbilevel._calculus.aliases import Nest, State
from tfbilevel._core.aggregation import Aggregation, aggregated, require_aggregation
from tfbilevel._core.arguments import (
    not_negative,
    positive,
    require_choice,
    require_number,
)
from tfbilevel._core.batches import Batches
from tfbilevel._core.method import Step
from tfbilevel._core.prepared import Prepared
from tfbilevel._core.problem import Problem
from tfbilevel._core.projection import fixed_projection
from tfbilevel._methods.moves_lower import MovesLower
from tfbilevel._methods.stochastic.directions import directions, followed, lagrangian

STEPS = ("scheduled", "exact")


@dataclasses.dataclass(frozen=True, eq=False)
class BAMM(MovesLower):
    r"""One step of y, of a multiplier v and of x per outer step (BAMM, DM).

    All three updates use the same (x_k, y_k, v_k); s is the lower optimizer's rate:

        y_{k+1} = y_k - update( phi_y ),     v_{k+1} = v_k - eta_k ( phi_yy v_k - f_y )
        x_{k+1} = x_k - beta_k update( f_x - phi_xy v_k ),      phi = g

    with eta_k = s * multiplier_rate * (k + 1)^{-tau/2} and beta_k = s (k + 1)^{-tau}.
    v is carried between steps and follows the solution of the linear system that
    `Implicit` solves at every step. A step therefore costs two gradients and one
    Hessian-vector product, and nothing is solved to convergence. With `aggregate`, for
    lower problems with many solutions,

        phi = (1 - mu_k) g + mu_k f,           mu_k the weight at the outer step k
        eta_k = s * multiplier_rate * (k + 1)^{-tau/2} mu_k^{3 - strategy}
        beta_k = s (k + 1)^{-3 tau/2} mu_k^{9 - 2 strategy},    strategy 1, 2 or 3

    (published: mu_k = 0.9 (k + 1)^{-1/100} and, with it, a `multiplier_rate` of 1).
    `multiplier_step="exact"` makes the step along r = phi_yy v - f_y that minimises the
    quadratic, eta_k = |r|^2 / <r, phi_yy r>, for one more product; no step is made if
    the curvature along r is not positive.

    Assumes phi_yy positive definite on the path and s * multiplier_rate below 2 /
    (largest eigenvalue of phi_yy). Memory: v, for any number of steps. Prefer
    `Implicit` if several inner steps per outer step are affordable: here x moves while
    y and v are still far off, so its steps must be small.

    The metrics hold `stationarity` (norm of phi_y), `residual` (|r| / |f_y|),
    `multiplier_rate` (eta_k) and `diverged`. The latter is 1 if an exact step met a
    curvature that is not positive, or if |r| exceeds ten times the largest |f_y| so
    far: v then grows, and `multiplier_rate` is too large for the curvature.

    Args:
        lower_optimizer: a Keras optimizer of constant rate that `tb.differentiable`
            supports; SGD in the paper.
        multiplier_rate: eta_0 / s, positive.
        decay: tau, not negative.
        aggregate: a `tb.Aggregation`, such as
            tb.Aggregation(tb.InversePower(0.9, 0.01)), or `None`.
        strategy: 1, 2 or 3: by which powers of mu_k v and x are slowed down.
        multiplier_step: "scheduled" or "exact".

    Raises:
        ValueError: for an unsupported optimizer or one of scheduled rate, an argument
            out of its range, or a `strategy` other than 1 without `aggregate`.

    Example:
        >>> problem = tb.Problem(
        ...     upper_loss=lambda x, y, batch: 0.5 * (y - 1.0) ** 2 + 0.5 * x**2,
        ...     lower_loss=lambda x, y, batch: 0.5 * (y - x) ** 2,
        ... )
        >>> method = tb.BAMM(keras.optimizers.SGD(0.5), multiplier_rate=1.0)
        >>> result = tb.minimize(problem, method, tf.constant(3.0), tf.constant(0.0),
        ...     keras.optimizers.SGD(0.2), tb.Batches(None, None), steps=400)
        >>> round(float(result.upper), 2), round(float(result.lower), 2)
        (0.5, 0.5)

    References:
        Liu, Liu, Yao, Zeng, Zhang (2023), Averaged method of multipliers for bi-level
        optimization without lower-level strong convexity. arXiv:2302.03407.
    """

    lower_optimizer: keras.optimizers.Optimizer
    multiplier_rate: float = 0.5
    decay: float = 0.01
    aggregate: Aggregation | None = None
    strategy: int = 1
    multiplier_step: str = "scheduled"

    def __post_init__(self) -> None:
        _ = self.rule  # raises if the optimizer is not supported
        require_number(self.multiplier_rate, "multiplier_rate", positive, "above 0")
        require_number(self.decay, "decay", not_negative, "not negative")
        require_aggregation(self.aggregate)
        require_choice(self.strategy, "strategy", (1, 2, 3))
        require_choice(self.multiplier_step, "multiplier_step", STEPS)
        if self.rule.scheduled:
            raise ValueError(
                "`lower_optimizer` must have a constant rate: the steps of v and x are "
                "multiples of it. Slow them with `decay`. "
                f"Received: lower_optimizer={self.lower_optimizer!r}"
            )
        if self.aggregate is None and self.strategy != 1:
            raise ValueError(
                "`strategy` must be 1 without `aggregate`: the others differ in powers "
                "of its weight. Leave it out, or pass tb.Aggregation(...). "
                f"Received: strategy={self.strategy}"
            )

    @property
    def couples_tasks(self) -> bool:
        # A nonfinite residual of one task affects all of x.
        return True

    def init(self, problem: Problem, upper: Nest, lower: Nest) -> State:
        del upper
        multiplier = structure.zeros_like(structure.to_tensors(lower))
        return {
            "step": tf.constant(0, tf.int64),
            "optimizer": self.rule.init(lower),
            "multiplier": multiplier,
            # The largest |f_y| so far, one per task.
            "largest": problem.inner_product.norm(multiplier),
        }

    def step(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: State
    ) -> Step:
        here = self._prepared(problem, upper, batches, state)
        lower, multiplier = structure.to_tensors(lower), state["multiplier"]
        made = directions(here, lower, multiplier)
        metrics, largest = followed(
            here.norm,
            made.losses,
            lower=made.lower,
            solution=made.solution,
            slope=made.slope,
            largest=state["largest"],
        )
        against = made.solution
        rate, upper_scale = self._steps(state["step"], made.slope.dtype)
        if self.multiplier_step == "exact":
            # One norm over all tensors. A published version adds up the norms of the
            # tensors before it squares them, which makes the step too long.
            square = here.dot(against, against)
            curvature = here.dot(against, made.products(against, mixed=False)[1])
            broken = (curvature <= 0) & (square > 0)
            diverged = tf.cast(broken, made.slope.dtype)
            metrics["diverged"] = tf.maximum(metrics["diverged"], diverged)
            rate = tf.where(curvature > 0, structure.ratio(square, curvature), 0)
        moved, optimizer = self.rule.update(made.lower, state["optimizer"], lower)
        return Step(
            upper_gradient=made.upper,
            lower=fixed_projection(problem, upper, moved, "BAMM"),
            state={
                "step": state["step"] + 1,
                "optimizer": optimizer,
                "multiplier": structure.add_scaled(multiplier, -rate, against),
                "largest": largest,
            },
            metrics={**metrics, "multiplier_rate": rate},
            upper_scale=upper_scale,
        )

    def objective(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: State
    ) -> Callable[[Nest], tf.Tensor]:
        return lambda x: lagrangian(
            self._prepared(problem, x, batches, state), lower, state["multiplier"]
        )

    def _prepared(
        self, problem: Problem, upper: Nest, batches: Batches, state: State
    ) -> Prepared:
        here = problem.prepared(upper, batches)
        return aggregated(self.aggregate, here, at=state["step"])

    def _steps(self, step: tf.Tensor, dtype: tf.DType) -> tuple[tf.Tensor, tf.Tensor]:
        """eta_k and beta_k."""
        count = tf.cast(step + 1, tf.float64)
        rate = tf.constant(float(self.rule.learning_rate), tf.float64)
        slower = rate * self.multiplier_rate * tf.pow(count, -self.decay / 2)
        if self.aggregate is None:
            slowest = rate * tf.pow(count, -self.decay)
        else:
            weight = self.aggregate.weight(step)
            slower *= weight ** (3 - self.strategy)
            slowest = rate * tf.pow(count, -1.5 * self.decay)
            slowest *= weight ** (9 - 2 * self.strategy)
        return tf.cast(slower, dtype), slowest
