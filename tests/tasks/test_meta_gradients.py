"""MAML, FOMAML and ANIL against PyTorch with `higher`, and central differences.

The expected numbers were written by benchmarks/meta_gradients.py, in float64.
"""

import json
import pathlib
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from suites import fast_where

import tfbilevel as tb

EXPECTED = json.loads(
    (pathlib.Path(__file__).parents[1] / "data" / "meta_gradients.json").read_text()
)
TASKS, IMAGES, SIDE, FILTERS, WAYS, STEPS, RATE = 3, 4, 6, 3, 2, 2, 0.3


def inputs() -> dict[str, tf.Tensor]:
    arrays = EXPECTED["inputs"]
    return {name: tf.constant(array, tf.float64) for name, array in arrays.items()}


def features(weights: Any, images: Any) -> Any:
    made = tf.nn.conv2d(images, weights[0], 1, "VALID") + weights[1]
    return tf.reshape(tf.tanh(made), [IMAGES, FILTERS * (SIDE - 2) ** 2])


def loss(head: Any, made: Any, labels: Any) -> Any:
    logits = made @ head[0] + head[1]
    return tf.reduce_mean(
        tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
    )


def problem_of(method: str) -> tuple[tb.Problem, list, list]:
    arrays = inputs()
    x = [arrays[name] for name in ("kernel", "bias", "head", "head_bias")]
    if method == "anil":
        one = tb.Problem(
            lambda x, y, batch: loss(y, *batch),
            lambda x, y, batch: loss(y, *batch),
            lower_start=lambda x: x[2:],
            prepare=lambda x, batches: tb.Batches(
                upper=(features(x, batches.upper[0]), batches.upper[1]),
                lower=(features(x, batches.lower[0]), batches.lower[1]),
            ),
        )
        like = x[2:]
    else:
        one = tb.Problem(
            lambda x, y, batch: loss(y[2:], features(y, batch[0]), batch[1]),
            lambda x, y, batch: loss(y[2:], features(y, batch[0]), batch[1]),
            lower_start=lambda x: x,
        )
        like = x
    return one, x, [tf.zeros([TASKS, *leaf.shape], tf.float64) for leaf in like]


def batches() -> tb.Batches:
    arrays = inputs()
    labels = tf.constant([[0, 1, 1, 0]] * TASKS)
    return tb.Batches(
        upper=(arrays["query"], labels), lower=(arrays["support"], labels)
    )


def method_of(name: str, **options: Any) -> tb.Method:
    inner = tb.InnerSolver(keras.optimizers.SGD(RATE), STEPS)
    return tb.Unroll(inner, first_order=name == "fomaml", **options)


@pytest.mark.parametrize(
    ("name", "memory"),
    fast_where(
        lambda name, memory: memory == "replay",
        [
            ("maml", "replay"),
            ("fomaml", "replay"),  # keeps no step
            ("anil", "replay"),  # a smaller y than MAML's, which has every memory
            ("maml", "checkpoint"),
            ("maml", "tape"),
        ],
    ),
)
def test_meta_gradients_are_those_of_higher(name, memory):
    one, x, y = problem_of(name)
    tasks, method = tb.over_tasks(one), method_of(name, memory=memory)
    state = method.init(tasks, x, y)
    run = tf.function(
        lambda x: tasks.step(method, x, y, batches(), state), autograph=False
    )
    for got, want in zip(run(x).upper_gradient, EXPECTED[name], strict=True):
        np.testing.assert_allclose(np.ravel(got), want, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_meta_gradients_are_central_differences():
    """Those of the tests above, as the check sees them; ANIL prepares its features."""
    one, x, y = problem_of("anil")
    tasks = tb.over_tasks(one)
    report = tb.check_hypergradient(tasks, method_of("anil"), x, y, batches(), probes=3)
    assert report.error < 1e-7


def test_first_order_is_not_second_order():
    """What the numbers above are worth: MAML that is first order by accident."""
    maml, fomaml = (np.concatenate(EXPECTED[name]) for name in ("maml", "fomaml"))
    assert np.linalg.norm(maml - fomaml) > 0.05 * np.linalg.norm(maml)


def test_itd_bio_at_rate_zero_is_first_order():
    """Heads that do not move: only the features' own gradient is left."""
    one, x, y = problem_of("anil")
    fixed = tb.Problem(one.upper_loss, one.lower_loss, prepare=one.prepare)
    tasks, encoder = tb.over_tasks(fixed), x[:2]
    heads = [tf.stack([leaf] * TASKS) for leaf in x[2:]]
    solver = tb.InnerSolver(keras.optimizers.SGD(0.0), STEPS)
    gradients = []
    for method in (tb.Unroll(solver), tb.Unroll(solver, first_order=True)):
        state = method.init(tasks, encoder, heads)
        step = tasks.step(method, encoder, heads, batches(), state)
        gradients.append(step.upper_gradient)
    for a, b in zip(*gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_fo_itd_bio_is_the_features_gradient_at_the_adapted_heads():
    one, x, _ = problem_of("anil")
    fixed = tb.Problem(one.upper_loss, one.lower_loss, prepare=one.prepare)
    tasks, encoder = tb.over_tasks(fixed), x[:2]
    heads = [tf.stack([leaf] * TASKS) for leaf in x[2:]]
    method = method_of("fomaml")
    step = method.step(
        tasks, encoder, heads, batches(), method.init(tasks, encoder, heads)
    )
    data = batches()
    with tf.GradientTape() as tape:
        tape.watch(encoder)
        total = 0.0
        for i in range(TASKS):
            made = features(encoder, data.upper[0][i])
            head = [leaf[i] for leaf in step.lower]
            total += loss(head, made, data.upper[1][i]) / TASKS
    gradient = tape.gradient(total, encoder)
    for got, want in zip(step.upper_gradient, gradient, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-10)
