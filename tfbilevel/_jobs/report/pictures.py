"""What the pictures of a page show, in numbers that its template draws."""

import math
from typing import Any

import numpy as np

# More classes than this make a table that nobody reads.
MOST_CLASSES = 20
STRONGEST = 15
LEAST = 0.005  # the share of a confusion that is told
BINS = 20
WIDTH = 640
HEIGHT = 150


def percent(share: float, digits: int = 0) -> str:
    """A share in percent, on one line."""
    return f"{100 * share:.{digits}f}\u00a0%"


def confusion(transition: np.ndarray, names: list[str]) -> dict[str, Any]:
    """The matrix of confusions as cells of a table, and its strongest pairs.

    Args:
        transition: [K, K], the row the true class, the column the given label.
        names: of the K classes.
    """
    transition = np.asarray(transition, np.float64)
    wrong = transition * (1 - np.eye(len(names)))
    order = np.argsort(-wrong, axis=None, kind="stable")[:STRONGEST]
    strongest = [
        {"true": names[i], "given": names[j], "share": wrong[i, j]}
        for i, j in zip(*np.unravel_index(order, wrong.shape), strict=True)
        if wrong[i, j] > 0
    ]
    rows = [
        [_cell(transition[i, j], names[i], names[j], i == j) for j in range(len(names))]
        for i in range(len(names))
    ]
    return {
        "rows": rows if len(names) <= MOST_CLASSES else None,
        "strongest": strongest,
        "sentence": _confused(strongest),
    }


def _confused(strongest: list[dict]) -> str:
    if not strongest or strongest[0]["share"] < 0.01:
        return f"No class is labelled as another in more than {percent(0.01)} of cases."
    first, *_ = strongest
    return (
        f"The strongest confusion: of the examples that are truly {first['true']}, "
        f"about {percent(first['share'])} were labelled {first['given']}."
    )


def _cell(share: float, true: str, given: str, same: bool) -> dict[str, Any]:
    style = "same" if same else ""
    style += " none" if share < LEAST else ""
    return {
        # Below the least share that is told the cell has no colour; above, it is
        # stepped up to one that can be seen.
        "shade": 0 if share < LEAST else round(0.1 + 0.9 * float(share), 3),
        "style": style.strip(),
        "text": f"{100 * share:.0f}" if share >= LEAST else "·",
        "title": f"true {true}, given {given}: {percent(share, 1)}",
    }


def histogram(weights: np.ndarray, suspicious: np.ndarray) -> dict[str, Any]:
    """How many given labels have which probability to be right, as bars.

    Args:
        weights: these probabilities, [n].
        suspicious: which of the examples are suspicious, bool [n].
    """
    weights = np.clip(np.asarray(weights, np.float64), 0, 1)
    edges = np.linspace(0, 1, BINS + 1)
    total = np.histogram(weights, edges)[0]
    wrong = np.histogram(weights[suspicious], edges)[0]
    most = int(total.max(initial=0))
    step = WIDTH / BINS
    bins = []
    for index, (all_, bad) in enumerate(
        zip(total.tolist(), wrong.tolist(), strict=True)
    ):
        height = HEIGHT * math.sqrt(all_ / most) if most else 0.0
        part = height * bad / all_ if all_ else 0.0
        bins.append(
            {
                "x": round(index * step + 1, 1),
                "width": round(step - 2, 1),
                "wrong_top": round(HEIGHT - part, 1),
                "wrong_height": round(part, 1),
                "right_top": round(HEIGHT - height, 1),
                "right_height": round(height - part, 1),
                "title": f"{100 * edges[index]:.0f} to {percent(edges[index + 1])}: "
                f"{all_:,} examples, {bad:,} of them suspicious",
            }
        )
    sure, unsure = int((weights >= 0.9).sum()), int((weights < 0.1).sum())
    between = len(weights) - sure - unsure
    return {
        "bins": bins,
        "height": HEIGHT,
        "most": most,
        "sentence": f"Of {len(weights):,} given labels, {sure:,} are right with a "
        f"probability of at least {percent(0.9)}, and {unsure:,} with one below "
        f"{percent(0.1)}. The other {between:,} lie between: look at these "
        "first if you check by hand.",
    }
