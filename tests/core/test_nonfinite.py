"""NaN and infinity are reported, or skipped and counted; they are never dropped."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from small_models import (
    EXAMPLES,
    full_batch,
    lower_loss,
    make,
    network,
    quadratic,
    simplex,
    unroll,
    upper_loss,
)

import tfbilevel as tb

SGD = keras.optimizers.SGD


def test_fit_too_can_choose_to_skip() -> None:
    model = make()
    data = full_batch(bad=1, repeat=3)
    with pytest.raises(tb.NonFiniteError, match="compile.on_nonfinite=.skip"):
        model.fit(data, verbose=0)
    history = model.fit(data, on_nonfinite="skip", verbose=0).history
    assert history["skipped"] == [1.0]
    with pytest.raises(ValueError, match="`on_nonfinite` must be one of"):
        model.fit(data, on_nonfinite="ignore", verbose=0)


def test_an_epoch_of_skipped_steps_has_no_loss() -> None:
    model = make(on_nonfinite="skip")
    data = full_batch(bad=1, repeat=3)
    history = model.fit(data.repeat(), steps_per_epoch=1, epochs=3, verbose=0).history
    assert history["skipped"] == [0.0, 1.0, 0.0]
    for name in ("upper_loss", "lower_loss"):
        first, skipped, last = history[name]
        assert np.isnan(skipped) and first > last > 0


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
def test_a_projection_that_ends_at_nan(on_nonfinite: str) -> None:
    model = tb.BilevelModel(
        tb.ExampleWeights(EXAMPLES),
        network(),
        upper_loss,
        lower_loss,
        project_upper=simplex,
    )
    model.compile(unroll(), SGD(1e-6), on_nonfinite=on_nonfinite, jit_compile=False)
    model.upper.logits.assign(-np.ones(EXAMPLES))
    before = [v.numpy() for v in (model.upper.logits, *model.lower.variables)]
    if on_nonfinite == "raise":
        with pytest.raises(tb.NonFiniteError, match="the upper variables became NaN"):
            model.fit(full_batch(), verbose=0)
    else:
        history = model.fit(full_batch(), verbose=0).history
        assert history["skipped"] == [1.0] and model.outer_step == 1
        assert np.isnan(history["upper_loss"]) and np.isnan(history["lower_loss"])
    after = [v.numpy() for v in (model.upper.logits, *model.lower.variables)]
    for a, b in zip(after, before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_minimize_with_a_projection_that_ends_at_nan() -> None:
    problem = quadratic(project_upper=lambda x: x / tf.reduce_sum(tf.nn.relu(x)))
    x = y = -tf.ones([2])
    with pytest.raises(tb.NonFiniteError, match="the upper variables became"):
        tb.minimize(problem, unroll(), x, y, SGD(0.1), tb.Batches(None, None), 1)


SOLVERS = {
    "cg": lambda: tb.ConjugateGradient(5),
    "normal-cg": lambda: tb.NormalConjugateGradient(5),
    "neumann": lambda: tb.Neumann(5, rate=0.5),
    "fixed-point": lambda: tb.FixedPoint(5, rate=0.5),
    "gradient": lambda: tb.GradientSolver(SGD(0.5), 5),
    "direct": tb.Direct,
}


@pytest.mark.parametrize("name", SOLVERS)
def test_an_upper_gradient_that_is_not_finite_is_not_dropped(name: str) -> None:
    """f is finite, f_y is not: with f_x alone every solver had gone on."""
    x = tf.constant([0.2, 0.3])
    y = tf.zeros([2])  # the solution, where the norm has no gradient
    problem = tb.Problem(
        lambda c, y, batch: tf.reduce_sum(c * c) + tf.norm(y),
        lambda c, y, batch: 0.5 * tf.reduce_sum((y - (c - x)) ** 2),
    )
    method = tb.Implicit(tb.InnerSolver(SGD(1.0), 2), SOLVERS[name]())
    with pytest.raises(tb.NonFiniteError, match="the upper gradient"):
        tb.minimize(problem, method, x, y, SGD(0.1), tb.Batches(None, None), 1)


def test_a_rank_one_gradient_that_is_not_finite_is_not_dropped() -> None:
    """As above, where g_y = 0 made 0 of NaN / 0."""
    x = tf.constant([0.2, 0.3])
    problem = tb.Problem(
        lambda c, y, batch: tf.reduce_sum(c * c) + tf.norm(y),
        lambda c, y, batch: 0.5 * tf.reduce_sum((y - (c - x)) ** 2),
    )
    method = tb.RankOne(tb.InnerSolver(SGD(1.0), 2))
    with pytest.raises(tb.NonFiniteError, match="the upper gradient"):
        none = tb.Batches(None, None)
        tb.minimize(problem, method, x, tf.zeros([2]), SGD(0.1), none, 1)
