"""What a BilevelModel keeps between outer steps besides its two models."""

from typing import Any

import keras
import tensorflow as tf

from tfbilevel._finite import NonFiniteError
from tfbilevel._workarounds.tracing import outside_traces

# How the outer step is compiled: not decided yet, as a graph, with XLA.
UNDECIDED, GRAPH, XLA = 0, 1, 2

SKIPPED = "skipped"  # the log entry that counts the steps passed over


def random_states(*models: Any) -> list:
    """States of seed generators, which Keras counts as no weights."""
    weights = {id(v) for model in models for v in model.weights}
    states = {id(v): v for model in models for v in model.variables}
    return [v for number, v in states.items() if number not in weights]


class Progress(keras.layers.Layer):
    """How far training is, saved with the weights."""

    def __init__(self, random_states: list, **keywords: Any):
        super().__init__(**keywords)
        # Of what the losses sample without a seed of their own.
        self.base = keras.random.SeedGenerator()
        # Keras saves no seed generator by itself.
        self.random_states = [*random_states, self.base.state]

        def scalar(name: str, dtype: str, value: int) -> Any:
            return self.add_weight(
                name=name,
                shape=(),
                dtype=dtype,
                trainable=False,
                initializer=keras.initializers.Constant(value),
            )

        self.step = scalar("step", "int64", 0)
        # Not int32: TensorFlow keeps int32 variables on the host, where a step that XLA
        # has compiled for another device cannot reach them.
        self.bad_code = scalar("bad_code", "int64", -1)
        self.compilation = scalar("compilation", "int64", UNDECIDED)
        self.built = True

    def count(self) -> None:
        self.step.assign(self.step.value + 1)

    def raise_if_nonfinite(self) -> None:
        code = int(self.bad_code.numpy())
        if code >= 0:
            self.bad_code.assign(-1)
            raise NonFiniteError(code, int(self.step.numpy()), in_fit=True)


class Start(keras.layers.Layer):
    """Where inner solves start, as variables of the upper level."""

    def __init__(self, lower: keras.layers.Layer):
        super().__init__(name="start")
        for index, variable in enumerate(lower.trainable_variables):
            copy = self.add_weight(
                name=f"{index}_{variable.name}",
                shape=variable.shape,
                dtype=variable.dtype,
                initializer="zeros",
            )
            copy.assign(variable)
        self.built = True


class Carried(keras.layers.Layer):
    """A method's state in variables, so that it is saved with the weights.

    What a method counts in int32 is kept in int64, which XLA reaches on every device.
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
    """A mean that is NaN, not zero, where nothing was counted."""

    def result(self) -> tf.Tensor:
        return self.total / tf.cast(self.count, self.total.dtype)


class Trackers:
    """Means of the step's metrics over an epoch, and how many steps were skipped. Not
    part of what is saved.

    Args:
        device: where the step's variables are: its means must be there too.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.of: dict[str, keras.metrics.Metric] = {}

    def named(self, names: Any) -> dict[str, keras.metrics.Metric]:
        new = [name for name in names if name not in self.of]

        def make() -> list[keras.metrics.Metric]:
            with tf.device(self.device):  # another thread knows no scope of the user's
                return [
                    keras.metrics.Sum(name)
                    if name == SKIPPED
                    else MeanOfSome(name=name)
                    for name in new
                ]

        self.of.update(zip(new, outside_traces(make), strict=True))
        return {name: self.of[name] for name in names}
