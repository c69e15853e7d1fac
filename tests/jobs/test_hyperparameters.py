"""Each hyperparameter against its formula, and its derivative through training steps
against central differences in float64."""

import types
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbilevel as tb
from tfbilevel._jobs.tuning.losses import Losses
from tfbilevel._jobs.tuning.outputs import Output
from tfbilevel._jobs.tuning.values import Values

hyper = tb.hyper
generator = np.random.default_rng(0)
IMAGES = generator.normal(size=(3, 4, 5, 1))
LABELS = np.eye(3)[[0, 2, 1]]


def network() -> keras.Model:
    layers = keras.layers
    options = {"dtype": "float64"}
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input((4, 5, 1), dtype="float64"),
            layers.Conv2D(2, 3, activation="tanh", name="conv", **options),
            layers.Dropout(0.3, **options),
            layers.Flatten(**options),
            layers.Dense(3, name="dense", **options),
            layers.GaussianDropout(0.1, **options),
        ]
    )


def setting(of: keras.Model, **changes: Any) -> Any:
    made = {
        "network": of,
        "classes": (3,),
        "deviation": 2.0,
        "shape": (4, 5, 1),
        "optimizer": keras.optimizers.SGD(0.25, momentum=0.5),
    }
    return hyper.Setting(**(made | changes))


SEARCH = [
    hyper.L2("per-layer", start=0.02),
    hyper.LabelSmoothing(0.2),
    hyper.ClassWeights([0.5, 1.0, 2.0]),
    hyper.Dropout("per-layer", start=0.3),
    hyper.Brightness(0.3),
    hyper.Contrast(0.3),
    hyper.Noise(0.3),
    hyper.Shift(1.3),
    hyper.Mixup(0.2),
    hyper.InputScale("per-feature", start=0.7),
    hyper.LearningRate(),
    hyper.Momentum(0.8),
    hyper.WeightDecay(0.1),
]


class Upper(keras.layers.Layer):
    """The variables without bounds, in float64."""

    def __init__(self, at: Any) -> None:
        super().__init__(dtype="float64")
        self.own = []
        for one in SEARCH:
            names = one.entries(at)
            shape = () if names is None else (len(names),)
            start = one.interval().position(np.broadcast_to(one.first(at), shape))
            self.own.append(self.add_weight(shape=shape, name=one.name))
            self.own[-1].assign(start)
        self.built = True

    def values(self) -> dict:
        return {
            one.name: one.interval().value(tf.convert_to_tensor(u.value))
            for one, u in zip(SEARCH, self.own, strict=True)
        }


def test_derivatives_through_training_steps_are_central_differences() -> None:
    """Two steps of momentum, all at once; the noise of a step is a fixed function."""
    net = network()
    at = setting(net)
    losses = Losses(SEARCH, (Output(None, types.SimpleNamespace()),), at)

    def options(own: Any) -> dict:
        values = own.values()
        return {k: v for s in SEARCH for k, v in s.options(values[s.name]).items()}

    model = tb.BilevelModel(
        Upper(at),
        net,
        lambda up, low, batch: losses.validation(up.values(), *batch),
        lambda up, low, batch: losses.training(up.values(), *batch),
    )
    inner = tb.InnerSolver(
        keras.optimizers.SGD(0.25, momentum=0.5), 2, hyperparameters=options
    )
    method, problem = tb.Unroll(inner), model.problem
    x, y = model._levels.point()
    batch = (tf.constant(IMAGES), (tf.constant(LABELS),))
    batches = tb.Batches(batch, (batch[0] * 0.9, batch[1]))
    state = method.init(problem, x, y)
    step = tf.function(
        lambda x: problem.step(method, x, y, batches, state).upper_gradient,
        autograph=False,
    )
    value = tf.function(
        method.objective(problem, x, y, batches, state), autograph=False
    )
    found, h = step(x), 1e-4
    for number, (one, gradient) in enumerate(zip(SEARCH, found, strict=True)):
        for entry in np.ndindex(*gradient.shape):
            ends = []
            for sign in (1, -1):
                moved = [u.numpy() for u in x]
                moved[number] = np.array(moved[number])
                moved[number][entry] += sign * h
                ends.append(float(value([tf.constant(u) for u in moved])))
            expected = (ends[0] - ends[1]) / (2 * h)
            assert abs(expected) > 1e-7, one.name
            name = f"{one.name}{list(entry)}"
            actual = gradient.numpy()[entry]
            assert actual == pytest.approx(expected, rel=2e-5), name


