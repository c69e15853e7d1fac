"""A check for missing second derivatives of the lower loss, made before training.

The lower gradient is traced once, and its operations are searched for suspects. Only if
there are any is that graph differentiated too, which shows the suspects that lie on the
way from a variable to the gradient.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from tensorflow.python.eager.backprop_util import IsTrainable as differentiable
from tensorflow.python.framework import ops

from tfbilevel._calculus import derivatives, structure
from tfbilevel._calculus.lost_derivatives import (
    MissingSecondDerivativeError,
    Operation,
    lost,
)
from tfbilevel._core.aggregation import aggregated
from tfbilevel._core.batches import Batches, first_task
from tfbilevel._core.method import Method
from tfbilevel._core.microbatched import unsplit
from tfbilevel._core.problem import Problem
from tfbilevel._tasks.over_tasks import OverTasks
from tfbilevel._workarounds import right_derivatives

# Operations whose derivative is zero, or that are documented as constants.
CONSTANT = {
    "EagerPyFunc",
    "OnesLike",
    "ParameterizedTruncatedNormal",
    "PyFunc",
    "PyFuncStateless",
    "StatelessRandomBinomial",
    "StatelessRandomPoisson",
    "StopGradient",
    "ZerosLike",
}
# Right to every order (tests/sweep_second_derivatives.py), and widely used.
SWISH = ("tensorflow.python.ops.nn_impl", "swish")
# TensorFlow's functions with a custom gradient that can be taken only once or is not
# the derivative of the function.
NOT_TWICE = {
    "ctc_loss_dense": ("missing", "its recursion over time can be differentiated once"),
    "grad_pass_through": (
        "wrong",
        "its gradient is that of the identity, not the derivative of its value",
    ),
}
NO_DERIVATIVE = "TensorFlow has no derivative of it"
TAKEN_FOR_CONSTANT = "TensorFlow silently treats it as a constant"
STOPPED = "a tf.custom_gradient function treats a part of its gradient as a constant"
CORRECTED = "it is wrong or missing in TensorFlow, and this library corrects it"
OWN = "its gradient is defined by a tf.custom_gradient"
# The errors that gradient functions raise where there is no derivative.
UNDIFFERENTIABLE = (LookupError, NotImplementedError, TypeError, ValueError)


class Suspect(NamedTuple):
    """An operation that may not be differentiable, and its name scope."""

    operation: tf.Operation
    layer: str
    in_backward_pass: bool


def require_second_derivatives(
    problem: Problem,
    method: Method,
    upper: Any,
    lower: Any,
    batches: Batches,
    models: Sequence[keras.layers.Layer] = (),
) -> None:
    """Raise if the method takes second derivatives that TensorFlow lacks or has wrong.

    Args:
        problem: the problem, over tasks or not.
        method: the method.
        upper: x, tensors or their specifications.
        lower: y, likewise.
        batches: likewise.
        models: the models whose layers are to be named.

    Raises:
        tb.MissingSecondDerivativeError: naming all such operations.
    """
    if not method.takes_second_derivatives:
        return
    aggregate = getattr(method, "aggregate", None)
    try:
        found = operations(problem, upper, lower, batches, aggregate, models)
    except derivatives.UnconnectedGradientError:
        return  # the step itself raises this error and names the variable
    found = [one for one in found if one.verdict in ("missing", "wrong")]
    if found:
        raise MissingSecondDerivativeError(found)


def operations(
    problem: Problem,
    upper: Any,
    lower: Any,
    batches: Batches,
    aggregate: Any = None,
    models: Sequence[keras.layers.Layer] = (),
    corrected: bool = False,
) -> list[Operation]:
    """The operations to report between a variable and the lower gradient.

    Args:
        problem, upper, lower, batches, models: as above.
        aggregate: what the method mixes into the lower loss.
        corrected: list also the operations that this library corrects.
    """
    before = dict(ops.gradient_registry._registry)
    traced: dict[str, Any] = {}

    def gradient(x: Any, y: Any, batches: Batches) -> Any:
        one, y, batches = one_task(problem, y, batches)
        here = aggregated(aggregate, one.prepared(x, batches), at=0)

        def loss(x: Any, y: Any, batch: Any) -> Any:
            value = here.problem.lower_loss(x, y, batch)
            graph = tf.compat.v1.get_default_graph()
            traced["forward"] = set(graph.get_operations())
            return value

        y = structure.to_tensors(y)
        _, made = derivatives.lower_gradient(
            loss, here.upper, y, here.batches.lower_at(0)
        )
        traced["sources"] = tf.nest.flatten((here.upper, y))
        traced["targets"] = tf.nest.flatten(made)
        return made

    arguments = tf.nest.map_structure(_spec, (upper, lower, batches))
    compiled = tf.function(gradient, autograph=False)
    graph = compiled.get_concrete_function(*arguments).graph
    with right_derivatives():
        layers = {layer.name for one in models for layer in one._flatten_layers()}
        now = ops.gradient_registry._registry
        ours = {kind for kind, entry in now.items() if before.get(kind) is not entry}
        suspects = [
            suspect._replace(layer=_layer_of(suspect.layer, layers))
            for suspect in _all_of(graph, "", traced["forward"])
            if _is_suspect(suspect) or corrected and _is_corrected(suspect, ours)
        ]
        return _reached(graph, suspects, traced["targets"], traced["sources"])


def one_task(problem: Problem, lower: Any, batches: Batches) -> tuple:
    """The problem of one task, with losses of whole batches, its lower variables and
    batches; unchanged if it is neither over tasks nor in microbatches."""
    if not isinstance(problem, OverTasks):
        return unsplit(problem), lower, batches
    first = tf.nest.map_structure(lambda leaf: leaf[0], lower)
    return unsplit(problem.one), first, first_task(batches)


def _spec(leaf: Any) -> Any:
    if leaf is None or isinstance(leaf, tf.TypeSpec):
        return leaf
    return tf.type_spec_from_value(
        leaf if tf.is_tensor(leaf) else tf.convert_to_tensor(leaf)
    )


def _all_of(graph: Any, scope: str, forward: set | None) -> Iterator[Suspect]:
    """Every operation, including those in loops, branches and functions."""
    for operation in graph.get_operations():
        layer = _scope_of(operation) or scope
        backward = forward is not None and operation not in forward
        yield Suspect(operation, layer, backward)
        for body in _bodies(operation, graph):
            yield from _all_of(body, layer, None)


def _bodies(operation: tf.Operation, graph: Any) -> Iterator[Any]:
    for attribute in operation.op_def.attr:
        if attribute.type not in ("func", "list(func)"):
            continue
        value = operation.get_attr(attribute.name)
        for function in value if isinstance(value, list) else [value]:
            owner = graph
            while owner is not None:
                found = owner._get_function(function.name)
                if found is not None:
                    if hasattr(found, "graph"):
                        yield found.graph
                    break
                owner = getattr(owner, "outer_graph", None)


def _scope_of(operation: tf.Operation) -> str:
    """The name scope, which begins with the names of Keras's models and layers."""
    return "/".join(
        part
        for part in operation.name.split("/gradients/")[0].split("/")[:-1]
        if part != "gradient_tape" and not part.endswith("PartitionedCall")
    )


