"""The interface of the linear solvers."""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from tfbilevel import _structure as structure
from tfbilevel._inner import require_count

Product = Callable[[Any], Any]


class LinearSolution(NamedTuple):
    """What a linear solver found.

    Attributes:
        value: v, like the right-hand side.
        residual: relative residual ||b - A v|| / ||b||, scalar; 0 for b = 0. The
            iterations that update v last report it from before that last update.
        iterations: how many steps the loop made, one product with A each (a warm
            start costs one more), int32 scalar.
    """

    value: Any
    residual: tf.Tensor
    iterations: tf.Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class LinearSolver(abc.ABC):
    """Solves A v = b, A symmetric, given products with A.

    Args:
        max_steps: most products with A, at least 1.
        tolerance: stop when ||b - A v|| <= tolerance * ||b||; not negative.
        damping: solve (A + damping I) v = b instead; not negative.

    Raises:
        ValueError: if an argument is out of its range.
    """

    max_steps: int
    tolerance: float = dataclasses.field(default=1e-6, kw_only=True)
    damping: float = dataclasses.field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        require_count(self.max_steps, "max_steps")
        for name in ("tolerance", "damping"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ValueError(
                    f"`{name}` must be finite and not negative. "
                    f"Received: {name}={value}"
                )

    @property
    def warm(self) -> bool:
        """Whether the solution of one outer step starts the next one's solve."""
        return False

    @abc.abstractmethod
    def solve(
        self, product: Product, rhs: Any, start: Any, rate: Any
    ) -> LinearSolution:
        """Solve A v = rhs.

        Args:
            product: v -> A v.
            rhs: b, any nest of tensors.
            start: where a warm-started solver begins; `None`: at zero.
            rate: the inner solver's learning rate, for the solvers that step with it.
        """

    def damped(self, product: Product) -> Product:
        """v -> (A + damping I) v."""
        if self.damping == 0:
            return product
        return lambda vector: structure.add_scaled(
            product(vector), self.damping, vector
        )


def relative(residual_norm: tf.Tensor, rhs_norm: tf.Tensor) -> tf.Tensor:
    """The ratio, and 0 for 0 / 0."""
    return tf.math.divide_no_nan(residual_norm, rhs_norm)


def require_rate(rate: float | None) -> None:
    """Raise unless the step size is `None` or positive and finite."""
    if rate is not None and not (math.isfinite(rate) and rate > 0):
        raise ValueError(
            "`rate` must be positive and below 2 / (largest eigenvalue of the lower "
            f"Hessian). Received: rate={rate}"
        )
