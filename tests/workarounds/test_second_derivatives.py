"""Second derivatives of the lower loss that TensorFlow has wrong, or not at all.

Hessian-vector and mixed products must equal central differences of the gradient, and
the gradient those of the loss.
"""

import contextlib
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from suites import fast_where
from tensorflow.python.framework import ops

import tfbilevel as tb
from tfbilevel._calculus import derivatives
from tfbilevel._workarounds import right_derivatives

generator = np.random.default_rng(0)
X = generator.normal(size=(6, 3))
LABELS = generator.normal(size=(6, 4))
WEIGHTS = generator.normal(size=(3, 4))
IMAGES = generator.normal(size=(2, 3, 4, 2))
SCALES = generator.normal(size=(2, 3, 4, 1))
TRANSFORMS = np.array(
    [
        [0.9, 0.2, 0.3, -0.1, 1.1, -0.4, 0.01, -0.02],
        [1.1, -0.3, 0.5, 0.2, 0.8, 0.7, 0, 0],
    ]
)
losses = keras.losses


def soft(entropy: Any) -> Any:
    """A cross-entropy of learned labels that sum to one."""
    return lambda x, y: tf.reduce_mean(entropy(tf.nn.softmax(x), X @ y))


def of_logits(function: Any) -> Any:
    return lambda x, y: tf.reduce_mean(function(X @ y) * x)


def resized(resize: Any) -> Any:
    """A non-linear function of a resize; most have kernels for float32 alone."""

    def loss(x: Any, y: Any) -> Any:
        image = tf.cast(tf.sin(y) * x, tf.float32)
        return tf.reduce_mean(tf.square(tf.tanh(resize(image))))

    return loss


def standardised(moments: Any) -> Any:
    def function(z: Any) -> Any:
        mean, variance = moments(z, [0])
        return tf.sin((z - mean) * tf.math.rsqrt(variance + 0.1))

    return function


def transformed(mode: str, interpolation: str) -> Any:
    return resized(
        lambda image: tf.raw_ops.ImageProjectiveTransformV3(
            images=image,
            transforms=tf.cast(TRANSFORMS, tf.float32),
            output_shape=[4, 5],
            fill_value=0.3,
            interpolation=interpolation,
            fill_mode=mode,
        )
    )


def spectral() -> Any:
    inner = keras.layers.Dense(4, use_bias=False, dtype="float64")
    layer = keras.layers.SpectralNormalization(inner, dtype="float64")
    layer.build((6, 3))
    layer.vector_u.assign(tf.constant([[0.3, -1.0, 0.7, 0.2]], tf.float64))
    network = tb.functional(layer)
    return lambda x, y: tf.reduce_mean(tf.sin(network([y], X, training=True)) * x)


def rematerialised(x: Any, y: Any) -> Any:
    return tf.reduce_mean(keras.remat(lambda z: tf.tanh(z) ** 2)(X @ y) * x)


def segments(function: Any) -> Any:
    def loss(x: Any, y: Any) -> Any:
        ids = [0, 0, 1, 3, 3]
        made = function(tf.sin(y), [0, 2, 1, 1, 0], ids, num_segments=6)
        return tf.reduce_mean(tf.sin(made) * x)

    return loss


def quantised(function: Any) -> Any:
    """Linear in what is quantised: the rule is no derivative, but this is the rule's.

    Its gradient's differences are therefore those in the factor x.
    """

    def loss(x: Any, y: Any) -> Any:
        low = tf.cast(tf.sin(y[0, 0, 0]) / 10 - 1.0, tf.float32)
        made = function(tf.cast(2.0 * tf.sin(y), tf.float32), low, low + 2.0)
        return tf.reduce_sum(tf.cast(x, tf.float32) * made)

    return loss


fused = tf.nn.softmax_cross_entropy_with_logits
matrices = (LABELS, WEIGHTS)
images = (SCALES, IMAGES)
image, sparse = tf.image, tf.sparse
quantization = tf.quantization

