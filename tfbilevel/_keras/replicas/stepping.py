"""A compiled step that all replicas make of their parts, for Keras's loops."""

from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from tfbilevel._core.batches import Batches
from tfbilevel._core.parts import Part
from tfbilevel._keras.replicas.given import of_any_sizes


def stepping(
    step: Callable, strategy: Any, eager: bool, alike: bool
) -> Callable[[Iterator], Any]:
    """An iterator over distributed elements -> the first local replica's logs.

    Keras's own function reduces the logs of every step over all replicas, which fails
    for scalars on several machines, and reads the iterator in the graph, where an
    epoch's end is an error in the midst of a step.

    A step of parts is traced for what is known of all of them, not for the first ones.
    Collectives are matched by the order in which replicas trace them, and this order
    can depend on whether the shape of a part is known: all replicas must know the same.

    Args:
        step: a replica's element -> its logs.
        strategy: the strategy.
        eager: whether the step is not compiled.
        alike: whether all replicas must know the same of the shapes of parts.
    """

    def all_replicas(element: Any) -> Any:
        logs = strategy.run(step, (element,))
        return {k: strategy.experimental_local_results(v)[0] for k, v in logs.items()}

    if eager:
        return lambda iterator: all_replicas(next(iterator))
    compiled = tf.function(all_replicas, autograph=False, reduce_retracing=True)
    traced: list = []

    def call(iterator: Any) -> Any:
        element = next(iterator)
        if alike and isinstance(element, Part | Batches):
            spec = iterator.element_spec
            spec = of_any_sizes(spec) if isinstance(spec, Batches) else spec
            if spec not in traced:
                compiled.get_concrete_function(spec)
                traced.append(spec)
        return compiled(element)

    return call
