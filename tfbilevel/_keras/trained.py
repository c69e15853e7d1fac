"""What a BilevelModel is for others than its training: its two trained models."""

from collections.abc import Callable
from typing import Any

import keras

from tfbilevel._calculus import structure
from tfbilevel._core.batches import Batches, count_tasks
from tfbilevel._core.inner_solver import InnerSolver
from tfbilevel._core.parts import Part
from tfbilevel._keras.arguments import (
    require_labels,
    require_measurable,
    require_servable,
)
from tfbilevel._keras.levels import Levels
from tfbilevel._keras.outer_step import OuterStep
from tfbilevel._keras.replicas.stepping import stepping
from tfbilevel._keras.replicas.strategies import is_replicated
from tfbilevel._keras.summary import print_level
from tfbilevel._tasks.adapt import adapted, require_adaptable


class Trained(keras.Model):
    """The public methods of `BilevelModel` that use the models without training them.

    Attributes:
        upper, lower: the two models.
        start: the variables of a learned start; `None` without one.
        tasks: the number of tasks; `None`: the problem is not over tasks.
    """

    upper: Any
    lower: Any
    start: Any
    tasks: int | None
    problem: Any
    _levels: Levels
    _outer: OuterStep

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return self.lower(inputs, training=training)

    @property
    def upper_variables(self) -> list:
        """x: the upper model's trainable variables, then those of a learned start."""
        return self._levels.upper_variables

    def summary(
        self,
        line_length: int | None = None,
        positions: list | None = None,
        print_fn: Callable | None = None,
        **keywords: Any,
    ) -> None:
        """Print the variables of both levels, then Keras's summary of each model.

        (A picture: `keras.utils.plot_model(model.lower)`.)

        Args:
            line_length, positions, print_fn: as in Keras.
            **keywords: other arguments of `keras.Model.summary`, for both models.
        """
        keywords.update(line_length=line_length, positions=positions, print_fn=print_fn)
        print_level("Upper level (x)", self.upper, keywords)
        if self.start is not None:
            print_level("Upper level (x), learned start", self.start, keywords)
        print_level("Lower level (y)", self.lower, keywords)

    def export(self, filepath: Any, *arguments: Any, **keywords: Any) -> None:
        """Write the trained lower model for serving, as `model.lower.export` does.

        The artifact predicts what `predict` does. The upper model, the losses and the
        method are only needed in training and are not in it; `save` keeps them.

        Args:
            filepath: the folder, or the file, to write.
            *arguments, **keywords: those of `keras.Model.export`.

        Raises:
            ValueError: if `lower` is a layer and not a model; for tasks, because the
                lower model then holds no task's solution. Nothing is written.
        """
        require_servable(self.lower, self.tasks, filepath)
        self.lower.export(filepath, *arguments, **keywords)

    def adapt(self, batches: Batches, inner: InnerSolver, function: Callable) -> Any:
        """The function's result for each task after an inner solve on its lower batch.

        Args:
            batches: any number of tasks along the leading axis.
            inner: the inner solver; its steps and rate may differ from training's.
            function: (upper model, lower model, prepared batches of the task) -> nest
                of tensors, called with the lower model at the task's solution.

        Returns:
            The nest, with the tasks along a leading axis.

        Raises:
            ValueError: if the model was built without `tasks`, or an argument is of
                the wrong kind.
        """
        require_adaptable(self.tasks, batches, inner, function)
        # Variables in the results must be read while they hold the task's values.
        at = self._levels.at_variables(
            lambda *task: structure.to_tensors(function(*task))
        )
        x, y = self._levels.read(count_tasks(batches))
        return adapted(self.problem, x, y, batches, inner, at)

    def _require_finite(self) -> None:
        """Raise what a step recorded that the host has not read yet: nothing is saved
        of a training that must stop."""
        if self.compiled:
            self._outer.check({})

    def _make_function(self, step_function: Callable) -> Callable:
        if not is_replicated(self._distribute_strategy):
            return super()._make_function(step_function)
        alike = self.tasks is None  # tasks meet in one collective, of known shape
        strategy = self._distribute_strategy
        step = stepping(step_function, strategy, self.run_eagerly, alike)
        return lambda iterator: self._of_all_replicas(step(iterator))

    def _of_all_replicas(self, logs: dict[str, Any]) -> dict[str, Any]:
        """The logs, with Keras's metrics, of which each replica has a part, whole."""
        metrics = self._compile_metrics
        whole = metrics.result() if metrics is not None and metrics.built else {}
        return {name: whole.get(name, value) for name, value in logs.items()}

    def evaluate(self, x: Any = None, *arguments: Any, **keywords: Any) -> Any:
        if is_replicated(self._distribute_strategy):
            self._assert_compile_called("evaluate")
            x = self._outer.dealt(x)
        return super().evaluate(x, *arguments, **keywords)

    def test_step(self, data: Any) -> dict[str, Any]:
        batches = data.batches if isinstance(data, Part) else data
        require_measurable(batches, self._compile_metrics, self.tasks)
        if isinstance(batches, Batches):
            return self._outer.measure(data)
        inputs, labels, weights = keras.utils.unpack_x_y_sample_weight(data)
        require_labels(labels)
        predictions = self(inputs, training=False)
        assert self._compile_metrics is not None
        self._compile_metrics.update_state(labels, predictions, sample_weight=weights)
        return self._compile_metrics.result()
