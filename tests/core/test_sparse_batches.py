"""Sparse batches give what the same batches give dense."""

import contextlib
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from suites import fast_where

import tfbilevel as tb

FEATURES, OUTPUTS, ROWS = 5, 2, 3
generator = np.random.default_rng(0)
INPUTS = generator.normal(size=(24, FEATURES))
INPUTS *= generator.random(INPUTS.shape) < 0.4
INPUTS[4:9] = 0  # a whole lower batch without an entry, and parts of two more
LABELS = generator.normal(size=(24, OUTPUTS))


def squares(y: Any, batch: tuple) -> tf.Tensor:
    inputs, labels = batch
    sparse = isinstance(inputs, tf.SparseTensor)
    product = tf.sparse.sparse_dense_matmul if sparse else tf.matmul
    return tf.reduce_mean(tf.square(product(inputs, y) - labels))


def penalised(x: Any, y: Any, batch: tuple) -> tf.Tensor:
    return squares(y, batch) + tf.reduce_sum(tf.exp(x)[:, None] * y * y)


PROBLEM = tb.Problem(lambda x, y, batch: squares(y, batch), penalised)
X = tf.linspace(tf.constant(-1.0, tf.float64), 1.0, FEATURES)
Y = tf.ones([FEATURES, OUTPUTS], tf.float64)


def inputs(sparse: bool, dtype: str = "float64") -> Any:
    dense = INPUTS.astype(dtype)
    return tf.sparse.from_dense(dense) if sparse else tf.constant(dense)


def dataset(sparse: bool, lower_batches: int, dtype: str = "float64") -> Any:
    slices = tf.data.Dataset.from_tensor_slices(
        (inputs(sparse, dtype), tf.constant(LABELS, dtype))
    ).batch(ROWS, drop_remainder=True)
    return tb.pair(slices, slices, lower_batches)


INNER = tb.InnerSolver(keras.optimizers.SGD(0.1), 2)
METHODS = {
    "stocbio": (tb.StocBiO(INNER, 2, 0.1), 5),
    "implicit": (tb.Implicit(INNER), 1),
    "implicit, stacked": (tb.Implicit(INNER, tb.FixedPoint(3)), 3),
    "unroll": (tb.Unroll(INNER), 1),
    "unroll, stacked": (tb.Unroll(INNER), 4),
}


@pytest.mark.parametrize("rows", [1, 3, 700])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.7])
def test_a_slice_of_sparse_batches_is_the_dense_slice(rows: int, density: float):
    """Long ones too: beyond the grid on which a slice's first entry is looked for."""
    draws = np.random.default_rng(1)
    dense = draws.normal(size=(4, rows, 6)) * (draws.random((4, rows, 6)) < density)
    dense[2] = 0
    batches = tb.StackedBatches(None, tf.sparse.from_dense(dense))

    @tf.function(autograph=False)
    def compiled(draw: tf.Tensor) -> Any:
        return batches.lower_at(draw)

    for draw in (0, 1, 2, 3, 4, 9):
        for made in (batches.lower_at(draw), compiled(tf.constant(draw))):
            assert made.shape == (rows, 6)
            np.testing.assert_array_equal(tf.sparse.to_dense(made), dense[draw % 4])


def test_pair_stacks_sparse_lower_batches():
    for batches in dataset(True, 4):
        assert isinstance(batches, tb.StackedBatches)
        assert batches.lower[0].shape == (4, ROWS, FEATURES)
        assert batches.upper[0].shape == (ROWS, FEATURES)
    for draw in range(4):
        features, labels = batches.lower_at(draw)
        rows = slice(ROWS * (4 + draw), ROWS * (5 + draw))
        np.testing.assert_array_equal(tf.sparse.to_dense(features), INPUTS[rows])
        np.testing.assert_array_equal(labels, LABELS[rows])


@pytest.mark.parametrize(
    "name, source",
    fast_where(
        lambda name, source: "stocbio" in name,
        [*((name, "dataset") for name in METHODS), ("stocbio", "fixed")],
    ),
)
def test_minimize(name: str, source: str):
    method, lower_batches = METHODS[name]

    def ends(sparse: bool) -> np.ndarray:
        batches = dataset(sparse, lower_batches).repeat(2)
        if source == "fixed":
            batches = next(iter(batches))
        result = tb.minimize(
            PROBLEM, method, X, Y, keras.optimizers.SGD(0.1), batches, 2
        )
        return np.concatenate([result.upper, tf.reshape(result.lower, [-1])])

    np.testing.assert_allclose(ends(True), ends(False), rtol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_prepared_entries_are_differentiated_through(name: str):
    """The inputs scaled by a function of x, once per outer step: in `prepare` sparse,
    dense, and in the loss itself."""
    method, lower_batches = METHODS[name]

    def scaled(x: Any, features: Any) -> Any:
        factor = 1 + tf.reduce_sum(x * x)
        if isinstance(features, tf.SparseTensor):
            return features.with_values(factor * features.values)
        return factor * features

    def prepare(x: Any, batches: tb.Batches) -> tb.Batches:
        features, labels = batches.lower
        return batches._replace(lower=(scaled(x, features), labels))

    def inside(x: Any, y: Any, batch: tuple) -> tf.Tensor:
        return penalised(x, y, (scaled(x, batch[0]), batch[1]))

    gradients = []
    for sparse, options in [
        (True, {"lower_loss": penalised, "prepare": prepare}),
        (False, {"lower_loss": penalised, "prepare": prepare}),
        (True, {"lower_loss": inside}),
    ]:
        problem = tb.Problem(PROBLEM.upper_loss, **options)
        batches = next(iter(dataset(sparse, lower_batches)))
        step = method.step(problem, X, Y, batches, method.init(problem, X, Y))
        gradients.append(step.upper_gradient)
    np.testing.assert_allclose(gradients[0], gradients[1], rtol=1e-10)
    np.testing.assert_allclose(gradients[0], gradients[2], rtol=1e-10)


def test_check_hypergradient():
    batches = next(iter(dataset(True, 4)))
    report = tb.check_hypergradient(PROBLEM, tb.Unroll(INNER), X, Y, batches)
    assert report.error < 1e-7


@pytest.mark.parametrize(
    "jit_compile", [False, pytest.param("auto", marks=pytest.mark.slow)]
)
def test_fit(jit_compile: Any):
    """XLA has no sparse product: "auto" then keeps the graph, and says so."""

    def ends(sparse: bool) -> np.ndarray:
        upper = tb.FeaturePenalties(FEATURES)
        lower = keras.layers.Dense(OUTPUTS, use_bias=False, kernel_initializer="ones")
        lower.build((None, FEATURES))
        model = tb.BilevelModel(
            upper,
            lower,
            lambda u, v, batch: squares(tf.convert_to_tensor(v.kernel), batch),
            lambda u, v, batch: (
                squares(tf.convert_to_tensor(v.kernel), batch) + u(v.kernel)
            ),
        )
        model.compile(
            METHODS["stocbio"][0],
            keras.optimizers.SGD(0.1),
            jit_compile=jit_compile if sparse else False,
            steps_per_execution=2,
        )
        said = pytest.warns(UserWarning, match="runs the outer step as a plain")
        with said if sparse and jit_compile else contextlib.nullcontext():
            model.fit(dataset(sparse, 5, "float32").take(4), epochs=2, verbose=0)
        assert model.outer_step == 8 and not model.jit_compile
        return np.concatenate([upper.logits, np.ravel(lower.kernel)])

    np.testing.assert_allclose(ends(True), ends(False), rtol=1e-5, atol=1e-7)
