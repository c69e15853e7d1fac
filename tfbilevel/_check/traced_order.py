"""What a traced function needs of its operations, and in which order they run."""

import collections
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

# Operations whose result is their first operand.
SAME = {
    *("CheckNumerics", "EnsureShape", "ExpandDims", "Identity", "PreventGradient"),
    *("PlaceholderWithDefault", "ReadVariableOp", "Reshape", "Snapshot", "Squeeze"),
    "StopGradient",
}
LOOPS = ("While", "StatelessWhile")
CALLS = ("PartitionedCall", "StatefulPartitionedCall")


def needed(graph: Any, wanted: list) -> tuple[set, dict]:
    """The tensors that the wanted ones need, and operation -> the needed inputs."""
    found: set[int] = set()
    read: dict[Any, set[int]] = collections.defaultdict(set)
    places: dict[Any, list[int]] = {}
    waiting = list(wanted)
    called: dict[
        Any, None
    ] = {}  # searched last, when all that is read of them is known
    while waiting or called:
        if waiting:
            tensor = waiting.pop()
            if id(tensor) in found:
                continue
            found.add(id(tensor))
            operation = tensor.op
            read[operation].add(tensor.value_index)
            if operation.type in (*LOOPS, *CALLS):
                called[operation] = None
                continue
            if operation in places and operation.type != "IdentityN":
                continue
        else:
            operation, _ = called.popitem()
        uses = places[operation] = _uses(operation, graph, read[operation])
        waiting += [operation.inputs[place] for place in uses]
    return found, places


def _uses(operation: Any, graph: Any, outputs: set[int]) -> list[int]:
    """The inputs that an operation needs for some of its outputs."""
    if operation.type in LOOPS:
        return sorted(_closure(operation, graph, outputs))
    if operation.type in CALLS:
        body = function_of(operation, "f", graph)
        within, _ = needed(body, [body.outputs[place] for place in outputs])
        return [p for p, tensor in enumerate(body.inputs) if id(tensor) in within]
    if operation.type == "IdentityN":
        return sorted(outputs)
    return list(range(len(operation.inputs)))


def in_order(places: dict) -> Iterator[Any]:
    """The needed operations, first ready, first run; what costs nothing runs first."""
    readers: dict[Any, list] = {one: [] for one in places}
    missing = {}
    for one, uses in places.items():
        sources = {one.inputs[place].op for place in uses}
        missing[one] = len(sources)
        for maker in sources:
            readers[maker].append(one)
    ready = collections.deque(reversed([one for one in places if not missing[one]]))
    while ready:
        operation = ready.popleft()
        if operation.type != "Placeholder":
            yield operation
        for reader in readers[operation]:
            missing[reader] -= 1
            if not missing[reader]:
                free = reader.type in SAME
                (ready.appendleft if free else ready.append)(reader)


def independent(places: dict, waits: set[int]) -> set:
    """The operations that need none of these tensors, and make no lists."""
    found = set()
    for operation in in_order(places):
        used = [operation.inputs[place] for place in places[operation]]
        known = all(
            t.op in found or t.op.type == "Placeholder" and id(t) not in waits
            for t in used
        )
        lists = any(t.dtype == tf.variant for t in operation.outputs)
        if known and not lists and operation.type not in LOOPS:
            found.add(operation)
    return found


def _closure(operation: Any, graph: Any, outputs: set[int]) -> set[int]:
    """The loop variables that these outputs of a loop, and its end, depend on."""
    body = function_of(operation, "body", graph)
    cond = function_of(operation, "cond", graph)
    position = {id(tensor): place for place, tensor in enumerate(body.inputs)}
    found = set(outputs)
    within, _ = needed(cond, cond.outputs)
    found |= {p for p, tensor in enumerate(cond.inputs) if id(tensor) in within}
    while True:
        within, _ = needed(body, [body.outputs[place] for place in found])
        more = found | {place for t, place in position.items() if t in within}
        if more == found:
            return found
        found = more


def source(tensor: tf.Tensor) -> tf.Tensor:
    """The tensor that this one is, behind operations that pass it on."""
    while tensor.op.type == "Identity":
        tensor = tensor.op.inputs[0]
    return tensor


def function_of(operation: Any, name: str, graph: Any) -> Any:
    """The graph of a function that an operation calls."""
    called = operation.get_attr(name).name
    while graph is not None:
        found = graph._get_function(called)
        if found is not None and hasattr(found, "graph"):
            return found.graph
        graph = getattr(graph, "outer_graph", None)
    raise ValueError(
        "`problem` must consist of operations that TensorFlow traced, to estimate "
        f"their memory. Received: a call of {called}, whose operations are not known"
    )
