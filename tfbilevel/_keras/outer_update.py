"""What an outer step assigns to a model's variables, or rejects as not finite."""

from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tfbilevel._calculus import structure
from tfbilevel._check.example_indices import IndexWatch
from tfbilevel._core.batches import Batches
from tfbilevel._core.method import Step
from tfbilevel._core.nonfinite import UPPER_VARIABLES, first_nonfinite
from tfbilevel._keras.arguments import require_no_average
from tfbilevel._keras.levels import Levels
from tfbilevel._keras.training_state import Carried, Progress


class OuterUpdate(NamedTuple):
    """The only place where an outer step assigns variables.

    Attributes:
        levels: the two models.
        optimizer: moves the upper variables.
        start_optimizer: moves those of a learned start; `None`: `optimizer` does.
        progress, carried: the state that is kept between steps.
        indices: records an index out of range.
        lower_steps: number of steps that the lower variables make.
        skips: whether steps that are not finite are skipped. Otherwise the first one
            stops training: no later one is made until its error code is read.
        advances: whether statistics and seeds are updated here, too.
    """

    levels: Levels
    optimizer: keras.optimizers.Optimizer
    start_optimizer: keras.optimizers.Optimizer | None
    progress: Progress
    carried: Carried
    indices: IndexWatch
    lower_steps: int
    skips: bool
    advances: bool = True

    def make(self, step: Step, *batches: Batches) -> Any:
        """Assign the result of the step; returns whether it was assigned.

        Args:
            step: the step.
            *batches: its batches, or the parts of them that are on this machine.
        """
        code = tf.cast(first_nonfinite(step), tf.int64)
        latched = self.progress.bad_code.value
        proceed = code < 0
        if not self.skips:
            proceed = proceed & (latched < 0)
        return tf.cond(
            proceed,
            lambda: self._commit(step, batches),
            lambda: self._refuse(tf.where(latched < 0, code, latched), *batches),
        )

    def _refuse(self, code: Any, *batches: Batches) -> tf.Tensor:
        for one in batches:
            self.indices.note(self.levels.problem, *self.levels.point(), one)
        if self.skips:
            self.progress.count()
        else:
            self.progress.bad_code.assign(code)
        return tf.constant(False)

    def _commit(self, step: Step, batches: tuple[Batches, ...]) -> tf.Tensor:
        """As `make`; not assigned if the upper optimizer or projection gives NaN."""
        if not isinstance(step.upper_scale, tuple):
            why = "with a method whose schedule scales the upper step"
            require_no_average(self.optimizer, why)
        upper, number = self.levels.upper_variables, self.progress.step
        before = [tf.convert_to_tensor(v.value) for v in upper]
        optimizers = [self.optimizer]
        if self.start_optimizer is not None:
            optimizers.append(self.start_optimizer)
        counted = [v for one in optimizers for v in one.variables]
        slots = [tf.convert_to_tensor(v.value) for v in counted]
        if self.start_optimizer is None:
            self.optimizer.apply(step.upper_gradient, upper)
        else:
            gradients = self.levels.split(step.upper_gradient)
            variables = self.levels.split(upper)
            self.optimizer.apply(gradients[0], variables[0])
            self.start_optimizer.apply(gradients[1], variables[1])
        moved = [tf.convert_to_tensor(v.value) for v in upper]
        problem = self.levels.problem_at(number.value)
        moved = problem.projected_upper(step.scaled(before, moved))
        fine = structure.all_finite(moved)
        for variable, value, old in zip(upper, moved, before, strict=True):
            variable.assign(tf.where(fine, value, old))
        for variable, old in zip(counted, slots, strict=True):
            variable.assign(tf.where(fine, variable.value, old))

        def finish() -> tf.Tensor:
            if self.levels.tasks is None:
                lower = zip(self.levels.lower_variables, step.lower, strict=True)
                for variable, value in lower:
                    variable.assign(value)
            self.carried.write(step.state)
            self.progress.count()
            if self.advances:
                self.levels.advance(batches[0], number.value, self.lower_steps)
            return tf.constant(True)

        return tf.cond(fine, finish, lambda: self._refuse(UPPER_VARIABLES))
