"""Keras optimizers as pure, differentiable update rules."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tfbilevel._optimizers.options import (
    WITH_MOMENTUM,
    momentum_methods,
    with_options,
)
from tfbilevel._workarounds.tracing import outside_traces
from tfbilevel._workarounds.vectorized_map import vectorized_map

SUPPORTED = (
    keras.optimizers.SGD,
    keras.optimizers.Adam,
    keras.optimizers.AdamW,
    keras.optimizers.RMSprop,
    keras.optimizers.Adagrad,
    keras.optimizers.Adadelta,
    keras.optimizers.Adamax,
    keras.optimizers.Lion,
    keras.optimizers.Ftrl,
)

# Methods of Keras's base optimizer assign every change to a Keras variable, and a
# StatelessScope turns the assignment into a tensor. The TensorFlow backend overrides
# these methods with assignments to tf.Variable, through which no gradient flows. The
# class that `_Pure` makes has those of the base class again.
_PURE_METHODS = (
    "assign",
    "assign_add",
    "assign_sub",
    "_var_key",
    "_apply_weight_decay",
    "_backend_update_step",
    "_backend_apply_gradients",
    "add_variable_from_reference",
    "stateless_apply",
)


class OptimizerState(NamedTuple):
    """The state of an update rule between steps.

    Attributes:
        iteration: the number of updates made, an integer scalar.
        learning_rate: the rate, a scalar of the variables' dtype; `()` if a
            `LearningRateSchedule` computes it from `iteration`.
        slots: momentum, second moments and the like, a list of tensors.
    """

    iteration: Any
    learning_rate: Any
    slots: list


@dataclasses.dataclass(frozen=True, eq=False)
class UpdateRule:
    """A Keras optimizer's update as a pure function: it takes and returns tensors.

    Made by `tb.differentiable`.

    Attributes:
        optimizer: the Keras optimizer.
        argument: the name that errors give it, that of the user's argument.
        learns: whether `update` may be given options; there is a slot for momentum
            then, even if the optimizer's own is zero.
    """

    optimizer: keras.optimizers.Optimizer
    argument: dataclasses.InitVar[str] = "optimizer"  # the user's name for it
    learns: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self, argument: str) -> None:
        object.__setattr__(self, "optimizer", optimizer_of(self.optimizer, argument))
        _require_supported(self.optimizer, argument)
        _ = self.learning_rate  # read now: later assignments to it have no effect

    @functools.cached_property
    def scheduled(self) -> bool:
        """Whether the rate is a `LearningRateSchedule`."""
        return not isinstance(self.optimizer._learning_rate, keras.Variable)

    @functools.cached_property
    def learning_rate(self) -> Any:
        """The constant rate as the user wrote it; `None` for a schedule."""
        if self.scheduled:
            return None
        # Keras rounds the rate to float32. The shortest decimal that rounds to the same
        # float32 is the number that the user wrote, so that float64 variables use 0.1
        # instead of 0.10000000149. For float32 variables there is no difference.
        with tf.init_scope():
            return float(str(self.optimizer._learning_rate.numpy()))

    @functools.cached_property
    def _built(self) -> dict:
        """The pure updates made so far, by the shapes of the variables."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        """Without them: their classes have no name that `pickle` could find."""
        return {name: value for name, value in vars(self).items() if name != "_built"}

    def init(self, variables: Any) -> OptimizerState:
        """The state before the first update of `variables`, any nest of tensors."""
        built = self._pure(variables)
        leaves = [tf.convert_to_tensor(leaf) for leaf in tf.nest.flatten(variables)]
        rate: Any = ()
        if not self.scheduled:
            rate = tf.constant(self.learning_rate, widest(leaves))
        slots = [make() for make in built.initial_slots]
        return OptimizerState(tf.constant(0, tf.int64), rate, slots)

    def update(
        self,
        gradients: Any,
        state: OptimizerState,
        variables: Any,
        options: dict[str, tf.Tensor] | None = None,
    ) -> tuple[Any, OptimizerState]:
        """One update: (variables, state) after the step along `gradients`.

        If `state` has one iteration per task (`counted`), all arguments have a leading
        axis for the tasks.

        Args:
            gradients: like `variables`.
            state: the optimizer's state.
            variables: a nest of tensors.
            options: scalars that replace options of the optimizer, such as
                {"momentum": m}; for a rule that `learns`.
        """
        if state.iteration.shape.rank:
            return self._update_each(gradients, state, variables, options)
        built = self._pure(variables)
        rate = [] if self.scheduled else [state.learning_rate]
        flat, carried = built.apply(
            [state.iteration, *rate, *state.slots],
            tf.nest.flatten(gradients),
            tf.nest.flatten(variables),
            options or {},
        )
        slots = carried[1 + len(rate) :]
        new_rate = carried[1] if rate else ()
        return (
            tf.nest.pack_sequence_as(variables, flat),
            OptimizerState(carried[0], new_rate, slots),
        )

    def counted(self, state: OptimizerState, tasks: int) -> OptimizerState:
        """The state with one iteration per task, for tasks that stop at different
        steps, if an update depends on the iteration."""
        corrected = (keras.optimizers.Adam, keras.optimizers.Adamax)
        if not self.scheduled and not isinstance(self.optimizer, corrected):
            return state
        return state._replace(iteration=tf.fill([tasks], state.iteration))

    def _update_each(
        self, gradients: Any, state: OptimizerState, variables: Any, options: Any
    ) -> tuple[Any, OptimizerState]:
        def one(task: tuple) -> tuple:
            own, iteration, slots, gradient = task
            alone = state._replace(iteration=iteration, slots=slots)
            moved, after = self.update(gradient, alone, own, options)
            return moved, after.iteration, after.slots

        each = (variables, state.iteration, state.slots, gradients)
        moved, iteration, slots = vectorized_map(one, each)
        return moved, state._replace(iteration=iteration, slots=slots)

    def _pure(self, variables: Any) -> "_Pure":
        leaves = [tf.convert_to_tensor(leaf) for leaf in tf.nest.flatten(variables)]
        key = tuple((tuple(leaf.shape), leaf.dtype.name) for leaf in leaves)
        if key not in self._built:
            self._built[key] = outside_traces(
                lambda: _Pure(self.optimizer, leaves, self.learns)
            )
        return self._built[key]


def optimizer_of(value: Any, argument: str) -> Any:
    """The optimizer named by a string, such as "adam"; other values unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return keras.optimizers.get(value)
    except ValueError as error:
        raise ValueError(
            f"`{argument}` must be a Keras optimizer such as keras.optimizers.SGD(0.1) "
            f"or the name of one, such as 'adam'. Received: {argument}={value!r}"
        ) from error