def test_the_scales_are_their_formulas() -> None:
    u = np.array([-1.5, 0.0, 2.0])
    share = 1 / (1 + np.exp(-u))
    rows = [
        (hyper.Noise(range=(0.2, 0.8)), 0.2 + 0.6 * share),
        (hyper.L2(range=(1e-6, 1e-2)), 1e-6 * 1e4**share),
        (hyper.Momentum(range=(0.0, 0.99)), 1 - 0.01**share),
    ]
    for one, expected in rows:
        interval = one.interval()
        np.testing.assert_allclose(interval.value(tf.constant(u)), expected, rtol=1e-12)
        np.testing.assert_allclose(interval.position(expected), u, rtol=1e-9, atol=1e-9)
    at_the_end = hyper.Noise().interval()
    assert float(at_the_end.value(at_the_end.position(0.0))) == pytest.approx(0.02)


def test_augmentations_are_their_formulas(monkeypatch: Any) -> None:
    """With e = 1 everywhere; the shift of 1.25 pixels is a mean of two neighbours."""
    monkeypatch.setattr(
        tf.random, "uniform", lambda s, *a, dtype=None: tf.ones(s, tf.float64)
    )
    monkeypatch.setattr(tf.random, "normal", lambda s, dtype: tf.ones(s, tf.float64))
    at, x, y = setting(network()), tf.constant(IMAGES), (tf.constant(LABELS),)
    v = tf.constant(0.25, tf.float64)
    mean = IMAGES.mean(axis=(1, 2, 3), keepdims=True)
    before = np.roll(IMAGES, 1, axis=0)
    rows = [
        (hyper.Brightness(), IMAGES + 0.5),
        (hyper.Contrast(), mean + (IMAGES - mean) * np.exp(0.25)),
        (hyper.Noise(), IMAGES + 0.5),
        (hyper.Mixup(), 0.75 * IMAGES + 0.25 * before),
    ]
    for one, expected in rows:
        found, labels = one.examples(v, x, y, at)
        np.testing.assert_allclose(found, expected, atol=1e-12, err_msg=one.name)
    np.testing.assert_allclose(labels[0], 0.75 * LABELS + 0.25 * np.roll(LABELS, 1, 0))
    moved, _ = hyper.Shift().examples(tf.constant(1.25, tf.float64), x, y, at)
    padded = np.pad(IMAGES, ((0, 0), (0, 2), (0, 2), (0, 0)))
    rows = 0.75 * padded[:, 1:5] + 0.25 * padded[:, 2:6]
    both = 0.75 * rows[:, :, 1:6] + 0.25 * rows[:, :, 2:7]
    np.testing.assert_allclose(moved, both, rtol=1e-12)
    smooth = hyper.LabelSmoothing().examples(v, x, y, at)[1][0]
    np.testing.assert_allclose(smooth, 0.75 * LABELS + 0.25 / 3, rtol=1e-12)


