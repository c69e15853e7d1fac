"""A compiled step that all replicas make of their parts, for Keras's loops."""

from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf


def stepping(step: Callable, strategy: Any, eager: bool) -> Callable[[Iterator], Any]:
    """An iterator over distributed elements -> the first local replica's logs.

    Keras's own function reduces the logs of every step over all replicas, which fails
    for scalars on several machines, and reads the iterator in the graph, where an
    epoch's end is an error in the midst of a step.

    Args:
        step: a replica's element -> its logs.
        strategy: the strategy.
        eager: whether the step is not compiled.
    """

    def all_replicas(element: Any) -> Any:
        logs = strategy.run(step, (element,))
        return {k: strategy.experimental_local_results(v)[0] for k, v in logs.items()}

    compiled = all_replicas
    if not eager:
        compiled = tf.function(all_replicas, autograph=False, reduce_retracing=True)
    return lambda iterator: compiled(next(iterator))