def differentiable(optimizer: keras.optimizers.Optimizer) -> UpdateRule:
    r"""Turn a Keras optimizer into a pure, differentiable update rule.

        state = rule.init(variables)
        variables, state = rule.update(gradients, state, variables)

    No variable is assigned, so gradients flow through every update: to the variables,
    the gradients, the slots (such as momentum) and the learning rate, which is part of
    the state. The updates are those of Keras and cost the same.

    Supported: SGD (plain, momentum, Nesterov), Adam (also amsgrad), AdamW, RMSprop,
    Adagrad, Adadelta, Adamax, Lion and Ftrl, with a constant rate or a
    `LearningRateSchedule`. The derivative of Lion's sign is zero, as it is almost
    everywhere.

    For float64 variables Keras rounds its other constants (momentum, betas, decay) to
    float32. This changes an update by a relative 1e-8, and Adam's first updates, which
    divide by 1 - beta_2, by 1e-5.

    Adam divides by the root of a mean square, whose derivative is infinite at zero. A
    coordinate that never had a gradient (such as a pixel that is always black) would
    turn every derivative into NaN. Therefore its gradient is set to a magnitude of
    1e-17 (a little more if beta_2 is above 0.999). Derivatives then stay finite, and
    the weight moves by 1e-17 / epsilon of a step: 1e-10 with Keras's epsilon.

    Args:
        optimizer: a Keras optimizer; it is never changed.

    Returns:
        An object with `init(variables) -> state` and `update(gradients, state,
        variables) -> (variables, state)`. `variables` is any nest (as in `tf.nest`) of
        tensors with static shapes.

    Raises:
        ValueError: for an optimizer or option that is not known to be
            differentiable (Nadam, Muon, clipping, averaging, accumulation, ...).

    Example:
        >>> rule = tb.differentiable(keras.optimizers.SGD(0.5, momentum=0.9))
        >>> y = tf.constant([1.0, 2.0])
        >>> y, state = rule.update(tf.constant([1.0, 1.0]), rule.init(y), y)
        >>> y.numpy().tolist()
        [0.5, 1.5]
    """
    return UpdateRule(optimizer)


