"""The single loop on the Moreau envelope."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tfbilevel._calculus import derivatives, structure
from tfbilevel._calculus.aliases import Nest, State
from tfbilevel._core.arguments import positive, require_number
from tfbilevel._core.batches import Batches
from tfbilevel._core.method import Step
from tfbilevel._core.prepared import Prepared
from tfbilevel._core.problem import Problem
from tfbilevel._core.projection import fixed_projection
from tfbilevel._core.schedules import InversePower, Schedule, as_weight
from tfbilevel._methods.penalty.divergence import grown
from tfbilevel._methods.penalty.moves_copy import MovesCopy
from tfbilevel._methods.penalty.value_gap import penalised


@dataclasses.dataclass(frozen=True, eq=False)
class MEHA(MovesCopy):
    r"""First-order single loop on the Moreau envelope of the lower loss (MEHA).

        v(x, y) = min_z  g(x, z) + |z - y|^2 / (2 gamma)
        min_{x, y}  w_k f(x, y) + g(x, y) - v(x, y),                w_k = 1 / c_k

    by one step of z, then of y, then of x:

        z_{k+1} = z_k - update( g_y(x_k, z_k) + (z_k - y_k) / gamma )
        y_{k+1} = y_k - update( w_k f_y(x_k, y_k) + g_y(x_k, y_k)
                                - (y_k - z_{k+1}) / gamma )
        x_{k+1} = x_k - update( w_k f_x(x_k, y_{k+1}) + g_x(x_k, y_{k+1})
                                - g_x(x_k, z_{k+1}) )

    The envelope is smooth in x and y also where the lower loss has many solutions or is
    not convex, as long as 1 / gamma exceeds its negative curvature. w_k falls slowly,
    so the constraint g = v binds more and more. The three steps use slices 0, 1 and 2
    of a stacked lower batch (`tb.pair(..., lower_batches=3)`); with fewer they repeat.

    Cost: four lower and two upper gradients; no second derivatives, no inner loop.
    Memory: one more copy of y. Prefer `ValueGap` or `F2SA` if the lower loss is
    strongly convex: there z may be solved, and w need not fall slowly.

    The metrics hold `gap` (g(x, y) - g(x, z) after the steps), `weight` (c_k) and
    `diverged`: 1 if the direction of y is ten times as long as the first of all.

    Args:
        lower_optimizer: a Keras optimizer for y; SGD in the paper. Its rate times
            (curvature of g) must stay below 2.
        auxiliary_optimizer: a Keras optimizer for z; its rate times (curvature of g +
            1 / gamma) must stay below 2. `None`: like `lower_optimizer`.
        smoothing: gamma, positive.
        upper_weight: w, a number or a schedule of the outer step, not negative. The
            paper has (k + 1)^{-p} / c with p below 1/2.

    Raises:
        ValueError: for an unsupported optimizer, a smoothing that is not positive or a
            negative weight.

    Example:
        >>> problem = tb.Problem(
        ...     upper_loss=lambda x, y, batch: 0.5 * (y - 1.0) ** 2 + 0.5 * x**2,
        ...     lower_loss=lambda x, y, batch: 0.5 * (y - x) ** 2,
        ... )
        >>> method = tb.MEHA(keras.optimizers.SGD(0.5), upper_weight=0.01)
        >>> result = tb.minimize(problem, method, tf.constant(3.0), tf.constant(0.0),
        ...     keras.optimizers.SGD(1.0), tb.Batches(None, None), steps=3000)
        >>> round(float(result.upper), 1), round(float(result.lower), 1)
        (0.5, 0.5)

    References:
        Liu, Liu, Yao, Zeng, Zhang (2024), Moreau envelope for nonconvex bi-level
        optimization: a single-loop and Hessian-free solution strategy.
        arXiv:2405.09927.
    """

    lower_optimizer: keras.optimizers.Optimizer
    auxiliary_optimizer: keras.optimizers.Optimizer | None = None
    smoothing: float = 1.0
    upper_weight: float | Schedule = InversePower(1.0, 0.25)

    def __post_init__(self) -> None:
        _ = self.rule, self.auxiliary_rule, self.schedule  # raises for invalid ones
        require_number(self.smoothing, "smoothing", positive, "above 0 (gamma)")

    @functools.cached_property
    def schedule(self) -> Schedule:
        """w at every outer step."""
        return as_weight(self.upper_weight, "upper_weight")

    @property
    def draws(self) -> int:
        """The number of lower batches that one step uses."""
        return 3

    @property
    def mean_metrics(self) -> tuple[str, ...]:
        return (*super().mean_metrics, "gap", "weight")

    def init(self, problem: Problem, upper: Nest, lower: Nest) -> State:
        del upper
        lengths = problem.inner_product.norm(structure.to_tensors(lower))
        return {
            "step": tf.constant(0, tf.int64),
            "optimizer": self.rule.init(lower),
            "auxiliary_optimizer": self.auxiliary_rule.init(lower),
            "auxiliary": structure.copied(lower),
            "first": tf.zeros_like(lengths),
        }

    def step(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: State
    ) -> Step:
        here = problem.prepared(upper, batches)
        weight = self._weight(state, lower)
        moved, auxiliary, after, length = self._moved(here, lower, state, weight)
        _, (partial, response) = derivatives.value_and_partials(
            lambda a, b: penalised(here, a, b, moved, auxiliary, 2, (weight, 1.0)),
            here.upper,
            here.upper,
        )
        metrics, first = grown((length, length), state)
        losses = [here.lower_loss(each, 2) for each in (moved, auxiliary)]
        return Step(
            upper_gradient=here.gradient(partial, response),
            lower=fixed_projection(problem, upper, moved, "MEHA"),
            state={
                **after,
                "step": state["step"] + 1,
                "auxiliary": auxiliary,
                "first": first,
            },
            metrics={
                "upper_loss": here.upper_loss(moved),
                "lower_loss": losses[0],
                "gap": losses[0] - losses[1],
                "weight": tf.math.reciprocal_no_nan(weight),
                **metrics,
            },
        )

    def objective(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: State
    ) -> Callable[[Nest], tf.Tensor]:
        at, weight = problem.prepared(upper, batches), self._weight(state, lower)
        moved, auxiliary, _, _ = self._moved(at, lower, state, weight)

        def value(x: Nest) -> tf.Tensor:
            here = problem.prepared(x, batches)
            c = here.upper
            return here.mean(penalised(here, c, c, moved, auxiliary, 2, (weight, 1.0)))

        return value

    def _weight(self, state: State, lower: Nest) -> tf.Tensor:
        dtype = structure.to_tensors(tf.nest.flatten(lower)[0]).dtype
        return tf.cast(self.schedule(state["step"]), dtype)

    def _moved(
        self, here: Prepared, lower: Nest, state: State, weight: tf.Tensor
    ) -> tuple[Any, Any, dict, tf.Tensor]:
        """y and z after their steps, both optimizers' states, and |d_y|."""
        y, z = structure.to_tensors(lower), state["auxiliary"]
        _, slope = here.lower_gradient(z, 0)
        pull = structure.subtract(z, y)
        slope = structure.add_scaled(slope, 1 / self.smoothing, pull)
        z, of_z = self.auxiliary_rule.update(slope, state["auxiliary_optimizer"], z)
        z = here.problem.projected_lower(here.upper, z)

        def loss(y: Nest) -> tf.Tensor:
            f = here.problem.upper_loss(here.upper, y, here.batches.upper)
            g = here.problem.lower_loss(here.upper, y, here.batches.lower_at(1))
            return weight * tf.cast(f, weight.dtype) + tf.cast(g, weight.dtype)

        _, (along,) = derivatives.value_and_partials(loss, y)
        along = derivatives.require_connected(along, y, "lower", "the penalised loss")
        pull = structure.subtract(y, z)
        along = structure.add_scaled(along, -1 / self.smoothing, pull)
        moved, of_y = self.rule.update(along, state["optimizer"], y)
        moved = here.problem.projected_lower(here.upper, moved)
        after = {"optimizer": of_y, "auxiliary_optimizer": of_z}
        return moved, z, after, here.norm(along)
