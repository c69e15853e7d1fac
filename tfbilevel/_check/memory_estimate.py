"""How much memory an outer step will need, before any of it is used."""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tfbilevel._calculus import structure
from tfbilevel._calculus.aliases import Nest
from tfbilevel._check.live_tensors import (
    CARRIED,
    CONSTANTS,
    HOST,
    LISTS,
    VALUES,
    Live,
    Memory,
)
from tfbilevel._core.batches import Batches, require_batches
from tfbilevel._core.method import Method, require_method
from tfbilevel._core.problem import Problem, require_problem
from tfbilevel._optimizers.update_rule import UpdateRule

# TensorFlow's allocator gives pieces of up to twice the size that was asked for.
# Measured at the peak of three steps (`Unroll`, with convolutions too, and `Implicit`):
# 8 to 12 percent on the whole.
ROUNDING = 0.1

UPPER, LOWER, SLOTS = "upper variables", "lower variables", "upper optimizer"
STATE, BATCHES, READ = "state of the method", "batches", "read by the losses"
ROWS = (UPPER, LOWER, SLOTS, STATE, BATCHES, READ, CONSTANTS, LISTS, CARRIED, VALUES)
MADE = (LISTS, CARRIED, VALUES)
ROUNDED, PEAK = "allocator's rounding", "peak"
UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("bytes", 1))


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """The result of `tb.memory_estimate`, in bytes.

    Attributes:
        rows: what holds memory at the peak -> bytes: the variables, the slots of the
            upper optimizer, the state of the method (the inner optimizer's slots too),
            the batches, what else the losses read, the stored iterates of an inner
            loop (or its tape), the variables of loops, what losses, gradients and
            products compute (activations, gradients, vectors of a linear solver), and
            a tenth of what the step makes for the allocator's rounding.
        peak: their sum.
        host: stored iterates in the host's memory, which `peak` does not include;
            on a CPU that is the same memory.
        lower_gradient: of what the step computes at once, the part of one lower loss
            and gradient; microbatches divide it.
        notes: limits of this estimate, one sentence each.
    """

    rows: dict[str, int]
    peak: int
    host: int
    lower_gradient: int
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, int]:
        """All numbers in one dictionary, as for a data frame."""
        return {
            **self.rows,
            PEAK: self.peak,
            HOST: self.host,
            "one lower gradient": self.lower_gradient,
        }

    def __str__(self) -> str:
        numbers = self.to_dict()
        unit, size = next(
            ((unit, size) for unit, size in UNITS if self.peak >= 10 * size), UNITS[-1]
        )
        width = max(map(len, numbers))
        line = "-" * (width + 12)
        lines = [f"{'memory':{width}}  {unit:>10}", line]
        for name, number in numbers.items():
            if name == PEAK:
                lines.append(line)
            if name != HOST or number:
                lines.append(f"{name:{width}}  {number / size:10,.1f}")
        return "\n".join([*lines, *self.notes])


