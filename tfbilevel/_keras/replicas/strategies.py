"""The tf.distribute strategies that a BilevelModel can train under."""

from collections.abc import Iterable
from typing import Any

import tensorflow as tf

from tfbilevel._core.method import Method
from tfbilevel._core.problem import Problem
from tfbilevel._methods.hypergradient.forward_unroll import ForwardUnroll
from tfbilevel._methods.penalty.gaffa import GAFFA

REPLICATED = (tf.distribute.MirroredStrategy, tf.distribute.MultiWorkerMirroredStrategy)
# Why not: what must be there before each of them can be used.
WHY_NOT = {
    "TPUStrategy": "its collectives are compiled by XLA, and no one has tested a "
    "bilevel step on a TPU",
    "ParameterServerStrategy": "its workers step at different times, and an inner "
    "solve needs all of them at once",
    "CentralStorageStrategy": "its variables have no copies on the devices",
}


def is_replicated(strategy: Any) -> bool:
    """Whether every variable has copies, one for each of the strategy's replicas."""
    return isinstance(strategy, REPLICATED)


def is_chief(strategy: Any) -> bool:
    """Whether this process writes files that all workers of a strategy share."""
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return True
    resolver = strategy.cluster_resolver
    if not resolver.cluster_spec().jobs:  # no TF_CONFIG: one worker
        return True
    chiefs = "chief" in resolver.cluster_spec().jobs
    return resolver.task_type == "chief" or (not chiefs and resolver.task_id == 0)


def is_alone(strategy: Any) -> bool:
    """Whether all replicas of a strategy are devices of this process."""
    return not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)


def require_strategy() -> None:
    """Raise in the scope of a strategy whose replicas cannot make a step together."""
    if not tf.distribute.has_strategy():
        return
    strategy = tf.distribute.get_strategy()
    if is_replicated(strategy) or isinstance(strategy, tf.distribute.OneDeviceStrategy):
        return
    name = type(strategy).__name__
    why = next((why for key, why in WHY_NOT.items() if name.startswith(key)), "unknown")
    raise ValueError(
        "A tb.BilevelModel trains under tf.distribute.MirroredStrategy (several "
        "devices of one machine), MultiWorkerMirroredStrategy (several machines) or "
        f"OneDeviceStrategy. Use one of them. Received: {name} ({why})"
    )


def require_created_within(strategy: Any, named: Iterable[tuple[str, Any]]) -> None:
    """Raise unless variables were created in the scope that the BilevelModel was.

    Args:
        strategy: that of the model; `None`: it was created outside of any scope.
        named: pairs (name of an argument, Keras variable).
    """
    for name, variable in named:
        value = variable.value
        if is_replicated(strategy):
            within = strategy.extended.variable_created_in_scope(value)
        else:
            within = not isinstance(value, tf.distribute.DistributedValues)
        if not within:
            raise ValueError(
                f"`{name}` and the tb.BilevelModel must be created in the same "
                "scope. Create both models, the optimizers and the tb.BilevelModel "
                "within one `with strategy.scope():`. Received: a BilevelModel "
                f"{_place(strategy)}, {name} ({variable.path}) created elsewhere"
            )


def require_models_within(strategy: Any, upper: Any, lower: Any) -> None:
    """Raise unless both models were created in the scope that the BilevelModel was."""
    for name, model in (("upper", upper), ("lower", lower)):
        named = [(name, variable) for variable in model.trainable_variables]
        require_created_within(strategy, named)


def require_compiled_within(strategy: Any) -> None:
    """Raise if the current scope is that of another strategy with replicas, under
    which Keras would run a model that has no strategy.

    Args:
        strategy: that of the model; `None`: it was created outside of any scope.
    """
    current = tf.distribute.get_strategy()
    if is_replicated(current) and current is not strategy:
        raise ValueError(
            "`compile` and `fit` must be called in the scope in which the "
            "tb.BilevelModel was created. Create both models, the optimizers and the "
            "tb.BilevelModel within one `with strategy.scope():`. Received: a "
            "BilevelModel "
            f"{_place(strategy)}, called in that of {type(current).__name__}"
        )


def _place(strategy: Any) -> str:
    if strategy is None:
        return "created outside of any scope"
    return f"created in the scope of {type(strategy).__name__}"


def require_plain_steps(strategy: Any, jit_compile: Any, executions: int) -> None:
    """Raise if replicas are asked for steps that TensorFlow cannot make together."""
    if jit_compile is True:
        raise ValueError(
            "`jit_compile` must be False or 'auto' (which is False then) under a "
            "strategy with replicas: TensorFlow's XLA compiles no collectives in "
            "loops. Received: jit_compile=True, "
            f"{type(strategy).__name__}, {strategy.num_replicas_in_sync} replica(s)"
        )
    if executions != 1:
        raise ValueError(
            "`steps_per_execution` must be 1 under a strategy with replicas: "
            "TensorFlow passes no keys of collectives into a loop over steps. "
            f"Received: steps_per_execution={executions!r}"
        )


def require_together(method: Method, problem: Problem) -> None:
    """Raise unless several replicas can make the method's steps together."""
    if getattr(method, "memory", None) == "tape":
        raise ValueError(
            "`memory` must be 'replay' or 'checkpoint', which give the same gradient, "
            "on several replicas: TensorFlow cannot differentiate a loop with "
            f"collectives in it. Received: method={method!r}"
        )
    if isinstance(method, ForwardUnroll) and problem.prepare is not None:
        raise ValueError(
            "`method` must not be a tb.ForwardUnroll with `prepare` on several "
            "replicas: it takes a derivative in every prepared number, and each "
            "replica prepares its own examples. Use tb.Unroll, which gives the same "
            f"gradient. Received: method={method!r}"
        )
    if isinstance(method, GAFFA) and method.held.reads_batches:
        raise ValueError(
            "`constraints` of tb.GAFFA must not read the batch on several replicas, of "
            "which each has examples of its own. Train on one device. "
            f"Received: method={method!r}"
        )
