"""A method's step for sequential tasks: the whole step of one task, then the next."""

import dataclasses
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfbilevel._calculus import structure
from tfbilevel._calculus.aliases import Nest, State
from tfbilevel._core.batches import Batches, apart
from tfbilevel._core.method import Method, Step
from tfbilevel._core.problem import Problem
from tfbilevel._randomness.seeds import as_seed, of_tasks
from tfbilevel._tasks.mapping import map_sequentially, of_same_tasks


@dataclasses.dataclass(frozen=True, eq=False)
class OneOfTasks(Problem):
    """The problem of one of many tasks.

    Attributes:
        number: the task's number.
        every: the lower variables of all tasks.
    """

    number: Any = dataclasses.field(kw_only=True)
    every: Any = dataclasses.field(kw_only=True)

    def _sampled(self, start: Callable, step: tf.Tensor, lower: Nest) -> Nest:
        # The function returns the starts of all tasks, as in the vectorized step.
        starts = super()._sampled(start, step, self.every)
        return tf.nest.map_structure(lambda leaf: tf.gather(leaf, self.number), starts)


def sequential_step(
    one: OneOfTasks,
    method: Method,
    upper: Nest,
    lower: Nest,
    batches: Batches,
    state: State,
) -> Step:
    """The step of a method that does not couple tasks, one task after the other.

    The memory of one task's inner loop is freed before the next one starts, and no
    derivative is taken through the mapping.

    Args:
        one: the problem of any one task, with the seed of all.
        method, upper, lower, batches, state: as for the problem over tasks.
    """
    lower, state = structure.to_tensors((lower, state))
    first = tf.nest.map_structure(lambda leaf: leaf[0], lower)
    like = tf.nest.flatten(method.init(one, upper, first))
    kept = tf.nest.flatten(state)
    # State that each task has separately is stacked; counters and rates are shared.
    own = [
        leaf.shape.rank > tf.convert_to_tensor(alone).shape.rank
        for leaf, alone in zip(kept, like, strict=True)
    ]

    def alone(task: tuple) -> Step:
        y, batch, mine, number, seed = task
        remaining = iter(mine)
        leaves = [
            next(remaining) if is_own else leaf
            for leaf, is_own in zip(kept, own, strict=True)
        ]
        carried = tf.nest.pack_sequence_as(state, leaves)
        this = dataclasses.replace(one, number=number, seed=seed)
        return this.step(method, upper, y, type(batches)(*batch), carried)

    mine = [leaf for leaf, is_own in zip(kept, own, strict=True) if is_own]
    upper_batch, lower_batch = apart(batches)
    named = {"lower variables": lower, "upper": upper_batch, "lower": lower_batch}
    lower, *parts = of_same_tasks(named).values()
    numbers = tf.range(tf.shape(tf.nest.flatten(lower)[0])[0])
    seeds = of_tasks(as_seed(one.seed), tf.size(numbers))
    made = map_sequentially(alone, (lower, tuple(parts), mine, numbers, seeds))
    after = [
        leaf if is_own else tf.reduce_max(leaf, axis=0)
        for leaf, is_own in zip(tf.nest.flatten(made.state), own, strict=True)
    ]
    return Step(
        upper_gradient=tf.nest.map_structure(
            lambda g: tf.reduce_mean(g, axis=0), made.upper_gradient
        ),
        lower=made.lower,
        state=tf.nest.pack_sequence_as(state, after),
        metrics={
            name: (
                tf.reduce_mean(value, axis=0) if name in method.mean_metrics else value
            )
            for name, value in made.metrics.items()
        },
        # The scale comes from a schedule, so it is the same for all tasks.
        upper_scale=tf.nest.map_structure(
            lambda scale: tf.reduce_max(scale, axis=0), made.upper_scale
        ),
    )
