"""The single loop with a table of every batch's last directions."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfbilevel._calculus import structure
from tfbilevel._calculus.aliases import Nest, State
from tfbilevel._core.arguments import require_count
from tfbilevel._core.batches import Batches
from tfbilevel._core.method import Step
from tfbilevel._core.problem import Problem
from tfbilevel._core.projection import fixed_projection
from tfbilevel._methods.stochastic.directions import followed, of_lower, spoiled
from tfbilevel._methods.stochastic.followed_solution import FollowedSolution
from tfbilevel._workarounds.row_exchange import exchanged


def last_part(batch: Any) -> Any:
    """The last part of a batch (x, y, number)."""
    return batch[-1]


class _Table(NamedTuple):
    """What every batch of a level gave when it was last seen, and the mean of it.

    Attributes:
        rows: a leading axis with one entry per batch.
        mean: over all rows.
    """

    rows: Nest
    mean: Nest

    @classmethod
    def empty(cls, count: int, like: Nest) -> "_Table":
        zeros = structure.zeros_like(structure.to_tensors(like))
        rows = tf.nest.map_structure(lambda z: tf.stack([z] * count), zeros)
        return cls(rows, zeros)

    def corrected(self, number: tf.Tensor, now: Nest) -> tuple[Any, "_Table"]:
        """now - row + mean, and the table with `now` in that row (SAGA).

        A number that is none of the table's makes all NaN, which is an error for every
        caller; a gather would raise on one device and return another row on the next.
        """
        count = tf.nest.flatten(self.rows)[0].shape[0]
        there = (number >= 0) & (number < count)
        now = structure.scale(tf.where(there, 1.0, np.nan), now)
        number = tf.clip_by_value(number, 0, count - 1)
        old, rows = exchanged(self.rows, number, now)
        change = structure.subtract(now, old)
        mean = structure.add_scaled(self.mean, 1 / count, change)
        return structure.add(change, self.mean), _Table(rows, mean)


@dataclasses.dataclass(frozen=True, eq=False)
class SABA(FollowedSolution):
    r"""`SOBA` with variance reduction: a table of every batch's directions (SABA).

        d = d_i - table[i] + mean(table),      table[i] = d_i        (SAGA)

    for each of g_y, g_yy v and g_xy v of the lower batch i, and f_y and f_x of the
    upper batch j. y, v and x make the steps of `SOBA` along these directions. They are
    unbiased, and their noise vanishes as the iterates converge: with constant rates the
    steps end in a solution, not near it, as fast as full batches at the price of
    minibatches.

    Batches must be fixed: batch i always holds the same examples, all of one size, and
    carries its number. For data `x` [n, size, ...] that is

        tb.index_batches(n, 1).map(lambda i: (x[i[0]], y[i[0]], i[0]))

    Cost: as `SOBA`. Memory: n (2 |y| + |x|) + m (|y| + |x|) numbers for n lower and m
    upper batches. `minimize`, other loops and `fit` under XLA change them in place;
    without XLA every step of `fit` makes a copy. Prefer `SOBA` for data that is
    augmented, for large networks, or if a rough solution is enough.

    The metrics are those of `SOBA`, from the corrected directions.

    Args:
        lower_optimizer: a Keras optimizer for y that `tb.differentiable` supports; SGD
            in the paper.
        rate: of v, positive: a number or a schedule of the outer step.
        lower_batches: n, the number of lower batches.
        upper_batches: m, the number of upper batches.
        number: batch -> its number, an integer scalar from 0; of both levels. By
            default the last part of the batch.
        most_bytes: the largest size of the tables.

    Raises:
        ValueError: for an unsupported optimizer or an argument out of its range; in
            `init` for tables above `most_bytes` and over tasks, whose batches are new
            in every step; in `step` for a batch without a number.

    Example:
        >>> curvatures = tf.constant([0.5, 1.0, 1.5])
        >>> problem = tb.Problem(
        ...     upper_loss=lambda x, y, batch: 0.5 * (y - 1.0) ** 2 + 0.5 * x**2,
        ...     lower_loss=lambda x, y, batch: 0.5 * batch[0] * (y - x) ** 2,
        ... )
        >>> lower = tb.index_batches(3, 1).map(lambda i: (curvatures[i[0]], i[0]))
        >>> upper = tf.data.Dataset.from_tensors((0.0, 0))
        >>> method = tb.SABA(
        ...     keras.optimizers.SGD(0.3), 0.3, lower_batches=3, upper_batches=1)
        >>> result = tb.minimize(problem, method, tf.constant(3.0), tf.constant(0.0),
        ...     keras.optimizers.SGD(0.1), tb.pair(upper, lower), steps=300)
        >>> round(float(result.upper), 3), round(float(result.lower), 3)
        (0.5, 0.5)

    References:
        Dagréou, Ablin, Vaiter, Moreau (2022), A framework for bilevel optimization that
        enables stochastic and global variance reduction algorithms. arXiv:2201.13409.
    """

    _: dataclasses.KW_ONLY
    lower_batches: int
    upper_batches: int
    number: Callable[[Any], Any] = last_part
    most_bytes: int = 2**30

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count(self.lower_batches, "lower_batches")
        require_count(self.upper_batches, "upper_batches")
        require_count(self.most_bytes, "most_bytes")
        if not callable(self.number):
            raise ValueError(
                "`number` must be a function of a batch that returns its number, such "
                f"as lambda batch: batch[-1]. Received: number={self.number!r}"
            )

    @property
    def draws(self) -> int:
        """The number of lower batches that one step uses."""
        return 1

    def init(self, problem: Problem, upper: Nest, lower: Nest) -> State:
        if problem.has_tasks:
            raise ValueError(
                "tb.SABA takes no tasks: its tables belong to batches that return, and "
                "tasks are new in every step. Use tb.SOBA or tb.AmIGO. Received: a "
                "problem over tasks"
            )
        upper, lower = structure.to_tensors((upper, lower))
        self._require_room(upper, lower)
        n, m = self.lower_batches, self.upper_batches
        return {
            **super().init(problem, upper, lower),
            "lower_table": _Table.empty(n, (lower, lower, upper)),
            "upper_table": _Table.empty(m, (lower, upper)),
        }

    def step(
        self, problem: Problem, upper: Nest, lower: Nest, batches: Batches, state: State
    ) -> Step:
        here = problem.prepared(upper, batches)
        lower, solution = structure.to_tensors(lower), state["solution"]
        number = self._number(batches.lower_at(0), "lower")
        *made, lower_loss = of_lower(here, lower, solution)
        (gradient, curved, mixed), lower_table = state["lower_table"].corrected(
            number, tuple(made)
        )
        number = self._number(batches.upper, "upper")
        upper_loss, partial, adjoint = here.upper_partials(lower)
        (adjoint, partial), upper_table = state["upper_table"].corrected(
            number, (adjoint, here.gradient(partial))
        )
        against = structure.subtract(curved, adjoint)
        metrics, largest = followed(
            structure.norm,
            {"upper_loss": upper_loss, "lower_loss": lower_loss},
            lower=gradient,
            solution=against,
            slope=structure.norm(adjoint),
            largest=state["largest"],
        )
        moved, optimizer = self.rule.update(gradient, state["optimizer"], lower)
        rate = self.rates(state["step"])
        return Step(
            upper_gradient=spoiled(structure.subtract(partial, mixed), against),
            lower=fixed_projection(problem, upper, moved, "SABA"),
            state={
                "step": state["step"] + 1,
                "optimizer": optimizer,
                "solution": structure.add_scaled(solution, -rate, against),
                "largest": largest,
                "lower_table": lower_table,
                "upper_table": upper_table,
            },
            metrics=metrics,
        )

    def _require_room(self, upper: Nest, lower: Nest) -> None:
        x, y = (
            sum(leaf.shape.num_elements() * leaf.dtype.size for leaf in leaves)
            for leaves in map(tf.nest.flatten, (upper, lower))
        )
        n, m = self.lower_batches, self.upper_batches
        size = n * (2 * y + x) + m * (y + x)
        if size > self.most_bytes:
            raise ValueError(
                "The tables of tb.SABA must fit into `most_bytes`. Use larger batches, "
                "of which there are fewer; or tb.SOBA, tb.FSLA or tb.MRBO, which keep "
                f"no tables; or raise `most_bytes`. Received: {size:,} bytes for "
                f"{n:,} lower and {m:,} upper batches, most_bytes={self.most_bytes:,}"
            )

    def _number(self, batch: Any, level: str) -> tf.Tensor:
        """The number of a batch."""
        try:
            number = tf.convert_to_tensor(self.number(batch))
        except (
            TypeError,
            ValueError,
            KeyError,
            IndexError,
            tf.errors.InvalidArgumentError,  # a slice of a scalar
        ) as error:
            raise ValueError(self._missing(level, batch)) from error
        if not number.dtype.is_integer or number.shape.num_elements() != 1:
            raise ValueError(self._missing(level, batch))
        return tf.reshape(number, [])

    def _missing(self, level: str, batch: Any) -> str:
        return (
            f"Every {level} batch of tb.SABA must carry its number, an integer scalar "
            "from 0, as its last part or where `number` finds it: batches are fixed, "
            "and their directions are kept under that number. "
            f"Received: {tf.nest.map_structure(lambda leaf: leaf.shape, batch)}"
        )