# Right in float64, eagerly, in graphs and under XLA.
EXACT = {
    "softmax": (soft(fused), matrices),
    "softmax-any-labels": (
        lambda x, y: tf.reduce_mean(fused(tf.exp(x), X @ y)),
        matrices,
    ),
    "softmax-axis": (soft(lambda t, z: fused(t, z, axis=0)), matrices),
    "keras-logits": (
        soft(lambda t, z: losses.categorical_crossentropy(t, z, from_logits=True)),
        matrices,
    ),
    "keras-smoothing": (
        soft(
            lambda t, z: losses.categorical_crossentropy(
                t, z, from_logits=True, label_smoothing=0.2
            )
        ),
        matrices,
    ),
    "keras-probabilities": (
        soft(lambda t, z: losses.categorical_crossentropy(t, tf.nn.softmax(z))),
        matrices,
    ),
    "softsign": (of_logits(tf.nn.softsign), matrices),
    "moments": (of_logits(standardised(tf.nn.moments)), matrices),
    "moments-v1": (
        of_logits(standardised(lambda *a: tf.compat.v1.nn.moments(*a))),
        matrices,
    ),
    "spectral": (spectral(), matrices),
    "remat": (rematerialised, matrices),
}

# Kernels in float32, or none of XLA's.
IN_GRAPHS = {
    "bilinear": (resized(lambda i: image.resize(i, [5, 6])), images),
    "bilinear-smaller": (resized(lambda i: image.resize(i, [2, 2])), images),
    "upsampling": (
        resized(lambda i: keras.layers.UpSampling2D(2, interpolation="bilinear")(i)),
        images,
    ),
    "nearest": (resized(lambda i: image.resize(i, [5, 6], "nearest")), images),
    "bicubic": (resized(lambda i: image.resize(i, [5, 6], "bicubic")), images),
    "antialias": (
        resized(lambda i: image.resize(i, [2, 3], antialias=True)),
        images,
    ),
    "lanczos": (resized(lambda i: image.resize(i, [5, 6], "lanczos3")), images),
    "crop": (
        resized(
            lambda i: image.crop_and_resize(
                i, [[0.1, 0.0, 0.8, 1.2], [0.0, 0.3, 1.0, 0.9]], [1, 1], [3, 2]
            )
        ),
        images,
    ),
    "projective": (transformed("CONSTANT", "BILINEAR"), images),
    "projective-reflect": (transformed("REFLECT", "BILINEAR"), images),
    "projective-wrap": (transformed("WRAP", "NEAREST"), images),
    "responses": (
        resized(lambda i: tf.nn.local_response_normalization(i, 1, 1.0, 0.5, 0.7)),
        images,
    ),
    "responses of few channels": (
        resized(lambda i: tf.nn.local_response_normalization(i, 5, 1.0, 0.5, 0.7)),
        images,
    ),
    "argmax-pool": (
        resized(lambda i: tf.nn.max_pool_with_argmax(i, 2, 2, "VALID")[0]),
        images,
    ),
    "segment-sum": (segments(sparse.segment_sum), (LABELS, WEIGHTS)),
    "segment-mean": (segments(sparse.segment_mean), (LABELS, WEIGHTS)),
    "segment-sqrt": (segments(sparse.segment_sqrt_n), (LABELS, WEIGHTS)),
    "quantised": (
        quantised(lambda v, *_: quantization.fake_quant_with_min_max_args(v, -1, 1)),
        (SCALES, IMAGES),
    ),
    "quantised-bounds": (
        quantised(
            lambda v, a, b: quantization.fake_quant_with_min_max_vars(v, a[0], b[0])
        ),
        images,
    ),
    "quantised-channels": (
        quantised(quantization.fake_quant_with_min_max_vars_per_channel),
        images,
    ),
}
ALL = EXACT | IN_GRAPHS
UNDER_XLA = [*EXACT, "bilinear", "bilinear-smaller", "upsampling", "responses"]


