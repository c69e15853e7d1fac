"""A method's step for one task after the other."""

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfbilevel import _structure as structure
from tfbilevel._method import Step
from tfbilevel._over_tasks import apart
from tfbilevel._problem import Batches, Problem
from tfbilevel._randomness import as_seed, of_tasks
from tfbilevel._task_loss import map_tasks, of_same_tasks, outcome

# Of these a user sees the mean; of the others one entry per task.
MEANS = ("upper_loss", "lower_loss", "gap", "weight")


def task_by_task(step: Callable[..., Step]) -> Callable[..., Step]:
    """For the `step` of a method that does nothing across tasks.

    Where a problem's tasks are taken in turn, the whole step is made for one task, then
    for the next: what a task's inner loop keeps is gone before the next one's begins,
    and no derivative goes through the mapping. Elsewhere the step is as it is.
    """

    @functools.wraps(step)
    def stepped(
        self: Any,
        problem: Problem,
        upper: Any,
        lower: Any,
        batches: Batches,
        state: Any,
    ) -> Step:
        one = problem.one_in_turn(lower)
        if one is None:
            return step(self, problem, upper, lower, batches, state)
        lower, state = structure.to_tensors((lower, state))
        first = tf.nest.map_structure(lambda leaf: leaf[0], lower)
        drawn = _drawn(self, lower, state)
        begun = tf.nest.map_structure(lambda leaf: leaf[0], drawn)
        like = tf.nest.flatten(_beginning_at(self, begun).init(one, upper, first))
        kept = tf.nest.flatten(state)
        # What every task has of its own is stacked; counters and rates are shared.
        own = [
            leaf.shape.rank > tf.convert_to_tensor(alone).shape.rank
            for leaf, alone in zip(kept, like, strict=True)
        ]

        def alone(task: tuple) -> Step:
            y, batch, mine, begun, seed = task
            remaining = iter(mine)
            leaves = [
                next(remaining) if is_own else leaf
                for leaf, is_own in zip(kept, own, strict=True)
            ]
            carried = tf.nest.pack_sequence_as(state, leaves)
            method = _beginning_at(self, begun)
            its = dataclasses.replace(one, seed=seed)
            return step(method, its, upper, y, type(batches)(*batch), carried)

        mine = [leaf for leaf, is_own in zip(kept, own, strict=True) if is_own]
        upper_batch, lower_batch = apart(batches)
        named = {"lower variables": lower, "upper": upper_batch, "lower": lower_batch}
        lower, *parts = of_same_tasks(named).values()
        count = tf.shape(tf.nest.flatten(lower)[0])[0]
        seeds = of_tasks(as_seed(problem.seed), count)
        tasks = (lower, tuple(parts), mine, drawn, seeds)
        traced, results = outcome(alone, tasks)
        made = map_tasks(traced, tasks, results)
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
                name: tf.reduce_mean(value, axis=0) if name in MEANS else value
                for name, value in made.metrics.items()
            },
        )

    return stepped


def _drawn(method: Any, lower: Any, state: Any) -> Any:
    """Where a function of the outer step has all tasks start; `()` without one."""
    inner = getattr(method, "inner", None)
    if inner is None or not callable(inner.start):
        return ()
    return inner.drawn(state.get("inner", state)["step"], lower)


def _beginning_at(method: Any, begun: Any) -> Any:
    """The method with an inner solver that starts there."""
    if isinstance(begun, tuple) and not begun:
        return method
    # Copies, not `dataclasses.replace`: what their constructors made is kept.
    inner, twin = copy.copy(method.inner), copy.copy(method)
    object.__setattr__(inner, "start", lambda step: begun)
    object.__setattr__(twin, "inner", inner)
    return twin