def _layer_of(scope: str, layers: set[str]) -> str:
    """The layers' names in a scope; the scope itself if it contains none."""
    named = []
    for part in scope.split("/"):
        # TensorFlow numbers scopes with the same name; Keras numbers its layers.
        for name in (re.sub(r"_\d+$", "", part), part):
            if name in layers:
                named.append(name)
                break
    return "/".join(named) or scope


def _own_gradient(operation: tf.Operation) -> Any:
    """The gradient function set for this single operation, or `None`."""
    try:
        kind = operation.get_attr("_gradient_op_type")
    except ValueError:
        return None
    return ops.gradient_registry.lookup(kind)


def _is_suspect(suspect: Suspect) -> bool:
    operation = suspect.operation
    if not any(map(differentiable, operation.inputs)):
        return False
    if not any(map(differentiable, operation.outputs)):
        return False
    if any(attribute.type.endswith("func") for attribute in operation.op_def.attr):
        return False  # its body is searched instead
    if operation.type == "StopGradient":
        return suspect.in_backward_pass
    if operation.type == "PreventGradient":
        return True
    own = _own_gradient(operation)
    if own is not None:
        return not _is_ours(own) and _author_of(own) != SWISH
    try:
        gradient = ops.gradient_registry.lookup(operation.type)
    except LookupError:
        return True
    return gradient is None and operation.type not in CONSTANT


