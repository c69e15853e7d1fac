"""The networks of a few-shot learner: the published one, and the user's."""

import inspect
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbilevel._core.arguments import takes_two
from tfbilevel._jobs.few_shot.layers import BatchStatistics, CosineHead
from tfbilevel._jobs.networks import fresh

SMALLEST_IMAGE = 16  # four times halved


def new_network(
    network: Any, like: np.ndarray, ways: int, seed: int | None, cosine: bool
) -> keras.Model:
    """A new network with one output per class.

    Args:
        network: the learner's argument.
        like: examples, for their shape and dtype.
        ways: number of classes.
        seed: the seed of the initial weights; `None`: no seed is set.
        cosine: whether the published network ends with a cosine head, not a linear one.

    Raises:
        ValueError: as `networks.fresh`, for data the published network is not for, or
            a model whose number of outputs cannot be changed.
    """
    shape = like.shape[1:]
    if network is None:
        if seed is not None:
            keras.utils.set_random_seed(seed)
        return published(shape, like.dtype == np.uint8, ways, cosine)
    if isinstance(network, keras.Model):
        if network.built and network.output_shape[-1] != ways:
            network = _with_outputs(network, ways)
    elif callable(network) and not takes_two(network) and _takes_one(network):
        made = network
        return fresh(lambda: made(ways), shape, ways, seed, "network")
    return fresh(network, shape, ways, seed, "network")


def _takes_one(function: Callable) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(p.default is p.empty and p.kind <= 1 for p in parameters)


def published(
    shape: tuple[int, ...], integers: bool, ways: int, cosine: bool
) -> keras.Model:
    """Four blocks of 64 filters, as in IAPTT-GM's paper for Omniglot.

    Args:
        shape: of an image.
        integers: whether pixels go from 0 to 255.
        ways: number of classes.
        cosine: whether the head is one of cosines, or linear.
    """
    if len(shape) != 3 or min(shape[:2]) < SMALLEST_IMAGE:
        raise ValueError(
            "`network` must be given, unless `x` holds images, [n, height, width, "
            f"channels], of at least {SMALLEST_IMAGE} x {SMALLEST_IMAGE}. Pass a "
            "function ways -> Keras model. Received: network=None and examples of "
            f"shape {shape}"
        )
    blocks: list[keras.layers.Layer] = []
    for _ in range(4):
        blocks += [
            keras.layers.Conv2D(64, 3, padding="same"),
            keras.layers.ReLU(),
            keras.layers.MaxPooling2D(2),
            keras.layers.BatchNormalization(epsilon=1e-5),
        ]
    scaled = [keras.layers.Rescaling(1 / 255)] if integers else []
    head = CosineHead(ways) if cosine else keras.layers.Dense(ways)
    return keras.Sequential(
        [keras.Input(shape), *scaled, *blocks, keras.layers.Flatten(), head]
    )


def _with_outputs(network: keras.Model, ways: int) -> keras.Model:
    """A clone whose last layer with weights has another number of outputs."""
    last = _last_with_weights(network)

    def cloned(layer: keras.layers.Layer) -> keras.layers.Layer:
        config = layer.get_config()
        if layer is last:
            name = next((n for n in ("units", "ways") if n in config), None)
            if name is None:
                raise ValueError(
                    f"`network` must have one output per class, {ways} here. End it "
                    f"with keras.layers.Dense({ways}), or pass a function ways -> "
                    f"Keras model. Received: {network.output_shape[-1]} outputs of "
                    f"a {type(layer).__name__}"
                )
            config = {**config, name: ways}
        return layer.__class__.from_config(config)

    return keras.models.clone_model(network, clone_function=cloned)


def require_new(make: Callable[[], keras.Model]) -> None:
    """Raise if a function returns the same network twice."""
    if make() is make():
        raise ValueError(
            "`network` must return a new Keras model at every call. Build the model "
            "within the function, or pass the model itself. Received: a function that "
            "returned the same model twice"
        )


