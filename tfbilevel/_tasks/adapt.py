"""Solving tasks at fixed upper variables."""

from collections.abc import Callable
from typing import Any

from tfbilevel._calculus.aliases import Nest
from tfbilevel._core.arguments import require_callable
from tfbilevel._core.batches import Batches, apart, require_batches
from tfbilevel._core.inner_solver import InnerSolver, require_inner
from tfbilevel._core.problem import Problem
from tfbilevel._tasks.over_tasks import OverTasks


def require_adaptable(tasks: Any, batches: Any, inner: Any, function: Any) -> None:
    """Raise unless the arguments of `BilevelModel.adapt` are valid."""
    require_batches(batches)
    require_inner(inner)
    require_callable(function, "function")
    if tasks is None:
        raise ValueError(
            "`adapt` solves tasks. Build the model with tb.BilevelModel(..., "
            "tasks=M), or use evaluate and predict. Received: tasks=None"
        )


def adapted(
    problem: Problem,
    x: Nest,
    y: Nest,
    batches: Batches,
    inner: InnerSolver,
    function: Callable[[Any, Any, Batches], Any],
) -> Any:
    """The function's result for each task after an inner solve on its lower batch.

    Args:
        problem: a problem over tasks.
        x: the upper variables.
        y: the start of the solves, with the tasks along a leading axis.
        batches: the batches of all tasks.
        inner: the inner solver.
        function: (x, y, batches) of one task -> nest of tensors.

    Returns:
        The nest, with the tasks along a leading axis.
    """
    assert isinstance(problem, OverTasks)
    if problem.prepare is not None:
        batches = problem.prepare(x, batches)
    problem = problem.prepared_before()
    state = inner.init(problem, x, y)
    y, _, _ = inner.solve(problem.prepared(x, batches), y, state)

    def one(task: Any) -> Any:
        lower, upper_batch, lower_batch = task
        return function(x, lower, type(batches)(upper_batch, lower_batch))

    return problem.each(one, y, *apart(batches))
