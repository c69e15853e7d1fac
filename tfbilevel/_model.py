"""Bilevel training as a Keras model."""

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from tfbilevel import _structure as structure
from tfbilevel._arguments import (
    require_callable,
    require_choice,
    require_count,
    takes_two,
)
from tfbilevel._batches import (
    Batches,
    apart,
    count_tasks,
    first_task,
    require_batches,
)
from tfbilevel._compilation import faster_with_xla
from tfbilevel._derivatives import UnconnectedGradientError
from tfbilevel._differentiable import optimizer_of
from tfbilevel._finite import (
    UPPER_VARIABLES,
    NonFiniteError,
    first_nonfinite,
    warn_diverged,
)
from tfbilevel._fixed_state import moved_on
from tfbilevel._functional import require_built
from tfbilevel._indices import ExampleWeightsError, IndexWatch, explain
from tfbilevel._inner import InnerSolver, require_inner
from tfbilevel._look import require_second_derivatives
from tfbilevel._lost_derivatives import MissingSecondDerivativeError
from tfbilevel._method import Method
from tfbilevel._model_arguments import (
    losses_are_minimised,
    require_apart,
    require_dataset_of_batches,
    require_jit,
    require_method_for,
    require_metrics,
    require_no_average,
    require_no_constraints,
    require_no_weights,
    require_one_replica,
    require_start_optimizer,
    require_upper_optimizer,
)
from tfbilevel._over_tasks import over_tasks
from tfbilevel._problem import Problem
from tfbilevel._random_operations import fixed_randomness
from tfbilevel._randomness import LOWER_LOSS, ROLE, as_seed, folded
from tfbilevel._regularizers import CHOICES as REGULARIZERS
from tfbilevel._regularizers import with_own_losses
from tfbilevel._resident import Resident
from tfbilevel._saved_model import (
    arguments_of,
    config_of,
    given,
    require_saved_as,
    require_serialisable,
    require_unshared,
)
from tfbilevel._training_state import (
    GRAPH,
    SKIPPED,
    UNDECIDED,
    XLA,
    Carried,
    Progress,
    Start,
    Trackers,
    random_states,
)
from tfbilevel._workarounds import functions_inline
from tfbilevel._workarounds.memory_optimizer import without_memory_rewrites

HOST = "CPU:0"  # the end of its name as a device; tf.data's elements are there
ON_NONFINITE = ("raise", "skip")
SAVED_SETTINGS = ("metrics", "weighted_metrics", "steps_per_execution", "run_eagerly")