class Differences:
    """g_xy v and g_yy v of a case, and their central differences."""

    def __init__(self, case: str):
        self.function, (x, y) = ALL[case]
        self.x, self.y = tf.constant(x), tf.constant(y)
        self.v = tf.constant(np.random.default_rng(7).normal(size=y.shape))
        exact = case in EXACT or case.startswith("segment")
        self.step = 1e-5 if exact else 3e-3
        self.tolerance = 1e-6 if exact else 2e-3
        self.rule = case.startswith("quantised")

    def loss(self, x: Any, y: Any, _: Any = None) -> Any:
        return self.function(x, y)

    def gradient(self, x: Any, y: Any) -> Any:
        return derivatives.lower_gradient(self.loss, x, y, None)[1]

    def products(self, x: Any, y: Any, v: Any) -> tuple[Any, Any]:
        _, _, pullback = derivatives.lower_gradient_pullback(self.loss, x, y, None)
        mixed, curvature = pullback(v)
        return tf.convert_to_tensor(mixed), curvature

    def along(self, function: Any, moved: str, direction: Any) -> Any:
        at = {"x": self.x, "y": self.y}
        high, low = (
            function(**(at | {moved: at[moved] + s * self.step * direction}))
            for s in (1.0, -1.0)
        )
        return (high - low).numpy() / (2 * self.step)

    def require(self, mixed: Any, curvature: Any) -> None:
        def weighted(x: Any, y: Any) -> Any:
            return tf.reduce_sum(self.v * self.gradient(x, y))

        direction = tf.constant(np.random.default_rng(8).normal(size=self.x.shape))
        found = tf.reduce_sum(direction * mixed).numpy()
        want = self.along(weighted, "x", direction)
        scale = np.abs(mixed.numpy()).max() * np.sqrt(mixed.numpy().size)
        assert abs(found - want) <= self.tolerance * max(scale, abs(want))
        want = self.along(self.gradient, "y", self.v)
        scale = np.abs(want).max()
        np.testing.assert_allclose(curvature, want, atol=self.tolerance * scale)

    def require_same(self, eager: Any, xla: bool = False) -> None:
        run = tf.function(self.products, autograph=False, jit_compile=xla)
        for ours, same in zip(run(self.x, self.y, self.v), eager, strict=True):
            scale = np.abs(same).max()
            np.testing.assert_allclose(ours, same, atol=1e-5 * scale)


@pytest.mark.parametrize("case", ALL)
def test_products_are_central_differences_of_the_gradient(case):
    differences = Differences(case)
    arguments = differences.x, differences.y, differences.v
    if not differences.rule:
        gradient = differences.gradient(differences.x, differences.y)
        slope = tf.reduce_sum(gradient * differences.v).numpy()
        want = differences.along(differences.loss, "y", differences.v)
        assert abs(slope - want) <= 10 * differences.tolerance * abs(want)
    eager = differences.products(*arguments)
    differences.require(*eager)
    differences.require_same(eager)


@pytest.mark.slow
@pytest.mark.parametrize("case", UNDER_XLA)
def test_products_under_xla(case):
    differences = Differences(case)
    arguments = differences.x, differences.y, differences.v
    differences.require_same(differences.products(*arguments), xla=True)


@pytest.mark.parametrize(
    "case",
    fast_where(
        {"softmax-any-labels", "bilinear", "softsign", "projective"}.__contains__,
        ["softmax-any-labels", "bilinear", "nearest", "softsign", "moments-v1"]
        + ["projective", "segment-mean", "argmax-pool"],
    ),
)
def test_products_inside_loops_and_mappings(case):
    differences = Differences(case)

    @tf.function(autograph=False)
    def looped(x: Any, y: Any, v: Any) -> Any:
        def body(index: Any, mixed: Any, curvature: Any) -> Any:
            more = differences.products(x, y, v)
            return index + 1, mixed + more[0] / 2, curvature + more[1] / 2

        start = (0, tf.zeros_like(x), tf.zeros_like(y))
        return tf.while_loop(lambda index, *_: index < 2, body, start)[1:]

    @tf.function(autograph=False)
    def mapped(x: Any, y: Any, v: Any) -> Any:
        both = tf.vectorized_map(
            lambda v: differences.products(x, y, v), tf.stack([-v, 3 * v])
        )
        return [value[1] / 3 for value in both]

    for run in (looped, mapped):
        differences.require(*run(differences.x, differences.y, differences.v))


