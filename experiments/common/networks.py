"""Networks of the published few-shot experiments, and their layers.

Each network is a list of blocks, and a block is a list of layers, so that a script can
assign some of the blocks to the lower level.
"""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tfbilevel._jobs.few_shot.layers import BatchStatistics
from tfbilevel._jobs.few_shot.layers import CosineHead as CosineHead

Block = list[keras.layers.Layer]


class Residual(keras.layers.Layer):
    """The sum of two branches.

    Args:
        main, skip: layers applied one after the other.
        **keywords: arguments of `keras.layers.Layer`.
    """

    def __init__(self, main: Block, skip: Block, **keywords: Any):
        super().__init__(**keywords)
        self.main, self.skip = list(main), list(skip)

    def build(self, input_shape: Any) -> None:
        for branch in (self.main, self.skip):
            shape = input_shape
            for layer in branch:
                layer.build(shape)
                shape = layer.compute_output_shape(shape)

    def compute_output_shape(self, input_shape: Any) -> Any:
        for layer in self.skip:
            input_shape = layer.compute_output_shape(input_shape)
        return input_shape

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        def through(branch: Block) -> tf.Tensor:
            outputs = inputs
            for layer in branch:
                outputs = layer(outputs)
            return outputs

        return through(self.main) + through(self.skip)


class Initializers:
    """Makes initializers, each with a different seed."""

    def __init__(self, seed: int):
        self._seed = 1000 * seed

    def __call__(self, kind: Callable[..., Any], **options: Any) -> Any:
        self._seed += 1
        return kind(seed=self._seed, **options)


GLOROT = keras.initializers.GlorotUniform


def pool_norm_relu_conv4(filters: int, make: Initializers) -> list[Block]:
    """Conv, pool, norm, ReLU: IAPTT-GM on miniImageNet and tieredImageNet (32)."""
    return [
        [_wide(filters, make), _pool(), BatchStatistics(), _relu()] for _ in range(4)
    ]


def relu_pool_norm_conv4(filters: int, make: Initializers) -> list[Block]:
    """Conv, ReLU, pool, norm: IAPTT-GM on Omniglot (64)."""
    return [
        [_wide(filters, make), _relu(), _pool(), BatchStatistics()] for _ in range(4)
    ]


def norm_relu_pool_conv4(filters: int, make: Initializers) -> list[Block]:
    """Conv, norm, ReLU, pool: stocBiO's meta-learning and MAML (64 or 32)."""
    uniform = keras.initializers.RandomUniform
    return [
        [
            keras.layers.Conv2D(
                filters, 3, padding="same", kernel_initializer=make(GLOROT)
            ),
            BatchStatistics(scale_initializer=make(uniform, minval=0.0, maxval=1.0)),
            _relu(),
            _pool(),
        ]
        for _ in range(4)
    ]


def shifted_conv4(filters: int, make: Initializers) -> list[Block]:
    """Conv without bias, norm without scale, ReLU except in the last block, pool: the
    penalty paper's network (64 filters on Omniglot, 32 on miniImageNet)."""
    return [
        [
            _bare(filters, 3, make),
            BatchStatistics(1e-3, scale=False),
            *([_relu()] if number < 3 else []),
            _pool(),
        ]
        for number in range(4)
    ]


def resnet12(make: Initializers) -> list[Block]:
    """Four residual stages of three convolutions: IAPTT-GM's network, 512 features."""
    blocks = []
    for stage, filters in enumerate((64, 128, 256, 512)):
        unit = [_bare(filters, 3, make), BatchStatistics(), _relu()]
        second = [_bare(filters, 3, make), BatchStatistics(), _relu()]
        main = [*unit, *second, _bare(filters, 3, make), BatchStatistics()]
        skip = [_bare(filters, 1, make), BatchStatistics()]
        block: Block = [Residual(main, skip), _relu()]
        if stage == 2:
            # The padded values are not negative, so zeros have the effect of -inf.
            block.append(keras.layers.ZeroPadding2D(1))
        if stage < 3:
            block.append(_pool())
        blocks.append(block)
    blocks[-1].append(keras.layers.GlobalAveragePooling2D())
    return blocks


def residual_encoder(make: Initializers) -> list[Block]:
    """Four residual stages and two 1 x 1 convolutions: the penalty paper's network,
    384 features."""
    blocks: list[Block] = []
    for filters in (64, 96, 128, 256):
        main: Block = []
        for _ in range(3):
            main += [
                _bare(filters, 3, make),
                BatchStatistics(1e-3, scale=False),
                keras.layers.LeakyReLU(0.1),
            ]
        skip: Block = [keras.layers.Conv2D(filters, 1, kernel_initializer=make(GLOROT))]
        pool = keras.layers.MaxPooling2D(2, padding="same")
        blocks.append([Residual(main, skip), pool])
    last = [
        keras.layers.Conv2D(
            2048, 1, activation="relu", kernel_initializer=make(GLOROT)
        ),
        keras.layers.GlobalAveragePooling2D(),
        keras.layers.Dense(384, kernel_initializer=make(GLOROT)),
    ]
    return [*blocks[:-1], [*blocks[-1], *last]]


def softplus_block(filters: int, make: Initializers) -> Block:
    """Conv, pool, norm, softplus: makes the lower level nonconvex (IAPTT-GM)."""
    softplus = keras.layers.Activation("softplus")
    return [_wide(filters, make), _pool(), BatchStatistics(), softplus]


def linear_head(ways: int, features: int, make: Initializers, kind: str) -> Block:
    """Flatten and a dense layer.

    Args:
        ways: number of classes.
        features: number of entries after flattening.
        make: the initializers.
        kind: "small": normal with standard deviation 0.01, bias 0. "uniform": within
            1 / sqrt(features), also the bias, as in PyTorch's default. "glorot":
            Glorot's uniform, bias 0. "zero": all 0, so that the first step changes only
            the head.
    """
    normal = keras.initializers.RandomNormal
    uniform = keras.initializers.RandomUniform
    edge = features**-0.5
    kernel, bias = {
        "small": (make(normal, stddev=0.01), "zeros"),
        "uniform": (
            make(uniform, minval=-edge, maxval=edge),
            make(uniform, minval=-edge, maxval=edge),
        ),
        "glorot": (make(keras.initializers.GlorotUniform), "zeros"),
        "zero": ("zeros", "zeros"),
    }[kind]
    dense = keras.layers.Dense(ways, kernel_initializer=kernel, bias_initializer=bias)
    return [keras.layers.Flatten(), dense]


def sequential(blocks: list[Block], shape: tuple[int, ...], name: str) -> keras.Model:
    """The blocks as one built model."""
    layers = [layer for block in blocks for layer in block]
    return keras.Sequential([keras.Input(shape), *layers], name=name)


def _wide(filters: int, make: Initializers) -> keras.layers.Layer:
    normal = make(keras.initializers.RandomNormal, stddev=(2 / (9 * filters)) ** 0.5)
    return keras.layers.Conv2D(filters, 3, padding="same", kernel_initializer=normal)


def _bare(filters: int, size: int, make: Initializers) -> keras.layers.Layer:
    return keras.layers.Conv2D(
        filters,
        size,
        padding="same",
        use_bias=False,
        kernel_initializer=make(GLOROT),
    )


def _pool() -> keras.layers.Layer:
    return keras.layers.MaxPooling2D(2)


def _relu() -> keras.layers.Layer:
    return keras.layers.ReLU()