@keras.saving.register_keras_serializable("tfbilevel")
class BilevelModel(keras.Model):
    """Two Keras models trained on two levels, with `compile` and `fit` as always.

        min_x  f(x, y*(x))      with      y*(x) in argmin_y g(x, y)

    x are the trainable variables of `upper`, y those of `lower`. `evaluate` and
    `predict` are of the lower model. Weights, both optimizers and the method's state
    are saved by `save_weights`, `ModelCheckpoint` and `BackupAndRestore`: a run
    resumed at an epoch equals the uninterrupted one to the last bit, provided that
    the dataset yields the same elements in each epoch. `save` keeps everything but
    Python: load it with keras.saving.load_model(path, custom_objects={"upper_loss":
    ..., "lower_loss": ..., "method": ...}), and whatever other functions it had.

    Non-trainable state: within one outer step both losses are fixed functions,
    whatever they sample by; every inner step sees the same masks, unless it has a
    lower batch of its own (`lower_batches`). Whatever a call would write to BatchNorm
    statistics or dropout seeds is dropped, so nothing leaks into the losses. After
    the step the lower loss is evaluated at the new variables: seeds advance once, and
    moving statistics of the lower model as often as the lower variables moved (only
    for models that have such state; it costs one forward pass per inner step).

    Tasks (`tasks=M`): the losses are those of one task, and every outer step sees M of
    them, along a leading axis of all batches (`tb.over_tasks`). The lower model's
    weights are then never assigned: each task solves for its own, from `lower_start`,
    or from the lower model's weights as they are. `adapt` solves new tasks.
    Non-trainable state is advanced by the first task's data.

    Args:
        upper: a built Keras layer or model.
        lower: a built Keras layer or model.
        upper_loss: (upper, lower, batch) -> scalar; the models themselves, called as
            always, evaluated at the right variables.
        lower_loss: (upper, lower, batch) -> scalar.
        project_upper: list of tensors -> list of tensors, in the order of
            `upper.trainable_variables`.
        project_lower: likewise for the lower model; or (upper model, list) -> list.
        lower_start: where inner solves start. A function, upper model -> list of
            tensors; or "learned": the start is a second group of upper variables, at
            first the lower model's own weights (IAPTT-GM, ANIL's head). The upper
            variables are then the upper model's, followed by the start's, which a loss
            may read as `model.start.trainable_variables`.
        prepare: (upper model, batches) -> batches, once per outer step.
        tasks: M, how many tasks share an outer step; `None`: the problem has none.
        mapping: how tasks are mapped, see `tb.over_tasks`.
        regularizers: "add": the sum of `lower.losses` (regularisers, `add_loss`)
            counts in the lower loss, that of `upper.losses` in the upper loss, as in
            Keras's `fit`; a loss that adds them itself is noticed. "ignore": losses
            are as they are returned.
        **keywords: of `keras.Model`.

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
        >>> data = tf.data.Dataset.from_tensors((tf.ones([6, 2]), tf.zeros([6])))
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
        super().__init__(**keywords)
        require_choice(regularizers, "regularizers", REGULARIZERS)
        if tasks is not None:
            require_count(tasks, "tasks")
        # Here: the problem is given functions around them.
        require_callable(upper_loss, "upper_loss")
        require_callable(lower_loss, "lower_loss")
        if prepare is not None:
            require_callable(prepare, "prepare")
        self.tasks = tasks
        require_built(upper, "upper")
        require_built(lower, "lower")
        require_no_constraints(lower)
        require_apart(upper, lower)
        self.upper = upper
        self.lower = lower
        self.mapping = mapping
        self.regularizers = regularizers
        functions = {
            "upper_loss": upper_loss,
            "lower_loss": lower_loss,
            "project_upper": project_upper,
            "project_lower": project_lower,
            "lower_start": lower_start if callable(lower_start) else None,
            "prepare": prepare,
        }
        self._functions = tuple(k for k, v in functions.items() if v is not None)
        self._lower_loss, self._prepare = lower_loss, prepare
        self.start: Start | None = None
        if isinstance(lower_start, str):
            require_choice(lower_start, "lower_start", ("learned",))
            with tf.device(lower.trainable_variables[0].value.device):
                self.start = Start(lower)
        elif lower_start is not None:
            require_callable(lower_start, "lower_start")
        self.problem = Problem(
            upper_loss=self._at_variables(upper_loss, self.upper),
            lower_loss=self._at_variables(lower_loss, self.lower),
            lower_start=self._start_function(lower_start),
            project_upper=project_upper and self._upper_projection(project_upper),
            project_lower=project_lower and self._lower_projection(project_lower),
            prepare=prepare and self._at_upper_variables(prepare),
            reads=self._rate,
        )
        if tasks is not None:
            self.problem = over_tasks(self.problem, mapping)
            self.mapping = self.problem.mapping  # by its present name
        with tf.device(self._device):
            self._progress = Progress(random_states(upper, lower), name="progress")
        self._carried: Carried | None = None
        self._trackers = Trackers(self._device)
        self._indices = IndexWatch(upper, lower)
        self._resident: Resident | None = None  # while `fit` runs
        self.built = True

    # The user's functions take models; the problem's take tensors.

    def _at_variables(self, function: Callable, penalised: Any = None) -> Callable:
        """The function at given variables, with the losses that a model has itself."""
        if self.regularizers == "ignore":
            penalised = None

        def at(x: list, y: list, batch: Any) -> Any:
            upper, _ = self._variables()
            values = [
                *zip(upper, x, strict=True),
                *zip(self.lower.trainable_variables, y, strict=True),
            ]
            scope = keras.StatelessScope(values, collect_losses=True)
            with functions_inline([v for v, _ in values]), scope:

                def value() -> Any:
                    return function(self.upper, self.lower, batch)

                if penalised is None:
                    return value()
                return with_own_losses(value, penalised, scope)

        return at

    def _at_upper_variables(self, function: Callable) -> Callable:
        def at(x: list, *arguments: Any) -> Any:
            with self._scope(x):
                made = function(self.upper, *arguments)
                return made if arguments else structure.to_tensors(list(made))

        return at

    @contextlib.contextmanager
    def _scope(self, x: list) -> Iterator[None]:
        """In it the upper variables are x, whoever reads them."""
        variables = self.upper_variables
        scope = keras.StatelessScope(list(zip(variables, x, strict=True)))
        with functions_inline(variables), scope:
            yield

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

    def _rate(self, rate: Callable, x: list) -> Any:
        with self._scope(x):
            try:
                return structure.to_tensors(rate(self.upper))
            except (TypeError, AttributeError, LookupError, ValueError) as error:
                raise ValueError(
                    "`learning_rate` is called with the upper model, as the losses of "
                    "a tb.BilevelModel are, and no longer with a list of tensors. Read "
                    "its `trainable_variables`, or call it. Received: "
                    f"{type(error).__name__}: {error}"
                ) from error

    def _start_function(self, lower_start: Any) -> Callable | None:
        if self.start is not None:
            return lambda x: self._split(x)[1]
        return lower_start and self._at_upper_variables(lower_start)

    def _split(self, x: list) -> tuple[list, list]:
        """The upper model's own variables, and the learned start's."""
        own = len(self.upper.trainable_variables)
        return list(x[:own]), list(x[own:])

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
    ) -> None:
        """Choose how to train.

        Args:
            method: a `tb.Method`.
            upper_optimizer: a Keras optimizer for the upper variables, any of them;
                or its name, such as "adam".
            metrics: Keras metrics of the lower model's predictions, for `evaluate`
                and `validation_data`.
            jit_compile: True: compile the step with XLA. False: do not. "auto": time
                steps each way on the first batch, its values turned, discard their
                results, keep the faster; the choice is saved with the weights and
                stays where the same method is compiled again. Convolutions on a CPU,
                steps of very many operations and steps of seconds are left to the
                graph without a trial; where XLA fails, a warning says why.
            steps_per_execution: outer steps per compiled call.
            on_nonfinite: "raise": stop with `tb.NonFiniteError` at the first NaN or
                infinity, all variables as before that step. "skip": pass over such
                steps; the log entry `skipped` counts those of the epoch.
            run_eagerly: run without compilation, for debugging.
            start_optimizer: a Keras optimizer for a learned start; `None`: the upper
                optimizer moves it too.
            weighted_metrics: like `metrics`, which are of all examples alike; these
                take the weights that the data of `evaluate` may have for a third part.
        """
        require_choice(on_nonfinite, "on_nonfinite", ON_NONFINITE)
        require_jit(jit_compile)
        require_method_for(method, self.tasks)
        require_one_replica()
        upper_optimizer = optimizer_of(upper_optimizer, "upper_optimizer")
        start_optimizer = optimizer_of(start_optimizer, "start_optimizer")
        learned = self.start is not None
        require_upper_optimizer(upper_optimizer, learned)
        if self.problem.project_upper is not None:
            require_no_average(upper_optimizer, "with `project_upper`")
        if any(v.constraint is not None for v in self.upper.trainable_variables):
            require_no_average(upper_optimizer, "with constraints of upper variables")
        if start_optimizer is not None:
            require_start_optimizer(start_optimizer, upper_optimizer, learned)
        if not self.compiled or method is not self.method:
            self._progress.compilation.assign(UNDECIDED)
        super().compile(
            optimizer=upper_optimizer,
            metrics=metrics,
            weighted_metrics=weighted_metrics,
            auto_scale_loss=False,
            jit_compile=False,
            steps_per_execution=steps_per_execution,
            run_eagerly=run_eagerly,
        )
        self.method = method
        self._auto_jit = jit_compile == "auto" and not run_eagerly
        self.jit_compile = jit_compile is True and not run_eagerly
        self.on_nonfinite = on_nonfinite
        if self._carried is not None:
            # Else Keras would go on saving it beside the new one.
            self._tracker.untrack(self._carried)
            self._carried = None
        self._trackers = Trackers(self._device)
        self.start_optimizer = start_optimizer
        self._warned = False
        self._looked = False
        upper, _ = self._variables()
        with tf.device(self._device):
            if start_optimizer is None:
                upper_optimizer.build(upper)
            else:
                own, start = self._split(upper)
                upper_optimizer.build(own)
                start_optimizer.build(start)

    def _maybe_symbolic_build(self, iterator: Any = None, data_batch: Any = None):
        """Within a strategy Keras would call the model on an outer step's batches, to
        build what is built."""

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return self.lower(inputs, training=training)

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
    def upper_variables(self) -> list:
        """x: the upper model's trainable variables, then those of a learned start."""
        return self._variables()[0]

    @property
    def outer_step(self) -> int:
        """How many outer steps were made, skipped ones included."""
        return int(self._progress.step.numpy())

    def fit(
        self,
        x: Any = None,
        *arguments: Any,
        on_nonfinite: str | None = None,
        **keywords: Any,
    ) -> Any:
        """Train on a dataset of `tb.Batches`; everything else as `keras.Model.fit`.

        Args:
            x: a `tf.data.Dataset` of `tb.Batches`, one per outer step.
            *arguments: of `keras.Model.fit`.
            on_nonfinite: as in `compile`, from here on; `None`: as it is.
            **keywords: of `keras.Model.fit`; `validation_data` is a dataset of
                (inputs, labels) for the lower model, measured by `metrics`, or of
                `tb.Batches`: their losses at the variables as they are, without an
                inner solve, are `val_upper_loss` and `val_lower_loss`.

        Raises:
            ValueError: if `x` is not a dataset of `tb.Batches`, or there are no
                metrics to measure `validation_data` by.
            tb.MissingSecondDerivativeError: if the method takes second derivatives of
                the lower loss that TensorFlow has wrong or not at all; nothing was
                done then.
            tb.NonFiniteError: at the first NaN or infinity, unless they are skipped.
        """
        require_dataset_of_batches(x)
        self._assert_compile_called("fit")
        require_no_weights(keywords)
        if on_nonfinite is not None and on_nonfinite != self.on_nonfinite:
            require_choice(on_nonfinite, "on_nonfinite", ON_NONFINITE)
            self.on_nonfinite = on_nonfinite
            self.make_train_function(force=True)
        measured = keywords.get("validation_data")
        if measured is not None:  # else an epoch would be lost before this is said
            self._require_measurable(getattr(measured, "element_spec", measured))
        empty = ValueError(
            "`x` must not be empty: there is no outer step to make. "
            "Received: a dataset of 0 elements"
        )
        if int(x.cardinality()) == 0:
            raise empty
        self._look(x.element_spec)
        self._ensure_carried()
        callbacks = keywords.get("callbacks")
        require_serialisable(self, callbacks)
        losses_are_minimised(callbacks)
        self._use_saved_compilation()
        if self._undecided:
            first = next(iter(x), None)  # an unknown cardinality may be zero
            if first is None:
                raise empty
            verbose = (*arguments, None, None, None, "auto")[3]
            silent = keywords.get("verbose", verbose) in (0, "0")
            self._choose_compilation(first, announce=not silent)
        keywords.setdefault("shuffle", False)
        if not self._device.endswith(HOST):
            self._resident = Resident(self._device)
        try:
            return super().fit(x, *arguments, **keywords)
        except tf.errors.InvalidArgumentError:
            if self._indices.layers:
                upper, lower = structure.to_tensors(self._variables())
                explain(self.problem, upper, lower, x)
            raise
        except (NonFiniteError, ExampleWeightsError, KeyboardInterrupt) as error:
            # The frames it came through, and a cycle of Keras's, hold the dataset's
            # iterator. Deleting one that waits for a Python generator never ends once
            # Python shuts down: the generator's thread can enter Python no more.
            error = error.with_traceback(None)
            gc.collect()
            raise error from None
        finally:
            self._resident = None

    @property
    def _undecided(self) -> bool:
        chosen = int(self._progress.compilation.numpy())
        return self._auto_jit and chosen == UNDECIDED

    def train_on_batch(
        self, x: Any, *arguments: Any, return_dict: bool = False, **keywords: Any
    ) -> Any:
        """One outer step on a `tb.Batches`, for a loop of your own.

        Args:
            x: the batches of one outer step.
            return_dict: return the metrics by name, not as a list.

        Raises:
            ValueError: if `x` is not a `tb.Batches`, or anything else is given: the
                losses are yours.
            tb.NonFiniteError: at NaN or infinity, unless they are skipped.
        """
        require_batches(x, "`x`")
        if arguments or any(value is not None for value in keywords.values()):
            raise ValueError(
                "`train_on_batch` takes a tb.Batches and nothing else. Put labels and "
                f"weights into it. Received: {arguments or keywords}"
            )
        self._assert_compile_called("train_on_batch")
        x = tf.nest.map_structure(
            lambda leaf: (
                leaf if leaf is None or tf.is_tensor(leaf) else tf.constant(leaf)
            ),
            x,
        )
        self._look(x)
        self._ensure_carried()
        self._use_saved_compilation()
        if self._undecided:
            self._choose_compilation(x)
        self.make_train_function()
        self.reset_metrics()
        logs = self.train_function(iter([x]))
        logs = {name: float(value) for name, value in logs.items()}
        return logs if return_dict else [logs[name] for name in sorted(logs)]

    def save(self, filepath: Any, *arguments: Any, **keywords: Any) -> None:
        require_saved_as(filepath)
        super().save(filepath, *arguments, **keywords)

    def export(self, filepath: Any, *arguments: Any, **keywords: Any) -> None:
        """Refused: what serves is the trained network.

        Raises:
            ValueError: always, before anything is written.
        """
        del arguments, keywords
        raise ValueError(
            "A tb.BilevelModel is trained, not served: its losses and method are "
            "Python. Export the network it trained, model.lower.export(filepath), or "
            f"model.upper.export(filepath). Received: filepath={filepath!r}"
        )

    def get_config(self) -> dict[str, Any]:
        """What `save` keeps of the arguments: all but functions."""
        require_unshared(self.upper, self.lower)
        models = {"upper": self.upper, "lower": self.lower}
        learned = {} if self.start is None else {"lower_start": "learned"}
        return {
            **super().get_config(),
            **config_of(models, self._functions),
            **learned,
            "tasks": self.tasks,
            "mapping": self.mapping,
            "regularizers": self.regularizers,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "BilevelModel":
        return cls(**arguments_of(config, ("upper", "lower")))

    def get_compile_config(self) -> dict[str, Any]:
        """What `save` keeps of `compile`'s arguments: all but the method."""
        known = super().get_compile_config()
        if not known:
            return {}
        self._ensure_carried()  # loading a compiled model asks the file for it
        serialize = keras.saving.serialize_keras_object
        return {
            "upper_optimizer": serialize(self.optimizer),
            **{name: known[name] for name in SAVED_SETTINGS},
            "jit_compile": "auto" if self._auto_jit else self.jit_compile,
            "on_nonfinite": self.on_nonfinite,
            "start_optimizer": serialize(self.start_optimizer),
        }

    def compile_from_config(self, config: dict[str, Any]) -> None:
        method = given(["method"], "the method (or pass compile=False)")
        settings = keras.saving.deserialize_keras_object(config)
        self.compile(**method, **settings)
        self._ensure_carried()  # so that what the file holds of it is loaded

    def make_train_function(self, force: bool = False) -> None:
        if self.train_function is not None and not force:
            return
        super().make_train_function(force)
        compiled = self.train_function

        def checked(iterator: Any) -> Any:
            if self._resident is not None:
                iterator = self._resident.read(iterator, self.steps_per_execution)
            with self._placed(), without_memory_rewrites():
                logs = compiled(iterator)
            try:
                if self.on_nonfinite == "raise":
                    self._progress.raise_if_nonfinite()
            finally:  # nothing that may be passed over, and nearer to the cause
                self._indices.raise_if_noted()
            if not self._warned and float(logs.get("diverged", 0.0)) > 0:
                self._warned = True
                warn_diverged(self.method)
            return logs

        self.train_function = checked

    def train_step(self, data: Batches) -> dict[str, Any]:
        """One outer step; the only place where variables are assigned."""
        x, y, state = self._read()
        try:
            problem = self.problem_at(self._progress.step.value)
            step = problem.step(self.method, x, y, data, state)
        except UnconnectedGradientError as error:
            level = self._variables()[0 if error.level == "upper" else 1]
            path = level[error.index].path
            raise UnconnectedGradientError(
                error.level, error.index, repr(path), error.source
            ) from None
        code = tf.cast(first_nonfinite(step), tf.int64)
        latched = self._progress.bad_code.value
        proceed = code < 0
        if self.on_nonfinite == "raise":
            proceed = proceed & (latched < 0)

        committed = tf.cond(
            proceed,
            lambda: self._commit(step, data),
            lambda: self._refuse(tf.where(latched < 0, code, latched), data),
        )
        logs = dict(step.metrics)
        if self.on_nonfinite == "skip":
            logs[SKIPPED] = tf.cast(~committed, tf.float32)
        for name, tracker in self._trackers.named(logs).items():
            kept = name == SKIPPED or committed
            value = tf.reduce_mean(tf.cast(logs[name], tf.float32))
            weight = tf.cast(kept, tf.float32)
            tracker.update_state(tf.where(kept, value, 0.0), sample_weight=weight)
        return {name: self._trackers.of[name].result() for name in logs}

    def adapt(self, batches: Batches, inner: InnerSolver, function: Callable) -> Any:
        """What a function gives for each task after an inner solve on its lower batch.

        Args:
            batches: any number of tasks along the leading axis.
            inner: the inner solver; its steps and rate may differ from training's.
            function: (upper model, lower model, batches of the task, prepared) -> nest
                of tensors, called with the lower model at the task's solution.

        Returns:
            The nest, with the tasks along a leading axis.

        Raises:
            ValueError: if the model was built without `tasks`, or an argument is not
                of its kind.
        """
        require_batches(batches)
        require_inner(inner)
        require_callable(function, "function")
        if self.tasks is None:
            raise ValueError(
                "`adapt` solves tasks. Build the model with tb.BilevelModel(..., "
                "tasks=M), or use evaluate and predict. Received: tasks=None"
            )
        x, y, _ = self._read(count_tasks(batches), state=False)
        if self.problem.prepare is not None:
            batches = self.problem.prepare(x, batches)
        problem = self.problem.prepared_before()
        state = inner.init(problem, x, y)
        y, _, _ = inner.solve(problem.prepared(x, batches), y, state)

        def one(task: Any) -> Any:
            lower, upper_batch, lower_batch = task
            return at(x, lower, type(batches)(upper_batch, lower_batch))

        # Variables among the results must be read while they hold the task's values.
        at = self._at_variables(lambda *task: structure.to_tensors(function(*task)))
        return self.problem.each(one, y, *apart(batches))

    def test_step(self, data: Any) -> dict[str, Any]:
        self._require_measurable(data)
        if isinstance(data, Batches):
            return self._losses_at_rest(data)
        inputs, labels, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        predictions = self(inputs, training=False)
        assert self._compile_metrics is not None
        self._compile_metrics.update_state(
            labels, predictions, sample_weight=sample_weight
        )
        return self._compile_metrics.result()

    def _losses_at_rest(self, data: Batches) -> dict[str, Any]:
        """The losses at the variables as they are, of batches with a lower part both;
        means over the batches so far."""
        x, y, _ = self._read(state=False)
        here = self.problem.prepared(x, data)
        losses = {"upper_loss": here.upper_loss(y)}
        if any(leaf is not None for leaf in tf.nest.flatten(data.lower)):
            losses["lower_loss"] = here.lower_loss(y)
        for name, tracker in self._trackers.named(losses).items():
            tracker.update_state(tf.cast(losses[name], tf.float32))
        return {name: self._trackers.of[name].result() for name in losses}

    def _require_measurable(self, data: Any) -> None:
        """Raise unless data of this kind can be evaluated."""
        if not isinstance(data, Batches):
            require_metrics(self._compile_metrics)
        elif self.tasks is not None:
            raise ValueError(
                "`evaluate` and `validation_data` take no tb.Batches over tasks: the "
                "lower model holds the solution of none of them. Solve them by "
                f"model.adapt, in a callback say. Received: tasks={self.tasks}"
            )

    def load_weights(self, filepath: Any, *arguments: Any, **keywords: Any) -> None:
        if self.compiled:
            self._ensure_carried()
        super().load_weights(filepath, *arguments, **keywords)
        self._use_saved_compilation()

    def save_weights(self, filepath: Any, *arguments: Any, **keywords: Any) -> None:
        if self.compiled:
            self._ensure_carried()
        super().save_weights(filepath, *arguments, **keywords)

    def problem_at(self, step: Any) -> Problem:
        """The problem with what its functions sample at an outer step."""
        base = tf.cast(self._progress.base.state.value[0], tf.int32)
        return dataclasses.replace(self.problem, seed=base).seeded(step)

    def _variables(self) -> tuple[list, list]:
        start = [] if self.start is None else self.start.trainable_variables
        upper = [*self.upper.trainable_variables, *start]
        return upper, self.lower.trainable_variables

    @property
    def _device(self) -> str:
        """Where the variables are: all others are made there too."""
        return self.lower.trainable_variables[0].value.device

    def _placed(self) -> Any:
        """XLA compiles for the device of the scope, whatever scope the user is in."""
        if self._device.endswith(HOST):
            return contextlib.nullcontext()
        return tf.device(self._device)

    def _read(self, tasks: Any = None, state: bool = True) -> tuple[list, list, Any]:
        """x, y (of every task) and the method's state."""
        upper, lower = self._variables()
        x = [tf.convert_to_tensor(v.value) for v in upper]
        y = [tf.convert_to_tensor(v.value) for v in lower]
        tasks = self.tasks if tasks is None else tasks
        if tasks is not None:
            y = [tf.broadcast_to(v, [tasks, *v.shape]) for v in y]
        return x, y, self._carried.read() if state else ()

    def _look(self, batches: Batches) -> None:
        """Refuse, once per `compile`, what has no second derivative.

        Args:
            batches: those of one outer step, or their specifications.
        """
        if self._looked:
            return
        upper, lower = self._variables()
        tasks = [] if self.tasks is None else [self.tasks]
        x = [tf.TensorSpec(v.shape, v.dtype) for v in upper]
        y = [tf.TensorSpec([*tasks, *v.shape], v.dtype) for v in lower]
        try:
            require_second_derivatives(
                self.problem, self.method, x, y, batches, (self.upper, self.lower)
            )
        except MissingSecondDerivativeError:
            raise
        except Exception:  # of code that cannot be traced, but does run eagerly
            if not self.run_eagerly:
                raise
        self._looked = True

    def _refuse(self, code: Any, data: Batches | None = None) -> tf.Tensor:
        if data is not None:
            upper, lower = structure.to_tensors(self._variables())
            self._indices.note(self.problem, upper, lower, data)
        if self.on_nonfinite == "raise":
            self._progress.bad_code.assign(code)
        else:
            self._progress.count()
        return tf.constant(False)

    def _commit(self, step: Any, data: Batches) -> tf.Tensor:
        """Whether it did: not if the upper optimizer or the projection ends at NaN."""
        upper, lower = self._variables()
        if not isinstance(step.upper_scale, tuple):
            why = "with a method whose schedule scales the upper step"
            require_no_average(self.optimizer, why)
        before = [tf.convert_to_tensor(v.value) for v in upper]
        optimizers = [self.optimizer]
        if self.start_optimizer is not None:
            optimizers.append(self.start_optimizer)
        counted = [v for one in optimizers for v in one.variables]
        slots = [tf.convert_to_tensor(v.value) for v in counted]
        if self.start_optimizer is None:
            self.optimizer.apply(step.upper_gradient, upper)
        else:
            gradients = self._split(step.upper_gradient)
            variables = self._split(upper)
            self.optimizer.apply(gradients[0], variables[0])
            self.start_optimizer.apply(gradients[1], variables[1])
        moved = [tf.convert_to_tensor(v.value) for v in upper]
        problem = self.problem_at(self._progress.step.value)
        moved = problem.projected_upper(step.damped(before, moved))
        fine = structure.all_finite(moved)
        for variable, value, old in zip(upper, moved, before, strict=True):
            variable.assign(tf.where(fine, value, old))
        for variable, old in zip(counted, slots, strict=True):
            variable.assign(tf.where(fine, variable.value, old))

        def finish() -> tf.Tensor:
            if self.tasks is None:
                for variable, value in zip(lower, step.lower, strict=True):
                    variable.assign(value)
            self._carried.write(step.state)
            self._progress.count()
            self._advance_fixed_state(data, self.method.lower_steps)
            return tf.constant(True)

        return tf.cond(fine, finish, lambda: self._refuse(UPPER_VARIABLES))

    def _advance_fixed_state(
        self, data: Batches, steps: int, lower: Any = None
    ) -> None:
        """Evaluate the lower loss for what it writes to statistics and seeds.

        Args:
            data: the step's batches.
            steps: how many steps the lower variables made.
            lower: values of the lower variables; `None`: their own.
        """
        trainable = {id(v) for group in self._variables() for v in group}
        owned = [*self.upper.variables, *self.lower.variables]
        others = [v for v in owned if id(v) not in trainable]
        if not others:
            return
        if self.tasks is not None:
            data = first_task(data)
        own = self.lower.trainable_variables
        values = [] if lower is None else list(zip(own, lower, strict=True))
        seed = as_seed(self.problem_at(self._progress.step.value).seed)
        fixed = folded(seed, ROLE, LOWER_LOSS)
        prepared = []  # by the first evaluation

        def evaluate(draw: Any) -> None:
            with functions_inline(own), fixed_randomness(fixed):
                if not prepared:
                    prepare = self._prepare
                    prepared.append(prepare(self.upper, data) if prepare else data)
                self._lower_loss(self.upper, self.lower, prepared[0].lower_at(draw))

        moved_on(evaluate, others, self.lower, values, steps)

    def _ensure_carried(self) -> None:
        if self._carried is None:
            x, y, _ = self._read(state=False)
            with tf.device(self._device):
                self._carried = Carried(self.method.init(self.problem, x, y))

    def _choose_compilation(self, data: Batches, announce: bool = False) -> None:
        """Time one outer step with and without XLA; variables are not touched."""

        def trial(x: list, y: list, state: Any, batches: Batches) -> Any:
            return self.problem.step(self.method, x, y, batches, state)

        # Without a gradient nothing is decided: train_step names the variable.
        with contextlib.suppress(UnconnectedGradientError):
            with self._placed():
                xla = faster_with_xla(trial, self._read(), data, announce)
            self._use_compilation(xla)

    def _use_saved_compilation(self) -> None:
        """What an earlier training decided."""
        chosen = int(self._progress.compilation.numpy())
        if self.compiled and self._auto_jit and chosen != UNDECIDED:
            self._use_compilation(chosen == XLA)

    def _use_compilation(self, xla: bool) -> None:
        if self.jit_compile != xla:
            self.jit_compile = xla  # Keras refuses XLA for some layers
            self.make_train_function(force=True)
        self._progress.compilation.assign(XLA if self.jit_compile else GRAPH)
