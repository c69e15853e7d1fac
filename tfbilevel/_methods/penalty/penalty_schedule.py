"""The factors by which the augmented Lagrangian's penalty changes."""

import dataclasses

from tfbilevel._core.arguments import require_number, share


@dataclasses.dataclass(frozen=True)
class PenaltySchedule:
    """The factors of a schedule update of `tb.AugmentedLagrangian`.

    When a pair (x, y) is nearly stationary for the current penalty, the schedule is
    updated:

        rho <- growth rho,                         lambda <- decay lambda,
        epsilon <- tolerance_decay epsilon,        steps <- rate_decay steps

    where rho is the penalty weight, lambda the weight of the lower loss, epsilon the
    tolerance for nearly stationary, and the steps are those of both levels.

    Args:
        growth: factor of rho, at least 1.
        decay: factor of lambda, in [0, 1].
        tolerance_decay: factor of epsilon, in (0, 1].
        rate_decay: factor of the steps of both levels, in (0, 1].

    Raises:
        ValueError: if a factor is out of its range.

    Example:
        >>> slow = tb.PenaltySchedule(growth=1.02, rate_decay=1.0)
        >>> method = tb.AugmentedLagrangian(
        ...     keras.optimizers.SGD(0.1), steps=20, schedule=slow)
        >>> method.schedule.growth
        1.02
    """

    growth: float = 1.1
    decay: float = 0.9
    tolerance_decay: float = 0.9
    rate_decay: float = 0.9

    def __post_init__(self) -> None:
        for name, holds, rule in (
            ("growth", lambda v: v >= 1, "at least 1"),
            ("decay", lambda v: 0 <= v <= 1, "between 0 and 1"),
            ("tolerance_decay", share, "above 0 and at most 1"),
            ("rate_decay", share, "above 0 and at most 1"),
        ):
            require_number(getattr(self, name), name, holds, rule)
