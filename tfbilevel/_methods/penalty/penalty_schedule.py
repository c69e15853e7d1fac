"""How the penalty of the augmented Lagrangian changes."""

import dataclasses

from tfbilevel._core.arguments import require_number, share


@dataclasses.dataclass(frozen=True)
class PenaltySchedule:
    """The factors of a schedule update of `tb.AugmentedLagrangian`.

    A pair (x, y) that is nearly stationary at the present penalty updates the schedule:

        rho <- growth rho,                         lambda <- decay lambda,
        epsilon <- tolerance_decay epsilon,        steps <- rate_decay steps

    with rho the penalty weight, lambda the weight of the lower loss, epsilon what
    counts as nearly stationary, and the steps those of both levels.

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