@pytest.mark.parametrize(
    "case",
    ["softmax", "softmax-any-labels", "bilinear", "nearest", "bicubic", "antialias"]
    + ["softsign", "moments", "moments-v1", "spectral", "remat", "projective"]
    + ["responses", "argmax-pool", "segment-mean", "quantised", "quantised-bounds"],
)
def test_tensorflow_s_own_are_what_is_wrong(case, monkeypatch):
    """Where this fails, TensorFlow was mended and a file of `_workarounds` can go."""
    nothing = contextlib.nullcontext
    monkeypatch.setattr(derivatives, "right_derivatives", nothing)
    differences = Differences(case)
    with pytest.raises((AssertionError, LookupError, NotImplementedError, ValueError)):
        differences.require(
            *differences.products(differences.x, differences.y, differences.v)
        )


def test_the_registry_is_left_as_it_was():
    before = dict(ops.gradient_registry._registry)
    probed = [tf.nn, tf.math, tf, tf.compat.v1.nn]
    functions = [dict(vars(module)) for module in probed]
    with contextlib.suppress(ZeroDivisionError), right_derivatives():
        with right_derivatives():
            assert "SoftsignGrad" in ops.gradient_registry._registry
        assert "SoftsignGrad" in ops.gradient_registry._registry
        1 / 0  # noqa: B018
    assert ops.gradient_registry._registry == before
    for module, was in zip(probed, functions, strict=True):
        changed = {k for k, v in vars(module).items() if was.get(k) is not v}
        assert not changed


def test_third_derivatives_of_a_resize():
    """The entries are differentiable again: of sum (R y)^3, in the direction v."""
    y, v = tf.constant(IMAGES, tf.float32), tf.ones(IMAGES.shape)

    def loss(_: Any, y: Any, __: Any) -> Any:
        return tf.reduce_sum(tf.image.resize(y, [5, 6]) ** 3)

    def product(y: Any) -> Any:
        pullback = derivatives.lower_gradient_pullback(loss, tf.zeros([]), y, None)[2]
        return tf.reduce_sum(v * pullback(v)[1])

    _, third = derivatives.value_and_partials(product, y)
    # v^T H v = 6 sum (R y) (R v)^2 and R v = 1: its gradient is 6 R^T 1.
    columns = tf.reshape(tf.eye(24), [24, 3, 4, 2])
    rows = tf.reduce_sum(tf.image.resize(columns, [5, 6]), [1, 2, 3])
    want = 6 * tf.tile(tf.reshape(rows, [1, 3, 4, 2]), [2, 1, 1, 1])
    np.testing.assert_allclose(third[0], want, rtol=1e-4)


@pytest.mark.parametrize("own", [False, True])
def test_keras_losses_of_probabilities_agree_where_these_round_to_zero(own):
    """Eagerly Keras would clip the probabilities, and end the gradient there."""

    def loss(x: Any, y: Any, _: Any) -> Any:
        made = keras.activations.softmax(y) if own else tf.nn.softmax(y)
        return tf.reduce_mean(
            losses.sparse_categorical_crossentropy(tf.constant([0, 1]), made)
        )

    y = tf.constant([[-40.0, 3.0, 0.0], [1.0, 2.0, 60.0]])
    eager = derivatives.lower_gradient(loss, (), y, None)[1]
    run = tf.function(lambda y: derivatives.lower_gradient(loss, (), y, None)[1])
    want = (tf.nn.softmax(y) - tf.one_hot([0, 1], 3)) / 2
    np.testing.assert_allclose(eager, want, atol=1e-6)
    np.testing.assert_allclose(run(y), want, atol=1e-6)


