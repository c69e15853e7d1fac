"""Two Keras models as one bilevel problem over tensors."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from tfbilevel._calculus import structure
from tfbilevel._calculus.derivatives import UnconnectedGradientError
from tfbilevel._core.arguments import (
    require_callable,
    require_choice,
    require_count,
    takes_two,
)
from tfbilevel._core.batches import Batches, first_task
from tfbilevel._core.microbatched import microbatched
from tfbilevel._core.problem import Problem
from tfbilevel._keras.arguments import require_apart, require_no_constraints
from tfbilevel._keras.fixed_state import assigned, moved_on
from tfbilevel._keras.functional import require_built
from tfbilevel._keras.precision import in_float32
from tfbilevel._keras.regularizers import CHOICES as REGULARIZERS
from tfbilevel._keras.regularizers import with_own_losses
from tfbilevel._randomness.operations import fixed_randomness
from tfbilevel._randomness.seeds import LOWER_LOSS, ROLE, as_seed, folded
from tfbilevel._tasks.over_tasks import over_tasks
from tfbilevel._workarounds import functions_inline

HOST = "CPU:0"  # the end of the host's device name


class Start(keras.layers.Layer):
    """A learned start of inner solves: variables of the upper level."""

    def __init__(self, lower: keras.layers.Layer):
        super().__init__(name="start")
        for index, variable in enumerate(lower.trainable_variables):
            copy = self.add_weight(
                name=f"{index}_{variable.name}",
                shape=variable.shape,
                dtype=variable.dtype,
                initializer="zeros",
            )
            copy.assign(variable)
        self.built = True


class Levels:
    """Two Keras models as one `Problem`.

    The user's functions take models; the problem's take tensors. During a call, the
    models' variables have these tensors as values, wherever they are read. The
    functions of the problem assign no variable; only `advance` does.

    Args: those of `tb.BilevelModel`.

    Attributes:
        upper, lower: the models.
        start: the variables of a learned start; `None` without one.
        problem: the problem, of one task or over tasks.
        tasks: the number of tasks; `None`: the problem is not over tasks.
        mapping: how tasks are mapped.
        base: a seed generator, for sampling in the losses without a seed of their own.
        prepare: the user's function of the upper model and batches.
    """

    def __init__(
        self,
        upper: keras.layers.Layer,
        lower: keras.layers.Layer,
        upper_loss: Callable,
        lower_loss: Callable,
        *,
        project_upper: Callable | None = None,
        project_lower: Callable | None = None,
        lower_start: Callable | str | None = None,
        prepare: Callable | None = None,
        tasks: int | None = None,
        mapping: str = "auto",
        regularizers: str = "add",
    ):
        require_choice(regularizers, "regularizers", REGULARIZERS)
        if tasks is not None:
            require_count(tasks, "tasks")
        # Checked here, because the problem receives functions that wrap them.
        require_callable(upper_loss, "upper_loss")
        require_callable(lower_loss, "lower_loss")
        if prepare is not None:
            require_callable(prepare, "prepare")
        require_built(upper, "upper")
        require_built(lower, "lower")
        require_no_constraints(lower)
        require_apart(upper, lower)
        self.upper, self.lower, self.tasks = upper, lower, tasks
        self.prepare, self._lower_loss = prepare, lower_loss
        self.start: Start | None = None
        if isinstance(lower_start, str):
            require_choice(lower_start, "lower_start", ("learned",))
            with tf.device(self.device):
                self.start = Start(lower)
        elif lower_start is not None:
            require_callable(lower_start, "lower_start")
        adds = regularizers == "add"
        self.problem = Problem(
            upper_loss=self._loss(upper_loss, upper if adds else None),
            lower_loss=self._loss(lower_loss, lower if adds else None),
            lower_start=self._start_function(lower_start),
            project_upper=project_upper and self._upper_projection(project_upper),
            project_lower=project_lower and self._lower_projection(project_lower),
            prepare=prepare and self._at_upper_variables(prepare),
            reads=self._reading,
        )
        self._one = self.problem
        self.mapping = mapping
        if tasks is not None:
            self.problem = over_tasks(self.problem, mapping)
            self.mapping = self.problem.mapping  # its current name, if renamed
        with tf.device(self.device):
            self.base = keras.random.SeedGenerator()

    @property
    def upper_variables(self) -> list:
        """x: the upper model's trainable variables, then those of a learned start."""
        start = [] if self.start is None else self.start.trainable_variables
        return [*self.upper.trainable_variables, *start]

    @property
    def lower_variables(self) -> list:
        """y: the lower model's trainable variables."""
        return self.lower.trainable_variables

    @property
    def device(self) -> str:
        """The device of the variables; everything else is created there too."""
        return self.lower.trainable_variables[0].value.device

    @property
    def on_host(self) -> bool:
        """Whether the variables are on the device of tf.data's elements."""
        return self.device.endswith(HOST)

    def placed(self) -> Any:
        """A scope for compiling: XLA compiles for the device of the current scope."""
        return contextlib.nullcontext() if self.on_host else tf.device(self.device)

    def split(self, x: list) -> tuple[list, list]:
        """The upper model's own variables, and the learned start's."""
        own = len(self.upper.trainable_variables)
        return list(x[:own]), list(x[own:])

    def read(self, tasks: Any = None) -> tuple[list, list]:
        """The values of x and of y, with y repeated for every task.

        Args:
            tasks: the number of tasks; `None`: the problem's own.
        """
        x, y = self.point()
        tasks = self.tasks if tasks is None else tasks
        if tasks is not None:
            y = [tf.broadcast_to(v, [tasks, *v.shape]) for v in y]
        return x, y

    def point(self) -> tuple[list, list]:
        """The values of x and of one task's y."""
        x, y = (
            [tf.convert_to_tensor(v.value) for v in variables]
            for variables in (self.upper_variables, self.lower_variables)
        )
        return x, y

    def specifications(self) -> tuple[list, list]:
        """The specifications of the result of `read`."""
        tasks = [] if self.tasks is None else [self.tasks]
        x = [tf.TensorSpec(v.shape, v.dtype) for v in self.upper_variables]
        y = [tf.TensorSpec([*tasks, *v.shape], v.dtype) for v in self.lower_variables]
        return x, y

    def named(self, error: UnconnectedGradientError) -> UnconnectedGradientError:
        """The error with the variable's name in its model."""
        upper = error.level == "upper"
        level = self.upper_variables if upper else self.lower_variables
        path = repr(level[error.index].path)
        return UnconnectedGradientError(error.level, error.index, path, error.source)

    def problem_at(self, step: Any) -> Problem:
        """The problem with the seed of an outer step."""
        base = tf.cast(self.base.state.value[0], tf.int32)
        return dataclasses.replace(self.problem, seed=base).seeded(step)

    def use_microbatches(self, upper: int, lower: int) -> Problem:
        """From now on, compute the losses on so many parts of their batches."""
        self.problem = microbatched(self._one, upper, lower)
        if self.tasks is not None:
            self.problem = over_tasks(self.problem, self.mapping)
        return self.problem

    def losses(
        self, batches: Batches, problem: Problem | None = None
    ) -> dict[str, tf.Tensor]:
        """The losses at the current variables; the upper one alone for batches without
        a lower part.

        Args:
            batches: the batches.
            problem: `None`: that of the models.
        """
        x, y = self.read()
        here = (problem or self.problem).prepared(x, batches)
        losses = {"upper_loss": here.upper_loss(y)}
        if any(leaf is not None for leaf in tf.nest.flatten(batches.lower)):
            losses["lower_loss"] = here.lower_loss(y)
        return losses

    def advance(
        self,
        batches: Batches,
        step: Any,
        steps: int,
        lower: list | None = None,
        assign: Callable[[Any, Any], None] = assigned,
    ) -> None:
        """Evaluate the lower loss, to update statistics and seeds.

        Args:
            batches: the batches of the outer step.
            step: the number of the outer step.
            steps: number of steps that the lower variables made.
            lower: values of the lower variables; `None`: the current ones.
            assign: (variable, value) -> assigns what the evaluation writes.
        """
        own = self.lower_variables
        trainable = {id(v) for v in [*self.upper_variables, *own]}
        owned = [*self.upper.variables, *self.lower.variables]
        others = [v for v in owned if id(v) not in trainable]
        if not others:
            return
        if self.tasks is not None:
            batches = first_task(batches)
        values = [] if lower is None else list(zip(own, lower, strict=True))
        seed = as_seed(self.problem_at(step).seed)
        fixed = folded(seed, ROLE, LOWER_LOSS)
        prepared = []  # filled by the first evaluation

        def evaluate(draw: Any) -> None:
            with functions_inline(own), fixed_randomness(fixed):
                if not prepared:
                    prepare = self.prepare
                    made = prepare(self.upper, batches) if prepare else batches
                    prepared.append(made)
                self._lower_loss(self.upper, self.lower, prepared[0].lower_at(draw))

        moved_on(evaluate, others, self.lower, values, steps, assign)

    def at_variables(self, function: Callable, penalised: Any = None) -> Callable:
        """Turns a function of models and a batch into one of x, y and the batch.

        Args:
            function: (upper model, lower model, batch) -> anything.
            penalised: a model whose own losses are added to the function's result.
        """

        def at(x: list, y: list, batch: Any) -> Any:
            values = [
                *zip(self.upper_variables, x, strict=True),
                *zip(self.lower_variables, y, strict=True),
            ]
            scope = keras.StatelessScope(values, collect_losses=True)
            with functions_inline([v for v, _ in values]), scope:

                def value() -> Any:
                    return function(self.upper, self.lower, batch)

                if penalised is None:
                    return value()
                return with_own_losses(value, penalised, scope)

        return at

    def _loss(self, loss: Callable, penalised: Any) -> Callable:
        return self.at_variables(in_float32(loss), penalised)

    def _at_upper_variables(self, function: Callable) -> Callable:
        def at(x: list, *arguments: Any) -> Any:
            with self._scope(x):
                made = function(self.upper, *arguments)
                return made if arguments else structure.to_tensors(list(made))

        return at

    @contextlib.contextmanager
    def _scope(self, x: list) -> Iterator[None]:
        """Within this context, the upper variables have the values x."""
        variables = self.upper_variables
        scope = keras.StatelessScope(list(zip(variables, x, strict=True)))
        with functions_inline(variables), scope:
            yield

    def _start_function(self, lower_start: Any) -> Callable | None:
        if self.start is not None:
            return lambda x: self.split(x)[1]
        return lower_start and self._at_upper_variables(lower_start)

    def _upper_projection(self, project: Callable) -> Callable:
        def at(x: list) -> Any:
            with self._scope(x):
                return structure.to_tensors(project(x))

        return at

    def _lower_projection(self, project: Callable) -> Callable:
        arguments = (self.upper,) if takes_two(project) else ()

        def at(x: list, y: list) -> Any:
            with self._scope(x):
                return structure.to_tensors(project(*arguments, y))

        return at

    def _reading(self, function: Callable, x: list, *others: Any) -> Any:
        if others:
            return self.at_variables(function)(x, *others)
        with self._scope(x):
            try:
                return structure.to_tensors(function(self.upper))
            except (TypeError, AttributeError, LookupError, ValueError) as error:
                raise ValueError(
                    "`learned_rate` is called with the upper model, like the losses "
                    "of a tb.BilevelModel, and no longer with a list of tensors; so "
                    "are `hyperparameters`. Read its `trainable_variables`, or call "
                    "it. Received: "
                    f"{type(error).__name__}: {error}"
                ) from error
