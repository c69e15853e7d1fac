"""Rates of dropout layers, by noise that has a derivative in the rate."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbilevel._core.arguments import require_choice
from tfbilevel._jobs.tuning.hyperparameter import Hyperparameter, Setting

KINDS = (keras.layers.Dropout, keras.layers.GaussianDropout)
PER = ("global", "per-layer")


class Dropout(Hyperparameter):
    r"""Rates of the network's dropout layers.

    A mask of zeros and ones has no derivative in its rate v. In training, each layer's
    mask is therefore replaced by Gaussian noise with the same mean and variance
    (Gaussian dropout, Srivastava and others, 2014),

        x * (1 + sqrt(v / (1 - v)) e),        e ~ N(0, 1)

    one e for each entry, or of the layer's `noise_shape`. The tuned network has its
    layers back, `keras.layers.Dropout(v)`: they do nothing when it predicts, and count
    when it is trained on. Layers: `Dropout`, `SpatialDropout*` and `GaussianDropout`.

    Args:
        per: "per-layer": one rate for each layer. "global": one.
        start, range, name: see `tb.hyper.Hyperparameter`; on a linear scale.

    Example:
        >>> tb.hyper.Dropout("global", start=0.2).range
        (0.01, 0.8)
    """

    def __init__(
        self,
        per: str = "per-layer",
        start: float = 0.1,
        range: tuple[float, float] = (0.01, 0.8),
        name: str | None = None,
    ):
        super().__init__(start, range, name)
        self.per = per

    def entries(self, setting: Setting) -> Sequence[str] | None:
        require_choice(self.per, "per", PER)
        interval = self.interval()
        if interval.low <= 0 or interval.high >= 1:
            raise ValueError(
                f"`range` of {self.name} must be above 0 and below 1: the noise has no "
                f"derivative at 0, and no bound at 1. Received: range={self.range}"
            )
        layers = _layers(setting.network)
        if not layers:
            raise ValueError(
                f"`search` must not hold {self.name} for a network without dropout "
                "layers. Add keras.layers.Dropout(0.1) to the network, or leave it "
                f"out. Received: {setting.network.name}"
            )
        if self.per == "global":
            return None
        return [layer.name for layer in layers]

    @contextlib.contextmanager
    def during(self, value: Any, setting: Setting) -> Iterator[None]:
        layers = _layers(setting.network)
        rates = tf.unstack(tf.broadcast_to(value, [len(layers)]))
        for layer, rate in zip(layers, rates, strict=True):
            vars(layer)["call"] = _noisy(layer, rate)
        try:
            yield
        finally:
            for layer in layers:
                del vars(layer)["call"]

    def built_in(self, value: np.ndarray, network: keras.Model) -> keras.Model:
        layers = _layers(network)
        rates = np.broadcast_to(value, len(layers))
        for layer, rate in zip(layers, rates, strict=True):
            layer.rate = float(rate)
            if getattr(layer, "seed_generator", None) is None:
                # Keras makes none for a rate of zero, and allows no new ones later.
                vars(layer)["seed_generator"] = keras.random.SeedGenerator(layer.seed)
        return network


def _layers(network: keras.Model) -> list:
    return [one for one in network._flatten_layers() if isinstance(one, KINDS)]


def _noisy(layer: Any, rate: Any) -> Callable:
    deviation = tf.sqrt(rate / (1 - rate))

    def call(inputs: Any, training: bool = False) -> Any:
        if not training:
            return inputs
        shape = getattr(layer, "noise_shape", None)
        if hasattr(layer, "_get_noise_shape"):  # SpatialDropout
            shape = layer._get_noise_shape(inputs)
        if shape is None:
            shape = tf.shape(inputs)
        else:
            known = tf.unstack(tf.shape(inputs))
            shape = [a if b is None else b for a, b in zip(known, shape, strict=True)]
            shape = tf.stack(shape)
        noise = tf.random.normal(shape, dtype=inputs.dtype)
        return inputs * (1 + tf.cast(deviation, inputs.dtype) * noise)

    return call
