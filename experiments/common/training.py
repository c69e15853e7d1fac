"""Plain training from a given start, with the library's inner solver."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

import tfbilevel as tb


def trainer(
    loss: Callable[[Any, Any], tf.Tensor],
    optimizer: keras.optimizers.Optimizer,
    steps: int,
    jit: bool,
    project: Callable[[Any], Any] | None = None,
) -> Callable[[Any, Any], Any]:
    """A function (batch, variables) -> the variables after training on the batch.

    It is compiled once for every shape of its arguments.

    Args:
        loss: (variables, batch) -> scalar.
        optimizer: the optimizer; its state starts at zero in every call.
        steps: the number of steps.
        jit: whether XLA compiles them.
        project: variables -> their projection onto the feasible set.
    """
    inner = tb.InnerSolver(optimizer, steps)
    problem = tb.Problem(
        lambda x, variables, batch: loss(variables, batch),
        lambda x, variables, batch: loss(variables, batch),
        project_lower=project,
    )

    @tf.function(autograph=False, jit_compile=jit)
    def train(batch: Any, start: Any) -> Any:
        state = inner.init(problem, (), start)
        here = problem.prepared((), tb.Batches(None, batch))
        return inner.solve(here, start, state)[0]

    return train
