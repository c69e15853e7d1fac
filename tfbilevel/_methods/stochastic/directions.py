"""The three directions of methods that follow the linear system's solution."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfbilevel._calculus import structure
from tfbilevel._calculus.aliases import Metrics, Nest
from tfbilevel._calculus.derivatives import Products
from tfbilevel._core.prepared import Prepared

# |g_yy v - f_y| stays below the largest |f_y| so far as long as v follows its system.
TOO_FAR = 10.0


class Directions(NamedTuple):
    """What is descended at one point (x, y, v).

    Attributes:
        upper: f_x - g_xy v, the gradient in the problem's x.
        lower: g_y.
        solution: g_yy v - f_y.
        slope: |f_y|; over tasks, one per task.
        losses: `upper_loss` and `lower_loss`.
        products: v -> (g_xy v, g_yy v) at the same point.
    """

    upper: Any
    lower: Nest
    solution: Nest
    slope: tf.Tensor
    losses: Metrics
    products: Products


def directions(
    here: Prepared, lower: Nest, solution: Nest, draw: Any = 0
) -> Directions:
    """All of them from one lower batch: two gradients and one pair of products.

    Args:
        here: the problem of this outer step.
        lower: y.
        solution: v.
        draw: the number of the lower batch.
    """
    upper_loss, partial, adjoint = here.upper_partials(lower)
    lower_loss, gradient, products = here.lower_gradient_pullback(lower, draw)
    mixed, curved = products(structure.scale(-1, solution))
    against = structure.subtract(structure.scale(-1, curved), adjoint)
    return Directions(
        upper=spoiled(here.gradient(partial, mixed), against),
        lower=gradient,
        solution=against,
        slope=here.norm(adjoint),
        losses={"upper_loss": upper_loss, "lower_loss": lower_loss},
        products=products,
    )


class OfLower(NamedTuple):
    """What the directions take from a lower batch.

    Attributes:
        gradient: g_y.
        curved: g_yy v.
        mixed: g_xy v, in the problem's own x.
        loss: g; over tasks, the mean.
    """

    gradient: Any
    curved: Any
    mixed: Any
    loss: tf.Tensor


def of_lower(here: Prepared, lower: Nest, solution: Nest) -> OfLower:
    """From the first lower batch."""
    value, gradient, products = here.lower_gradient_pullback(lower, 0)
    mixed, curved = products(solution)
    zeros = structure.zeros_like(here.upper)
    return OfLower(gradient, curved, here.gradient(zeros, mixed), value)


def followed(
    norm: Callable[[Nest], tf.Tensor],
    losses: Metrics,
    *,
    lower: Nest,
    solution: Nest,
    slope: tf.Tensor,
    largest: tf.Tensor,
) -> tuple[Metrics, tf.Tensor]:
    """How well y and v follow their solutions, and the largest |f_y| so far.

    Args:
        norm: of nests like y; over tasks, one per task.
        losses: `upper_loss` and `lower_loss`.
        lower: g_y, as this step knows it.
        solution: g_yy v - f_y, likewise.
        slope: |f_y|.
        largest: the largest |f_y| before.
    """
    size = norm(solution)
    largest = tf.maximum(largest, slope)
    metrics = {
        **losses,
        "stationarity": norm(lower),
        "residual": structure.ratio(size, slope),
        "diverged": too_far(size, largest),
    }
    return metrics, largest


def spoiled(direction: Any, against: Nest) -> Any:
    """The direction of x, all NaN if the step of v is not finite.

    That would be noticed one step later, after v is lost.
    """
    return structure.scale(
        tf.where(structure.all_finite(against), 1.0, np.nan), direction
    )


def too_far(size: tf.Tensor, largest: tf.Tensor) -> tf.Tensor:
    """1 where the linear system's residual says that v grows, otherwise 0.

    Args:
        size: |g_yy v - f_y|.
        largest: the largest |f_y| so far.
    """
    return tf.cast(size > TOO_FAR * largest, size.dtype)


def lagrangian(here: Prepared, lower: Nest, solution: Nest) -> tf.Tensor:
    """f - <v, g_y>, whose derivative in x is f_x - g_xy v; over tasks, the mean."""
    _, gradient = here.lower_gradient(lower, 0)
    product = here.mean(structure.dot(solution, gradient))
    f = here.upper_loss(lower)
    return f - tf.cast(product, f.dtype)
