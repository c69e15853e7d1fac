"""Constraints h(x, y) <= 0 of the lower variables, and the start of multipliers."""

import dataclasses
import numbers
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tfbilevel._calculus import structure
from tfbilevel._calculus.aliases import Nest
from tfbilevel._core.arguments import require_number, takes
from tfbilevel._core.prepared import Prepared
from tfbilevel._core.problem import Problem
from tfbilevel._randomness.seeds import LOWER_LOSS, ROLE, Noisy, as_seed, folded

ONE_SIZE = (
    "all batches need one size: .batch(size, drop_remainder=True), or "
    "tb.pair(..., lower_batches=2), which fills up the last one"
)


@dataclasses.dataclass(frozen=True, eq=False)
class LowerConstraints:
    """The user's function h, whose values must not be positive.

    Attributes:
        function: (x, y) or (x, y, batch) -> any nest of floating tensors.
    """

    function: Callable[..., Nest]

    @property
    def reads_batches(self) -> bool:
        """Whether it is a function of the lower batch too."""
        return takes(self.function, 3)

    def __call__(self, x: Any, y: Any, batch: Any) -> Any:
        made = self.function(*((x, y, batch) if self.reads_batches else (x, y)))
        if any(leaf is None for leaf in tf.nest.flatten(made)):
            raise ValueError(
                "`constraints` must return h, a nest of floating tensors. Does the "
                f"function end without `return`? Received: {made!r}"
            )
        return made

    def values(self, here: Prepared, y: Nest, multiplier: Nest, draw: Any) -> Any:
        """h in the multipliers' dtype, after a check that it is like them.

        Its shapes must be static: a batch of another size would fail in the middle of
        a run otherwise, in whichever operation meets it first.

        Args:
            here: the problem of this outer step.
            y: the lower variables.
            multiplier: like h.
            draw: the number of the lower batch.
        """
        values = here.evaluated(self, y, draw)
        _require_floating(values)
        dtype = tf.nest.flatten(multiplier)[0].dtype
        values = tf.nest.map_structure(lambda v: tf.cast(v, dtype), values)
        rule = "return values like the multipliers"
        if self.reads_batches:
            rule += f" for every lower batch ({ONE_SIZE})"
        structure.require_like(values, multiplier, "constraints", rule)
        _require_static(values, self.reads_batches)
        return values

    def begun(self, problem: Problem, upper: Nest, lower: Nest, initial: Any) -> Any:
        """Multipliers at the start, in the dtype of y.

        Args:
            problem: the problem.
            upper, lower: its variables.
            initial: a number for all of them, or a nest like h.
        """
        dtype = tf.nest.flatten(lower)[0].dtype
        number = isinstance(initial, numbers.Real)
        if not number:
            initial = tf.nest.map_structure(
                lambda m: structure.scalar(
                    m if isinstance(m, numbers.Real) else structure.copied(m), dtype
                ),
                initial,
            )
        if self.reads_batches:
            if number:
                raise ValueError(
                    "`initial_multiplier` must be a nest like the values of the "
                    "constraints if these read the batch: how many there are is not "
                    "known before the first batch. Pass for example np.zeros([100]). "
                    f"Received: initial_multiplier={initial!r}"
                )
            return initial
        seed = folded(as_seed(problem.seed), ROLE, LOWER_LOSS)
        values = problem._evaluated(self, upper, lower, Noisy(None, seed))
        _require_floating(values)
        _require_static(values, False)
        like = tf.nest.map_structure(lambda v: tf.cast(v, dtype), values)
        if number:
            return tf.nest.map_structure(
                lambda v: tf.fill(v.shape, structure.scalar(initial, dtype)), like
            )
        rule = "be a number, or like the values of the constraints"
        structure.require_like(initial, like, "initial_multiplier", rule)
        return initial


def require_between(multiplier: Any, most: float) -> None:
    """Raise unless all initial multipliers are from 0 to the largest one."""
    rule = f"from 0 to `largest_multiplier`, {most:g}"
    if isinstance(multiplier, numbers.Real):
        name = "initial_multiplier"
        require_number(multiplier, name, lambda v: 0 <= v <= most, rule)
        return
    for leaf in tf.nest.flatten(multiplier):
        values = np.asarray(leaf)
        if values.dtype.kind not in "iuf":
            raise ValueError(
                "`initial_multiplier` must be a number, or a nest of numbers or arrays "
                f"like the values of the constraints. Received: {leaf!r}"
            )
        if not np.all((values >= 0) & (values <= most)):
            raise ValueError(
                f"`initial_multiplier` must be {rule}. Received: values from "
                f"{values.min():g} to {values.max():g}"
            )


def _require_floating(values: Any) -> None:
    """Raise unless there are values, and they are floating."""
    leaves = tf.nest.flatten(values)
    if not leaves:
        raise ValueError(
            "`constraints` must have at least one value. Use tb.MEHA without any. "
            f"Received: {values!r}"
        )
    for leaf in leaves:
        if not leaf.dtype.is_floating:
            raise ValueError(
                "`constraints` must be floating: return h, which must not be positive, "
                "and not whether it is. "
                f"Received: shape {leaf.shape}, dtype {leaf.dtype.name}"
            )


def _require_static(values: Any, of_batch: bool) -> None:
    """Raise unless all shapes are known while the step is traced.

    Args:
        values: h.
        of_batch: whether it is a function of the lower batch.
    """
    for leaf in tf.nest.flatten(values):
        if not leaf.shape.is_fully_defined():
            batches = f" If the size of the lower batch is not fixed, {ONE_SIZE}."
            raise ValueError(
                "`constraints` must return values of static shapes, because each has a "
                f"multiplier. Set their shapes.{batches * of_batch} "
                f"Received: shape {leaf.shape}"
            )
