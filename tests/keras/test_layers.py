"""The small upper models, against NumPy."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from suites import fast_where

import tfbilevel as tb

LOGITS = np.array([-1.0, 0.5, 2.0, 0.0], "float32")


def filled(layer):
    layer.logits.assign(LOGITS)
    return layer


def test_example_weights_are_gathered_by_index():
    weights = filled(tb.ExampleWeights(4))
    expected = 1 / (1 + np.exp(-LOGITS))
    np.testing.assert_allclose(weights(None), expected, rtol=1e-6)
    index = np.array([[2, 0], [2, 3]])
    np.testing.assert_allclose(weights(index), expected[index], rtol=1e-6)


def test_a_gathered_weight_sends_its_gradient_home():
    weights = filled(tb.ExampleWeights(4))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(weights(tf.constant([2, 0, 2])) * [1.0, 10.0, 100.0])
    gradient = tf.convert_to_tensor(tape.gradient(loss, weights.logits.value))
    s = 1 / (1 + np.exp(-LOGITS))
    expected = s * (1 - s) * [10.0, 0.0, 101.0, 0.0]
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 2, 5)])
def test_feature_penalties_are_half_the_weighted_squares(shape):
    kernel = np.random.default_rng(0).normal(size=shape).astype("float32")
    axes = tuple(range(1, len(shape)))
    expected = 0.5 * np.sum(np.exp(LOGITS) * np.sum(kernel**2, axis=axes))
    penalties = filled(tb.FeaturePenalties(4))
    np.testing.assert_allclose(penalties(kernel), expected, rtol=1e-5)
    np.testing.assert_allclose(penalties.coefficients, np.exp(LOGITS), rtol=1e-6)


def test_a_kernel_with_other_rows_is_refused():
    with pytest.raises(ValueError, match="`kernel` must have one row per feature"):
        tb.FeaturePenalties(4)(np.ones((3, 4), "float32"))


@pytest.mark.parametrize("jit", [False, True])
def test_feature_penalties_have_both_derivatives(jit):
    """Gradient and Hessian-vector product, written out in NumPy."""
    generator = np.random.default_rng(1)
    kernel, v = generator.normal(size=(2, 4, 3)).astype("float32")
    penalties = filled(tb.FeaturePenalties(4))
    penalty = tb.functional(penalties)

    @tf.function(jit_compile=jit, autograph=False)
    def derivatives(x, y, v):
        with tf.GradientTape() as outer:
            outer.watch((x, y))
            with tf.GradientTape() as inner:
                inner.watch((x, y))
                value = 3.0 * penalty([x], y)
            first = inner.gradient(value, (x, y))
            along = tf.reduce_sum(first[1] * v)
        return first, outer.gradient(along, (x, y))

    (d_x, d_y), (mixed, curved) = derivatives(*map(tf.constant, (LOGITS, kernel, v)))
    c = 3 * np.exp(LOGITS)
    np.testing.assert_allclose(d_x, 0.5 * c * (kernel**2).sum(1), rtol=1e-5)
    np.testing.assert_allclose(d_y, c[:, None] * kernel, rtol=1e-5)
    np.testing.assert_allclose(curved, c[:, None] * v, rtol=1e-5)
    np.testing.assert_allclose(mixed, c * (kernel * v).sum(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [tb.ExampleWeights, tb.FeaturePenalties])
def test_layers_survive_their_configuration(kind):
    layer = kind(4, activation="softplus", name="mine")
    again = keras.layers.deserialize(keras.layers.serialize(layer))
    assert type(again) is kind and again.name == "mine" and again.n == 4
    filled(again)
    values = again(None) if kind is tb.ExampleWeights else again.coefficients
    np.testing.assert_allclose(values, np.log1p(np.exp(LOGITS)), rtol=1e-5)


@pytest.mark.parametrize("n", [0, -3, 2.5, True])
def test_how_many_is_checked(n):
    with pytest.raises(ValueError, match="`n` must be an integer of at least 1"):
        tb.ExampleWeights(n=n)


# Indices out of range and losses of other shapes: refused, however compiled.

INPUTS = np.random.default_rng(2).normal(size=(4, 3)).astype("float32")
LABELS = np.array([0, 1, 1, 0])


def cross_entropy(network, batch):
    return tf.nn.sparse_softmax_cross_entropy_with_logits(batch[1], network(batch[0]))


def weighted(upper, lower, batch):
    return upper.mean(cross_entropy(lower, batch), batch[2])


def trained(lower_batches, lower_loss=weighted, stacked=1, jit=True, **options):
    """Fit three outer steps of two inner ones."""
    network = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model = tb.BilevelModel(
        tb.ExampleWeights(4, name="importance"),
        network,
        lambda upper, lower, batch: tf.reduce_mean(cross_entropy(lower, batch)),
        lower_loss,
        tasks=options.pop("tasks", None),
    )
    method = tb.Unroll(tb.InnerSolver(keras.optimizers.SGD(0.5), 2))
    model.compile(method, keras.optimizers.SGD(1.0), jit_compile=jit, **options)
    copies = UPPER if model.tasks is None else tuple(np.stack([p] * 2) for p in UPPER)
    upper = tf.data.Dataset.from_tensors(copies)
    data = tb.pair(upper, lower_batches, lower_batches=stacked)
    model.fit(data, verbose=0)
    return model


UPPER = (INPUTS, LABELS)


def of_indices(*rows):
    """A dataset of one full batch per row of indices."""
    count = len(rows)
    parts = [np.stack([part] * count) for part in UPPER]
    return tf.data.Dataset.from_tensor_slices((*parts, np.array(rows)))


FINE = [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (([0, 1, 2, 4],), {}),
        pytest.param(
            (FINE, [3, 3, 3, -7]),
            {"on_nonfinite": "skip", "jit": False},
            marks=pytest.mark.slow,
        ),
        ((FINE, FINE, [0, 4, 0, 0]), {"steps_per_execution": 3, "jit": False}),
        pytest.param(
            (FINE, [0, 1, 2, 4]), {"stacked": 2, "jit": False}, marks=pytest.mark.slow
        ),
        pytest.param(
            (FINE, [0, 1, 2, 4]),
            {"run_eagerly": True, "jit": False},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_an_index_out_of_range_is_named(rows, options):
    bad = next(i for row in rows for i in row if not 0 <= i < 4)
    with pytest.raises(
        ValueError, match=rf"`index` must be from 0 to 3.*importance.*index {bad}, out"
    ):
        trained(of_indices(*rows), **options)


def test_an_index_of_one_task_out_of_range_is_named():
    index = np.array([FINE, [0, 1, 2, -4]])
    data = tf.data.Dataset.from_tensors(
        (np.stack([INPUTS] * 2), np.stack([LABELS] * 2), index)
    )
    with pytest.raises(ValueError, match="`index` must be from 0 to 3.*index -4, out"):
        trained(data, tasks=2, jit=False)


@pytest.mark.parametrize("jit", fast_where(lambda jit: not jit, [False, True]))
def test_a_step_with_a_bad_index_moves_nothing_and_training_goes_on(jit):
    model = trained(of_indices(FINE), jit=jit)
    before = model.get_weights()
    batch = tb.Batches(UPPER, (*UPPER, np.array([0, 1, 2, 5])))
    with pytest.raises(ValueError, match="index 5, out of range, n=4"):
        model.train_on_batch(batch)
    for value, was in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(value, was)
    model.train_on_batch(batch._replace(lower=(*UPPER, np.array(FINE))))
    assert not np.array_equal(model.upper.logits, before[0])


@pytest.mark.parametrize("jit", fast_where(bool, [False, True]))
def test_minimize_names_an_index_out_of_range(jit):
    weights = tb.functional(tb.ExampleWeights(4))
    problem = tb.Problem(
        lambda x, y, batch: tf.reduce_sum((y - 1.0) ** 2),
        lambda x, y, batch: tf.reduce_mean(weights(x, batch) * (y - 2.0) ** 2),
    )
    method = tb.Unroll(tb.InnerSolver(keras.optimizers.SGD(0.1), 1))
    start = [[tf.zeros([4])], tf.zeros([3])]
    for batches in (
        tb.Batches(None, tf.constant([0, 1, 4])),
        lambda k: tb.Batches(None, k + tf.constant([0, 1, 2])),
    ):
        with pytest.raises(ValueError, match="index 4, out of range, n=4"):
            tb.minimize(
                problem,
                method,
                *start,
                keras.optimizers.SGD(0.1),
                batches,
                3,
                jit_compile=jit,
            )


@pytest.mark.parametrize("kind", ["int32", "int64", "uint8", "int16"])
def test_indices_of_every_integer_type(kind):
    weights = filled(tb.ExampleWeights(4))
    index = np.array([3, 1], kind)
    want = 1 / (1 + np.exp(-LOGITS[[3, 1]]))
    graph = tf.function(lambda index: weights(index), autograph=False)
    np.testing.assert_allclose(weights(index), want, rtol=1e-6)
    np.testing.assert_allclose(graph(tf.constant(index)), want, rtol=1e-6)
    with pytest.raises(ValueError, match="`index` must be integers"):
        weights(index.astype("float32"))


@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_mean_is_of_weights_times_losses(column, dtype):
    weights = filled(tb.ExampleWeights(4))
    losses = np.array([1.0, 10.0, 3.0, 7.0], dtype)
    shape = (-1, 1) if column else (-1,)
    sigmoid = 1 / (1 + np.exp(-LOGITS))
    found = weights.mean(losses.reshape(shape))
    assert found.dtype == dtype
    close = {"rtol": 2e-3 if dtype == "float16" else 1e-6}
    np.testing.assert_allclose(found, np.mean(sigmoid * losses), **close)
    index = np.array([2, 0, 2])
    found = weights.mean(losses[:3].reshape(shape), index.reshape(shape))
    np.testing.assert_allclose(found, np.mean(sigmoid[index] * losses[:3]), **close)


@pytest.mark.parametrize(
    ("losses", "index"),
    [
        (np.ones(3), None),
        (np.ones(()), None),  # reduced already
        (np.ones((1, 4)), None),
        (np.ones((4, 4)), None),
        (np.ones(3), np.array([0, 1])),
        (np.ones(1), np.array([0, 1])),  # would be repeated
        (np.ones(4, int), None),
    ],
)
def test_losses_that_are_not_one_per_example_are_refused(losses, index):
    with pytest.raises(ValueError, match="`losses`.*must be"):
        tb.ExampleWeights(4).mean(losses, index)


@pytest.mark.parametrize(
    ("jit", "one"),
    fast_where(lambda jit, one: jit, [(False, True), (True, True), (False, False)]),
)
def test_losses_of_a_size_that_only_the_step_knows_are_refused_by_name(jit, one):
    """Mini-batches without an index; one loss for all of a batch's indices."""

    def lower_loss(upper, lower, batch):
        losses = cross_entropy(lower, batch)
        return upper.mean(losses[:1], batch[2]) if one else upper.mean(losses)

    data = tf.data.Dataset.from_tensor_slices((*UPPER, np.arange(4))).batch(2)
    with pytest.raises(ValueError, match=r"`losses` of tb.ExampleWeights.mean must be"):
        trained(data, lower_loss, jit=jit)
    whole = tf.data.Dataset.from_tensor_slices((*UPPER, np.arange(4))).batch(4)
    trained(whole, lambda u, low, b: u.mean(cross_entropy(low, b)), jit=jit)