def memory_estimate(
    problem: Problem,
    method: Method,
    upper: Nest,
    lower: Nest,
    batches: Batches,
    *,
    upper_optimizer: keras.optimizers.Optimizer | str | None = None,
) -> MemoryEstimate:
    """The memory that an outer step will need, without making one.

    The step is traced, which computes nothing, and its operations are followed in the
    order in which TensorFlow can run them. Each result counts from its operation to its
    last use. So it holds for your own methods and losses too, and needs no data: shapes
    are enough.

    Measured in eight cases by TensorFlow's own count of its tensors, the peak was
    between 0.9 and 1.25 times the estimate (docs/memory.md). Not in it: TensorFlow
    itself (about 500 MB of a process), memory that the process has freed but keeps,
    scratch memory of single operations such as convolutions, what XLA makes of a step,
    and datasets. Lists of unknown length, as in recurrent layers, count one entry.

    Cost: one or two traces of the step, some seconds. No memory.

    Args:
        problem: the problem; in microbatches (`tb.microbatched`) or over tasks too.
        method: the method.
        upper: x, a nest of tensors, arrays, variables or `tf.TensorSpec`.
        lower: y, likewise.
        batches: the batches of one outer step, likewise.
        upper_optimizer: whose slots are counted; `None`: nobody's.

    Returns:
        The estimate; print it to see it as a table.

    Raises:
        ValueError: if a shape is not known, for sparse and ragged batches, and for
            losses whose operations TensorFlow cannot list.

    Example:
        >>> problem = tb.Problem(
        ...     upper_loss=lambda x, y, batch: tf.reduce_sum(y**2),
        ...     lower_loss=lambda x, y, batch: tf.reduce_sum((y - x) ** 4),
        ... )
        >>> inner = tb.InnerSolver(keras.optimizers.SGD(0.1), steps=50)
        >>> vector = tf.TensorSpec([1000], tf.float64)
        >>> estimate = tb.memory_estimate(
        ...     problem, tb.Unroll(inner), vector, vector, tb.Batches(None, None))
        >>> estimate.rows["stored iterates and tapes"]  # 50 times 1000 times 8 bytes
        400000
    """
    require_problem(problem)
    require_method(method)
    require_batches(batches)
    upper = _specifications(upper, "upper")
    lower = _specifications(lower, "lower")
    structure.require_floating(upper, "upper")
    structure.require_floating(lower, "lower")
    batches = batches._replace(
        upper=_specifications(batches.upper, "batches.upper"),
        lower=_specifications(batches.lower, "batches.lower"),
    )
    with tf.device(None):  # an operation with a device has it from the step itself
        state = _result(lambda x, y: method.init(problem, x, y), upper, lower)
        slots: Any = ()
        if upper_optimizer is not None:
            rule = UpdateRule(upper_optimizer, "upper_optimizer")
            slots = _result(rule.init, upper).slots
        given = {UPPER: upper, LOWER: lower, BATCHES: batches}
        live = _followed(
            lambda x, y, data, carried: problem.step(method, x, y, data, carried)[:3],
            {**given, STATE: state},
            slots,
        )
        gradient = _followed(
            lambda x, y, data: problem.prepared(x, data).lower_gradient(y), given
        )
    rows = {name: live.at_peak.get(name, 0) for name in ROWS}
    rows[ROUNDED] = round(ROUNDING * _made(live))
    unknown = ", ".join(sorted(live.unknown))
    note = f"Results of unknown size, counted as one entry: those of {unknown}."
    return MemoryEstimate(
        rows,
        peak=sum(rows.values()),
        host=live.host,
        lower_gradient=_made(gradient),
        notes=(note,) if unknown else (),
    )


def _followed(function: Callable, given: dict[str, Any], slots: Any = ()) -> Live:
    """What is alive while the function runs with these arguments, by what they are."""
    traced = tf.function(function, autograph=False)
    graph = traced.get_concrete_function(*given.values()).graph
    live = Live()
    live.now[SLOTS] = sum(map(_bytes, tf.nest.flatten(slots)))
    inputs = [
        Memory(_bytes(leaf), kind)
        for kind, nest in given.items()
        for leaf in tf.nest.flatten(nest)
        if leaf is not None
    ]
    inputs += [Memory(_bytes(leaf), READ) for leaf in graph.external_captures]
    live.run(graph, inputs)
    return live


def _made(live: Live) -> int:
    return sum(live.at_peak.get(kind, 0) for kind in MADE)


def _bytes(leaf: Any) -> int:
    """The bytes of a tensor or its specification, or of the variable of a handle."""
    parts = [leaf]
    if leaf.dtype == tf.resource:
        parts = getattr(getattr(leaf, "_handle_data", None), "shape_and_type", [])
    return sum(
        tf.TensorShape(part.shape).num_elements() * tf.as_dtype(part.dtype).size
        for part in parts
    )


def _result(function: Callable, *arguments: Any) -> Any:
    """The specifications of what a function of such tensors returns."""
    traced = tf.function(function, autograph=False)
    made = traced.get_concrete_function(*arguments).structured_outputs
    return tf.nest.map_structure(
        lambda leaf: tf.TensorSpec(leaf.shape, leaf.dtype), made
    )


def _specifications(nest: Any, name: str) -> Any:
    leaves = tf.nest.flatten(nest)
    made = [None if leaf is None else _specification(leaf) for leaf in leaves]
    for leaf, path in zip(made, structure.paths(nest, name), strict=True):
        known = isinstance(leaf, tf.TensorSpec) and leaf.shape.is_fully_defined()
        if leaf is not None and not known:
            raise ValueError(
                f"`{name}` must have known sizes, from which the memory follows. Pass "
                "dense arrays, or tf.TensorSpec(shape, dtype) with the largest batch "
                f"that will occur. Received: {path} = {leaf}"
            )
    return tf.nest.pack_sequence_as(nest, made)


def _specification(leaf: Any) -> Any:
    if isinstance(leaf, tf.TypeSpec):
        return leaf
    composite = isinstance(leaf, tf.SparseTensor | tf.RaggedTensor)
    if not composite and hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return tf.TensorSpec(leaf.shape, leaf.dtype)  # nothing is copied
    return tf.type_spec_from_value(leaf if composite else tf.convert_to_tensor(leaf))