def _is_corrected(suspect: Suspect, ours: set[str]) -> bool:
    own = _own_gradient(suspect.operation)
    return suspect.operation.type in ours or own is not None and _is_ours(own)


def _reached(
    graph: Any, suspects: list[Suspect], targets: list, sources: list
) -> list[Operation]:
    """The suspects that a reverse sweep from the targets to the sources reaches.

    Each gets a gradient function that records the call. Everything else is left to
    TensorFlow, which knows through which inputs its operations pass gradients.
    """
    if not suspects:
        return []
    found: dict[Operation, None] = {}
    places: dict[str, str] = {}
    for suspect in suspects:
        name = _name_of(suspect.operation)
        if suspect.layer:
            places.setdefault(name, suspect.layer)
        # The operations of a custom gradient have no scope, but the function has.
        layer = suspect.layer or places.get(name, "")
        suspect.operation._gradient_function = _noting(name, layer, found)
    with graph.as_default():
        try:
            tf.gradients(targets, sources)
        except UNDIFFERENTIABLE as error:
            # Raised inside a function whose operations cannot be searched.
            found[lost(type(error).__name__, "", "missing", str(error))] = None
    return list(found)


def _noting(name: str, layer: str, found: dict) -> Callable:
    def gradient(operation: tf.Operation, *upstream: Any) -> Any:
        one, further = _judged(name, layer, operation, upstream)
        found[one] = None
        return further or [None] * len(operation.inputs)

    return gradient


def _judged(
    name: str, layer: str, operation: tf.Operation, upstream: tuple
) -> tuple[Operation, Any]:
    """The verdict on a suspect, and its gradient if it has one."""
    if operation.type == "StopGradient":
        return lost(name, layer, "wrong", STOPPED), None
    if name in NOT_TWICE:
        return lost(name, layer, *NOT_TWICE[name]), None
    function = _own_gradient(operation)
    verdict, reason = "right", CORRECTED
    if function is not None and not _is_ours(function):
        verdict, reason = "own", OWN
    if function is None:
        try:
            function = ops.gradient_registry.lookup(operation.type)
        except LookupError:
            return lost(name, layer, "missing", NO_DERIVATIVE), None
        if function is None:
            return lost(name, layer, "wrong", TAKEN_FOR_CONSTANT), None
    try:
        made = function(operation, *upstream)
    except UNDIFFERENTIABLE as error:
        return lost(name, layer, "missing", str(error)), None
    return Operation(name, layer, verdict, reason, ""), made


def _name_of(operation: tf.Operation) -> str:
    """The operation's type, or the Python function with a custom gradient."""
    if operation.type == "StopGradient":
        return "tf.stop_gradient"
    own = _own_gradient(operation)
    return operation.type if own is None else _author_of(own)[1]


def _author_of(gradient: Callable) -> tuple[str, str]:
    """The module and the name of the function that defines a gradient."""
    function: Any = gradient
    while True:
        name = function.__qualname__.split(".<locals>")[0]
        if name != "_graph_mode_decorator":
            return function.__module__, name
        # TensorFlow's own wrappers.
        captured = inspect.getclosurevars(function).nonlocals
        function = captured.get("tape_grad_fn") or captured["grad_fn"]


def _is_ours(gradient: Callable) -> bool:
    """Whether this library defines the gradient."""
    return _author_of(gradient)[0].startswith("tfbilevel.")
