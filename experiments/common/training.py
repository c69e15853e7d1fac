"""Plain training from a given start, by the library's inner solver."""

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
    """A function (batch, variables) -> the variables after so many steps on the batch.

    It is compiled once for every shape of what it is given.

    Args:
        loss: (variables, batch) -> scalar.
        optimizer: of the steps; its state starts at zero in every call.
        steps: how many.
        jit: whether XLA compiles them.
        project: variables -> those in the set they must stay in.
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
