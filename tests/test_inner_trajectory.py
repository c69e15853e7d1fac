"""`InnerSolver.trajectory` against a loop in NumPy."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbilevel as tb

RATE, STEPS = 0.3, 5
GENERATOR = np.random.default_rng(0)
SLOPES = GENERATOR.normal(size=(STEPS, 3))  # one lower batch per inner step
X, Y, START = GENERATOR.normal(size=(3, 3))
LEAST = -0.375  # exact in float32 too, as the momentum must be


def problem(**options) -> tb.Problem:
    """g_y = y - x + the batch."""
    return tb.Problem(
        upper_loss=lambda x, y, batch: tf.reduce_sum(y**2),
        lower_loss=lambda x, y, batch: tf.reduce_sum(0.5 * (y - x) ** 2 + batch * y),
        **options,
    )


def expected(start: np.ndarray, momentum: float, least: float) -> np.ndarray:
    """Of gradient steps with Keras's momentum, kept above a bound."""
    y, velocity, found = start, np.zeros(3), []
    for slope in SLOPES:
        velocity = momentum * velocity - RATE * (y - X + slope)
        y = np.maximum(y + velocity, least)
        found.append(y)
    return np.array(found)


@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
@pytest.mark.parametrize(
    ("options", "begin", "momentum", "least"),
    [
        ({}, Y, 0.0, -np.inf),
        ({}, Y, 0.5, LEAST),
        (
            {"start": lambda step: START * tf.cast(1 + step, tf.float64)},
            4 * START,
            0.0,
            LEAST,
        ),
    ],
    ids=["plain", "momentum and projection", "a start of the outer step's own"],
)
def test_iterates_are_those_of_a_loop(mode, options, begin, momentum, least) -> None:
    inner = tb.InnerSolver(keras.optimizers.SGD(RATE, momentum), STEPS, **options)
    bounded = problem(
        project_lower=lambda y: tf.maximum(y, tf.constant(least, y.dtype))
    )
    batches = tb.StackedBatches(None, tf.constant(SLOPES))
    x, y = tf.constant(X), tf.constant(Y)
    state = inner.init(bounded, x, y)
    if "step" in state:
        state["step"] = tf.constant(3, tf.int64)

    def both() -> tuple:
        here = bounded.prepared(x, batches)
        kept = inner.trajectory(here, y, state)
        sums = inner.trajectory(here, y, state, of=tf.reduce_sum)
        return kept, sums, inner.solve(here, y, state)[0]

    if mode != "eager":
        both = tf.function(both, autograph=False, jit_compile=mode == "xla")
    kept, sums, end = both()
    want = expected(begin, momentum, least)
    np.testing.assert_allclose(kept, want, rtol=1e-12)
    np.testing.assert_allclose(sums, want.sum(axis=1), rtol=1e-12)
    np.testing.assert_allclose(end, want[-1], rtol=1e-12)


def test_nests_are_kept_and_a_tolerance_is_refused() -> None:
    nested = tb.Problem(
        upper_loss=lambda x, y, batch: y["a"] ** 2,
        lower_loss=lambda x, y, batch: 0.5 * (y["a"] - x) ** 2 + y["b"][0] ** 2,
    )
    x, y = tf.constant(4.0), {"a": tf.constant(0.0), "b": [tf.constant(1.0)]}
    nothing, sgd = tb.Batches(None, None), keras.optimizers.SGD(0.25)
    inner = tb.InnerSolver(sgd, 2)
    here = nested.prepared(x, nothing)
    found = inner.trajectory(here, y, inner.init(nested, x, y))
    np.testing.assert_allclose(found["a"], [1.0, 1.75])
    np.testing.assert_allclose(found["b"][0], [0.5, 0.25])
    stopping = tb.InnerSolver(sgd, 2, atol=0.1)
    with pytest.raises(ValueError, match="must be None for `trajectory`"):
        stopping.trajectory(here, y, stopping.init(nested, x, y))
