"""Tasks divided among replicas: each replica makes the step of its own tasks."""

import dataclasses
from typing import Any

import tensorflow as tf

from tfbilevel._calculus import structure
from tfbilevel._calculus.collectives import total
from tfbilevel._core.method import Method, Step
from tfbilevel._core.problem import Problem
from tfbilevel._randomness.seeds import TASK, as_seed, folded


def of_own_tasks(problem: Problem, first: Any) -> Problem:
    """The problem whose tasks sample what they do among all tasks.

    Args:
        problem: the problem over tasks.
        first: the number of this replica's first task.
    """
    return dataclasses.replace(problem, seed=folded(as_seed(problem.seed), TASK, first))


def mean_over_replicas(step: Step, share: Any) -> Step:
    """The step of all tasks, from each replica's step of its own.

    The upper gradient and the metrics are means over all tasks. The state has nothing
    of single tasks (`require_no_state_of_tasks`), so it is the same on all replicas.
    `lower` is NaN if a lower variable of any task is not finite, else zero. Cost: one
    collective for the gradient and one for other dtypes in the metrics.

    Args:
        step: the step of this replica's tasks.
        share: the share that they are of all tasks.
    """

    def shared(value: Any) -> Any:
        value = tf.convert_to_tensor(value)
        value = value if value.dtype.is_floating else tf.cast(value, tf.float32)
        return tf.cast(share, value.dtype) * value

    means = {k: tf.reduce_mean(shared(value)) for k, value in step.metrics.items()}
    dtype = tf.nest.flatten(step.lower)[0].dtype
    nan = tf.constant(float("nan"), dtype)
    lower = tf.where(structure.all_finite(step.lower), tf.zeros_like(nan), nan)
    gradient = tf.nest.map_structure(shared, step.upper_gradient)
    gradient, lower, means = total((gradient, [lower], means))
    return step._replace(upper_gradient=gradient, lower=lower, metrics=means)


def require_no_state_of_tasks(
    method: Method, problem: Problem, upper: list, lower: list
) -> None:
    """Raise if a method's state or step depends on which tasks are on one replica.

    Args:
        method: the method.
        problem: the problem over tasks.
        upper, lower: x, and y of all tasks.
    """
    one_more = [tf.concat([leaf, leaf[:1]], axis=0) for leaf in lower]
    states = (method.init(problem, upper, y) for y in (lower, one_more))
    leaves = zip(*map(tf.nest.flatten, states), strict=True)
    shapes = [tuple(tf.convert_to_tensor(v).shape for v in pair) for pair in leaves]
    if any(some != more for some, more in shapes):
        raise ValueError(
            "`method` must keep nothing of single tasks from step to step on several "
            "replicas, where a task's data come to any of them. Use tb.InnerSolver("
            "..., optimizer_state='reset'), a linear solver with warm_start=False, and "
            f"a start other than 'cold'. Received: method={method!r}"
        )
    if method.couples_tasks:
        raise ValueError(
            "`method` must solve each task by itself on several replicas, each of "
            "which has some of the tasks. Use a method such as tb.Unroll or "
            f"tb.Implicit. Received: method={method!r}"
        )
