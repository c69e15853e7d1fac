"""Errors of layers with a row per example in compiled steps, which raise none."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfbilevel._core.batches import Batches, StackedBatches, apart, count_tasks
from tfbilevel._core.microbatched import unsplit
from tfbilevel._core.problem import Problem
from tfbilevel._tasks.over_tasks import OverTasks

NONE = -1
SEARCHED = 1000  # at most so many elements of a dataset


class PerExampleError(ValueError):
    """An index without a row, or values that are not one per example."""


def range_error(layer: Any, index: int) -> PerExampleError:
    n = layer.n
    return PerExampleError(
        f"`index` must be from 0 to {n - 1}: the layer '{layer.name}', "
        f"a tb.{type(layer).__name__}, is of {n} examples. Count the training examples "
        "from 0, and create the layer for as many as there are. "
        f"Received: index {index}, out of range, n={n}"
    )


class IndexWatch:
    """Remembers the first index that was out of range, and its layer; it is not saved.

    Args:
        *models: the models whose layers are watched, if the layers can be `heard`.
    """

    def __init__(self, *models: Any):
        every = {id(one): one for model in models for one in model._flatten_layers()}
        self.layers = [one for one in every.values() if hasattr(one, "heard")]
        self._noted = tf.Variable(tf.constant([NONE, 0], tf.int64), trainable=False)

    def note(self, problem: Problem, x: Any, y: Any, batches: Batches) -> None:
        """Search the calls of both losses for such an index, within a compiled step.

        If the batches carry tasks, y holds the lower variables of one task.
        """
        if self._used:  # otherwise the losses would be traced again for nothing
            now = self._noted.read_value()
            new = first_out_of_range(problem, x, y, batches, self.layers)
            self._noted.assign(tf.where(now[0] == NONE, new, now))

    @property
    def _used(self) -> bool:
        return any(layer.in_graphs for layer in self.layers)

    @contextlib.contextmanager
    def explaining(
        self, problem: Problem, point: Callable[[], tuple], data: Any
    ) -> Iterator[None]:
        """If TensorFlow fails, raise the error that a layer would raise eagerly.

        Args:
            problem: the losses.
            point: () -> (x, y of one task), the values at the time of the failure.
            data: the batches, or an iterable of them.
        """
        try:
            yield
        except tf.errors.InvalidArgumentError:
            if self.layers:
                x, y = point()
                explain(problem, x, y, data)
            raise

    def raise_if_noted(self) -> None:
        if not self._used:
            return
        number, index = self._noted.numpy()
        if number != NONE:
            self._noted.assign([NONE, 0])
            raise range_error(self.layers[number], int(index)) from None


def explain(problem: Problem, x: Any, y: Any, data: Any) -> None:
    """Raise the error that a layer raises eagerly; called only after a failure.

    Args:
        problem: the losses.
        x, y: the point; y of one task.
        data: the batches, or an iterable of them, of which every shape is tried.
    """
    seen = set()
    several = [data] if isinstance(data, Batches) else data
    for batches in itertools.islice(several, SEARCHED):
        shapes = str(tf.nest.map_structure(np.shape, batches, expand_composites=True))
        if shapes not in seen:
            seen.add(shapes)
            try:
                first_out_of_range(problem, x, y, batches)
            except PerExampleError as error:
                raise error from None
            except Exception:  # unrelated to the indices
                return


def first_out_of_range(
    problem: Problem, x: Any, y: Any, batches: Batches, layers: Sequence = ()
) -> tf.Tensor:
    """The position of a layer with an index out of range, or NONE, and that index.

    When called eagerly, the layers raise the error themselves.

    Args:
        problem: the losses, of one task or over tasks.
        x, y: the point; y of one task.
        batches: the batches of all tasks.
        layers: layers that can be `heard`.
    """
    tasks = isinstance(problem, OverTasks)
    # Layers are not heard in the loop over microbatches.
    one = unsplit(problem.one if tasks else problem)
    whole = apart(batches) if tasks else (batches.upper, batches.lower)
    stacked = [leaf for leaf in tf.nest.flatten(batches.lower) if leaf is not None]
    draws: Any = 1
    if isinstance(batches, StackedBatches) and stacked:
        draws = tf.shape(stacked[0])[0]

    def at(number: Any) -> tf.Tensor:
        part = whole
        if tasks:
            part = tf.nest.map_structure(
                lambda leaf: None if leaf is None else tf.gather(leaf, number // draws),
                whole,
            )
        part = type(batches)(*part)
        if one.prepare is not None:
            part = one.prepare(x, part)
        rows = [tf.constant([NONE, 0], tf.int64)]
        with contextlib.ExitStack() as stack:
            for position, layer in enumerate(layers):

                def hear(index: Any, position: int = position, n: int = layer.n):
                    if _within_reach(index):
                        rows.append(_worst(index, position, n))

                stack.enter_context(layer.heard(hear))
            one.upper_loss(x, y, part.upper)
            one.lower_loss(x, y, part.lower_at(number % draws))
        return _first(tf.stack(rows))

    if not tasks and not isinstance(batches, StackedBatches):
        return at(0)
    count = draws * count_tasks(batches) if tasks else draws
    return _first(tf.map_fn(at, tf.range(count), fn_output_signature=tf.int64))


def _within_reach(tensor: tf.Tensor) -> bool:
    """Whether the tensor belongs to the graph being built or one around it, and not to
    a function or loop within the loss."""
    graph = tf.compat.v1.get_default_graph()
    while graph is not None and graph is not tensor.graph:
        graph = getattr(graph, "outer_graph", None)
    return graph is not None


def _worst(index: tf.Tensor, position: int, n: int) -> tf.Tensor:
    index = tf.cast(index, tf.int64)
    # TensorFlow has no minimum of int64 on a GPU, nor an argmax of int32 (below).
    low, high = -tf.reduce_max(-index), tf.reduce_max(index)
    number = tf.where((high >= n) | (low < 0), tf.constant(position, tf.int64), NONE)
    return tf.stack([number, tf.where(high >= n, high, low)])


def _first(rows: tf.Tensor) -> tf.Tensor:
    """The first row that holds a layer's position."""
    # Not rows[first]: XLA takes where a slice begins for a constant of the program, and
    # compiles the step again whenever the indices of the batch are others.
    first = tf.argmax(tf.cast(rows[:, 0] != NONE, tf.float32))
    return tf.gather(rows, first)
