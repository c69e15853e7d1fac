"""Networks of the published few-shot experiments, and their layers.

Each network is a list of blocks, and a block is a list of layers, so that a script can
assign some of the blocks to the lower level.
"""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tfbilevel._calculus.derivatives import fill_zeros, vjp

Block = list[keras.layers.Layer]


class BatchStatistics(keras.layers.Layer):
    """Normalises by the mean and variance of its input, also at test time.

    There are no moving averages. Predictions depend on the other examples of the call
    (they are transductive).

    Args:
        epsilon: added to the variance.
        scale, shift: whether the result is scaled and shifted by trained vectors.
        scale_initializer: the initializer of the scale.
        fused: use TensorFlow's fused kernels for float32 images. This does not work if
            the second derivative is taken through a loop over tasks
            (`tb.AugmentedLagrangian` with convolutions that differ between tasks):
            TensorFlow then raises an error about a tensor out of scope.
        **keywords: arguments of `keras.layers.Layer`.
    """

    def __init__(
        self,
        epsilon: float = 1e-5,
        scale: bool = True,
        shift: bool = True,
        scale_initializer: Any = "ones",
        fused: bool = True,
        **keywords: Any,
    ):
        super().__init__(**keywords)
        self.fused = fused
        self.epsilon, self.has_scale, self.has_shift = epsilon, scale, shift
        self.scale_initializer = keras.initializers.get(scale_initializer)

    def build(self, input_shape: Any) -> None:
        channels = (input_shape[-1],)
        self.scale = self.shift = None
        if self.has_scale:
            self.scale = self.add_weight(
                name="scale", shape=channels, initializer=self.scale_initializer
            )
        if self.has_shift:
            self.shift = self.add_weight(
                name="shift", shape=channels, initializer="zeros"
            )

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        ones = tf.ones(inputs.shape[-1:], inputs.dtype)
        scale = ones if self.scale is None else tf.convert_to_tensor(self.scale)
        shift = 0 * ones if self.shift is None else tf.convert_to_tensor(self.shift)
        if self.fused and inputs.shape.rank == 4 and inputs.dtype == tf.float32:
            return _fused(inputs, scale, shift, self.epsilon)
        return _standardised(inputs, self.epsilon)[0] * scale + shift


def _standardised(inputs: tf.Tensor, epsilon: float) -> tuple[tf.Tensor, tf.Tensor]:
    """The inputs with mean 0 and variance 1, and the scale factor."""
    axes = list(range(inputs.shape.rank - 1))
    # Not with tf.nn.moments, whose second derivative is wrong in TensorFlow.
    apart = inputs - tf.reduce_mean(inputs, axes, keepdims=True)
    factor = tf.math.rsqrt(tf.reduce_mean(apart * apart, axes) + epsilon)
    return apart * factor, factor


def _fused(
    inputs: tf.Tensor, scale: tf.Tensor, shift: tf.Tensor, epsilon: float
) -> Any:
    """Normalisation with TensorFlow's fused kernels for values and first derivatives.

    The second derivative is that of the plain formula, because TensorFlow's second
    derivative of the fused kernels is wrong inside a loop that is differentiated.
    """
    options = {"epsilon": epsilon, "is_training": True}

    @tf.custom_gradient
    def normalise(x: tf.Tensor, s: tf.Tensor, b: tf.Tensor) -> tuple:
        none = tf.zeros([0])
        made = tf.raw_ops.FusedBatchNormV3(
            x=x, scale=s, offset=b, mean=none, variance=none, **options
        )
        kept = [tf.stop_gradient(part) for part in made[3:]]

        def gradient(dy: tf.Tensor) -> tuple:
            return first(x, s, dy, *kept)

        return made[0], gradient

    @tf.custom_gradient
    def first(x: tf.Tensor, s: tf.Tensor, dy: tf.Tensor, *kept: tf.Tensor) -> tuple:
        names = [f"reserve_space_{number}" for number in (1, 2, 3)]
        made = tf.raw_ops.FusedBatchNormGradV3(
            y_backprop=dy,
            x=x,
            scale=s,
            **dict(zip(names, kept, strict=True)),
            **options,
        )

        def gradient(*directions: tf.Tensor) -> tuple:
            pulled = vjp(plain, x, s, dy)[2](directions)
            return *fill_zeros(pulled, (x, s, dy)), *map(tf.zeros_like, kept)

        return tuple(made[:3]), gradient

    def plain(x: tf.Tensor, s: tf.Tensor, dy: tf.Tensor) -> tuple:
        axes = [0, 1, 2]
        z, factor = _standardised(x, epsilon)
        ds, db = tf.reduce_sum(dy * z, axes), tf.reduce_sum(dy, axes)
        count = tf.cast(tf.size(x) / tf.size(s), x.dtype)
        return (s * factor * (dy - db / count - z * ds / count), ds, db), None

    return normalise(inputs, scale, shift)


class CosineHead(keras.layers.Layer):
    """Ten times the cosine between the feature (x, w0) and the class (W_k, b_k).

    Args:
        ways: number of classes.
        constant: w0.
        seed: the seed of W, normal with standard deviation 0.01; b starts at 0.001.
        **keywords: arguments of `keras.layers.Layer`.
    """

    def __init__(self, ways: int, constant: float = 1e-3, seed: int = 0, **keywords):
        super().__init__(**keywords)
        self.ways, self.constant, self.seed = ways, constant, seed

    def build(self, input_shape: Any) -> None:
        normal = keras.initializers.RandomNormal(stddev=0.01, seed=self.seed)
        self.kernel = self.add_weight(
            name="kernel", shape=(input_shape[-1], self.ways), initializer=normal
        )
        self.bias = self.add_weight(
            name="bias",
            shape=(self.ways,),
            initializer=keras.initializers.Constant(1e-3),
        )

    def compute_output_shape(self, input_shape: Any) -> Any:
        return (*input_shape[:-1], self.ways)

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        kernel, bias = (tf.convert_to_tensor(v) for v in (self.kernel, self.bias))
        squares = tf.reduce_sum(inputs * inputs, axis=-1, keepdims=True)
        lengths = tf.sqrt(squares + self.constant**2)
        classes = tf.sqrt(tf.reduce_sum(kernel * kernel, axis=0) + bias * bias)
        return 10 * (inputs @ kernel + self.constant * bias) / (lengths * classes)


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
