"""One outer step, made by all replicas of a strategy together."""

from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from tfbilevel._calculus.collectives import apart, total
from tfbilevel._calculus.derivatives import UnconnectedGradientError
from tfbilevel._core.batches import Batches, count_tasks
from tfbilevel._core.method import Step
from tfbilevel._core.parts import Part, of_all_parts
from tfbilevel._core.problem import Problem
from tfbilevel._keras.outer_step import ENDS, OuterStep
from tfbilevel._keras.replicas.dealing import DealtOnce, dealt, require_enough
from tfbilevel._keras.replicas.given import (
    in_steps,
    is_given,
    local_parts,
    part_given,
)
from tfbilevel._keras.replicas.strategies import (
    is_alone,
    is_replicated,
    require_compiled_within,
    require_created_within,
    require_together,
)
from tfbilevel._keras.replicas.workers import (
    callbacks_of_worker,
    has_workers,
    while_all_are_there,
)
from tfbilevel._keras.training_state import Carried
from tfbilevel._tasks.over_replicas import (
    mean_over_replicas,
    of_own_tasks,
    require_no_state_of_tasks,
)
from tfbilevel._workarounds.abandoned_iterators import without_frames
from tfbilevel._workarounds.memory_optimizer import without_memory_rewrites
from tfbilevel._workarounds.merged_optimizers import merged_optimizers


def outer_step(strategy: Any, *arguments: Any) -> OuterStep:
    """The outer step under a strategy.

    Args:
        strategy: that of the model; `None`: it was created outside of any scope.
        *arguments: those of `OuterStep`.
    """
    require_compiled_within(strategy)
    _, _, *optimizers = arguments[:4]
    named = zip(("upper_optimizer", "start_optimizer"), optimizers, strict=True)
    require_created_within(strategy, [(n, o.iterations) for n, o in named if o])
    if not is_replicated(strategy):
        return OuterStep(*arguments)
    kind = ReplicatedStep if arguments[0].tasks is None else TaskStep
    with strategy.scope():
        return kind(strategy, *arguments)


