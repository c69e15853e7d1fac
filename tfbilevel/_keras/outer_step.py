"""One outer step of two Keras models, with the preparations for the first one."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from tfbilevel._calculus.derivatives import UnconnectedGradientError
from tfbilevel._calculus.lost_derivatives import MissingSecondDerivativeError
from tfbilevel._check.example_indices import IndexWatch, PerExampleError
from tfbilevel._check.look import require_second_derivatives
from tfbilevel._core.batches import Batches
from tfbilevel._core.method import Method, Step
from tfbilevel._core.nonfinite import NonFiniteError, warn_diverged
from tfbilevel._keras.compilation import faster_with_xla
from tfbilevel._keras.levels import Levels
from tfbilevel._keras.outer_update import OuterUpdate
from tfbilevel._keras.reads import Reads
from tfbilevel._keras.resident import Resident
from tfbilevel._keras.training_state import SKIPPED, Carried, Progress, Trackers, kept
from tfbilevel._workarounds.abandoned_iterators import without_frames
from tfbilevel._workarounds.memory_optimizer import without_memory_rewrites

ENDS = NonFiniteError, PerExampleError, KeyboardInterrupt  # they end training


class OuterStep:
    """A method, its optimizers and two models, as combined by `BilevelModel.compile`.

    Args:
        levels: the two models.
        method: computes the step.
        optimizer, start_optimizer: move the upper variables; see `OuterUpdate`.
        progress: the progress of training.
        indices: records an index out of range.

    Attributes:
        trackers: of the step's metrics.
        reads: when the host reads what steps record.
        carried: the method's state in variables; `None` before `ensure_carried`.
        early: whether `ensure_carried` must initialise it from the current variables.
    """

    def __init__(
        self,
        levels: Levels,
        method: Method,
        optimizer: keras.optimizers.Optimizer,
        start_optimizer: keras.optimizers.Optimizer | None,
        progress: Progress,
        indices: IndexWatch,
    ):
        self.levels, self.method = levels, method
        self.optimizer, self.start_optimizer = optimizer, start_optimizer
        self.progress, self.indices = progress, indices
        self.trackers = Trackers(levels.device)
        self.reads = Reads(often=levels.on_host)
        self.carried: Carried | None = None
        self.early = True
        self._looked = self._warned = False
        self._resident: Resident | None = None  # only while steps run
        with tf.device(levels.device):
            if start_optimizer is None:
                optimizer.build(levels.upper_variables)
            else:
                own, start = levels.split(levels.upper_variables)
                optimizer.build(own)
                start_optimizer.build(start)

    def look(self, batches: Batches, eager: bool) -> None:
        """At the first call, reject losses without second derivatives if needed.

        Args:
            batches: those of one outer step, or their specifications.
            eager: whether code that cannot be traced is allowed.
        """
        if self._looked:
            return
        levels = self.levels
        x, y = levels.specifications()
        models = (levels.upper, levels.lower)
        try:
            require_second_derivatives(
                levels.problem, self.method, x, y, batches, models
            )
        except MissingSecondDerivativeError:
            raise
        except Exception:  # code that cannot be traced may still run eagerly
            if not eager:
                raise
        self._looked = True

    def ensure_carried(self) -> Carried:
        """The method's state before the next step."""
        if self.early or self.carried is None:
            with tf.device(self.levels.device):
                state = self.method.init(self.levels.problem, *self.levels.read())
                if self.carried is None:
                    self.carried = Carried(state)
                else:
                    self.carried.write(state)
        self.early = False
        return self.carried

    def faster_with_xla(self, batches: Batches, announce: bool) -> bool | None:
        """Time one step with and without XLA; no variable is changed.

        `None` if it has no gradient: the step itself will raise that error.
        """
        problem, carried = self.levels.problem, self.ensure_carried()

        def trial(x: list, y: list, state: Any, batches: Batches) -> Any:
            return problem.step(self.method, x, y, batches, state)

        with contextlib.suppress(UnconnectedGradientError), self.levels.placed():
            arguments = (*self.levels.read(), carried.read())
            return faster_with_xla(trial, arguments, batches, announce)
        return None

    def make(self, data: Batches, skips: bool) -> dict[str, Any]:
        """Make one step; returns its metrics as means over all steps so far.

        Args:
            data: the batches of the step.
            skips: whether steps that are not finite are skipped.
        """
        assert self.carried is not None
        (x, y), state = self.levels.read(), self.carried.read()
        try:
            problem = self.levels.problem_at(self.progress.step.value)
            step = problem.step(self.method, x, y, data, state)
        except UnconnectedGradientError as error:
            raise self.levels.named(error) from None
        return self.assign(step, skips, data)[1]

    def assign(
        self, step: Step, skips: bool, *batches: Batches, advances: bool = True
    ) -> tuple[Any, dict[str, Any]]:
        """Assign a step's result; returns whether it was assigned, and the metrics.

        Args:
            step: the step.
            skips: whether steps that are not finite are skipped.
            *batches: its batches, or the parts of them that are on this machine.
            advances: whether statistics and seeds are updated, too.
        """
        assert self.carried is not None
        update = OuterUpdate(
            levels=self.levels,
            optimizer=self.optimizer,
            start_optimizer=self.start_optimizer,
            progress=self.progress,
            carried=self.carried,
            indices=self.indices,
            lower_steps=self.method.lower_steps,
            skips=skips,
            advances=advances,
        )
        committed = update.make(step, *batches)
        logs = dict(step.metrics)
        if skips:
            logs[SKIPPED] = tf.cast(~committed, tf.float32)
        return committed, self.trackers.update(logs, committed)

    def measure(self, data: Any) -> dict[str, Any]:
        """The losses at the current variables, as means over the batches so far."""
        return self.trackers.update(self.levels.losses(data))

    def dealt(self, x: Any) -> Any:
        """A dataset of batches as the devices take it: unchanged."""
        return x

    def dealt_once(self, batches: Batches) -> Any:
        """An iterator over the batches of one step as the devices take them."""
        return iter([batches])

    def with_callbacks(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Keras's arguments of `fit` with the callbacks for this process: unchanged."""
        return arguments

    def run(self, function: Callable[[], Any], x: Any) -> Any:
        """Call a function that makes steps by `call`, and return its result.

        Args:
            function: called once.
            x: the batches of its steps, or a dataset of them.
        """
        self.reads.start()
        if not self.levels.on_host:
            self._resident = Resident(self.levels.device)
        try:
            with self.indices.explaining(self.levels.problem, self.levels.point, x):
                return without_frames(function, ENDS)
        finally:
            self._resident = None

    def call(
        self, compiled: Callable, iterator: Iterator, count: int
    ) -> dict[str, Any]:
        """Call the compiled step on the next `count` elements; check the result if due.

        Args:
            compiled: the step.
            iterator: its batches.
            count: the most of them that it takes.
        """
        if self._resident is not None:
            iterator = self._resident.read(iterator, count)
        with self.levels.placed(), without_memory_rewrites():
            logs = compiled(iterator)
        if self.reads.due():
            self.check(logs)
        return logs

    def check(self, logs: dict[str, Any]) -> None:
        """Raise errors that compiled steps recorded; warn at the first divergence.

        The first step that is not finite is recorded unless such steps are skipped.
        """
        try:
            self.progress.raise_if_nonfinite()
        finally:  # this error is closer to the cause
            self.indices.raise_if_noted()
        if not self._warned and float(logs.get("diverged", 0.0)) > 0:
            self._warned = True
            warn_diverged(self.method)

    @contextlib.contextmanager
    def restoring(self, variables: list) -> Iterator[None]:
        """Restores all variables on exit, so that a step made within only compiles.

        Args:
            variables: those of both models, and all that is saved with them.
        """
        optimizers = [self.optimizer, *filter(None, [self.start_optimizer])]
        slots = [v for one in optimizers for v in one.variables]
        with kept([*variables, *slots]), self.trackers.kept():
            yield
