"""Shuffled batches of arrays, which can start at any outer step."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tfbilevel._keras.arrays import Examples
from tfbilevel._keras.index_batches import permutation

Position = int | tf.Variable  # an outer step; a variable is read by each iterator


@dataclasses.dataclass(frozen=True, eq=False)
class Shuffled:
    """Endless batches of examples, shuffled for each pass.

    Every batch has the same size: the last step of a pass is completed with the first
    examples of the same permutation.

    Attributes:
        examples: the examples.
        size: number of examples in a batch.
        seed: of the permutations.
        draws: number of batches in a step; `None`: one, without an axis of its own.
    """

    examples: Examples
    size: int
    seed: int
    draws: int | None = None

    @property
    def steps(self) -> int:
        """The number of steps in a pass."""
        batches = math.ceil(self.examples.count / self.size)
        return math.ceil(batches / (self.draws or 1))

    def batches(self, position: Position) -> tf.data.Dataset:
        """The batches of the outer steps from a position on."""
        count, steps = self.examples.count, self.steps
        shape = [steps, *([self.draws] if self.draws else []), self.size]

        def one_pass(number: tf.Tensor) -> tf.data.Dataset:
            order = permutation(count, self.seed, number)
            entries = tf.math.floormod(tf.range(math.prod(shape)), count)
            index = tf.reshape(tf.gather(order, entries), shape)
            return tf.data.Dataset.from_tensor_slices(index)

        def from_step(step: tf.Tensor) -> Any:
            passes = tf.data.Dataset.range(step // steps, tf.int64.max)
            return passes.flat_map(one_pass).skip(tf.math.floormod(step, steps))

        def read(nothing: tf.Tensor) -> tf.Tensor:
            return tf.cast(tf.convert_to_tensor(position), tf.int64)

        start = tf.data.Dataset.from_tensors(0).map(read)
        unknown = start.flat_map(from_step).map(self.examples.at)
        endless = tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY)
        return unknown.apply(endless)


class Passes(tf.data.Dataset):
    """A dataset of one or more passes over arrays, which can start at any outer step.

    It always begins at the same step. `BilevelModel.fit` lets it begin at the model's
    outer step instead, so that every epoch is shuffled differently, and a resumed run
    continues with the same batches. `repeat`, `map`, `prefetch` and `with_options`
    keep this; what other methods return is a plain dataset.

    Args:
        make: (position, number of passes or `None` for no end) -> dataset.
        goes_on: whether the passes of one iterator are those of several ones, each of
            which begins where the last one ended.
        position: the first outer step.
        passes: number of passes; `None`: without end.
    """

    def __init__(
        self,
        make: Callable[[Position, int | None], tf.data.Dataset],
        goes_on: bool,
        position: Position = 0,
        passes: int | None = 1,
    ):
        self._make, self.goes_on = make, goes_on
        self._position, self._passes = position, passes
        self._made = make(position, passes)
        super().__init__(self._made._variant_tensor)  # pyright: ignore[reportCallIssue]

    def _inputs(self) -> list:
        return [self._made]

    @property
    def element_spec(self) -> Any:
        return self._made.element_spec

    def starting_at(self, position: Position, endless: bool = False) -> "Passes":
        """These passes from another outer step on, or as many as are asked for."""
        passes = None if endless else self._passes
        return Passes(self._make, self.goes_on, position, passes)

    def repeat(self, count: Any = None, name: str | None = None) -> "Passes":
        """More passes, each shuffled differently."""
        one, more = self._passes, -1 if count is None else int(count)
        passes = None if one is None or more < 0 else one * more
        return Passes(self._make, self.goes_on, self._position, passes)

    def map(self, *arguments: Any, **keywords: Any) -> "Passes":
        return self._then(lambda made: made.map(*arguments, **keywords))

    def prefetch(self, *arguments: Any, **keywords: Any) -> "Passes":
        return self._then(lambda made: made.prefetch(*arguments, **keywords))

    def with_options(self, *arguments: Any, **keywords: Any) -> "Passes":
        return self._then(lambda made: made.with_options(*arguments, **keywords))

    def _then(self, change: Callable) -> "Passes":
        def make(position: Position, passes: int | None) -> tf.data.Dataset:
            return change(self._make(position, passes))

        return Passes(make, self.goes_on, self._position, self._passes)


class FromTheOuterStep(keras.callbacks.Callback):
    """Lets each epoch's batches begin at the model's outer step.

    It must be the last callback: others load a backup when training begins.
    """

    def __init__(self) -> None:
        super().__init__()
        with tf.device("CPU:0"):  # where datasets read it
            self.position = tf.Variable(tf.constant(0, tf.int64), trainable=False)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.position.assign(self.model.outer_step)