def split(network: keras.Model) -> tuple[keras.Model, keras.Model]:
    """The features of a network, and its head: the last layer with weights.

    The two models share the network's layers. What follows the head's layer (a softmax)
    belongs to the head.

    Raises:
        ValueError: if the network is no chain there, or has no weights before it.
    """
    try:
        between = _before_head(network)
        encoder = keras.Model(network.inputs[0], between)
        head = keras.Model(between, network.outputs[0])
    except (ValueError, AttributeError, TypeError, IndexError) as error:
        raise ValueError(
            "`network` must be a Sequential or functional model that ends with its "
            "head, such as keras.layers.Dense, for a method that adapts the head "
            'only. Change it, or take method="maml". Received: '
            f"{type(network).__name__} {network.name!r}, {error}"
        ) from error
    if not encoder.trainable_variables:
        raise ValueError(
            "`network` must have trained layers before its head, for a method that "
            'adapts the head only. Add some, or take method="maml". Received: '
            f"weights in one layer only, {head.layers[-1].name!r}"
        )
    return encoder, head


def _before_head(network: keras.Model) -> Any:
    """The input of the last layer with weights, in the network's own graph.

    `layer.input` would be that in the first of the graphs that a layer is part of.
    """
    tensor = network.outputs[0]
    while True:
        layer, index, _ = tensor._keras_history
        (before,) = layer._inbound_nodes[index].input_tensors  # ValueError: no chain
        if layer.trainable_variables:
            return before
        tensor = before


def _last_with_weights(network: keras.Model) -> keras.layers.Layer:
    return [layer for layer in network.layers if layer.trainable_variables][-1]


# Normalisation.


def normalisations(network: keras.Model) -> list[keras.layers.BatchNormalization]:
    """The layers of batch normalisation, at any depth."""
    layers = network._flatten_layers()
    return [y for y in layers if isinstance(y, keras.layers.BatchNormalization)]


def transductive(network: keras.Model) -> keras.Model:
    """A copy that normalises by the statistics of whatever it is given.

    Raises:
        ValueError: for a subclassed model with batch normalisation, which cannot be
            copied, or normalisation of another axis than the last.
    """
    if not normalisations(network):
        return network

    def cloned(layer: keras.layers.Layer) -> keras.layers.Layer:
        if not isinstance(layer, keras.layers.BatchNormalization):
            return layer.__class__.from_config(layer.get_config())
        if layer.axis not in (-1, layer.input_spec.ndim - 1):
            raise ValueError(f"normalisation of axis {layer.axis}")
        return BatchStatistics(
            layer.epsilon, layer.scale, layer.center, name=layer.name, dtype=layer.dtype
        )

    try:
        made = keras.models.clone_model(
            network, clone_function=cloned, recursive=isinstance(network, keras.Model)
        )
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ValueError(
            "`network` must be a Sequential or functional model, with "
            "BatchNormalization of the last axis, for transductive=True. Change it, or "
            f"take transductive=False. Received: {type(network).__name__}, {error}"
        ) from error
    _copy_layers(network, made)
    return made


def _copy_layers(source: Any, target: Any) -> None:
    """Assign the weights of a network to its copy of `transductive`."""
    for one, other in zip(source.layers, target.layers, strict=True):
        if isinstance(one, keras.Model):
            _copy_layers(one, other)
        elif isinstance(other, BatchStatistics):
            pairs = (other.scale, getattr(one, "gamma", None)), (other.shift, one.beta)
            for mine, given in pairs:
                if mine is not None:
                    mine.assign(given)
        else:
            other.set_weights(one.get_weights())


def keep_statistics(network: keras.Model, examples: tf.Tensor) -> None:
    """Set the moving statistics of batch normalisation to those of some examples."""
    layers = normalisations(network)
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    rates = without_dropout(network)
    for layer in layers:
        layer.momentum = 0.0
    network(examples, training=True)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    for layer, rate in rates:
        layer.rate = rate


def without_dropout(network: keras.Model) -> list[tuple[Any, float]]:
    """Set the rates of dropout to 0; returns the layers and their rates before.

    Batch normalisation takes the statistics of its input in training mode only, in
    which dropout is active too.
    """
    kinds = (
        keras.layers.Dropout,
        keras.layers.AlphaDropout,
        keras.layers.GaussianDropout,
    )
    layers = [layer for layer in network._flatten_layers() if isinstance(layer, kinds)]
    rates = [(layer, layer.rate) for layer in layers]
    for layer in layers:
        layer.rate = 0.0
    return rates
