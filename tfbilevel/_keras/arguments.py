"""Checks of the arguments of a BilevelModel, its `compile` and its `fit`."""

from typing import Any

import keras

from tfbilevel._core.arguments import require_count
from tfbilevel._core.batches import Batches
from tfbilevel._core.method import Method, require_method


def require_apart(upper: Any, lower: Any) -> None:
    """Raise if one variable is trained at both levels."""
    own = {id(variable) for variable in upper.trainable_variables}
    shared = [v.path for v in lower.trainable_variables if id(v) in own]
    if shared:
        raise ValueError(
            "`upper` and `lower` must not share trainable variables: a lower step "
            "would overwrite the upper one. Build two networks; a learned start is "
            "lower_start='learned'. "
            f"Received: {', '.join(shared)} in both"
        )


def require_no_constraints(lower: Any) -> None:
    """Raise if lower variables have constraints, which inner steps do not apply."""
    held = [v.path for v in lower.trainable_variables if v.constraint is not None]
    if held:
        raise ValueError(
            "`lower` must have no constraints on its variables: inner steps are pure "
            "functions, which do not call them. Build the layers without and pass "
            f"`project_lower`. Received: constraints on {', '.join(held)}"
        )


def require_no_average(optimizer: Any, why: str) -> None:
    """Raise if Keras would set x to an average of the optimizer's own results."""
    if getattr(optimizer, "use_ema", False):
        raise ValueError(
            f"`upper_optimizer` must not average weights (use_ema) {why}: Keras "
            "averages what the optimizer's step gives, and sets x to it at the end of "
            f"fit. Leave `use_ema` out. Received: upper_optimizer={optimizer!r}"
        )


def jit_of(jit_compile: Any, method: Method) -> bool | str:
    """How to compile; "auto" is False for a method that XLA cannot compile."""
    if jit_compile != "auto" and not isinstance(jit_compile, bool):
        raise ValueError(
            "`jit_compile` must be True, False or 'auto'. "
            f"Received: jit_compile={jit_compile!r}"
        )
    return False if jit_compile == "auto" and method.keeps_on_host else jit_compile


def microbatches_of(microbatches: Any) -> tuple[int, int]:
    """The largest numbers of parts of an upper and of a lower batch."""
    both = microbatches
    if not isinstance(microbatches, tuple | list):
        both = (microbatches, microbatches)
    if len(both) != 2:
        raise ValueError(
            "`microbatches` must be a number, or a pair of numbers, (upper, lower). "
            f"Received: microbatches={microbatches!r}"
        )
    for number in both:
        require_count(number, "microbatches")
    return int(both[0]), int(both[1])


def require_method_for(method: Any, tasks: int | None) -> None:
    """Raise unless it is a method and, for tasks, does not move the lower variables."""
    require_method(method)
    if tasks is not None and method.moves_lower:
        raise ValueError(
            "`method` must solve every task from its start with "
            "tb.BilevelModel(tasks=...), which keeps no lower variables of a task: the "
            "steps that this method makes with them would be lost. Use "
            "tb.minimize(tb.over_tasks(...)) "
            f"or a method with an inner solver. Received: method={method!r}"
        )


def require_optimizers(upper_optimizer: Any, start_optimizer: Any, levels: Any) -> None:
    """Raise unless the optimizers can move the upper variables of `levels`."""
    learned = levels.start is not None
    _require_upper_optimizer(upper_optimizer, learned)
    if levels.problem.project_upper is not None:
        require_no_average(upper_optimizer, "with `project_upper`")
    if any(v.constraint is not None for v in levels.upper.trainable_variables):
        require_no_average(upper_optimizer, "with constraints of upper variables")
    if start_optimizer is not None:
        _require_start_optimizer(start_optimizer, upper_optimizer, learned)


def _require_upper_optimizer(optimizer: Any, learned: bool) -> None:
    """Raise unless the optimizer can move the upper variables."""
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ValueError(
            "`upper_optimizer` must be a Keras optimizer such as "
            "keras.optimizers.Adam(0.01). "
            f"Received: upper_optimizer={optimizer!r}"
        )
    _require_plain("upper_optimizer", optimizer, learned)