@pytest.mark.parametrize("name", ["sigmoid", "softmax"])
def test_keras_losses_of_the_other_probabilities_take_none_s_logits(name):
    """A softmax's logits are none of a sigmoid's, and the other way round."""
    entropies = {
        "softmax": lambda p: losses.binary_crossentropy(tf.constant(LABELS), p),
        "sigmoid": lambda p: losses.categorical_crossentropy(tf.constant(LABELS), p),
    }

    def by_hand(p: Any) -> Any:
        t = tf.constant(LABELS)
        if name == "softmax":
            each = t * tf.math.log(p) + (1 - t) * tf.math.log(1 - p)
            return -tf.reduce_mean(each, -1)
        return -tf.reduce_sum(t * tf.math.log(p / tf.reduce_sum(p, -1)[:, None]), -1)

    def loss(entropy: Any, z: Any) -> Any:
        # Looked up here: where the library differentiates they are its own.
        return tf.reduce_mean(entropy(getattr(tf.nn, name)(z)))

    z = tf.constant(np.random.default_rng(0).normal(size=np.shape(LABELS)))

    def gradient(entropy: Any) -> Any:
        at = derivatives.lower_gradient(lambda x, y, _: loss(entropy, y), (), z, None)
        return at[1].numpy()

    want = gradient(by_hand)
    graph = tf.function(
        lambda z: derivatives.lower_gradient(
            lambda x, y, _: loss(entropies[name], y), (), z, None
        )[1]
    )
    np.testing.assert_allclose(gradient(entropies[name]), want, rtol=1e-5)
    np.testing.assert_allclose(graph(z), want, rtol=1e-5)


def test_learned_labels_move_under_every_kind_of_method():
    x, y = tf.constant(LABELS), tf.constant(WEIGHTS)
    inner = tb.InnerSolver(keras.optimizers.SGD(0.5), 3)

    def by_hand(labels: Any, logits: Any) -> Any:
        return -tf.reduce_sum(labels * tf.nn.log_softmax(logits), -1)

    def gradient(entropy: Any, method: Any) -> np.ndarray:
        def upper(x: Any, y: Any, batch: Any) -> Any:
            del x, batch
            return tf.reduce_mean(tf.square(X[:, :2] @ y[:2] - 1.0))

        problem = tb.Problem(upper, lambda x, y, _: soft(entropy)(x, y))
        step = method.step(
            problem, x, y, tb.Batches(None, None), method.init(problem, x, y)
        )
        return step.upper_gradient.numpy()

    for method in (
        tb.Unroll(inner),
        tb.ForwardUnroll(inner),
        tb.Implicit(inner, tb.ConjugateGradient(12, damping=0.1)),
        tb.GradientNorm(keras.optimizers.SGD(0.5), weight=1.0),
    ):
        want = gradient(by_hand, method)
        assert np.abs(want).max() > 1e-3
        np.testing.assert_allclose(
            gradient(fused, method), want, atol=1e-6 * np.abs(want).max()
        )


def test_methods_agree_where_the_upper_level_resizes():
    """f = |y - c|^2, g = |y - R x|^2 / 2, five steps at rate 0.3 from y = 0."""
    c = generator.normal(size=36).astype("float32")
    x, y = tf.constant(generator.normal(size=9).astype("float32")), tf.zeros([36])

    def enlarged(x: Any) -> Any:
        return tf.reshape(tf.image.resize(tf.reshape(x, [-1, 3, 3, 1]), [6, 6]), [-1])

    columns = tf.reshape(
        tf.image.resize(tf.reshape(tf.eye(9), [9, 3, 3, 1]), [6, 6]), [9, 36]
    )
    reached = 1 - 0.7**5
    end = reached * tf.linalg.matvec(columns, x, transpose_a=True)
    want = reached * 2 * tf.linalg.matvec(columns, end - c)
    problem = tb.Problem(
        lambda x, y, _: tf.reduce_sum(tf.square(y - c)),
        lambda x, y, _: 0.5 * tf.reduce_sum(tf.square(y - enlarged(x))),
    )
    inner = tb.InnerSolver(keras.optimizers.SGD(0.3), 5)
    for method in (tb.Unroll(inner), tb.ForwardUnroll(inner)):
        step = method.step(
            problem, x, y, tb.Batches(None, None), method.init(problem, x, y)
        )
        np.testing.assert_allclose(step.upper_gradient, want, rtol=1e-4)