class ReplicatedStep(OuterStep):
    """An outer step whose batches are divided among replicas.

    Every replica computes the same step of the same problem, whose losses are means
    over all parts (`_core/parts.py`). It is then assigned once, outside of the
    replicas, which copies it to all devices.

    Args:
        strategy: the strategy.
        *arguments: those of `OuterStep`.
    """

    def __init__(self, strategy: Any, *arguments: Any):
        super().__init__(*arguments)
        self.strategy = strategy
        # Several workers must all stop at the same step.
        self.reads.often |= not is_alone(strategy)
        self.replicas = strategy.num_replicas_in_sync

    def look(self, batches: Batches, eager: bool) -> None:
        if not self._looked:
            require_enough(batches, self.replicas)
            if self.replicas > 1:
                self._require_possible()
            super().look(batches, eager)
            if not eager:
                self._trace_alone(batches)

    def _require_possible(self) -> None:
        require_together(self.method, self.levels.problem)

    def _trace_alone(self, batches: Batches) -> None:
        """Raise what tracing one device's step raises.

        Where values are copied to replicas, a derivative of zero counts as connected.
        """
        problem, method = self.levels.problem, self.method

        def step(x: list, y: list, batches: Batches) -> Any:
            state = method.init(problem, x, y)
            return problem.step(method, x, y, batches, state).upper_gradient

        traced = tf.function(step, autograph=False)
        try:
            traced.get_concrete_function(*self.levels.specifications(), batches)
        except UnconnectedGradientError as error:
            raise self.levels.named(error) from None

    def dealt(self, x: Any) -> Any:
        if isinstance(x, tf.data.Dataset) and isinstance(x.element_spec, Batches):
            return dealt(x, self.strategy)
        return in_steps(x) if is_given(x) else x

    def dealt_once(self, batches: Batches) -> Any:
        return DealtOnce(batches, self.strategy)

    def measure(self, data: Any) -> dict[str, Any]:
        part = _part(data)
        losses = self.levels.losses(part.batches, self._problem(part))

        def update(strategy: Any, losses: dict) -> dict[str, Any]:
            return self.trackers.update(_of(strategy, 0, losses))

        return tf.distribute.get_replica_context().merge_call(update, (losses,))

    def ensure_carried(self) -> Carried:
        with self.strategy.scope():
            return super().ensure_carried()

    def make(self, data: Any, skips: bool) -> dict[str, Any]:
        assert self.carried is not None
        part = _part(data)
        (x, y), state = self._read(part), self.carried.read()
        number = tf.convert_to_tensor(self.progress.step.value)
        arguments = (x, y, state, number, part)
        if tf.executing_eagerly():
            step = self._step(*arguments)
        else:
            with without_memory_rewrites():  # here, because replicas are threads
                step = apart(self._step)(*arguments)
        committed = tf.distribute.get_replica_context().merge_call(
            self._assign, (step, part.batches, skips)
        )
        self._advance(part, number + 1, committed)
        return {}  # Keras would reduce metrics over replicas once more

    def _read(self, part: Part) -> tuple[list, list]:
        del part
        return self.levels.read()

    def _step(self, x: list, y: list, state: Any, number: Any, part: Part) -> Step:
        problem = self._problem(part, self.levels.problem_at(number))
        return problem.step(self.method, x, y, part.batches, state)

    def _problem(self, part: Part, problem: Problem | None = None) -> Problem:
        problem = self.levels.problem if problem is None else problem
        return of_all_parts(problem, part) if self.replicas > 1 else problem

    def _assign(self, strategy: Any, step: Any, batches: Any, skips: bool) -> Any:
        """Assign the step, which is the same on every replica."""
        local = range(len(strategy.extended.worker_devices))
        parts = [_of(strategy, replica, batches) for replica in local]
        step = _of(strategy, 0, step)
        with merged_optimizers.in_use():
            return self.assign(step, skips, *parts, advances=False)[0]

    def _advance(self, part: Part, number: Any, committed: Any) -> None:
        """Statistics become means over the replicas; of seeds each has the same."""

        written: list = []

        def note(variable: Any, value: Any) -> None:
            value = tf.cast(tf.convert_to_tensor(value), variable.dtype)
            if value.dtype.is_floating:
                value = tf.cast(self._weight(part), value.dtype) * value
            written.append((variable, value))

        steps = self.method.lower_steps
        self.levels.advance(part.batches, number, steps, assign=note)
        means = iter(total([v for _, v in written if v.dtype.is_floating]))
        for variable, value in written:
            value = next(means) if value.dtype.is_floating else value
            old = tf.convert_to_tensor(variable.value)
            variable.assign(tf.where(committed, value, old))

    def _weight(self, part: Part) -> Any:
        """The weight of this replica's statistics."""
        return part.lower_share

    def with_callbacks(self, arguments: dict[str, Any]) -> dict[str, Any]:
        if not has_workers(self.strategy):
            return arguments
        with while_all_are_there():
            made = callbacks_of_worker(self.strategy, arguments.get("callbacks"))
        return {**arguments, "callbacks": made}

    def run(self, function: Callable[[], Any], x: Any) -> Any:
        self.reads.start()
        ends = (*ENDS, tf.errors.UnavailableError)
        data = x
        if is_given(x):  # to read one, several workers must read together
            data = local_parts(x) if is_alone(self.strategy) else ()
        point = self.levels.point
        explained = self.indices.explaining(self.levels.problem, point, data)
        with while_all_are_there(), explained:
            return without_frames(function, ends)

    def call(
        self, compiled: Callable, iterator: Iterator, count: int
    ) -> dict[str, Any]:
        with without_memory_rewrites():
            compiled(iterator)
        logs = {name: one.result() for name, one in self.trackers.of.items()}
        if self.reads.due():
            self.check(logs)
        return logs


class TaskStep(ReplicatedStep):
    """An outer step whose tasks are divided among replicas.

    Every replica makes the step of its own tasks. Only the upper gradient and the
    metrics are reduced.
    """

    def _require_possible(self) -> None:
        with self.strategy.scope():
            x, y = self.levels.read()
            require_no_state_of_tasks(self.method, self.levels.problem, x, y)

    def _read(self, part: Part) -> tuple[list, list]:
        return self.levels.read(count_tasks(part.batches))

    def _step(self, x: list, y: list, state: Any, number: Any, part: Part) -> Step:
        problem = of_own_tasks(self.levels.problem_at(number), part.first)
        step = problem.step(self.method, x, y, part.batches, state)
        return mean_over_replicas(step, part.upper_share)

    def _weight(self, part: Part) -> Any:
        return tf.equal(part.first, 0)  # one device takes those of the first task


def _part(data: Any) -> Part:
    return data if isinstance(data, Part) else part_given(data)


def _of(strategy: Any, replica: int, values: Any) -> Any:
    """What one of this machine's replicas has, from a nest of all replicas' values."""
    return tf.nest.map_structure(
        lambda value: strategy.experimental_local_results(value)[replica], values
    )
