"""Layers of few-shot networks: normalisation by the input, and a head of cosines."""

from typing import Any

import keras
import tensorflow as tf

from tfbilevel._calculus.derivatives import fill_zeros, vjp


@keras.saving.register_keras_serializable("tfbilevel")
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

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "epsilon": self.epsilon,
            "scale": self.has_scale,
            "shift": self.has_shift,
            "scale_initializer": keras.initializers.serialize(self.scale_initializer),
            "fused": self.fused,
        }

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


@keras.saving.register_keras_serializable("tfbilevel")
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

    def get_config(self) -> dict[str, Any]:
        own = {"ways": self.ways, "constant": self.constant, "seed": self.seed}
        return {**super().get_config(), **own}

    def compute_output_shape(self, input_shape: Any) -> Any:
        return (*input_shape[:-1], self.ways)

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        kernel, bias = (tf.convert_to_tensor(v) for v in (self.kernel, self.bias))
        squares = tf.reduce_sum(inputs * inputs, axis=-1, keepdims=True)
        lengths = tf.sqrt(squares + self.constant**2)
        classes = tf.sqrt(tf.reduce_sum(kernel * kernel, axis=0) + bias * bias)
        return 10 * (inputs @ kernel + self.constant * bias) / (lengths * classes)
