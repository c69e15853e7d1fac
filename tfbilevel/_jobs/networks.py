"""Fresh classifiers from what the user gave, and their probabilities."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

# Keras's cross-entropy of probabilities cuts them off there, too.
SMALLEST = 1e-7
# Layers that are adapted to data, which a clone would forget.
ADAPTED = (
    keras.layers.Normalization,
    keras.layers.Discretization,
    keras.layers.TextVectorization,
    keras.layers.StringLookup,
    keras.layers.IntegerLookup,
    keras.layers.Hashing,
)


# Codes by which Keras makes parts of its messages bold.
ANSI = re.compile(r"\x1b\[\d+m")


def fresh(
    model: Any,
    shape: tuple[int, ...],
    classes: int,
    seed: int | None,
    argument: str = "model",
) -> keras.Model:
    """A new classifier with random weights.

    Args:
        model: a Keras model, which is cloned; or a function () -> Keras model, or
            (shape, classes) -> Keras model.
        shape: the shape of one example.
        classes: number of classes.
        seed: the seed of the initial weights; `None`: no seed is set.
        argument: what errors call `model`.

    Raises:
        ValueError: if it is none of these, has no weights to train, does not take
            such examples, or has another number of outputs.
    """
    network = new_network(model, shape, classes, seed, argument)
    found = output_shapes(network, shape, argument)
    if found != [(classes,)]:
        raise ValueError(
            f"`{argument}` must have one output per class, {classes} here. End it with "
            f"keras.layers.Dense({classes}). Received: outputs of shape "
            f"{', '.join(map(str, found))} per example"
        )
    return network


def new_network(
    model: Any,
    shape: tuple[int, ...],
    outputs: int | None,
    seed: int | None,
    argument: str = "model",
) -> keras.Model:
    """A new network with random weights, as in `fresh`, for any number of outputs.

    Args:
        model, shape, seed, argument: as for `fresh`.
        outputs: what a function with two parameters receives as the second one.
    """
    if seed is not None:
        keras.utils.set_random_seed(seed)
    if isinstance(model, keras.Model):
        try:
            network = keras.models.clone_model(model, clone_function=_copied)
        except (ValueError, NotImplementedError, TypeError) as error:
            raise ValueError(
                f"`{argument}` must be a Keras model that keras.models.clone_model can "
                "clone, or a function that returns a new one. Received: "
                f"{type(model).__name__}, {error}"
            ) from error
    elif callable(model):
        network = model(shape, outputs) if _takes_both(model) else model()
    else:
        network = None
    if not isinstance(network, keras.Model):
        raise ValueError(
            f"`{argument}` must be a Keras model, or a function that returns a new "
            f"one. Received: {argument}={model!r}"
            + (f", which returned {network!r}" if callable(model) else "")
        )
    return network


def _copied(layer: keras.layers.Layer) -> keras.layers.Layer:
    """A new layer; a layer with a vocabulary or moments of data stays itself."""
    if isinstance(layer, ADAPTED):
        return layer
    return type(layer).from_config(layer.get_config())


def predicted(network: keras.Model, x: np.ndarray) -> np.ndarray:
    """The network's outputs for examples, which may be texts, [n, K]."""
    return network.predict(as_tensor(x), batch_size=1000, verbose=0)


def as_tensor(x: np.ndarray) -> Any:
    """Texts as a tensor, which Keras asks for; numbers as they are."""
    if x.dtype.kind not in "US":
        return x
    with tf.device("CPU:0"):
        return tf.constant(x)


def _takes_both(function: Callable) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return sum(p.default is p.empty and p.kind <= 1 for p in parameters) == 2


def output_shapes(
    network: keras.Model, shape: tuple[int, ...], argument: str = "model"
) -> list[tuple]:
    """The shape of each output for one example.

    Raises:
        ValueError: if the network does not take such examples, or has no weights to
            train.
    """
    try:
        given = network.inputs or ()
        text = any(each.dtype == "string" for each in given)
        nothing = tf.fill((2, *shape), "") if text else tf.zeros((2, *shape))
        outputs = tf.nest.flatten(network(nothing, training=False))
        shapes = [tuple(tf.convert_to_tensor(each).shape[1:]) for each in outputs]
    except Exception as error:
        lines = ANSI.sub("", str(error)).splitlines() + [type(error).__name__]
        # Keras says first in which layer it happened.
        reason = next(s for s in lines if s.strip() and not s.startswith("Exception"))
        raise ValueError(
            f"`{argument}` must take examples of shape {shape}, like `x`. Change its "
            f"keras.Input, or reshape `x`. Received: {reason}"
        ) from error
    if not network.trainable_variables:
        raise ValueError(f"`{argument}` must have weights to train. Received: none")
    return shapes


def gives_probabilities(network: keras.Model, x: Any) -> bool:
    """Whether the outputs are probabilities (a softmax at the end) or logits."""
    outputs = np.asarray(network(as_tensor(x), training=False), np.float64)
    return bool((outputs >= 0).all() and np.allclose(outputs.sum(axis=1), 1, atol=1e-3))


def log_probabilities(outputs: Any, probabilities: bool) -> tf.Tensor:
    """log p of every class, from a network's outputs, [n, K], at least float32."""
    outputs = tf.convert_to_tensor(outputs)
    if outputs.dtype.size < 4:
        outputs = tf.cast(outputs, tf.float32)
    if probabilities:
        return tf.math.log(tf.clip_by_value(outputs, SMALLEST, 1 - SMALLEST))
    return tf.nn.log_softmax(outputs)
