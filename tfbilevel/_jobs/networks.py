"""Fresh classifiers from what the user gave, and their probabilities."""

import inspect
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

# Keras's cross-entropy of probabilities cuts them off there, too.
SMALLEST = 1e-7


def fresh(model: Any, shape: tuple[int, ...], classes: int, seed: int) -> keras.Model:
    """A new classifier with random weights.

    Args:
        model: a Keras model, which is cloned; or a function () -> Keras model, or
            (shape, classes) -> Keras model.
        shape: the shape of one example.
        classes: number of classes.
        seed: the seed of the initial weights.

    Raises:
        ValueError: if it is none of these, has no weights to train, does not take
            such examples, or has another number of outputs.
    """
    network = new_network(model, shape, classes, seed)
    _require_fitting(network, shape, classes)
    return network


def new_network(
    model: Any, shape: tuple[int, ...], outputs: int | None, seed: int
) -> keras.Model:
    """A new network with random weights, as in `fresh`, for any number of outputs.

    Args:
        model: as for `fresh`.
        shape: the shape of one example.
        outputs: what a function with two parameters receives as the second one.
        seed: the seed of the initial weights.
    """
    keras.utils.set_random_seed(seed)
    if isinstance(model, keras.Model):
        try:
            network = keras.models.clone_model(model)
        except (ValueError, NotImplementedError, TypeError) as error:
            raise ValueError(
                "`model` must be a Keras model that keras.models.clone_model can "
                "clone, or a function that returns a new one. Received: "
                f"{type(model).__name__}, {error}"
            ) from error
    elif callable(model):
        network = model(shape, outputs) if _takes_both(model) else model()
    else:
        network = None
    if not isinstance(network, keras.Model):
        raise ValueError(
            "`model` must be a Keras model, or a function that returns a new one. "
            f"Received: model={model!r}"
            + (f", which returned {network!r}" if callable(model) else "")
        )
    return network


def outputs_of(network: keras.Model, shape: tuple[int, ...]) -> list[tuple]:
    """The shape of each output for one example, without the axis of the examples.

    Raises:
        ValueError: if the network does not take such examples, or has no weights to
            train.
    """
    try:
        outputs = network(tf.zeros((2, *shape)), training=False)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"`model` must take examples of shape {shape}, like `x`. Change its "
            f"keras.Input, or reshape `x`. Received: {reason}"
        ) from error
    if not network.trainable_variables:
        raise ValueError("`model` must have weights to train. Received: none")
    flat = tf.nest.flatten(outputs)
    return [tuple(tf.convert_to_tensor(one).shape[1:]) for one in flat]


def _takes_both(function: Callable) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return sum(p.default is p.empty and p.kind <= 1 for p in parameters) == 2


def _require_fitting(network: keras.Model, shape: tuple, classes: int) -> None:
    found = outputs_of(network, shape)
    if found != [(classes,)]:
        raise ValueError(
            f"`model` must have one output per class, {classes} here. End it with "
            f"keras.layers.Dense({classes}). Received: outputs of shape "
            f"{', '.join(map(str, found))} per example"
        )


def gives_probabilities(network: keras.Model, x: Any) -> bool:
    """Whether the outputs are probabilities (a softmax at the end) or logits."""
    outputs = np.asarray(network(x, training=False), np.float64)
    return bool((outputs >= 0).all() and np.allclose(outputs.sum(axis=1), 1, atol=1e-3))


def log_probabilities(outputs: Any, probabilities: bool) -> tf.Tensor:
    """log p of every class, from a network's outputs, [n, K], at least float32."""
    outputs = tf.convert_to_tensor(outputs)
    if outputs.dtype.size < 4:
        outputs = tf.cast(outputs, tf.float32)
    if probabilities:
        return tf.math.log(tf.clip_by_value(outputs, SMALLEST, 1 - SMALLEST))
    return tf.nn.log_softmax(outputs)