@pytest.mark.parametrize(
    "policy", fast_where("mixed_float16".__eq__, ["mixed_float16", "mixed_bfloat16"])
)
def test_mixed_precision_trains_on_weights_of_the_variables_precision(policy):
    """As in float32, where the network is in float32 itself."""
    moved = {}
    for name in (policy, "float32"):
        keras.config.set_dtype_policy(name)
        try:
            keras.utils.set_random_seed(1)
            dense = keras.layers.Dense(2, dtype="float32")
            model = tb.BilevelModel(
                tb.ExampleWeights(4),
                keras.Sequential([keras.Input((3,)), dense]),
                lambda u, low, batch: tf.reduce_mean(cross_entropy(low, batch)),
                lambda u, low, batch: tf.reduce_mean(
                    u(None) * cross_entropy(low, batch)
                ),
            )
            assert model.upper(None).dtype == tf.float32
            assert model.upper(tf.constant([0])).dtype == tf.float32
            penalty = tb.FeaturePenalties(2)(tf.ones([2, 3]) / 3.0)
            assert penalty.dtype == tf.float32
        finally:
            keras.config.set_dtype_policy("float32")
        method = tb.Unroll(tb.InnerSolver(keras.optimizers.SGD(0.5), 2))
        model.compile(method, keras.optimizers.SGD(1.0), jit_compile=False)
        full = tf.data.Dataset.from_tensors(UPPER)
        model.fit(tb.pair(full, full), verbose=0)
        moved[name] = model.upper.logits.numpy()
    assert np.abs(moved["float32"]).max() > 1e-3
    np.testing.assert_allclose(moved[policy], moved["float32"], rtol=1e-5)