def _require_start_optimizer(
    optimizer: Any, upper_optimizer: Any, learned: bool
) -> None:
    """Raise unless there is a learned start that the optimizer can move."""
    if not learned:
        raise ValueError(
            "`start_optimizer` needs a learned start. Build the model with "
            "tb.BilevelModel(..., lower_start='learned'), or leave it out. "
            f"Received: start_optimizer={optimizer!r}"
        )
    if optimizer is upper_optimizer or not isinstance(
        optimizer, keras.optimizers.Optimizer
    ):
        raise ValueError(
            "`start_optimizer` must be a separate Keras optimizer, such as "
            "keras.optimizers.SGD(0.03); leave it out to let the upper optimizer "
            f"move the start too. Received: start_optimizer={optimizer!r}"
        )
    _require_plain("start_optimizer", optimizer, learned)


def _require_plain(name: str, optimizer: Any, learned: bool) -> None:
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer) or getattr(
        optimizer, "loss_scale_factor", None
    ):
        raise ValueError(
            f"`{name}` must not scale losses: the upper gradient is not the gradient "
            "of one scaled loss, and would be divided by the scale. Leave "
            f"`loss_scale_factor` out. Received: {name}={optimizer!r}"
        )
    if getattr(optimizer, "use_ema", False) and learned:
        raise ValueError(
            f"`{name}` must not average weights (use_ema) where the start is "
            "learned: Keras would write the averages to other variables at the end "
            f"of fit. Received: {name}={optimizer!r}"
        )


def require_no_weights(keywords: dict[str, Any]) -> None:
    """Raise if `fit` is given weights of examples or classes."""
    for name in ("class_weight", "sample_weight"):
        if keywords.get(name) is not None:
            raise ValueError(
                f"`{name}` has no effect in fit, because the losses are your own. "
                "Weight the examples in them. "
                f"Received: {name}={keywords[name]!r}"
            )


def require_nothing_else(arguments: tuple, keywords: dict[str, Any]) -> None:
    """Raise if `train_on_batch` is given more than batches."""
    if arguments or any(value is not None for value in keywords.values()):
        raise ValueError(
            "`train_on_batch` takes a tb.Batches and nothing else. Put labels and "
            f"weights into it. Received: {arguments or keywords}"
        )


def require_servable(lower: Any, tasks: int | None, filepath: Any) -> None:
    """Raise unless the lower model can be exported as the trained network."""
    if tasks is not None:
        raise ValueError(
            "`export` needs one trained network, but the lower model of a "
            "tb.BilevelModel(tasks=...) holds no task's solution. Set its weights to "
            "what model.adapt returns, then model.lower.export(filepath). "
            f"Received: tasks={tasks}, filepath={filepath!r}"
        )
    if not isinstance(lower, keras.Model):
        raise ValueError(
            "`export` needs a keras.Model as `lower`, because a layer does not know "
            "the shape of its input. Build with keras.Sequential([keras.Input(shape), "
            f"layer]). Received: lower={lower!r}, filepath={filepath!r}"
        )


def require_labels(labels: Any) -> None:
    """Raise if `evaluate` has nothing to compare predictions with."""
    if labels is None:
        raise ValueError(
            "`evaluate` needs labels to measure metrics. Pass them by themselves, "
            "evaluate(x, y), or in a dataset of (x, y). Received: y=None"
        )


def require_measurable(data: Any, metrics: Any, tasks: int | None) -> None:
    """Raise unless `evaluate` can measure data of this kind."""
    if isinstance(data, Batches):
        if tasks is not None:
            raise ValueError(
                "`evaluate` and `validation_data` take no tb.Batches over tasks: the "
                "lower model holds no task's solution. Solve the tasks with "
                f"model.adapt, for example in a callback. Received: tasks={tasks}"
            )
    elif metrics is None:
        raise ValueError(
            "`evaluate` and `validation_data` need metrics of the lower model. "
            "Pass them: compile(..., metrics=["
            "keras.metrics.SparseCategoricalAccuracy()]), or a dataset of tb.Batches "
            "for the losses. Received: metrics=None"
        )


LOSSES = ("upper_loss", "lower_loss", "val_upper_loss", "val_lower_loss")


def losses_are_minimised(callbacks: Any) -> None:
    """Tell callbacks that monitor a loss of either level that smaller is better.

    Keras knows the direction only for its own metrics, and raises at the end of the
    first epoch.
    """
    for callback in keras.tree.flatten(getattr(callbacks, "callbacks", callbacks)):
        watched = getattr(callback, "monitor", None)
        undecided = getattr(callback, "mode", None) == "auto"
        if undecided and watched in LOSSES:
            callback.mode = "min"
