"""The tensors that are alive at once while a traced function runs.

The operations are followed in the order in which they become ready. A result is freed
after its last use; an elementwise operation writes into an operand that it is the last
to use, as TensorFlow does; what nothing uses is left out. A loop is followed once, from
loop variables of its own, which is how its later iterations run.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import tensorflow as tf

from tfbilevel._check.traced_order import (
    SAME,
    function_of,
    in_order,
    independent,
    needed,
    source,
)

# What a piece of memory holds, besides what the caller names. Lists are in the host's
# memory if the operation that makes them is placed there.
CONSTANTS, LISTS = "constants", "stored iterates and tapes"
CARRIED, VALUES = "variables of loops", "losses, gradients, vectors"
HOST = "host"

# Operations that write into an operand of the same size, if they use it last.
IN_PLACE = {
    *("Abs", "Add", "AddN", "AddV2", "BiasAdd", "Cos", "Div", "DivNoNan", "Elu"),
    *("EluGrad", "Erf", "Exp", "Expm1", "FloorDiv", "FloorMod", "Inv", "Log", "Log1p"),
    *("LogSoftmax", "LogicalAnd", "LogicalNot", "LogicalOr", "Maximum", "Minimum"),
    *("Mul", "MulNoNan", "Neg", "Pow", "RealDiv", "Reciprocal", "ReciprocalGrad"),
    *("Relu", "Relu6", "Relu6Grad", "ReluGrad", "Rsqrt", "RsqrtGrad", "Selu"),
    *("SeluGrad", "Sigmoid", "SigmoidGrad", "Sign", "Sin", "Softmax", "Softplus"),
    *("SoftplusGrad", "Sqrt", "SqrtGrad", "Square", "SquaredDifference", "Sub"),
    *("Tanh", "TanhGrad", "Xdivy", "Xlogy"),
}


class Memory:
    """A piece of memory, which several tensors may share.

    Attributes:
        size: in bytes.
        kind: what it holds.
        depth: the number of loops around its creation.
        uses: how many operations still read it.
        value: of a small constant.
        length: of a list of tensors, the number of entries; `None` if not known.
        full: of a list, its bytes if it shared no memory with other lists.
        listed: whether it is an entry of a list.
    """

    def __init__(self, size: int, kind: str, depth: int = 0):
        self.size, self.kind, self.depth = size, kind, depth
        self.uses = 0
        self.value: Any = None
        self.length: int | None = None
        self.full = 0
        self.listed = False


class Live:
    """What is alive now, and what was alive at the peak.

    Attributes:
        now: kind -> bytes.
        peak: the largest number of bytes so far, without those on the host.
        host: the largest number of bytes on the host so far.
        at_peak: kind -> its bytes at that moment.
        unknown: the types of operations whose results have an unknown shape, which are
            counted as if unknown axes had one entry.
        filled: dtype, number and shape -> a tensor filled with it.
    """

    def __init__(self) -> None:
        self.now: Counter[str] = Counter()
        self.peak = self.host = 0
        self.at_peak: dict[str, int] = {}
        self.unknown: set[str] = set()
        self.filled: dict[tuple, Memory] = {}

    def add(self, kind: str, size: int) -> None:
        self.now[kind] += size
        self.host = max(self.host, self.now[HOST])
        total = sum(self.now.values()) - self.now[HOST]
        if total > self.peak:
            self.peak, self.at_peak = total, dict(self.now)

    def run(self, graph: Any, inputs: list[Memory]) -> None:
        """Follow a traced function with these inputs, which stay alive."""
        for memory in inputs:
            memory.uses += 1
            self.add(memory.kind, memory.size)
        _Body(self, graph, inputs, graph.outputs, 0).run()


class _Body:
    """One run of a function or of a loop's body."""

    def __init__(
        self, live: Live, graph: Any, inputs: list, wanted: Iterable, depth: int
    ):
        self.live, self.graph, self.depth = live, graph, depth
        self.wanted = list(wanted)
        _, self.places = needed(graph, self.wanted)
        self.reads = Counter(id(tensor) for tensor in self.wanted)
        for operation, places in self.places.items():
            self.reads.update(id(operation.inputs[place]) for place in places)
        self.at: dict[int, Memory] = {}
        for tensor, memory in zip(graph.inputs, inputs, strict=True):
            self._bind(tensor, memory)

    def run(self, first: set | None = None) -> list[Memory]:
        """Follow all operations; only those in `first`, if it is given."""
        beside = None
        for operation in in_order(self.places):
            if first is not None and operation not in first:
                continue
            if beside and any(t.op is beside for t in operation.inputs):
                self._end(beside)
                beside = None
            special = SPECIAL.get(operation.type, _Body._ordinary)
            special(self, operation)
            if beside:
                self._end(beside)
            beside = operation
        if beside:
            self._end(beside)
        return [] if first else [self.at[id(tensor)] for tensor in self.wanted]

    def _end(self, operation: Any) -> None:
        for place in self.places[operation]:
            self._release(self.at[id(operation.inputs[place])])

    def _bind(self, tensor: tf.Tensor, memory: Memory) -> None:
        self.at[id(tensor)] = memory
        memory.uses += self.reads[id(tensor)]

    def _new(self, tensor: tf.Tensor, kind: str = VALUES) -> Memory:
        memory = Memory(self._size(tensor), kind, self.depth)
        self.live.add(kind, memory.size)
        self._bind(tensor, memory)
        if memory.uses == 0:
            memory.uses = 1
            self._release(memory)
        return memory

    def _release(self, memory: Memory) -> None:
        memory.uses -= 1
        if memory.uses == 0:
            self.live.add(memory.kind, -memory.size)

    def _size(self, tensor: tf.Tensor) -> int:
        if tensor.dtype in (tf.resource, tf.variant):
            return 0
        shape = tensor.shape
        if not shape.is_fully_defined():
            self.live.unknown.add(tensor.op.type)
        axes = [] if shape.rank is None else [axis or 1 for axis in shape]
        return _entries(axes) * max(tensor.dtype.size or 0, 1)

    def _of(self, operation: Any, place: int = 0) -> Memory:
        return self.at[id(operation.inputs[place])]

    def _inputs(self, tensors: Iterable) -> list[Memory]:
        return [self.at.get(id(t), Memory(0, VALUES)) for t in tensors]

    def _ordinary(self, operation: Any) -> None:
        outputs = operation.outputs
        if operation.type in SAME:
            self._bind(outputs[0], self._of(operation))
            return
        first = int(operation.type in IN_PLACE and self._overwrites(operation))
        for tensor in outputs[first:]:
            self._new(tensor)

    def _constant(self, operation: Any) -> None:
        """It stays: TensorFlow makes it once, and keeps it for the next call."""
        memory = self._new(operation.outputs[0], CONSTANTS)
        memory.uses += 1
        memory.value = tf.get_static_value(operation.outputs[0])

    def _overwrites(self, operation: Any) -> bool:
        (tensor,) = operation.outputs[:1]
        size = self._size(tensor)
        memories = [self._of(operation, place) for place in self.places[operation]]
        for memory in memories:
            last = memory.uses == memories.count(memory)
            if last and memory.size == size and memory.kind in (VALUES, CARRIED):
                self._bind(tensor, memory)
                return True
        return False

    def _same_each(self, operation: Any) -> None:
        for place in self.places[operation]:
            self._bind(operation.outputs[place], self._of(operation, place))

    def _reserve(self, operation: Any) -> None:
        """A list of known length, counted as full when it is first written."""
        host = "CPU:0" in operation.device
        memory = self._new(operation.outputs[0], HOST if host else LISTS)
        memory.length = self._length(operation)

    def _empty(self, operation: Any) -> None:
        """A list to which a loop appends, for its derivative."""
        memory = self._new(operation.outputs[0], LISTS)
        memory.length = self._length(operation)

    def _length(self, operation: Any) -> int | None:
        count = self._value(operation.inputs[1])
        if count is None or count < 0:
            self.live.unknown.add(operation.type)
            return None
        return int(count)

    def _zeros(self, operation: Any) -> None:
        """Zeros like a list, which TensorFlow makes for derivatives that nothing reads,
        are a list."""
        tensor = operation.outputs[0]
        if tensor.dtype != tf.variant:
            self._filled(operation)
            return
        like, memory = self._of(operation), self._new(tensor, LISTS)
        memory.length, memory.full = like.length, like.full
        self._grow(memory, like.full)

    def _filled(self, operation: Any) -> None:
        """Many equal numbers of a known shape: made once for all such, and kept."""
        tensor = operation.outputs[0]
        of = operation.inputs[-1]
        value = 0 if operation.type == "ZerosLike" else self._value(of)
        if value is None or not tensor.shape.is_fully_defined():
            self._new(tensor)
            return
        key = (tensor.dtype, float(value), *tensor.shape)
        if key not in self.live.filled:
            self.live.filled[key] = self._new(tensor, CONSTANTS)
            self.live.filled[key].uses += 1
        else:
            self._bind(tensor, self.live.filled[key])

    def _value(self, tensor: tf.Tensor) -> Any:
        value = tf.get_static_value(tensor)
        if value is None and id(tensor) in self.at:
            value = self.at[id(tensor)].value  # given to this function from outside
        return value

    def _grow(self, memory: Memory, size: int) -> None:
        memory.size += size
        self.live.add(memory.kind, size)

    def _set(self, operation: Any) -> None:
        memory = self._of(operation)
        if memory.size == 0 and memory.length:
            self._grow(memory, memory.length * self._size(operation.inputs[2]))
        self._bind(operation.outputs[0], memory)

    def _push(self, operation: Any) -> None:
        memory, item = self._of(operation), self._of(operation, 1)
        length = memory.length or 1
        memory.full += length * item.size
        # What does not change in the loop, and what is in another list, is shared.
        if (
            item.depth == self.depth
            and not item.listed
            and item.kind not in (LISTS, HOST)
        ):
            item.listed = True
            self._grow(memory, length * item.size)
        self._bind(operation.outputs[0], memory)

    def _pop(self, operation: Any) -> None:
        for tensor in operation.outputs:
            self._bind(tensor, self._of(operation))

    def _call(self, operation: Any) -> None:
        body = function_of(operation, "f", self.graph)
        inputs = self._inputs(operation.inputs)
        read = [t.value_index for t in operation.outputs if self.reads[id(t)]]
        wanted = [body.outputs[index] for index in read]
        made = _Body(self.live, body, inputs, wanted, self.depth).run()
        self._results([operation.outputs[index] for index in read], made)

    def _results(self, outputs: Any, made: list[Memory]) -> None:
        """Results of a function, which it holds no longer."""
        for tensor, memory in zip(outputs, made, strict=True):
            self._bind(tensor, memory)
        for memory in made:
            self._release(memory)

    def _branches(self, operation: Any) -> None:
        inputs = self._inputs(operation.inputs[1:])
        for branch in ("else_branch", "then_branch"):
            body = function_of(operation, branch, self.graph)
            made = _Body(self.live, body, inputs, body.outputs, self.depth).run()
            if branch == "then_branch":
                self._results(operation.outputs, made)
            else:
                for memory in made:
                    self._release(memory)

    def _loop(self, operation: Any) -> None:
        body = function_of(operation, "body", self.graph)
        places = self.places[operation]
        inputs: list[Memory] = []
        for place, tensor in enumerate(body.inputs):
            if place not in places:
                inputs.append(Memory(0, VALUES))
            elif source(body.outputs[place]) is tensor or tensor.dtype == tf.variant:
                inputs.append(self._of(operation, place))
            else:
                memory = Memory(self._size(tensor), CARRIED, self.depth + 1)
                self.live.add(CARRIED, memory.size)
                memory.uses = 1
                inputs.append(memory)
        wanted = [body.outputs[place] for place in places]
        ahead: Counter[str] = Counter()
        if operation.get_attr("parallel_iterations") > 1:
            ahead = self._ahead(body, inputs, wanted)
        inside = _Body(self.live, body, inputs, wanted, self.depth + 1)
        for place in places:  # the loop itself no longer holds its variables
            if inputs[place].depth > self.depth and inputs[place].kind == CARRIED:
                inside._release(inputs[place])
        made = inside.run()
        self.live.now.subtract(ahead)
        for place, memory in zip(places, made, strict=True):
            if memory.depth > self.depth:
                memory.depth, memory.listed = self.depth, False
                self.live.now[memory.kind] -= memory.size
                memory.kind = CARRIED
                self.live.now[CARRIED] += memory.size
            self._bind(operation.outputs[place], memory)
            self._release(memory)

    def _ahead(self, body: Any, inputs: list, wanted: list) -> Counter:
        """The memory of what the next iteration computes before this one has ended,
        which is what depends on no result of it but on its number. It is alive now."""
        before = self.live.now.copy()
        copies = [copy.copy(memory) for memory in inputs]
        for memory in copies:
            memory.uses += 1  # it stays
        following = _Body(self.live, body, copies, wanted, self.depth + 1)
        waits = {
            id(tensor)
            for tensor, now in zip(body.inputs, body.outputs, strict=False)
            if source(now) is not tensor and not tensor.dtype.is_integer
        }
        following.run(independent(following.places, waits))
        held = self.live.now.copy()
        held.subtract(before)
        return held


SPECIAL: dict[str, Callable] = {
    "Const": _Body._constant,
    "EmptyTensorList": _Body._empty,
    "Fill": _Body._filled,
    "IdentityN": _Body._same_each,
    "If": _Body._branches,
    "PartitionedCall": _Body._call,
    "StatefulPartitionedCall": _Body._call,
    "StatelessIf": _Body._branches,
    "StatelessWhile": _Body._loop,
    "TensorListGetItem": _Body._pop,
    "TensorListPopBack": _Body._pop,
    "TensorListPushBack": _Body._push,
    "TensorListReserve": _Body._reserve,
    "TensorListSetItem": _Body._set,
    "While": _Body._loop,
    "ZerosLike": _Body._zeros,
}


def _entries(shape: Iterable) -> int:
    product = 1
    for axis in shape:
        product *= int(axis)
    return product
