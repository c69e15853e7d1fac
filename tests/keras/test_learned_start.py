"""A learned start in BilevelModel, with an optimizer of its own."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbilevel as tb

SGD = keras.optimizers.SGD
generator = np.random.default_rng(0)
TRAIN = generator.normal(size=(7, 3)).astype("float32")
ANSWERS = generator.normal(size=7).astype("float32")
VALID = generator.normal(size=(6, 3)).astype("float32")
WANTED = generator.normal(size=6).astype("float32")


def squared(network, batch):
    return tf.square(network(batch[0])[:, 0] - batch[1])


def make(**keywords) -> tb.BilevelModel:
    network = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    network.set_weights([np.full((3, 1), 0.4, "float32"), np.zeros(1, "float32")])
    return tb.BilevelModel(
        tb.ExampleWeights(7),
        network,
        upper_loss=lambda upper, lower, batch: tf.reduce_mean(squared(lower, batch)),
        lower_loss=lambda upper, lower, batch: tf.reduce_mean(
            upper(None) * squared(lower, batch)
        ),
        **keywords,
    )


def data(steps: int) -> tf.data.Dataset:
    full = tf.data.Dataset.from_tensors
    return tb.pair(full((VALID, WANTED)), full((TRAIN, ANSWERS))).repeat(steps)


def iaptt() -> tb.Unroll:
    return tb.Unroll(tb.InnerSolver(SGD(0.1), steps=6), end="pessimistic")


def compiled(start_optimizer=None, **keywords) -> tb.BilevelModel:
    model = make(lower_start="learned")
    model.compile(
        iaptt(),
        keras.optimizers.Adam(0.05),
        jit_compile=False,
        start_optimizer=start_optimizer,
        **keywords,
    )
    return model


def test_both_optimizers_move_their_own_variables() -> None:
    """Three steps by hand: Adam on the weights, momentum on the start, in tensors."""
    model = compiled(SGD(0.2, momentum=0.9))
    x = [tf.constant(v.numpy()) for v in model.upper_variables]
    y = [tf.constant(v.numpy()) for v in model.lower.trainable_variables]
    assert [v.shape for v in x] == [(7,), (3, 1), (1,)]
    for start, weights in zip(x[1:], y, strict=True):
        np.testing.assert_array_equal(start, weights)
    model.fit(data(3), verbose=0)
    rules = (
        tb.differentiable(keras.optimizers.Adam(0.05)),
        tb.differentiable(SGD(0.2, momentum=0.9)),
    )
    states = rules[0].init(x[:1]), rules[1].init(x[1:])
    batches = tb.Batches(upper=(VALID, WANTED), lower=(TRAIN, ANSWERS))
    for _ in range(3):
        step = iaptt().step(model.problem, x, y, batches, {})
        own, s0 = rules[0].update(step.upper_gradient[:1], states[0], x[:1])
        start, s1 = rules[1].update(step.upper_gradient[1:], states[1], x[1:])
        x, y, states = [*own, *start], step.lower, (s0, s1)
    for got, want in zip(model.upper_variables, x, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    for got, want in zip(model.lower.trainable_variables, y, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_one_optimizer_moves_both() -> None:
    model = compiled()
    before = [v.numpy() for v in model.upper_variables]
    model.fit(data(1), verbose=0)
    # Adam's first step has the length of its rate wherever there is a gradient.
    for was, now in zip(before, model.upper_variables, strict=True):
        np.testing.assert_allclose(np.abs(now - was), 0.05, rtol=5e-3)


@pytest.mark.slow  # test_saved_models.py saves a learned start, too
def test_saved_weights_continue_to_the_last_bit(tmp_path) -> None:
    whole = compiled(SGD(0.2, momentum=0.9))
    whole.fit(data(3), verbose=0)
    path = str(tmp_path / "half.weights.h5")
    whole.save_weights(path)
    whole.fit(data(3), verbose=0)
    second = compiled(SGD(0.2, momentum=0.9))
    second.load_weights(path)
    second.fit(data(3), verbose=0)
    for a, b in zip(whole.upper_variables, second.upper_variables, strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(
        whole.start_optimizer.variables, second.start_optimizer.variables, strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_a_start_that_no_gradient_reaches_is_named() -> None:
    model = make(lower_start="learned")
    truncated = tb.Unroll(tb.InnerSolver(SGD(0.1), steps=3), last=2)
    model.compile(truncated, SGD(0.1), jit_compile=False)
    with pytest.raises(tb.UnconnectedGradientError, match="start"):
        model.fit(data(1), verbose=0)


def test_projection_sees_the_start_too() -> None:
    def project(x: list) -> list:
        logits, *start = x
        return [logits, *(tf.clip_by_value(leaf, -0.1, 0.1) for leaf in start)]

    model = make(lower_start="learned", project_upper=project)
    model.compile(iaptt(), SGD(0.1), jit_compile=False)
    model.fit(data(2), verbose=0)
    for leaf in model.upper_variables[1:]:
        assert np.abs(leaf.numpy()).max() <= 0.1 + 1e-7


def test_wrong_start_options() -> None:
    with pytest.raises(ValueError, match="`lower_start` must be one of 'learned'"):
        make(lower_start="cold")
    with pytest.raises(ValueError, match="`start_optimizer` needs a learned start"):
        make().compile(iaptt(), SGD(0.1), start_optimizer=SGD(0.1))
    shared = SGD(0.1)
    for wrong in (shared, 0.1):
        with pytest.raises(ValueError, match="must be a separate Keras optimizer"):
            make(lower_start="learned").compile(iaptt(), shared, start_optimizer=wrong)
