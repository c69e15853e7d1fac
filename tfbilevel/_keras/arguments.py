"""What a BilevelModel, its `compile` and its `fit` refuse."""

from typing import Any

import keras
import tensorflow as tf

from tfbilevel._core.batches import Batches
from tfbilevel._core.method import require_method


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
    """Raise if Keras would hold lower variables in a set: only its optimizers do."""
    held = [v.path for v in lower.trainable_variables if v.constraint is not None]
    if held:
        raise ValueError(
            "`lower` must have no constraints on its variables: inner steps are pure "
            "functions, which do not call them. Build the layers without and pass "
            f"`project_lower`. Received: constraints on {', '.join(held)}"
        )


def require_no_average(optimizer: Any, why: str) -> None:
    """Raise if Keras would set x to an average of what the optimizer alone made."""
    if getattr(optimizer, "use_ema", False):
        raise ValueError(
            f"`upper_optimizer` must not average weights (use_ema) {why}: Keras "
            "averages what the optimizer's step gives, and sets x to it at the end of "
            f"fit. Leave `use_ema` out. Received: upper_optimizer={optimizer!r}"
        )


def require_jit(jit_compile: Any) -> None:
    if jit_compile != "auto" and not isinstance(jit_compile, bool):
        raise ValueError(
            "`jit_compile` must be True, False or 'auto'. "
            f"Received: jit_compile={jit_compile!r}"
        )


def require_method_for(method: Any, tasks: int | None) -> None:
    """Raise unless it is a method, one that solves every task anew if there are any."""
    require_method(method)
    if tasks is not None and method.moves_lower:
        raise ValueError(
            "`method` must solve every task anew with tb.BilevelModel(tasks=...), "
            "which keeps no lower variables of a task: the steps that this method "
            "makes with them would be lost. Use tb.minimize(tb.over_tasks(...)) "
            f"or a method with an inner solver. Received: method={method!r}"
        )


def require_optimizers(upper_optimizer: Any, start_optimizer: Any, levels: Any) -> None:
    """Raise unless they can move the upper variables of `levels`."""
    learned = levels.start is not None
    _require_upper_optimizer(upper_optimizer, learned)
    if levels.problem.project_upper is not None:
        require_no_average(upper_optimizer, "with `project_upper`")
    if any(v.constraint is not None for v in levels.upper.trainable_variables):
        require_no_average(upper_optimizer, "with constraints of upper variables")
    if start_optimizer is not None:
        _require_start_optimizer(start_optimizer, upper_optimizer, learned)


def _require_upper_optimizer(optimizer: Any, learned: bool) -> None:
    """Raise unless it can move the upper variables, with a learned start or not."""
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
    """Raise unless there is a learned start and it can move it."""
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
            "`start_optimizer` must be a Keras optimizer of its own, such as "
            "keras.optimizers.SGD(0.03); leave it out to let the upper optimizer "
            f"move the start too. Received: start_optimizer={optimizer!r}"
        )
    _require_plain("start_optimizer", optimizer, learned)


def _require_plain(name: str, optimizer: Any, learned: bool) -> None:
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer) or getattr(
        optimizer, "loss_scale_factor", None
    ):
        raise ValueError(
            f"`{name}` must not scale losses: the upper gradient is no gradient of "
            "one scaled loss, and would be divided by the scale. Leave "
            f"`loss_scale_factor` out. Received: {name}={optimizer!r}"
        )
    if getattr(optimizer, "use_ema", False) and learned:
        raise ValueError(
            f"`{name}` must not average weights (use_ema) where the start is "
            "learned: Keras would write the averages to other variables at the end "
            f"of fit. Received: {name}={optimizer!r}"
        )


def require_one_replica() -> None:
    """Raise within the scope of a tf.distribute strategy other than of one device.

    Also of one replica: a MirroredStrategy's variables are not assigned where an outer
    step decides whether it is to be made.
    """
    strategy = tf.distribute.get_strategy()
    one = isinstance(strategy, tf.distribute.OneDeviceStrategy)
    if tf.distribute.has_strategy() and not one:
        raise ValueError(
            "A tb.BilevelModel trains on one device: a strategy would make every "
            "replica's inner solve of its own part of the data. Compile it outside "
            "the strategy's scope, or in that of a tf.distribute.OneDeviceStrategy. "
            "Received: "
            f"{type(strategy).__name__}, {strategy.num_replicas_in_sync} replica(s)"
        )


def require_no_weights(keywords: dict[str, Any]) -> None:
    """Raise if `fit` is given weights of examples or classes, as Keras's is."""
    for name in ("class_weight", "sample_weight"):
        if keywords.get(name) is not None:
            raise ValueError(
                f"`{name}` means nothing to fit: the losses are yours. Weigh the "
                f"examples in them. Received: {name}={keywords[name]!r}"
            )


def require_nothing_else(arguments: tuple, keywords: dict[str, Any]) -> None:
    """Raise if `train_on_batch` is given more than batches."""
    if arguments or any(value is not None for value in keywords.values()):
        raise ValueError(
            "`train_on_batch` takes a tb.Batches and nothing else. Put labels and "
            f"weights into it. Received: {arguments or keywords}"
        )


def no_export(filepath: Any) -> ValueError:
    return ValueError(
        "A tb.BilevelModel is trained, not served: its losses and method are "
        "Python. Export the network it trained, model.lower.export(filepath), or "
        f"model.upper.export(filepath). Received: filepath={filepath!r}"
    )


def require_measurable(data: Any, metrics: Any, tasks: int | None) -> None:
    """Raise unless data of this kind can be evaluated."""
    if isinstance(data, Batches):
        if tasks is not None:
            raise ValueError(
                "`evaluate` and `validation_data` take no tb.Batches over tasks: the "
                "lower model holds the solution of none of them. Solve them by "
                f"model.adapt, in a callback say. Received: tasks={tasks}"
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
    """Tell callbacks that watch a loss of either level which way is better.

    Keras knows it of its own metrics only, and raises at the first epoch's end.
    """
    for callback in keras.tree.flatten(getattr(callbacks, "callbacks", callbacks)):
        watched = getattr(callback, "monitor", None)
        undecided = getattr(callback, "mode", None) == "auto"
        if undecided and watched in LOSSES:
            callback.mode = "min"
