"""Arguments of the release before, which work for one more with a warning."""

import warnings
from typing import Any

from tfbilevel._core.prepared import Prepared


def of_former(
    problem: Any, upper: Any, lower: Any, batches: Any, state: dict
) -> tuple[Prepared, Any, dict]:
    """The arguments of `InnerSolver.solve` from those of the release before."""
    warnings.warn(
        "solve(problem, upper, lower, batches, state) of tb.InnerSolver will go: call "
        "solve(problem.prepared(upper, batches), lower, state)",
        DeprecationWarning,
        stacklevel=3,
    )
    # Not prepared here: it may be the problem of a `Prepared`, with its batches.
    return Prepared(problem, upper, batches, _total), lower, state


def _total(partial: Any, response: Any) -> Any:
    del partial, response
    raise AssertionError("an inner solve takes no upper gradient")
