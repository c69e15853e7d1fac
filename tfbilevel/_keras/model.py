"""Bilevel training as a Keras model."""

import functools
from collections.abc import Callable
from typing import Any

import keras

from tfbilevel._check.example_indices import IndexWatch
from tfbilevel._core.arguments import require_choice
from tfbilevel._core.batches import Batches, require_batches
from tfbilevel._core.method import Method
from tfbilevel._keras import elements, fit_arguments
from tfbilevel._keras.arguments import (
    jit_of,
    losses_are_minimised,
    microbatches_of,
    require_measurable,
    require_method_for,
    require_no_weights,
    require_nothing_else,
    require_optimizers,
)
from tfbilevel._keras.levels import Levels
from tfbilevel._keras.replicas import strategies
from tfbilevel._keras.replicas.outer_step import outer_step
from tfbilevel._keras.saving import (
    arguments_of,
    compile_config_of,
    config_of,
    given,
    require_saved_as,
    require_serialisable,
)
from tfbilevel._keras.trained import Trained
from tfbilevel._keras.training_state import Carried, Progress, Trackers
from tfbilevel._optimizers.update_rule import optimizer_of

ON_NONFINITE = ("raise", "skip")


@keras.saving.register_keras_serializable("tfbilevel")
class BilevelModel(Trained):
    """Two Keras models trained on two levels, with Keras's `compile` and `fit`.

        min_x  f(x, y*(x))      with      y*(x) in argmin_y g(x, y)

    x are the trainable variables of `upper`, y those of `lower`. `evaluate` and
    `predict` use the lower model. `save_weights`, `ModelCheckpoint` and
    `BackupAndRestore` save the weights, both optimizers and the method's state: a run
    that is resumed at an epoch equals the uninterrupted one to the last bit, if it
    trains on arrays or its dataset yields the same elements in each epoch. `save`
    stores everything except Python functions and the method. Load it with
    keras.saving.load_model(path, custom_objects={"upper_loss": ..., "lower_loss": ...,
    "method": ...}), with all other functions that the model had. `export` writes the
    trained lower model for serving.

    Non-trainable state: within one outer step both losses are fixed functions, even if
    they sample. Every inner step sees the same dropout masks, unless it has a lower
    batch of its own (`lower_batches`). Updates of BatchNorm statistics or dropout seeds
    by these calls are dropped. After the step the lower loss is evaluated at the new
    variables to update them: seeds once, moving statistics of the lower model once for
    each step of the lower variables. (This is done only for models with such state; it
    costs one forward pass per inner step.)

    Tasks (`tasks=M`): the losses are those of one task, and every outer step uses M
    tasks, along a leading axis of all batches (`tb.over_tasks`). The lower model's
    weights are then never assigned: each task is solved separately, from `lower_start`
    or from the lower model's weights. `adapt` solves new tasks. Non-trainable state is
    updated with the first task's data.

    Args:
        upper: a built Keras layer or model.
        lower: a built Keras layer or model.
        upper_loss: (upper, lower, batch) -> scalar. It receives the models themselves
            and calls them as usual; they are evaluated at the right variables.
        lower_loss: (upper, lower, batch) -> scalar.
        project_upper: list of tensors -> list of tensors, in the order of
            `upper.trainable_variables`.
        project_lower: likewise for the lower model; or (upper model, list) -> list.
        lower_start: the start of inner solves. A function, upper model -> list of
            tensors; or "learned": the start is a second group of upper variables,
            initially the lower model's own weights (IAPTT-GM, ANIL's head). The upper
            variables are then the upper model's, followed by the start's, which a loss
            may read as `model.start.trainable_variables`.
        prepare: (upper model, batches) -> batches, once per outer step.
        tasks: M, number of tasks in an outer step; `None`: the problem has no tasks.
        mapping: how tasks are mapped, see `tb.over_tasks`.
        regularizers: "add": the sum of `lower.losses` (regularisers, `add_loss`) is
            added to the lower loss, and that of `upper.losses` to the upper loss, as in
            Keras's `fit`. Losses that a function adds itself are not added twice.
            "ignore": losses are used as returned.
        **keywords: arguments of `keras.Model`.

    Raises:
        ValueError: if a model is not built or has no trainable variables.

    Example:
        >>> weights = tb.ExampleWeights(6)
        >>> network = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        >>> def squared(network, batch):
        ...     return tf.square(network(batch[0])[:, 0] - batch[1])
        >>> model = tb.BilevelModel(
        ...     weights, network,
        ...     upper_loss=lambda upper, lower, batch: tf.reduce_mean(
        ...         squared(lower, batch)),
        ...     lower_loss=lambda upper, lower, batch: upper.mean(
        ...         squared(lower, batch)))
        >>> inner = tb.InnerSolver(keras.optimizers.SGD(0.1), steps=5)
        >>> model.compile(tb.Unroll(inner), keras.optimizers.Adam(0.1))
        >>> data = (tf.ones([6, 2]), tf.zeros([6]))
        >>> history = model.fit(tb.pair(data, data), epochs=2, verbose=0)
        >>> sorted(history.history)
        ['lower_loss', 'upper_loss']
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
        **keywords: Any,
    ):
        strategies.require_strategy()
        super().__init__(**keywords)
        functions = {
            "upper_loss": upper_loss,
            "lower_loss": lower_loss,
            "project_upper": project_upper,
            "project_lower": project_lower,
            "lower_start": lower_start,
            "prepare": prepare,
        }
        levels = self._levels = Levels(
            upper,
            lower,
            **functions,
            tasks=tasks,
            mapping=mapping,
            regularizers=regularizers,
        )
        self._functions = tuple(k for k, v in functions.items() if callable(v))
        strategies.require_models_within(self._distribute_strategy, upper, lower)
        self.upper, self.lower, self.start = upper, lower, levels.start
        self.problem = levels.problem
        self.tasks, self.regularizers = tasks, regularizers
        self.mapping = levels.mapping
        self._progress = Progress(levels)
        self._carried: Carried | None = None  # defined here, so that Keras saves it
        self._trackers = Trackers(levels.device)
        self._indices = IndexWatch(upper, lower)
        self.built = True

    def compile(
        self,
        method: Method,
        upper_optimizer: keras.optimizers.Optimizer | str,
        metrics: list | None = None,
        jit_compile: bool | str = "auto",
        steps_per_execution: int = 1,
        on_nonfinite: str = "raise",
        run_eagerly: bool = False,
        start_optimizer: keras.optimizers.Optimizer | str | None = None,
        weighted_metrics: list | None = None,
        microbatches: int | tuple[int, int] = 1,
    ) -> None:
        """Set the method, the optimizers, the metrics and the compilation.

        Args:
            method: a `tb.Method`.
            upper_optimizer: any Keras optimizer for the upper variables, or its name,
                such as "adam".
            metrics: Keras metrics of the lower model's predictions, for `evaluate`
                and `validation_data`.
            jit_compile: True: compile the step with XLA. False: do not. "auto": time
                steps both ways on the first batch (with its entries reordered and the
                results dropped) and keep the faster. The choice is saved with the
                weights, and kept if the same method is compiled again. Convolutions on
                a CPU, steps with very many operations and steps that take seconds run
                as a graph without a trial; if XLA fails, a warning gives the reason.
            steps_per_execution: outer steps per compiled call.
            on_nonfinite: "raise": stop with `tb.NonFiniteError` at the first NaN or
                infinity, with all variables as before that step. "skip": leave out such
                steps; the log entry `skipped` counts them per epoch.
            run_eagerly: run without compilation, for debugging.
            start_optimizer: a Keras optimizer for a learned start; `None`: the upper
                optimizer moves it too.
            weighted_metrics: like `metrics`, but weighted by the weights that the data
                of `evaluate` may have as a third part.
            microbatches: number of parts, or (upper, lower), in which both losses
                compute their batches, to save memory; see `tb.microbatched`.
        """
        require_choice(on_nonfinite, "on_nonfinite", ON_NONFINITE)
        require_method_for(method, self.tasks)
        jit_compile = jit_of(jit_compile, method)
        strategies.require_strategy()
        strategy = self._distribute_strategy
        if strategies.is_replicated(strategy):
            strategies.require_plain_steps(strategy, jit_compile, steps_per_execution)
            jit_compile = False
        microbatches = microbatches_of(microbatches)
        upper_optimizer = optimizer_of(upper_optimizer, "upper_optimizer")
        start_optimizer = optimizer_of(start_optimizer, "start_optimizer")
        require_optimizers(upper_optimizer, start_optimizer, self._levels)
        if not self.compiled or method is not self.method:
            self._progress.decide(None)
        super().compile(
            optimizer=upper_optimizer,
            metrics=metrics,
            weighted_metrics=weighted_metrics,
            auto_scale_loss=False,
            jit_compile=False,
            steps_per_execution=steps_per_execution,
            run_eagerly=run_eagerly,
        )
        self.method, self.microbatches = method, microbatches
        self.problem = self._levels.use_microbatches(*microbatches)
        self._auto_jit = jit_compile == "auto" and not run_eagerly
        self.jit_compile = jit_compile is True and not run_eagerly
        self.on_nonfinite = on_nonfinite
        if self._carried is not None:
            # Otherwise Keras would still save it beside the new one.
            self._tracker.untrack(self._carried)
            self._carried = None
        self.start_optimizer = start_optimizer
        self._outer = outer_step(
            strategy,
            self._levels,
            method,
            upper_optimizer,
            start_optimizer,
            self._progress,
            self._indices,
        )
        self._trackers = self._outer.trackers

    def _maybe_symbolic_build(self, iterator: Any = None, data_batch: Any = None):
        """Do nothing: the models are built already. Within a strategy, Keras would call
        the model on an outer step's batches to build it."""

    @property
    def metrics(self) -> list:
        compiled = [] if self._compile_metrics is None else [self._compile_metrics]
        return [*self._trackers.of.values(), *compiled]

    def get_metrics_result(self) -> dict[str, Any]:
        results = {name: metric.result() for name, metric in self._trackers.of.items()}
        if self._compile_metrics is not None and self._compile_metrics.built:
            results.update(self._compile_metrics.result())
        return results

    @property
    def outer_step(self) -> int:
        """The number of outer steps so far, including skipped ones."""
        return int(self._progress.step.numpy())

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        *arguments: Any,
        with_index: bool = False,
        lower_batches: int = 1,
        seed: int = 0,
        on_nonfinite: str | None = None,
        **keywords: Any,
    ) -> Any:
        """Train on arrays or on a dataset of `tb.Batches`, like `keras.Model.fit`.

            fit((x, y), validation_data=(x_val, y_val), batch_size=64)
            = fit(tb.pair((x_val, y_val), (x, y), batch_size=64))

        Args:
            x: the lower level's arrays, (x, y); or a `tf.data.Dataset` of `tb.Batches`,
                one per outer step (`tb.pair`), also one that is distributed already.
            y: the labels, if `x` holds the inputs alone.
            *arguments: arguments of `keras.Model.fit`.
            with_index: for arrays: lower batches are (x, y, index), with the example
                numbers for `tb.ExampleWeights`.
            lower_batches, seed: for arrays: those of `tb.pair`, and so are the batches.
            on_nonfinite: as in `compile`, from now on; `None`: unchanged.
            **keywords: arguments of `keras.Model.fit`. For arrays `validation_data` is
                the upper level's, and measured after each epoch too if `compile` got
                metrics; `batch_size` is a number, or (upper, lower), and 32 if it is
                not given (fewer if there are fewer examples). For a dataset,
                `validation_data` is a dataset of (inputs, labels) for the lower model,
                measured by `metrics`, or of `tb.Batches`: their losses at the current
                variables, without an inner solve, are `val_upper_loss` and
                `val_lower_loss`.

        Raises:
            ValueError: if `x` is neither arrays nor a dataset of `tb.Batches`; for
                arrays that `tb.pair` refuses, or without `validation_data`; if there
                are no metrics to measure `validation_data` by.
            tb.MissingSecondDerivativeError: if the method takes second derivatives of
                the lower loss that are missing or wrong in TensorFlow; no step is made.
            tb.NonFiniteError: at the first NaN or infinity, unless they are skipped.
        """
        given = fit_arguments.named(keras.Model.fit, x, y, *arguments, **keywords)
        self._assert_compile_called("fit")
        strategies.require_compiled_within(self._distribute_strategy)
        require_no_weights(given)
        x, given = fit_arguments.batches_of(
            given,
            with_index,
            lower_batches,
            seed,
            self.tasks,
            self._compile_metrics is not None,
        )
        elements.require_dataset_of_batches(x, self._distribute_strategy)
        if on_nonfinite is not None and on_nonfinite != self.on_nonfinite:
            require_choice(on_nonfinite, "on_nonfinite", ON_NONFINITE)
            self.on_nonfinite = on_nonfinite
            self.make_train_function(force=True)
        measured = given.get("validation_data")
        if measured is not None:  # checked now, before the first epoch is computed
            measured = getattr(measured, "element_spec", measured)
            require_measurable(measured, self._compile_metrics, self.tasks)
        require_serialisable(self, given.get("callbacks"))
        losses_are_minimised(given.get("callbacks"))
        like, aloud = elements.spec_of(x), given.get("verbose") not in (0, "0")
        self._ready(like, lambda: elements.first_of(x), announce=aloud)
        data, given = fit_arguments.from_the_outer_step(x, given, self)
        given["validation_data"] = self._outer.dealt(given.get("validation_data"))
        fit = functools.partial(super().fit, self._outer.dealt(data), **given)
        return self._outer.run(fit, x)

    def warm_up(self, x: Any) -> None:
        """Compile the outer step without training, so that `fit` starts at full speed.

        With jit_compile="auto" this chooses the compilation. One step is run, and all
        its assignments (variables, seeds, optimizers, metrics) are undone. Cost: the
        compilation, one step, and a copy of all variables on the host.

        Args:
            x: the dataset for `fit`, or the `tb.Batches` for `train_on_batch`; others
                of the same shapes and dtypes will do. Only the first element of a
                dataset is read.

        Raises:
            ValueError: if `x` is neither or is empty, or if called before `compile`.
            tb.MissingSecondDerivativeError, tb.NonFiniteError: as in `fit`.

        Example:
            >>> layer = keras.layers.Dense(1)
            >>> layer.build((None, 2))
            >>> def loss(weights, layer, batch):
            ...     return weights.mean(tf.square(layer(batch))[:, 0])
            >>> model = tb.BilevelModel(tb.ExampleWeights(4), layer, loss, loss)
            >>> inner = tb.InnerSolver(keras.optimizers.SGD(0.1), steps=5)
            >>> model.compile(tb.Unroll(inner), keras.optimizers.Adam(0.1))
            >>> data = tf.data.Dataset.from_tensors(tf.ones([4, 2]))
            >>> model.warm_up(tb.pair(data, data))
            >>> model.outer_step
            0
        """
        self._assert_compile_called("warm_up")
        if isinstance(x, Batches):
            x = elements.tensors(x)
            data, like, first = self._outer.dealt_once(x), x, lambda: x
        else:
            elements.require_dataset_of_batches(x, self._distribute_strategy)
            data, like = self._outer.dealt(elements.one_of(x)), elements.spec_of(x)
            first = functools.partial(elements.first_of, x)
        early = self._outer.early
        self._ready(like, first)
        try:
            with elements.not_empty(x), self._outer.restoring(self.variables):
                self._outer.run(lambda: self.train_function(iter(data)), x)
        finally:
            self._outer.early = early

    def train_on_batch(
        self, x: Any, *arguments: Any, return_dict: bool = False, **keywords: Any
    ) -> Any:
        """Make one outer step on a `tb.Batches`, for your own training loop.

        Args:
            x: the batches of one outer step.
            return_dict: return the metrics by name instead of as a list.

        Raises:
            ValueError: if `x` is not a `tb.Batches`, or any other argument is given
                (such as weights, which belong in your losses).
            tb.NonFiniteError: at NaN or infinity, unless they are skipped.
        """
        require_batches(x, "`x`")
        require_nothing_else(arguments, keywords)
        self._assert_compile_called("train_on_batch")
        x = elements.tensors(x)
        self._ready(x, lambda: x)
        self.reset_metrics()
        self._outer.reads.start()
        logs = self.train_function(self._outer.dealt_once(x))
        logs = {name: float(value) for name, value in logs.items()}
        return logs if return_dict else [logs[name] for name in sorted(logs)]

    def save(self, filepath: Any, *arguments: Any, **keywords: Any) -> None:
        require_saved_as(filepath)
        self._require_finite()
        super().save(filepath, *arguments, **keywords)

    def get_config(self) -> dict[str, Any]:
        """The arguments that `save` stores: all except functions."""
        return {**super().get_config(), **config_of(self, self._functions)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "BilevelModel":
        return cls(**arguments_of(config))

    def get_compile_config(self) -> dict[str, Any]:
        """The arguments of `compile` that `save` stores: all except the method."""
        known = super().get_compile_config()
        if not known:
            return {}
        self._ensure_carried()  # loading a compiled model reads it from the file
        jit_compile = "auto" if self._auto_jit else self.jit_compile
        return compile_config_of(self, known) | {"jit_compile": jit_compile}

    def compile_from_config(self, config: dict[str, Any]) -> None:
        method = given(["method"], "the method (or pass compile=False)")
        self.compile(**method, **keras.saving.deserialize_keras_object(config))
        self._ensure_carried()  # so that its values are loaded from the file

    def make_train_function(self, force: bool = False) -> None:
        if self.train_function is not None and not force:
            return
        super().make_train_function(force)
        compiled = self.train_function

        def checked(iterator: Any) -> Any:
            return self._outer.call(compiled, iterator, self.steps_per_execution)

        self.train_function = checked

    def train_step(self, data: Batches) -> dict[str, Any]:
        """Make one outer step; variables are assigned nowhere else."""
        return self._outer.make(data, self.on_nonfinite == "skip")

    def get_weights(self) -> list:
        """All variables' values, as `save_weights` stores them, for `set_weights`."""
        self._require_finite()
        self._ensure_carried()
        return super().get_weights()

    def set_weights(self, weights: list) -> None:
        """Set what `get_weights` returned, on a model built and compiled alike."""
        self._ensure_carried()
        super().set_weights(weights)
        self._use_saved_compilation()

    def load_weights(self, filepath: Any, *arguments: Any, **keywords: Any) -> None:
        self._ensure_carried()
        super().load_weights(filepath, *arguments, **keywords)
        self._use_saved_compilation()

    def save_weights(self, filepath: Any, *arguments: Any, **keywords: Any) -> None:
        self._require_finite()
        self._ensure_carried()
        super().save_weights(filepath, *arguments, **keywords)

    def _ready(self, like: Batches, first: Callable, announce: bool = False) -> None:
        """Everything needed before the first outer step; no variable is changed.

        Args:
            like: batches of one outer step, or their specifications.
            first: () -> the batches of the first outer step.
            announce: print a message if a trial of XLA takes long.
        """
        self._outer.look(like, self.run_eagerly)
        self._ensure_carried()
        self._use_saved_compilation()
        if self._auto_jit and self._progress.xla is None:
            self._use_compilation(self._outer.faster_with_xla(first(), announce))
        self.make_train_function()

    def _ensure_carried(self) -> None:
        if self.compiled:
            self._carried = self._outer.ensure_carried()

    def _use_saved_compilation(self) -> None:
        if self.compiled and self._auto_jit:
            self._use_compilation(self._progress.xla)

    def _use_compilation(self, xla: bool | None) -> None:
        if xla is not None:
            if self.jit_compile != xla:
                self.jit_compile = xla  # Keras does not allow XLA for some layers
                self.make_train_function(force=True)
            self._progress.decide(self.jit_compile)
