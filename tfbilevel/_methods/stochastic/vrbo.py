"""Inner steps along recursive estimates, exact again after every period."""

import dataclasses
import functools
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tfbilevel._calculus import structure
from tfbilevel._calculus.aliases import Metrics, Nest, State
from tfbilevel._calculus.loops import serial_loop
from tfbilevel._core.arguments import require_count
from tfbilevel._core.batches import Batches
from tfbilevel._core.method import Step
from tfbilevel._core.problem import Problem
from tfbilevel._core.projection import fixed_projection
from tfbilevel._methods.moves_lower import MovesLower
from tfbilevel._methods.stochastic.series import (
    growth_metrics,
    require_series,
    series_gradient,
)
from tfbilevel._methods.stochastic.slices import Slices, summed


class _Estimates(NamedTuple):
    """The directions w of x and u of y, and what is known of them."""

    upper: Any
    lower: Any
    metrics: Metrics


@dataclasses.dataclass(frozen=True, eq=False)
class VRBO(MovesLower):
    r"""Several steps of y per step of x, both along recursive estimates (VRBO).

        for t = 0, ..., T, from the y, u and w of the step before:
            u = u + g_y(x, y_t; S_t) - g_y(x', y_{t-1}; S_t)
            w = w + h(x, y_t; S_t)   - h(x', y_{t-1}; S_t)
            y_{t+1} = y_t - update( u ),   t < T
        every `period` steps:  u = g_y(x, y_T),  w = h(x, y_T)  of the large batch
        x_{k+1} = x_k - update( w )

    h is the hypergradient of `StocBiO`: f_x - g_xy v, v a series of `terms` + 1 terms.
    (x', y_{t-1}) is the point before: (x_{k-1}, y_0) for t = 0, later (x, y_{t-1}). The
    same batches serve at both points (SPIDER), so the noise of each change falls with
    the steps' length. The first outer step only estimates: y moves from the second on,
    after x, as in the paper.

    S_t are `terms` + 2 successive slices of a stacked lower batch, from
    `tb.pair(..., lower_batches=method.draws)`: one for g_y, one per factor of the
    series, one for g_xy. The first is chosen at random; with fewer slices they repeat.
    All slices together are the large batch, in every factor. More of them make it
    larger; the blocks of all data, [n, size, ...], as constant batches of
    `tb.minimize`, make it the full one.

    Cost: 2 (T + 1) lower gradients, as many upper ones, and 2 (T + 1) (`terms` + 1)
    products. Every `period` steps n (`terms` + 1) gradients and as many products more,
    for n slices, one after the other: loops of no iteration otherwise, because replicas
    that exchange sums cannot branch. Memory: two more copies of x and of y. Assumes g
    strongly convex in y, and `rate` below 1 / (largest eigenvalue of g_yy on any
    batch). Prefer `SRBA`, which makes no series; `MRBO` if no large batch can be had.

    The metrics are those of `StocBiO`, of the last estimate.

    Args:
        lower_optimizer: a Keras optimizer for y that `tb.differentiable` supports; SGD
            in the paper.
        terms: number of terms of the series after the first.
        rate: the series' step size.
        steps: T, the number of steps of y, at least 1. (The paper's m + 1.)
        period: the number of outer steps from one large batch to the next, at least 1.
        upper_parts: into how many equal parts the upper batch is cut, as in `SRBA`;
            S_t has one of them. 1: the whole upper batch.
        seed: of the first slice, an integer.

    Raises:
        ValueError: for an unsupported optimizer or an argument out of its range; in
            `step` for an upper batch that cannot be cut into equal parts.

    Example:
        >>> problem = tb.Problem(
        ...     upper_loss=lambda x, y, batch: 0.5 * (y - 1.0) ** 2 + 0.5 * x**2,
        ...     lower_loss=lambda x, y, batch: 0.5 * batch * (y - x) ** 2,
        ... )
        >>> all_data = tb.StackedBatches(None, tf.constant([0.5, 1.0, 1.5]))
        >>> method = tb.VRBO(keras.optimizers.SGD(0.3), terms=20, rate=0.3)
        >>> result = tb.minimize(problem, method, tf.constant(3.0), tf.constant(0.0),
        ...     keras.optimizers.SGD(0.1), all_data, steps=100)
        >>> round(float(result.upper), 2), round(float(result.lower), 2)
        (0.5, 0.5)

    References:
        Yang, Ji, Liang (2021), Provably faster algorithms for bilevel optimization.
        arXiv:2106.04692.
    """

    lower_optimizer: keras.optimizers.Optimizer
    terms: int = 3
    rate: float = 0.5
    steps: int = 5
    period: int = 3
    _: dataclasses.KW_ONLY
    upper_parts: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        _ = self.rule  # raises if the optimizer is not supported
        require_series(self.terms, self.rate, "terms")
        require_count(self.steps, "steps")
        require_count(self.period, "period")
        require_count(self.upper_parts, "upper_parts")
        require_count(self.seed, "seed", least=0)

    @property
    def draws(self) -> int:
        """The number of lower batches that one step uses; more make the large batch."""
        return (self.steps + 1) * self._each

    @property
    def _each(self) -> int:
        """The number of lower batches of one estimate."""
        return self.terms + 2

    @property
    def couples_tasks(self) -> bool:
        # The estimate for x belongs to all tasks together.
        return True

    def init(self, problem: Problem, upper: Nest, lower: Nest) -> State:
        del problem
        return {
            "step": tf.constant(0, tf.int64),
            "optimizer": self.rule.init(lower),
            "upper": structure.copied(upper),
            "upper_direction": structure.zeros_like(structure.to_tensors(upper)),
            "lower_direction": structure.zeros_like(structure.to_tensors(lower)),
        }

    def step(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: State
    ) -> Step:
        upper, lower = structure.to_tensors((upper, lower))
        slices, step = Slices(problem, batches, self.upper_parts), state["step"]
        lower, optimizer, made = self._moved(problem, slices, upper, lower, state)
        large = tf.equal(step % self.period, 0)
        full = self._of_all(problem, slices, upper, lower, large)
        estimates = structure.where(large, full, made)
        return Step(
            upper_gradient=estimates.upper,
            lower=lower,
            state={
                "step": step + 1,
                "optimizer": optimizer,
                "upper": upper,
                "upper_direction": estimates.upper,
                "lower_direction": estimates.lower,
            },
            metrics=estimates.metrics,
        )

    def _moved(
        self,
        problem: Problem,
        slices: Slices,
        upper: Nest,
        lower: Nest,
        state: State,
    ) -> tuple[Any, Any, _Estimates]:
        """y after its steps, its optimizer's state, and the estimates there.

        Without a step before there is no point before: nothing is moved then.
        """
        first, part = slices.chosen(self.seed, state["step"])
        kind = tf.nest.flatten(lower)[0].dtype

        def estimated(x: Nest, y: Nest, t: tf.Tensor) -> _Estimates:
            """g_y and h from the batches of step t."""
            number, count = first + t * self._each, self._each
            own = tf.math.floormod(part + t, slices.upper)
            here = slices.prepared(x, number, own, count)
            _, gradient = here.lower_gradient(y, 0)
            made, metrics = series_gradient(here, y, self.terms, self.rate, first=1)
            metrics = {name: tf.cast(value, kind) for name, value in metrics.items()}
            return _Estimates(made, gradient, metrics)

        def body(
            t: tf.Tensor, y: Any, before: Any, optimizer: Any, last: _Estimates
        ) -> tuple:
            now = estimated(upper, y, t)
            old = estimated(structure.where(t > 0, upper, state["upper"]), before, t)
            upper_change = structure.subtract(now.upper, old.upper)
            along = structure.add(last.lower, structure.subtract(now.lower, old.lower))
            moved, after = self.rule.update(along, optimizer, y)
            moved = fixed_projection(problem, upper, moved, "VRBO")
            going = t < self.steps  # the last estimates are at the last y
            return (
                t + 1,
                structure.where(going, moved, y),
                y,
                structure.where(going, after, optimizer),
                _Estimates(structure.add(last.upper, upper_change), along, now.metrics),
            )

        before = _Estimates(
            state["upper_direction"],
            state["lower_direction"],
            _zero_metrics(problem, lower),
        )
        count = tf.where(state["step"] > 0, self.steps + 1, 0)
        _, lower, _, optimizer, made = serial_loop(
            lambda t, *_: t < count,
            body,
            (tf.constant(0), lower, lower, state["optimizer"], before),
            self.steps + 1,
        )
        return lower, optimizer, made

    def _of_all(
        self,
        problem: Problem,
        slices: Slices,
        upper: Nest,
        lower: Nest,
        large: tf.Tensor,
    ) -> _Estimates:
        """g_y and h of the large batch, one slice after the other; or zeros."""
        n, m = (tf.where(large, count, 0) for count in (slices.lower, slices.upper))
        share, upper_share = (
            1 / tf.cast(count, tf.float64) for count in (slices.lower, slices.upper)
        )
        x_zero, y_zero = structure.zeros_like((upper, lower))
        zero = tf.zeros([], tf.nest.flatten(lower)[0].dtype)

        def of_upper(j: tf.Tensor) -> Any:
            here = slices.prepared(upper, 0, j)
            value, partial, adjoint = here.upper_partials(lower)
            terms = here.gradient(partial), adjoint, tf.cast(value, zero.dtype)
            return structure.scale(upper_share, terms)

        def curved(vector: Nest, i: tf.Tensor) -> Any:
            here = slices.prepared(upper, i, 0)
            _, _, products = here.lower_gradient_pullback(lower, 0)
            return structure.scale(share, products(vector, mixed=False)[1])

        def factor(j: tf.Tensor, term: Any, total: Any) -> tuple:
            product = summed(y_zero, n, functools.partial(curved, term))
            term = structure.add_scaled(term, -self.rate, product)
            return j + 1, term, structure.add(total, term)

        def of_lower(i: tf.Tensor) -> Any:
            here = slices.prepared(upper, i, 0)
            value, gradient, products = here.lower_gradient_pullback(lower, 0)
            mixed, _ = products(structure.scale(-self.rate, total), curvature=False)
            through = here.gradient(structure.zeros_like(here.upper), mixed)
            terms = through, gradient, tf.cast(value, zero.dtype)
            return structure.scale(share, terms)

        partial, adjoint, upper_loss = summed((x_zero, y_zero, zero), m, of_upper)
        count = tf.where(large, self.terms, 0)
        _, term, total = serial_loop(
            lambda j, *_: j < count,
            factor,
            (tf.constant(0), adjoint, adjoint),
            self.terms,
        )
        through, gradient, lower_loss = summed((x_zero, y_zero, zero), n, of_lower)
        norm = problem.inner_product.norm
        metrics = {
            "upper_loss": upper_loss,
            "lower_loss": lower_loss,
            **growth_metrics(norm, term, adjoint),
        }
        return _Estimates(structure.add(partial, through), gradient, metrics)


def _zero_metrics(problem: Problem, lower: Nest) -> Metrics:
    size = tf.zeros_like(problem.inner_product.norm(lower))
    loss = tf.zeros([], size.dtype)
    return {"upper_loss": loss, "lower_loss": loss, "growth": size, "diverged": size}
