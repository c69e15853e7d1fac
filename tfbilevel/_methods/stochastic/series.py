"""Stochastic estimates of the inverse Hessian's product with f_y."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfbilevel._calculus import structure
from tfbilevel._calculus.aliases import Metrics, Nest
from tfbilevel._calculus.loops import serial_loop
from tfbilevel._core.arguments import positive, require_count, require_number
from tfbilevel._core.prepared import Prepared


def require_series(count: int, rate: float, name: str = "max_steps") -> None:
    """Raise unless the series has a valid length and step size."""
    require_count(count, name)
    remedy = "Stay below 1 / (largest eigenvalue of the lower Hessian)."
    require_number(rate, "rate", positive, "above 0 (eta)", remedy)


def factors(
    here: Prepared,
    lower: Nest,
    vector: Nest,
    rate: float,
    *,
    first: Any,
    count: Any,
    most: int,
    stride: int = 1,
) -> tuple[Any, Any]:
    """prod_j (I - rate H_j) v over j < count, and the sum of all partial products.

    H_j is the lower Hessian on the lower batch with number first + j * stride.
    """

    def body(j: tf.Tensor, term: Any, total: Nest) -> tuple:
        _, _, pullback = here.lower_gradient_pullback(lower, first + j * stride)
        term = structure.add_scaled(term, -rate, pullback(term, mixed=False)[1])
        return j + 1, term, structure.add(total, term)

    _, term, total = serial_loop(
        lambda j, *_: j < count, body, (tf.constant(0), vector, vector), most
    )
    return term, total


def series_gradient(
    here: Prepared, lower: Nest, terms: int, rate: float, *, first: int, stride: int = 1
) -> tuple[Any, Metrics]:
    """f_x - g_xy v, v = rate * (1 + `terms` terms of the series), and its metrics.

    The lower batches are first, first + stride, ... for the factors, then the next one
    for g_xy.
    """
    upper_loss, partial, adjoint = here.upper_partials(lower)
    term, total = factors(
        here,
        lower,
        adjoint,
        rate,
        first=first,
        count=terms,
        most=terms,
        stride=stride,
    )
    solution = structure.scale(-rate, total)
    after = first + (terms if stride else 1)
    mixed, lower_loss = mixed_product(here, lower, solution, after)
    metrics = {
        "upper_loss": upper_loss,
        "lower_loss": lower_loss,
        **growth_metrics(here.norm, term, adjoint),
    }
    return here.gradient(partial, mixed), metrics


def mixed_product(here: Prepared, lower: Nest, vector: Nest, draw: Any) -> tuple:
    """g_xy v and the lower loss on one lower batch; `None` where not connected."""
    value, _, pullback = here.lower_gradient_pullback(lower, draw)
    return pullback(vector, curvature=False)[0], value


def growth_metrics(
    norm: Callable[[Nest], tf.Tensor], term: Any, vector: Nest
) -> Metrics:
    """The growth of the products, one value per task; above 1 the series does not
    converge."""
    growth = structure.ratio(norm(term), norm(vector))
    return {"growth": growth, "diverged": tf.cast(growth > 1.001, growth.dtype)}