class _Pure:
    """A pure optimizer built for variables of given shapes and dtypes."""

    def __init__(
        self, original: keras.optimizers.Optimizer, leaves: list, learns: bool
    ):
        for leaf in leaves:
            if not leaf.shape.is_fully_defined():
                raise ValueError(
                    "The variables of a differentiable optimizer need static shapes. "
                    "Give every lower variable a fixed shape. "
                    f"Received: shape {leaf.shape}"
                )
        kind = type(original)
        base = keras.optimizers.Optimizer.__mro__
        plain = next(c for c in base if c.__name__ == "BaseOptimizer")
        methods = {name: getattr(plain, name) for name in _PURE_METHODS}
        options = configuration(original)
        self._own: dict[str, Any] = {}
        if learns and isinstance(original, WITH_MOMENTUM):
            methods |= momentum_methods(kind)
            self._own = {"momentum": original.momentum}
            options |= {"momentum": 0.5}  # not zero, so that Keras makes its slots
        pure = type(f"Pure{kind.__name__}", (kind,), methods)
        optimizer = pure.from_config(options)
        rate = optimizer._learning_rate
        if isinstance(rate, keras.Variable):
            # Keras stores the rate in float32; the state has the variables' own
            # precision.
            wide = keras.Variable(
                rate.numpy(), dtype=widest(leaves).name, trainable=False
            )
            optimizer._variables[1] = wide
            # Not through Keras's tracker, which would list it again after the slots:
            # that copy is never updated, but stateless_apply would use it.
            object.__setattr__(optimizer, "_learning_rate", wide)
        templates = [
            keras.Variable(np.zeros(leaf.shape), dtype=leaf.dtype.name)
            for leaf in leaves
        ]
        optimizer.build(templates)
        self.optimizer = optimizer
        slots = 2 if isinstance(rate, keras.Variable) else 1
        self.initial_slots = [_maker(v.numpy()) for v in optimizer.variables[slots:]]
        self._nudge = isinstance(original, keras.optimizers.Adam)

    def apply(
        self, state: list, gradients: list, leaves: list, options: dict
    ) -> tuple[list, list]:
        """Keras's own stateless update: the leaves and the state after it."""
        optimizer, options = self.optimizer, self._own | options
        if options:
            dtype = widest(leaves)
            options = {k: tf.cast(v, dtype) for k, v in options.items()}
            optimizer = with_options(optimizer, options)
        if self._nudge:
            gradients = [
                _away_from_zero(gradient, 1 - optimizer.beta_2)
                for gradient in gradients
            ]
        return optimizer.stateless_apply(state, gradients, leaves)


def configuration(optimizer: keras.optimizers.Optimizer) -> dict:
    """The optimizer's configuration, with its schedule as an object.

    Keras would serialise a schedule and rebuild it, which users' own schedules rarely
    support.
    """
    schedule = optimizer._learning_rate
    if isinstance(schedule, keras.Variable):
        return optimizer.get_config()
    twin = object.__new__(type(optimizer))
    twin.__dict__.update(vars(optimizer))
    object.__setattr__(twin, "_learning_rate", None)
    return twin.get_config() | {"learning_rate": schedule}


def _maker(value: np.ndarray) -> Callable[[], tf.Tensor]:
    if value.size and (value == value.flat[0]).all():
        # A fill, because a constant as large as the weights would be in every graph.
        return lambda: tf.fill(value.shape, tf.constant(value.flat[0], value.dtype))
    return lambda: tf.constant(value)


def _away_from_zero(gradient: tf.Tensor, memory: Any) -> tf.Tensor:
    # The square times `memory`, 1 - beta_2, must be a normal number of the dtype. The
    # correction is constant, so the derivative in the gradient stays one.
    least = 1e-150 if gradient.dtype == tf.float64 else 1e-17
    if tf.is_tensor(memory):
        longest = tf.maximum(1.0, tf.sqrt(1e-3 / tf.cast(memory, tf.float32)))
        smallest = least * tf.cast(longest, gradient.dtype)
    else:
        longest = max(1.0, (1e-3 / memory) ** 0.5)
        smallest = tf.constant(least * longest, gradient.dtype)
    correction = tf.where(
        tf.abs(gradient) < smallest, smallest - gradient, tf.zeros_like(gradient)
    )
    return gradient + tf.stop_gradient(correction)


def widest(leaves: list) -> tf.DType:
    """The widest dtype among the tensors."""
    return max((leaf.dtype for leaf in leaves), key=lambda dtype: dtype.size)


def _require_supported(optimizer: Any, argument: str) -> None:
    names = ", ".join(kind.__name__ for kind in SUPPORTED)
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ValueError(
            f"`{argument}` must be a Keras optimizer, such as "
            f"keras.optimizers.SGD(0.1). Received: {argument}={optimizer!r}"
        )
    if type(optimizer) not in SUPPORTED:
        raise ValueError(
            f"{type(optimizer).__name__} is not a differentiable optimizer: its "
            "derivatives are not known to be right (hidden state, matrix roots or a "
            f"custom update). Use one of {names}. Received: {argument}={optimizer!r}"
        )
    options = {
        "use_ema": optimizer.use_ema,
        "gradient_accumulation_steps": optimizer.gradient_accumulation_steps,
        "loss_scale_factor": optimizer.loss_scale_factor,
        "clipnorm": optimizer.clipnorm,
        "global_clipnorm": optimizer.global_clipnorm,
        "clipvalue": optimizer.clipvalue,
        "exclude_from_weight_decay": getattr(
            optimizer, "_exclude_from_weight_decay", None
        )
        or getattr(optimizer, "_exclude_from_weight_decay_pattern", None),
    }
    for name, value in options.items():
        if value:
            raise ValueError(
                f"A differentiable optimizer cannot use `{name}`: its derivatives "
                "are not supported. Create the optimizer without it (clip or scale "
                f"inside the loss if needed). Received: {name}={value!r}"
            )
    rate = optimizer._learning_rate
    schedule = keras.optimizers.schedules.LearningRateSchedule
    if not isinstance(rate, (keras.Variable, schedule)):
        raise ValueError(
            "The learning rate of a differentiable optimizer must be a number or a "
            "LearningRateSchedule, because a function may change between calls. "
            f"Received: learning_rate={rate!r}"
        )
