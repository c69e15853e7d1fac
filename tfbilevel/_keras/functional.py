"""Keras models as functions of their weights."""

import dataclasses
from typing import Any

import keras
import tensorflow as tf

from tfbilevel._workarounds import functions_inline


@dataclasses.dataclass(frozen=True, eq=False)
class Functional:
    """A Keras model as a pure function, made by `tb.functional`.

    Attributes:
        model: the Keras model.
    """

    model: keras.layers.Layer

    def initial(self) -> list[tf.Tensor]:
        """The current values of the model's trainable variables, in its order."""
        return [tf.identity(v.value) for v in self.model.trainable_variables]

    def __call__(
        self, variables: Any, inputs: Any, training: bool | None = None
    ) -> Any:
        """The model's outputs at these values of its trainable variables.

        Args:
            variables: tensors like `initial()`, in any nest that flattens to it.
            inputs: the model's inputs.
            training: passed to the model; `None`: not passed.
        """
        own = self.model.trainable_variables
        values = tf.nest.flatten(variables)
        if len(values) != len(own):
            raise ValueError(
                "`variables` must hold one tensor per trainable variable of the "
                "model, in the order of `.initial()`. "
                f"Received: {len(values)} tensors for {len(own)} variables"
            )
        keywords = {} if training is None else {"training": training}
        scope = keras.StatelessScope(list(zip(own, values, strict=True)))
        with functions_inline(own), scope:
            return self.model(inputs, **keywords)


def functional(model: keras.layers.Layer) -> Functional:
    """A Keras model or layer as a pure function of its trainable variables.

        outputs = functional(model)(variables, inputs, training=None)

    Gradients flow to `variables`. The model itself is not changed: its non-trainable
    state (BatchNorm statistics, dropout seeds) is read, and updates that a call would
    write to it are dropped.

    Args:
        model: a built Keras model or layer.

    Returns:
        A callable with `.initial()`, the list of current values to start from.

    Raises:
        ValueError: if the model is not built, or on a call with the wrong number of
            variables.

    Example:
        >>> dense = keras.layers.Dense(2, kernel_initializer="ones")
        >>> dense.build((None, 3))
        >>> network = tb.functional(dense)
        >>> kernel, bias = network.initial()
        >>> network([2.0 * kernel, bias], tf.ones([1, 3])).numpy().tolist()
        [[6.0, 6.0]]
    """
    require_built(model, "model")
    return Functional(model)


def require_built(layer: Any, name: str) -> None:
    """Raise unless `layer` is a built Keras layer with trainable variables."""
    if not isinstance(layer, keras.layers.Layer):
        raise ValueError(
            f"`{name}` must be a Keras layer or model. Received: {name}={layer!r}"
        )
    if not _has_all_variables(layer):
        raise ValueError(
            f"`{name}` must be built, so that its variables exist. Call it once on a "
            f"batch, give it an Input, or call {name}.build(input_shape). "
            f"Received: {layer!r}, not built"
        )
    if not layer.trainable_variables:
        raise ValueError(
            f"`{name}` must have trainable variables: they are the variables of its "
            f"level. Received: {layer!r} without any"
        )


def _has_all_variables(layer: keras.layers.Layer) -> bool:
    """Whether the layer is built, or created all its variables in its constructor."""
    if layer.built:
        return True
    makes_more = type(layer).build not in (keras.layers.Layer.build, keras.Model.build)
    if makes_more and not isinstance(layer, keras.Sequential):
        return False
    return all(_has_all_variables(part) for part in layer._layers) and (
        bool(layer.variables) or type(layer).build is keras.layers.Layer.build
    )
