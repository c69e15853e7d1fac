"""Keras models that temporarily compute in float64."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf


@contextlib.contextmanager
def in_float64(models: Sequence[keras.layers.Layer]) -> Iterator[None]:
    """While it is open, the models' layers compute in float64.

    Trainable variables take float64 values (from a `keras.StatelessScope`); the others
    are read as float64. Everything is restored afterwards. Quantised layers stay
    unchanged.
    """
    layers = {id(k): k for one in models for k in one._flatten_layers()}
    # The functional model inside a Sequential is not listed among its layers.
    inside = [getattr(k, "_functional", None) for k in layers.values()]
    layers.update((id(k), k) for k in inside if k is not None)
    variables = {id(v): v for one in models for v in one.variables}
    with contextlib.ExitStack() as stack:

        def put(owner: Any, name: str, value: Any) -> None:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)

        for layer in layers.values():
            if layer.dtype_policy.quantization_mode is None:
                put(layer, "_dtype_policy", keras.DTypePolicy("float64"))
            # A model casts its inputs to the dtype of its InputLayers.
            inputs = list(getattr(layer, "_inputs", None) or ())
            inputs += [layer] if isinstance(layer, keras.layers.InputLayer) else []
            for one in inputs:
                if keras.backend.is_float_dtype(one.dtype):
                    put(one, "_dtype", "float64")
        for variable in variables.values():
            if keras.backend.is_float_dtype(variable.dtype):
                put(variable, "_dtype", "float64")
                if not variable.trainable:
                    put(variable, "_value", tf.cast(variable._value, tf.float64))
        yield


def to_float64(values: Any) -> Any:
    """The nest with its floating-point leaves in float64."""

    def cast(leaf: Any) -> Any:
        if leaf is None:
            return None
        leaf = leaf if tf.is_tensor(leaf) else tf.convert_to_tensor(leaf)
        return tf.cast(leaf, tf.float64) if leaf.dtype.is_floating else leaf

    return tf.nest.map_structure(cast, values)


def leaves_float64(graph: Any) -> bool:
    """Whether a graph casts a float64 tensor to lower precision, or mixes the two.

    Image transformations use float32 coordinates for images of any dtype.
    """
    for operation in graph.get_operations():
        types = {t.dtype for t in operation.inputs if t.dtype.is_floating}
        if tf.float64 not in types:
            continue
        if operation.type == "Cast":
            types |= {t.dtype for t in operation.outputs if t.dtype.is_floating}
        calls = any(part.type.endswith("func") for part in operation.op_def.attr)
        if len(types) > 1 and not calls:
            return True
    return False
