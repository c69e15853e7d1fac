"""The problem of one outer step, with all derivatives that methods need."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from tfbilevel._calculus import derivatives, structure
from tfbilevel._calculus.aliases import Nest
from tfbilevel._core.batches import Batches, StackedBatches
from tfbilevel._core.loss import losses
from tfbilevel._randomness.seeds import DRAW, Noisy, folded

if TYPE_CHECKING:
    from tfbilevel._core.problem import Problem


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    r"""The problem of one outer step, for writing your own methods.

        here = problem.prepared(upper, batches)
        f, f_x, f_y = here.upper_partials(y)
        g, g_y, product = here.lower_gradient_pullback(y)
        g_xy v, g_yy v = product(v)
        upper_gradient = here.gradient(f_x, response)

    Its losses include `prepare` and the randomness of this step. A method that only
    calls this object needs no gradient tape, and the same code is right for one problem
    and over tasks:

    - Every loss returned here is the mean over tasks.
    - Every derivative is that of the sum over tasks, so the lower variables of a task
      only see that task's loss.
    - `gradient` turns derivatives in `here.upper` into the gradient in the problem's
      x; over tasks, the gradient of the mean.
    - `dot` and `norm` return one number, over tasks one per task; `where`, `scale` and
      `add_scaled` accept such numbers.

    Cost: `lower_gradient` takes one gradient of g, a product of its pullback about two.
    Memory: the pullback keeps the intermediate values of g and its gradient as long as
    it exists. For whole inner solves use `tb.InnerSolver`:
    `inner.solve(here, y, state)`.

    Attributes:
        problem: the problem with its losses; over tasks, they are sums.
        upper: its upper variables: x, and the results of `prepare`.
        batches: its batches, `batches.upper` and `batches.lower_at(t)`.
        tasks: the number of tasks that the losses sum over; `None`: no tasks.
        total: (f_x, response) -> their sum in the problem's own x, summed over tasks.
            Call `gradient` instead.

    Raises:
        tb.UnconnectedGradientError: if a required derivative is not connected.

    Example:
        >>> problem = tb.Problem(
        ...     upper_loss=lambda x, y, batch: 0.5 * (y - 1.0) ** 2,
        ...     lower_loss=lambda x, y, batch: 0.5 * (y - x) ** 2,
        ... )
        >>> x, y = tf.constant(2.0), tf.constant(4.0)
        >>> here = problem.prepared(x, tb.Batches(None, None))
        >>> f, f_x, f_y = here.upper_partials(y)
        >>> g, g_y, product = here.lower_gradient_pullback(y)
        >>> g_xy, g_yy = product(f_y)
        >>> float(f), float(g), float(g_y), float(g_xy), float(g_yy)
        (4.5, 2.0, 2.0, -3.0, 3.0)
        >>> response = tf.nest.map_structure(tf.negative, g_xy)
        >>> float(here.gradient(f_x, response))
        3.0
    """

    problem: "Problem"
    upper: Nest
    batches: Batches
    total: Callable[[Nest, Nest], Nest]
    tasks: Any = None

    def at(self, upper: Nest) -> "Prepared":
        """The same problem at other upper variables, like `here.upper`."""
        return dataclasses.replace(self, upper=upper)

    def gradient(self, partial: Nest, response: Nest = ()) -> Any:
        """The gradient in the problem's own x: f_x + response.

        Args:
            partial: f_x, like `here.upper`; entries that are `None` count as zero.
            response: the part of the gradient through y, likewise; an entry that is
                `None` raises an error that names the variable. If left out, f does not
                depend on x through y.
        """
        if isinstance(response, tuple) and not response:
            response = structure.zeros_like(self.upper)
        total = self.total(partial, response)
        if self.tasks is None:
            return total
        return tf.nest.map_structure(lambda g: g / tf.cast(self.tasks, g.dtype), total)

    def mean(self, value: tf.Tensor) -> tf.Tensor:
        """Converts a sum over tasks to the mean; without tasks, returns the value."""
        return value if self.tasks is None else value / tf.cast(self.tasks, value.dtype)

    def dot(self, a: Nest, b: Nest) -> tf.Tensor:
        """The inner product of nests like y; over tasks, one per task."""
        return self.problem.inner_product.dot(a, b)

    def norm(self, a: Nest) -> tf.Tensor:
        """The Euclidean norm of a nest like y; over tasks, one per task."""
        return self.problem.inner_product.norm(a)

    def where(self, condition: tf.Tensor, a: Nest, b: Nest) -> Nest:
        """a where the condition holds, otherwise b, for nests like y.

        Args:
            condition: a bool; over tasks, one per task.
        """
        return structure.where(condition, a, b)

    def scale(self, factor: Any, a: Nest) -> Nest:
        """factor * a, for a nest like y.

        Args:
            factor: a number; over tasks, one per task.
        """
        return structure.scale(factor, a)

    def add_scaled(self, a: Nest, factor: Any, b: Nest) -> Nest:
        """a + factor * b, for nests like y.

        Args:
            factor: a number; over tasks, one per task.
        """
        return structure.add_scaled(a, factor, b)

    def upper_loss(self, lower: Nest) -> tf.Tensor:
        """f; over tasks, the mean."""
        return self.mean(self.problem.upper_loss(self.upper, lower, self.batches.upper))

    def upper_losses(self, lower: Nest) -> tf.Tensor:
        """f; over tasks, one value per task."""
        values = losses(self.problem.upper_loss)(self.upper, lower, self.batches.upper)
        return self._value(values)

    def upper_partials(self, lower: Nest) -> tuple[tf.Tensor, Nest, Nest]:
        """f, f_x (`None` where not connected) and f_y (every entry connected)."""
        value, (partial, response) = derivatives.value_and_partials(
            lambda c, y: self.problem.upper_loss(c, y, self.batches.upper),
            self.upper,
            lower,
        )
        response = derivatives.require_connected(
            response, lower, "lower", "the upper loss"
        )
        return self.mean(value), partial, response

    def lower_loss(self, lower: Nest, draw: Any = 0) -> tf.Tensor:
        """g; over tasks, the mean.

        Args:
            draw: the number of the lower batch, such as the inner step.
        """
        batch = self.batches.lower_at(draw)
        return self.mean(self.problem.lower_loss(self.upper, lower, batch))

    def lower_losses(self, lower: Nest, draw: Any = 0) -> tf.Tensor:
        """g; over tasks, one value per task.

        Args:
            draw: the number of the lower batch.
        """
        batch = self.batches.lower_at(draw)
        return self._value(losses(self.problem.lower_loss)(self.upper, lower, batch))

    def evaluated(self, function: Callable, lower: Nest, draw: Any = 0) -> Any:
        """A user's function of (x, y, lower batch), such as constraints of y.

        Args:
            function: returns any nest. In `tb.BilevelModel` it receives the models.
            draw: the number of the lower batch.
        """
        batch = self.batches.lower_at(draw)
        return self.problem._evaluated(function, self.upper, lower, batch)

    def lower_gradient(self, lower: Nest, draw: Any = 0) -> tuple[tf.Tensor, Nest]:
        """g and g_y, with every entry connected.

        Args:
            draw: the number of the lower batch.
        """
        value, gradient = derivatives.lower_gradient(
            self.problem.lower_loss, self.upper, lower, self.batches.lower_at(draw)
        )
        return self.mean(value), gradient

    def lower_gradient_pullback(
        self, lower: Nest, draw: Any = 0
    ) -> tuple[tf.Tensor, Any, derivatives.Products]:
        """g, g_y and v -> (g_xy v, g_yy v), which takes one reverse sweep.

        Entries of g_xy v are `None` where not connected. If you use one product only,
        call the map with `mixed=False` or `curvature=False`; on several replicas the
        other is then not computed.

        Args:
            draw: the number of the lower batch.
        """
        value, gradient, pullback = derivatives.lower_gradient_pullback(
            self.problem.lower_loss, self.upper, lower, self.batches.lower_at(draw)
        )
        return self.mean(value), gradient, pullback

    def lower_pullback(
        self, lower: Nest, draw: Any = 0
    ) -> tuple[tf.Tensor, derivatives.Pullback]:
        """g, and weight -> (weight * g_x, weight * g_y); only first derivatives.

        The weight is a number; over tasks, one per task (g_x is then summed). Entries
        are `None` where not connected.

        Args:
            draw: the number of the lower batch.
        """
        batch = self.batches.lower_at(draw)

        def at(c: Nest, y: Nest) -> tuple[tf.Tensor, None]:
            values = losses(self.problem.lower_loss)(c, y, batch)
            return self._value(values), None

        values, _, pullback = derivatives.vjp(at, self.upper, lower)
        value = self.mean(tf.reduce_sum(values))
        return value, lambda weights: pullback(tf.cast(weights, values.dtype))

    def _value(self, values: tf.Tensor) -> tf.Tensor:
        """One loss per task, or a single loss, which must be a scalar."""
        if self.problem.has_tasks:
            return values
        return derivatives.require_scalar(values)


class SeededBatches(Batches):
    """Batches with a seed for each; `lower` holds the batches without seeds."""

    __slots__ = ()

    def lower_at(self, draw: Any) -> Noisy:
        return seeded_batch(self.lower.batch, self.lower.seed, draw)


class NumberedBatches(Batches):
    """Placeholders for prepared batches: a lower batch is only its number, with the
    common seed."""

    __slots__ = ()

    def lower_at(self, draw: Any) -> Noisy:
        return Noisy(draw, self.lower)


def seeded_batch(batches: Batches, seed: Any, draw: Any) -> Noisy:
    """A lower batch with its seed; different batches have different seeds."""
    if isinstance(batches, StackedBatches):
        seed = folded(seed, DRAW, draw)
    return Noisy(batches.lower_at(draw), seed)
