"""Aggregating both losses in the direction of the inner steps."""

import dataclasses
import functools
from typing import Any, NamedTuple

import tensorflow as tf

from tfbilevel._calculus.aliases import Nest
from tfbilevel._core.arguments import require_number, share
from tfbilevel._core.batches import Batches
from tfbilevel._core.loss import TaskLoss, losses
from tfbilevel._core.prepared import Prepared
from tfbilevel._core.schedules import Schedule, as_schedule, at_ends, is_schedule


@dataclasses.dataclass(frozen=True, eq=False)
class Aggregation:
    r"""Inner steps along a mixture of both losses (BDA).

        d_t(x, y) = (1 - a_t) g(x, y) + a_t f(x, y),      a_t = alpha * decay^t

    For lower problems with many solutions: the upper loss selects one of them. Each
    inner step costs one gradient of f besides that of g. Pass it to `tb.Unroll`,
    `tb.Implicit`, `tb.RankOne` or `tb.FiniteDifference`, or to `tb.BAMM`, which makes
    one lower step per outer step, so that t is the outer step.

    Args:
        alpha: a_0, in (0, 1]; or a schedule of the inner step t with values in
            [0, 1], such as alpha / (t + 1).
        decay: in (0, 1]; 1 keeps alpha constant. Only if `alpha` is a number.
        constant_lower: weight g by 1 - a_0 at every step, as the authors' own code
            does, instead of by 1 - a_t.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> float(tb.Aggregation(0.5, decay=0.5).weight(tf.constant(2)))
        0.125

    References:
        Liu, Mu, Yuan, Zeng, Zhang (2020), A generic first-order algorithmic
        framework for bi-level programming beyond lower-level singleton.
        arXiv:2006.04045.
    """

    alpha: float | Schedule
    decay: float = 1.0
    constant_lower: bool = False

    def __post_init__(self) -> None:
        start, end = at_ends(self.schedule)
        if not (0 < start <= 1 and 0 <= end <= 1):
            raise ValueError(
                "`alpha` must be above 0 and at most 1: it is the weight of the upper "
                "loss in the inner direction; a schedule may end at 0. Leave the "
                f"aggregation out for 0. Received: alpha={self.alpha!r}"
            )
        remedy = "Use 1 for a constant weight."
        require_number(self.decay, "decay", share, "above 0 and at most 1", remedy)
        if is_schedule(self.alpha) and self.decay != 1:
            raise ValueError(
                "`decay` has no effect with a schedule, which decays by itself. Leave "
                f"it out. Received: alpha={self.alpha!r}, decay={self.decay}"
            )

    @functools.cached_property
    def schedule(self) -> Schedule:
        """a_t / decay^t at every inner step."""
        return as_schedule(self.alpha, "alpha")

    def weight(self, t: Any) -> tf.Tensor:
        """a_t, a float64 scalar."""
        decay = tf.constant(self.decay, tf.float64)
        return self.schedule(t) * tf.pow(decay, tf.cast(t, tf.float64))

    def applied(self, here: Prepared, at: Any = None) -> Prepared:
        """The problem with the mixture as its lower loss.

        Args:
            at: the inner step whose weights are used for every lower batch, one per
                task if tasks differ; `None`: lower batch t has the weights of step t.
        """
        upper_loss, lower_loss = here.problem.upper_loss, here.problem.lower_loss

        def mixture(c: Nest, y: Nest, drawn: _Drawn) -> tf.Tensor:
            g = losses(lower_loss)(c, y, drawn.batch)
            f = tf.cast(losses(upper_loss)(c, y, here.batches.upper), g.dtype)
            a = tf.cast(self.weight(drawn.t if at is None else at), g.dtype)
            first = tf.cast(self.weight(0), g.dtype) if self.constant_lower else a
            return (1 - first) * g + a * f

        mixed = TaskLoss(mixture) if here.problem.has_tasks else mixture
        return dataclasses.replace(
            here,
            problem=dataclasses.replace(here.problem, lower_loss=mixed),
            batches=_NumberedBatches(here.batches.upper, here.batches),
        )


def aggregated(
    aggregate: Aggregation | None, here: Prepared, at: Any = None
) -> Prepared:
    """The problem with the mixture as its lower loss; unchanged without `aggregate`."""
    return here if aggregate is None else aggregate.applied(here, at)


def require_aggregation(aggregate: Any) -> None:
    """Raise unless `aggregate` is a `tb.Aggregation` or `None`."""
    if aggregate is not None and not isinstance(aggregate, Aggregation):
        raise ValueError(
            "`aggregate` must be a tb.Aggregation, such as tb.Aggregation(0.5, "
            f"decay=0.9). Received: aggregate={aggregate!r}"
        )


class _Drawn(NamedTuple):
    """A lower batch with the number of the inner step that uses it."""

    t: Any
    batch: Nest


class _NumberedBatches(Batches):
    """Batches that return each lower batch with its number; `lower` has the rest."""

    __slots__ = ()

    def lower_at(self, draw: Any) -> Any:
        return _Drawn(draw, self.lower.lower_at(draw))