def test_penalties_and_weights_are_their_formulas() -> None:
    net = network()
    at = setting(net)
    conv, dense = (net.get_layer(n).kernel.numpy() for n in ("conv", "dense"))
    for per, names in (
        ("per-layer", ["conv", "dense"]),
        ("per-weight", ["conv/kernel", "dense/kernel"]),
    ):
        one = hyper.L2(per)
        assert one.entries(at) == names
        found = one.penalty(tf.constant([2.0, 3.0]), at)
        expected = 2 * np.sum(conv**2) + 3 * np.sum(dense**2)
        assert float(found) == pytest.approx(expected, rel=1e-6)
    found = hyper.L2("global").penalty(tf.constant(0.5), at)
    assert float(found) == pytest.approx(0.5 * (np.sum(conv**2) + np.sum(dense**2)))
    labels = (tf.constant(LABELS, tf.float32),)
    weights = tf.constant([1.0, 2.0, 3.0])
    weighted = hyper.ClassWeights().losses(weights, [tf.ones([3])], labels, at)
    np.testing.assert_allclose(weighted[0], [0.5, 1.5, 1.0])  # classes 0, 2, 1
    several, ones = setting(net, classes=(3, None)), [tf.ones([2]), tf.ones([2])]
    weights = tf.constant([1.0, 3.0])
    first, second = hyper.LossWeights().losses(weights, ones, (), several)
    assert (float(first[0]), float(second[0])) == (0.5, 1.5)
    assert hyper.LossWeights(main=1).validation_losses([3, 4]) == [4]


def test_dropout_noise_has_the_mean_and_variance_of_a_mask() -> None:
    layers = [keras.layers.SpatialDropout1D(0.5), keras.layers.Dropout(0.0)]
    net = keras.Sequential([keras.Input((4, 2)), *layers])
    at, one = setting(net), hyper.Dropout()
    x = tf.ones([20000, 4, 2])
    with one.during(tf.constant([0.2, 0.01]), at):
        made, small = (layer(x, training=True).numpy() for layer in layers)
        assert np.all(net(x, training=False) == 1.0)
    assert made.mean() == pytest.approx(1.0, abs=0.01)
    # A mask is 0 with probability v, else 1 / (1 - v): its variance is v / (1 - v).
    assert made.var() == pytest.approx(0.2 / 0.8, rel=0.03)
    np.testing.assert_array_equal(made[:, 0], made[:, 3])  # one mask for all steps
    assert small.var() == pytest.approx(0.01 / 0.99, rel=0.03)
    one.built_in(np.array([0.2, 0.7]), net)
    assert [layer.rate for layer in net.layers] == [0.2, 0.7]
    kept = np.mean(layers[1](x, training=True) > 0)
    assert kept == pytest.approx(0.3, abs=0.02)


DENSE = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])


@pytest.mark.parametrize(
    ("one", "changes", "words"),
    [
        (hyper.L2("all"), {}, "`per` must be one of 'global'"),
        (hyper.LabelSmoothing(), {"classes": (None,)}, "for a classification only"),
        (hyper.ClassWeights(), {"classes": (3, 3)}, "network with several outputs"),
        (hyper.LossWeights(), {}, "for a network with one output"),
        (hyper.LossWeights(main=2), {"classes": (3, 3)}, "0 to 1. Received: main=2"),
        (hyper.Shift(), {"shape": (4,)}, "for images only"),
        (hyper.Dropout(range=(0.0, 0.5)), {}, "must be above 0 and below 1"),
        (hyper.Dropout(), {"network": DENSE}, "without dropout layers"),
        (hyper.Noise(range=3), {}, "must be two numbers"),
        (hyper.Noise(range=(1.0, 0.0)), {}, "the smaller one first"),
        (hyper.L2(range=(0.0, 1.0)), {}, "above 0 on a log scale"),
        (hyper.Momentum(range=(0.0, 1.0)), {}, "must be below 1"),
        (hyper.Noise(2.0), {}, "must be in its range, from 0 to 1"),
        (hyper.Hyperparameter(1, (0, 2), scale="root"), {}, "`scale` of hyperparam"),
        (hyper.OptimizerOption("rho", None, (0, 1)), {}, "has no `rho` of its own"),
        (hyper.ClassWeights([1.0, 2.0]), {}, "or 3, one for each of its entries"),
    ],
)
def test_what_does_not_fit_gets_one_line(one: Any, changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Values([one], setting(network(), **changes))
