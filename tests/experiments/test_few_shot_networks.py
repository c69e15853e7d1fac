"""The networks of the few-shot papers: layers by hand, parameter counts, sizes."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from common import networks

from tfbilevel._jobs.few_shot import layers


def standardised(inputs: np.ndarray, epsilon: float) -> np.ndarray:
    axes = tuple(range(inputs.ndim - 1))
    apart = inputs - inputs.mean(axes)
    return apart / np.sqrt((apart**2).mean(axes) + epsilon)


@pytest.mark.parametrize("shape", [(6, 5, 5, 3), (7, 3)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_batch_statistics(shape, dtype):
    inputs = np.random.default_rng(0).normal(2.0, 3.0, shape)
    layer = networks.BatchStatistics(1e-3, dtype=dtype)
    layer.build(shape)
    layer.scale.assign([1.0, 2.0, -3.0])
    layer.shift.assign([0.5, 0.0, 1.0])
    want = standardised(inputs, 1e-3) * [1.0, 2.0, -3.0] + [0.5, 0.0, 1.0]
    got = layer(tf.constant(inputs, dtype))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    # Nothing is carried: the second call is the first.
    np.testing.assert_array_equal(got, layer(tf.constant(inputs, dtype)))
    assert not layer.non_trainable_variables
    bare = networks.BatchStatistics(1e-3, scale=False, shift=False, dtype=dtype)
    got = bare(tf.constant(inputs, dtype))
    np.testing.assert_allclose(got, standardised(inputs, 1e-3), rtol=1e-4, atol=1e-5)


def products(dtype: str, way: str) -> list[np.ndarray]:
    """The gradient of sum(sin(y)), and that of its product with fixed directions."""
    generator = np.random.default_rng(1)
    inputs = tf.constant(generator.normal(size=(3, 4, 5, 5, 2)), dtype)
    scale, shift = (
        tf.constant(generator.normal(size=(3, 2)) + 1, dtype) for _ in range(2)
    )
    along = [
        tf.constant(generator.normal(size=leaf.shape), dtype)
        for leaf in (inputs, scale, shift)
    ]
    layer = networks.BatchStatistics(1e-3, dtype=dtype)
    layer.build((4, 5, 5, 2))

    def one(task: tuple) -> tf.Tensor:
        layer_scale, layer_shift = task[1], task[2]
        if dtype == "float32":
            made = layers._fused(task[0], layer_scale, layer_shift, 1e-3)
        else:
            plain, _ = layers._standardised(task[0], 1e-3)
            made = plain * layer_scale + layer_shift
        return tf.reduce_sum(tf.sin(made))

    def total(parts: tuple) -> tf.Tensor:
        if way == "map":
            signature = tf.TensorSpec([], dtype)
            return tf.reduce_sum(tf.map_fn(one, parts, fn_output_signature=signature))
        if way == "vectorized":
            return tf.reduce_sum(tf.vectorized_map(one, parts))
        return tf.add_n([one(tuple(leaf[i] for leaf in parts)) for i in range(3)])

    @tf.function(autograph=False, jit_compile=way == "xla")
    def run(*parts: tf.Tensor) -> tuple:
        with tf.GradientTape() as outer:
            outer.watch(parts)
            with tf.GradientTape() as inner:
                inner.watch(parts)
                value = total(parts)
            gradient = inner.gradient(value, parts)
        second = outer.gradient(gradient, parts, output_gradients=along)
        # The shift's second derivative passes through sin alone.
        return gradient, second

    return [np.array(leaf) for leaf in tf.nest.flatten(run(inputs, scale, shift))]


def test_fused_kernels_refuse_a_second_derivative_through_a_loop():
    """Where those that TensorFlow registers give wrong numbers."""
    with pytest.raises(ValueError, match="out of scope"):
        products("float32", "map")


@pytest.mark.parametrize("way", ["plain", "vectorized", "xla"])
def test_fused_kernels_have_the_plain_formula_s_derivatives(way):
    want = products("float64", "plain")
    for got, exact in zip(products("float32", way), want, strict=True):
        error = np.linalg.norm(got - exact) / np.linalg.norm(exact)
        assert error < 1e-5, error


def test_cosine_head():
    layer = networks.CosineHead(3, seed=4)
    inputs = np.random.default_rng(0).normal(size=(5, 6)).astype("float32")
    got = layer(inputs)
    kernel, bias = (np.array(v, "float64") for v in (layer.kernel, layer.bias))
    np.testing.assert_allclose(bias, 1e-3, rtol=1e-6)
    for row, image in enumerate(inputs):
        for column in range(3):
            a = np.append(image.astype("float64"), 1e-3)
            b = np.append(kernel[:, column], bias[column])
            cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            np.testing.assert_allclose(got[row, column], 10 * cosine, rtol=1e-4)


MINI, DIGIT, CIFAR = (84, 84, 3), (28, 28, 1), (32, 32, 3)

# Names, shapes, parameters and entries of the output after flattening. Published
# counts: 111,424 and 28,640 and 3,543,424 (the penalty paper's); the others by hand.
COUNTS: list[tuple[str, tuple, Any, int, int]] = [
    ("shifted_conv4", DIGIT, 64, 111_424, 64),
    ("shifted_conv4", MINI, 32, 28_640, 800),
    ("residual_encoder", MINI, None, 3_543_424, 384),
    # 9 * 1 * 64 + 64 + 128, and three times 9 * 64 * 64 + 64 + 128.
    ("norm_relu_pool_conv4", DIGIT, 64, 768 + 3 * 37_056, 64),
    ("relu_pool_norm_conv4", DIGIT, 64, 768 + 3 * 37_056, 64),
    # 9 * 3 * 64 + 64 + 128 first.
    ("norm_relu_pool_conv4", MINI, 64, 1920 + 3 * 37_056, 1600),
    ("norm_relu_pool_conv4", CIFAR, 64, 1920 + 3 * 37_056, 256),
    # 9 * 3 * 32 + 32 + 64, and three times 9 * 32 * 32 + 32 + 64.
    ("pool_norm_relu_conv4", MINI, 32, 960 + 3 * 9312, 800),
    # A stage from a to b channels: 9 (a + 2 b) b + a b + 8 b.
    (
        "resnet12",
        MINI,
        None,
        sum(
            9 * (a + 2 * b) * b + a * b + 8 * b
            for a, b in ((3, 64), (64, 128), (128, 256), (256, 512))
        ),
        512,
    ),
]


@pytest.mark.parametrize(("name", "shape", "filters", "count", "width"), COUNTS)
def test_parameter_counts(name, shape, filters, count, width):
    make = networks.Initializers(0)
    build = getattr(networks, name)
    blocks = build(make) if filters is None else build(filters, make)
    assert len(blocks) == 4
    model = networks.sequential(blocks, shape, "features")
    assert model.count_params() == count
    assert np.prod(model.output_shape[1:]) == width


def test_resnet12_halves_as_published():
    """84, 42, 21, 11 and 11: zeros around the third stage before its pooling."""
    blocks = networks.resnet12(networks.Initializers(0))
    sides = [
        networks.sequential(blocks[:n], MINI, "part").output_shape[1] for n in (1, 2, 3)
    ]
    assert sides == [42, 21, 11]


def test_the_residual_encoder_is_the_penalty_paper_s():
    """specs: penalty 5. 84, 42, 21, 11 and 6."""
    blocks = networks.residual_encoder(networks.Initializers(0))
    sides = [
        networks.sequential([*blocks[:n], blocks[n][:2]], MINI, "part").output_shape[1]
        for n in range(4)
    ]
    assert sides == [42, 21, 11, 6]
    for block in blocks:
        norms, slopes = block[0].main[1::3], block[0].main[2::3]
        assert [layer.epsilon for layer in norms] == [1e-3] * 3
        assert [layer.negative_slope for layer in slopes] == [pytest.approx(0.1)] * 3
    assert blocks[-1][2].activation is keras.activations.relu
    assert blocks[-1][4].activation is keras.activations.linear


def test_a_residual_is_a_sum():
    first, second = keras.layers.Dense(2), keras.layers.Dense(2)
    layer = networks.Residual([first, keras.layers.ReLU()], [second])
    inputs = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
    found = layer(inputs)
    (a, b), (c, d) = first.get_weights(), second.get_weights()
    want = np.maximum(inputs @ a + b, 0) + inputs @ c + d
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)


def test_softplus_head_is_2_by_2_by_32():
    block = networks.softplus_block(32, networks.Initializers(0))
    assert networks.sequential([block], (5, 5, 32), "x").output_shape[1:] == (2, 2, 32)


def test_networks_are_seeded():
    def weights(seed: int) -> list[np.ndarray]:
        blocks = networks.norm_relu_pool_conv4(4, networks.Initializers(seed))
        return networks.sequential(blocks, DIGIT, "x").get_weights()

    for a, b in zip(weights(3), weights(3), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(weights(3)[0], weights(4)[0])
    # No two layers share a seed.
    assert not np.array_equal(weights(3)[4], weights(3)[8])


CONV, NORM, RELU, POOL = "Conv2D", "BatchStatistics", "ReLU", "MaxPooling2D"
ORDERS = {
    "pool_norm_relu_conv4": [[CONV, POOL, NORM, RELU]] * 4,
    "relu_pool_norm_conv4": [[CONV, RELU, POOL, NORM]] * 4,
    "norm_relu_pool_conv4": [[CONV, NORM, RELU, POOL]] * 4,
    "shifted_conv4": [[CONV, NORM, RELU, POOL]] * 3 + [[CONV, NORM, POOL]],
    "resnet12": [
        ["Residual", RELU, POOL],
        ["Residual", RELU, POOL],
        ["Residual", RELU, "ZeroPadding2D", POOL],
        ["Residual", RELU, "GlobalAveragePooling2D"],
    ],
    "residual_encoder": [["Residual", POOL]] * 3
    + [["Residual", POOL, CONV, "GlobalAveragePooling2D", "Dense"]],
}


def names(layers: list) -> list[str]:
    return [type(layer).__name__ for layer in layers]


def built(name: str) -> list:
    make = networks.Initializers(0)
    few = name in ("resnet12", "residual_encoder")
    return getattr(networks, name)(*([make] if few else [64, make]))


@pytest.mark.parametrize("name", ORDERS)
def test_layers_stand_in_the_published_order(name):
    """specs: iaptt 4.4 to 4.6, stocbio 6, penalty 5."""
    blocks = built(name)
    assert [names(block) for block in blocks] == ORDERS[name]
    for block in blocks[:3] if name in ("resnet12", "residual_encoder") else ():
        once = [CONV, NORM, RELU if name == "resnet12" else "LeakyReLU"]
        main = 2 * once + [CONV, NORM] if name == "resnet12" else 3 * once
        assert names(block[0].main) == main
        assert names(block[0].skip) == ([CONV, NORM] if name == "resnet12" else [CONV])
        assert block[0].skip[0].kernel_size == (1, 1)


def test_softplus_head_stands_in_the_published_order():
    block = networks.softplus_block(32, networks.Initializers(0))
    assert names(block) == [CONV, POOL, NORM, "Activation"]
    np.testing.assert_allclose(block[3](tf.constant(0.0)), np.log(2.0), rtol=1e-6)


# Of the second block's kernel, 3 x 3 x 64 -> 64: standard deviation.
GLOROT = (2 / (9 * 64 + 9 * 64)) ** 0.5
SPREADS = {
    "pool_norm_relu_conv4": (2 / (9 * 64)) ** 0.5,
    "relu_pool_norm_conv4": (2 / (9 * 64)) ** 0.5,
    "norm_relu_pool_conv4": GLOROT,
    "shifted_conv4": GLOROT,
}


@pytest.mark.parametrize("name", SPREADS)
def test_networks_start_as_published(name):
    blocks = built(name)
    model = networks.sequential(blocks, CIFAR, "x")
    kernel, *rest = blocks[1][0].get_weights()
    assert kernel.shape == (3, 3, 64, 64)
    np.testing.assert_allclose(kernel.std(), SPREADS[name], rtol=0.02)
    uniform = name in ("norm_relu_pool_conv4", "shifted_conv4")
    assert (np.abs(kernel).max() < 3**0.5 * GLOROT) == uniform
    assert all(not bias.any() for bias in rest)
    assert bool(rest) == (name != "shifted_conv4")
    norms = [layer for layer in model.layers if type(layer).__name__ == NORM]
    assert [layer.epsilon for layer in norms] == 4 * [
        1e-3 if name == "shifted_conv4" else 1e-5
    ]
    for norm in norms:
        assert not np.any(norm.shift)
        if name == "shifted_conv4":
            assert norm.scale is None
        elif name == "norm_relu_pool_conv4":  # PyTorch's old default: uniform
            assert 0 < np.min(norm.scale) and np.max(norm.scale) < 1
            np.testing.assert_allclose(np.std(norm.scale), 12**-0.5, rtol=0.2)
        else:
            np.testing.assert_array_equal(norm.scale, 1)


@pytest.mark.parametrize(
    ("kind", "edge", "spread", "bias"),
    [
        ("small", None, 0.01, 0.0),
        ("uniform", 1 / 20, 1 / 20 / 3**0.5, 1 / 20 / 3**0.5),
        # Glorot: the square root of 6 / (400 + 30).
        ("glorot", (6 / 430) ** 0.5, (2 / 430) ** 0.5, 0.0),
        ("zero", 0.0, 0.0, 0.0),
    ],
)
def test_linear_heads_start_as_published(kind, edge, spread, bias):
    block = networks.linear_head(30, 400, networks.Initializers(0), kind)
    model = networks.sequential([block], (20, 20, 1), "x")
    kernel, shift = model.get_weights()
    assert kernel.shape == (400, 30)
    np.testing.assert_allclose(kernel.std(), spread, rtol=0.02)
    np.testing.assert_allclose(shift.std(), bias, rtol=0.3)
    if edge is not None:
        assert np.abs(kernel).max() <= edge
