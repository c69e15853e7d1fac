"""What label cleaning found, as tables and numbers."""

import dataclasses
from typing import Any

import numpy as np

from tfbilevel._jobs.cleaning.stages import Outcome
from tfbilevel._jobs.intervals import wilson_interval


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which model of the noise was taken, and why.

    Attributes:
        name: "class-dependent": a given label depends on the true class alone;
            "feature-dependent": it depends on the example, too.
        reason: one sentence.
        scores: mean log-loss of the given labels of rows that the model did not see,
            by name; lower is better.
        trusted_scores: mean log-loss on held-out trusted labels of the last layer with
            the learned belief ("learned") and the one at the start ("start"); empty
            without trusted data.
        belief: the numbers that the network was trained with at the end: "trust",
            "given", "alone".
    """

    name: str
    reason: str
    scores: dict[str, float]
    trusted_scores: dict[str, float]
    belief: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Accuracy on held-out trusted examples, before and after cleaning.

    Attributes:
        before: share of right predictions of networks trained on the given labels.
        after: likewise, of networks trained with the model of the noise.
        before_interval, after_interval: 95 percent Wilson intervals.
        n: number of held-out examples.
    """

    before: float
    after: float
    before_interval: tuple[float, float]
    after_interval: tuple[float, float]
    n: int


def accuracy(before: np.ndarray, after: np.ndarray) -> Accuracy | None:
    """From which predictions were right, [n] booleans each; `None` of nothing."""
    n = len(before)
    if not n:
        return None
    first, second = float(before.mean()), float(after.mean())
    intervals = wilson_interval(first, n), wilson_interval(second, n)
    return Accuracy(first, second, *intervals, n)


def choice(found: Outcome) -> Choice:
    """What `LabelCleaner` says about its choice."""
    names = "class-dependent", "feature-dependent"
    name, other = names[:: -1 if found.feature_dependent else 1]
    belief = found.belief
    return Choice(
        name,
        f"Given labels that a model did not see are {name} rather than {other}: "
        f"log-loss {found.scores[name]:.3f} against {found.scores[other]:.3f}.",
        found.scores,
        found.trusted_scores,
        {
            "trust": belief.trust,
            "given": belief.given,
            "alone": belief.alone,
        },
    )


def issues(
    given: np.ndarray,
    suggested: np.ndarray,
    right: np.ndarray,
    values: np.ndarray,
) -> Any:
    """The rows whose suggested label is another one, most suspicious first.

    Args:
        given, suggested: class numbers, [n].
        right: probability that the given label is right, [n].
        values: the classes as the user writes them, [K].

    Returns:
        A pandas table with the columns row, given_label, suggested_label,
        probability_right and rank; without pandas a dictionary of arrays.
    """
    rows = np.flatnonzero(given != suggested)
    rows = rows[np.argsort(right[rows], kind="stable")]
    columns = {
        "row": rows,
        "given_label": values[given[rows]],
        "suggested_label": values[suggested[rows]],
        "probability_right": right[rows],
        "rank": np.arange(1, len(rows) + 1),
    }
    try:
        import pandas
    except ImportError:
        return columns
    return pandas.DataFrame(columns)
