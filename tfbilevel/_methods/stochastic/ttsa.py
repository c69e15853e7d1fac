"""The two-timescale single loop."""

import dataclasses

import keras
import tensorflow as tf

from tfbilevel._calculus import structure
from tfbilevel._calculus.aliases import Nest, State
from tfbilevel._core.arguments import not_negative, require_count, require_number
from tfbilevel._core.batches import Batches
from tfbilevel._core.method import Step
from tfbilevel._core.problem import Problem
from tfbilevel._core.projection import fixed_projection
from tfbilevel._methods.moves_lower import MovesLower
from tfbilevel._methods.stochastic.bsa import random_product
from tfbilevel._methods.stochastic.series import require_series


@dataclasses.dataclass(frozen=True, eq=False)
class TTSA(MovesLower):
    r"""One stochastic lower step per upper step, on two time scales (TTSA).

        y_{k+1} = y_k - (k + 1)^{-b} update( g_y(x_k, y_k; S) )
        x_{k+1} = x_k - (k + 1)^{-a} update( h(x_k, y_{k+1}) ),      1 > a > b > 0

    where h is the random-length estimate of `BSA` at the new y, and the updates are
    those of the two optimizers (SGD in the paper). The powers make y move faster than
    x, so that y follows the solution; the published ones are a = 3/5 and b = 2/5 for a
    strongly convex lower loss. A step costs one lower gradient, at most Q products and
    two vectors like y. Lower batches: S, then the factors, then D. Slow by design;
    prefer `StocBiO` if several lower steps are affordable.

    Args:
        lower_optimizer: a Keras optimizer that `tb.differentiable` supports; its
            steps are scaled by (k + 1)^{-b}. SGD in the paper.
        max_steps: Q, maximal number of factors.
        rate: eta; needs eta * (largest eigenvalue of g_yy) < 1.
        upper_power: a, the decay of the upper step (`Step.upper_scale`).
        lower_power: b.
        seed: the seed of the random length.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> problem = tb.Problem(
        ...     upper_loss=lambda x, y, batch: 0.5 * (y - 1.0) ** 2,
        ...     lower_loss=lambda x, y, batch: 0.5 * (y - x) ** 2,
        ... )
        >>> method = tb.TTSA(keras.optimizers.SGD(0.5), max_steps=1, rate=0.5)
        >>> x, y = tf.constant(3.0), tf.constant(1.0)
        >>> step = method.step(problem, x, y, tb.Batches(None, None), method.init(
        ...     problem, x, y))
        >>> float(step.lower), float(step.upper_gradient)
        (2.0, 0.5)

    References:
        Hong, Wai, Wang, Yang (2020), A two-timescale framework for bilevel
        optimization. arXiv:2007.05170.
    """

    lower_optimizer: keras.optimizers.Optimizer
    max_steps: int = 3
    rate: float = 0.5
    upper_power: float = 0.6
    lower_power: float = 0.4
    seed: int = 0

    def __post_init__(self) -> None:
        _ = self.rule  # raises if the optimizer is not supported
        require_series(self.max_steps, self.rate)
        require_count(self.seed, "seed", least=0)
        for name in ("lower_power", "upper_power"):
            require_number(getattr(self, name), name, not_negative, "not negative")
        if not 0 <= self.lower_power <= self.upper_power <= 1:
            raise ValueError(
                "`lower_power` and `upper_power` must satisfy 0 <= lower_power <= "
                "upper_power <= 1, or y cannot follow the solution. The published "
                f"ones are 0.4 and 0.6. Received: lower_power={self.lower_power}, "
                f"upper_power={self.upper_power}"
            )

    @property
    def draws(self) -> int:
        """The largest number of lower batches that one step uses."""
        return 1 + self.max_steps

    @property
    def couples_tasks(self) -> bool:
        # All tasks have series of the same random length.
        return True

    def init(self, problem: Problem, upper: Nest, lower: Nest) -> State:
        del problem, upper
        return {"step": tf.constant(0, tf.int64), "optimizer": self.rule.init(lower)}

    def step(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: State
    ) -> Step:
        here = problem.prepared(upper, batches)
        count = tf.cast(state["step"] + 1, tf.float64)
        _, gradient = here.lower_gradient(lower, 0)
        lower = structure.to_tensors(lower)
        moved, optimizer = self.rule.update(gradient, state["optimizer"], lower)
        # Steps are scaled instead of gradients, because most optimizers normalise the
        # gradient.
        lower = structure.add_scaled(
            lower, tf.pow(count, -self.lower_power), structure.subtract(moved, lower)
        )
        lower = fixed_projection(problem, upper, lower, "TTSA")
        upper_gradient, metrics = random_product(
            here, lower, self.max_steps, self.rate, 1, (self.seed, state["step"])
        )
        return Step(
            upper_gradient=upper_gradient,
            lower=lower,
            state={"step": state["step"] + 1, "optimizer": optimizer},
            metrics=metrics,
            upper_scale=tf.pow(count, -self.upper_power),
        )
