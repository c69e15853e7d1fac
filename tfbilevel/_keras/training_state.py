"""The state of a BilevelModel between outer steps, apart from its two models."""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from tfbilevel._core.nonfinite import NonFiniteError
from tfbilevel._keras.levels import Levels
from tfbilevel._workarounds.tracing import outside_traces

# How the outer step is compiled: not decided yet, as a graph, with XLA.
UNDECIDED, GRAPH, XLA = 0, 1, 2

SKIPPED = "skipped"  # the log entry that counts skipped steps


def random_states(*models: Any) -> list:
    """States of seed generators, which Keras does not count as weights."""
    weights = {id(v) for model in models for v in model.weights}
    states = {id(v): v for model in models for v in model.variables}
    return [v for number, v in states.items() if number not in weights]


class Progress(keras.layers.Layer):
    """The progress of training, saved with the weights."""

    def __init__(self, levels: Levels):
        super().__init__(name="progress")
        # The seed for sampling in the losses without a seed of their own.
        self.base = levels.base
        # Keras does not save seed generators itself.
        states = random_states(levels.upper, levels.lower)
        self.random_states = [*states, levels.base.state]

        def scalar(name: str, dtype: str, value: int) -> Any:
            return self.add_weight(
                name=name,
                shape=(),
                dtype=dtype,
                trainable=False,
                initializer=keras.initializers.Constant(value),
            )

        with tf.device(levels.device):
            self.step = scalar("step", "int64", 0)
            # Not int32: TensorFlow keeps int32 variables on the host, where a step that
            # XLA compiled for another device cannot reach them.
            self.bad_code = scalar("bad_code", "int64", -1)
            self.compilation = scalar("compilation", "int64", UNDECIDED)
        self.built = True

    def load_own_variables(self, store: Any) -> None:
        if len(store.keys()) != len(self.weights):  # 0: Keras tries other places too
            raise ValueError(
                "The file does not fit: either a version before 0.1 saved it, without "
                "the seed of the losses' samples, or the models had other random "
                "layers. To load both models and count outer steps from 0, pass "
                "load_weights(path, skip_mismatch=True). "
                "Received: other variables of training's progress than these "
                f"{len(self.weights)}"
            )
        super().load_own_variables(store)

    def count(self) -> None:
        self.step.assign(self.step.value + 1)

    @property
    def xla(self) -> bool | None:
        """Whether the step is compiled with XLA; `None`: not decided yet."""
        chosen = int(self.compilation.numpy())
        return None if chosen == UNDECIDED else chosen == XLA

    def decide(self, xla: bool | None) -> None:
        self.compilation.assign(UNDECIDED if xla is None else XLA if xla else GRAPH)

    def raise_if_nonfinite(self) -> None:
        code = int(self.bad_code.numpy())
        if code >= 0:
            self.bad_code.assign(-1)
            raise NonFiniteError(code, int(self.step.numpy()), in_fit=True)


class Carried(keras.layers.Layer):
    """A method's state in variables, so that it is saved with the weights.

    Int32 counters of a method are stored as int64, which XLA can use on every device.
    """

    def __init__(self, state: Any):
        super().__init__(name="method_state")
        self._like = tf.nest.map_structure(lambda leaf: leaf.dtype, state)
        self._cells = []
        for index, leaf in enumerate(tf.nest.flatten(state)):
            cell = self.add_weight(
                name=f"state_{index}",
                shape=leaf.shape,
                dtype="int64" if leaf.dtype == tf.int32 else leaf.dtype.name,
                trainable=False,
                initializer="zeros",
            )
            cell.assign(leaf)
            self._cells.append(cell)
        self.built = True

    def read(self) -> Any:
        values = [
            tf.cast(tf.convert_to_tensor(cell.value), dtype)
            for cell, dtype in zip(
                self._cells, tf.nest.flatten(self._like), strict=True
            )
        ]
        return tf.nest.pack_sequence_as(self._like, values)

    def write(self, state: Any) -> None:
        for cell, leaf in zip(self._cells, tf.nest.flatten(state), strict=True):
            cell.assign(tf.cast(leaf, cell.dtype))


class MeanOfSome(keras.metrics.Mean):
    """A mean that is NaN instead of zero if nothing was counted."""

    def result(self) -> tf.Tensor:
        return self.total / tf.cast(self.count, self.total.dtype)


class Trackers:
    """Means of the step's metrics over an epoch, and the number of skipped steps.

    They are not saved.

    Args:
        device: the device of the step's variables, where the means must be too.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.of: dict[str, keras.metrics.Metric] = {}

    def named(self, names: Any) -> dict[str, keras.metrics.Metric]:
        new = [name for name in names if name not in self.of]

        def make() -> list[keras.metrics.Metric]:
            with tf.device(self.device):  # another thread does not see the user's scope
                return [
                    keras.metrics.Sum(name)
                    if name == SKIPPED
                    else MeanOfSome(name=name)
                    for name in new
                ]

        self.of.update(zip(new, outside_traces(make), strict=True))
        return {name: self.of[name] for name in names}

    def update(self, logs: dict[str, Any], committed: Any = True) -> dict[str, Any]:
        """The means over the steps so far, after adding one more.

        Args:
            logs: the step's metrics, by name.
            committed: whether the step was assigned; if not, only SKIPPED counts.
        """
        for name, tracker in self.named(logs).items():
            kept = name == SKIPPED or committed
            value = tf.reduce_mean(tf.cast(logs[name], tf.float32))
            weight = tf.cast(kept, tf.float32)
            tracker.update_state(tf.where(kept, value, 0.0), sample_weight=weight)
        return {name: self.of[name].result() for name in logs}

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Restores all means on exit, including those created within."""
        known = list(self.of.values())
        with kept([v for tracker in known for v in tracker.variables]):
            yield
        for tracker in self.of.values():
            if tracker not in known:
                tracker.reset_state()


@contextlib.contextmanager
def kept(variables: list) -> Iterator[None]:
    """Restores the variables' values on exit."""
    before = [variable.numpy() for variable in variables]
    try:
        yield
    finally:
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)
