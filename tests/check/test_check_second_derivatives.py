"""The look at a lower loss before the first step, and `tb.check_second_derivatives`."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import sweep_second_derivatives as sweep
import tensorflow as tf
from small_models import SGD, unroll
from suites import fast_where

import tfbilevel as tb
from tfbilevel._calculus import derivatives
from tfbilevel._check.look import operations

K = keras.layers
PIXELS = np.random.default_rng(0).normal(size=(6, 6, 6, 1)).astype("float32")
TARGETS = np.zeros([6, 2], "float32")
BATCHES = tb.Batches((PIXELS, TARGETS), (PIXELS, TARGETS))


def data() -> tf.data.Dataset:
    full = tf.data.Dataset.from_tensors((PIXELS, TARGETS))
    return tb.pair(full, full)


def upper_loss(upper: Any, lower: Any, batch: Any) -> tf.Tensor:
    inputs, targets = batch
    return tf.reduce_mean((lower(inputs, training=True) - targets) ** 2)


def lower_loss(upper: Any, lower: Any, batch: Any) -> tf.Tensor:
    inputs, targets = batch
    errors = tf.reduce_mean((lower(inputs, training=True) - targets) ** 2, 1)
    return tf.reduce_mean(upper(None) * errors)


def bilevel(*layers: Any, loss: Callable = lower_loss) -> tb.BilevelModel:
    """Weights per example around a convolution, some layers and a head."""
    keras.utils.set_random_seed(0)
    network = keras.Sequential(
        [
            keras.Input(PIXELS.shape[1:]),
            K.Conv2D(2, 3, name="first"),
            *layers,
            K.Flatten(),
            K.Dense(2, name="last"),
        ],
        name="net",
    )
    return tb.BilevelModel(tb.ExampleWeights(6), network, upper_loss, loss)


def part(function: Callable, name: str = "part") -> keras.layers.Layer:
    return K.Lambda(function, name=name)


def fractional(z: tf.Tensor) -> tf.Tensor:
    return tf.nn.fractional_max_pool(z, [1, 1.4, 1.4, 1], seed=3)[0]


def dilation(z: tf.Tensor) -> tf.Tensor:
    kernel = tf.zeros([2, 2, z.shape[-1]])
    return tf.nn.dilation2d(z, kernel, [1] * 4, "SAME", "NHWC", [1] * 4)


def colours(z: tf.Tensor) -> tf.Tensor:
    return tf.image.hsv_to_rgb(tf.concat([z, z[..., :1]], -1)) + z[..., :1]


@tf.custom_gradient
def turned(z: tf.Tensor) -> Any:
    """Gradient reversal, whose gradient is one of nothing."""
    return tf.identity(z), lambda upstream: -upstream


@tf.custom_gradient
def halted(z: tf.Tensor) -> Any:
    return tf.sin(z), lambda upstream: upstream * tf.stop_gradient(tf.cos(z))


@tf.custom_gradient
def sine(z: tf.Tensor) -> Any:
    return tf.sin(z), lambda upstream: upstream * tf.cos(z)


def looped(function: Callable) -> Callable:
    def body(count: tf.Tensor, z: tf.Tensor) -> tuple:
        return count + 1, tf.ensure_shape(function(z), z.shape)

    return lambda z: tf.while_loop(lambda n, z: n < 2, body, (0, z))[1]


def branched(function: Callable) -> Callable:
    return lambda z: tf.cond(tf.size(z) > 0, lambda: function(z), lambda: z)


def norm(lower: Any) -> tf.Tensor:
    return tf.reduce_sum(lower.trainable_variables[0] ** 2)


REFUSED = {
    "fractional": (fractional, "FractionalMaxPoolGrad", "tf.nn.max_pool2d"),
    "dilation": (dilation, "Dilation2DBackpropInput", "extract_patches"),
    "in a loop": (looped(dilation), "Dilation2DBackpropInput", "extract_patches"),
    "in a branch": (branched(dilation), "Dilation2DBackpropInput", "extract_patches"),
    "in a function": (tf.function(dilation), "Dilation2DBackprop", "extract_patches"),
    "pass through": (
        tf.grad_pass_through(tf.round),
        "grad_pass_through",
        "stop_gradient",
    ),
    "colours": (colours, "HSVToRGB", "sums and products"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_before_work_is_lost(name: str, tmp_path: Any) -> None:
    """The operation, the layer, what to use; no variable moved, no file written."""
    function, operation, instead = REFUSED[name]
    model = bilevel(part(function))
    model.compile(unroll(), SGD(0.1), jit_compile=False)
    before = [v.numpy() for v in model.variables]
    log = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    backup = keras.callbacks.BackupAndRestore(tmp_path / "run")
    with pytest.raises(tb.MissingSecondDerivativeError) as caught:
        model.fit(data(), callbacks=[log, backup], verbose=0)
    message = str(caught.value)
    for words in (operation, "'net/part'", instead, "second derivative", "Received"):
        assert words in message
    assert not list(pathlib.Path(tmp_path).iterdir())
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)
    assert model.outer_step == 0


@pytest.mark.parametrize(
    "method",
    fast_where(
        lambda method: not isinstance(method, tb.F3SA | tb.BVFSM | tb.GAFFA),
        [
            tb.ValueGap(tb.InnerSolver(SGD(0.1), 1), SGD(0.1), 1.0),
            tb.F2SA(tb.InnerSolver(SGD(0.1), 1), SGD(0.1), 1.0),
            tb.BOME(tb.InnerSolver(SGD(0.1), 1), SGD(0.1)),
            tb.MEHA(SGD(0.1)),
            tb.PersistentES(tb.InnerSolver(SGD(0.1), 1, start="cold"), 2),
            tb.F3SA(SGD(0.1), 1.0),
            tb.BVFSM(tb.InnerSolver(SGD(0.1), 1), SGD(1e-3), 1, slack=1e3),
            tb.GAFFA(SGD(0.1), lambda upper, lower: 0.1 - upper(None)[0] + norm(lower)),
            tb.FiniteDifference(tb.InnerSolver(SGD(0.1), 1)),
            tb.RankOne(tb.InnerSolver(SGD(0.1), 2)),
            tb.Unroll(
                tb.InnerSolver(
                    SGD(0.1), 2, learned_rate=lambda u: tf.reduce_mean(u(None))
                ),
                first_order=True,
            ),
        ],
    ),
    ids=lambda method: type(method).__name__,
)
def test_first_order_methods_are_not_held_to_it(method: tb.Method) -> None:
    assert not method.takes_second_derivatives
    model = bilevel(part(dilation))
    model.compile(method, SGD(0.1), jit_compile=False)
    history = model.fit(data(), verbose=0).history
    assert np.isfinite(history["upper_loss"]).all()


def test_all_other_methods_are() -> None:
    inner, rate = tb.InnerSolver(SGD(0.1), 2), SGD(0.1)
    methods = [
        tb.Unroll(inner),
        tb.ForwardUnroll(inner),
        tb.Implicit(inner),
        tb.GradientNorm(rate, 1.0),
        tb.AugmentedLagrangian(rate, 2),
        tb.StocBiO(inner),
        tb.BSA(inner),
        tb.TTSA(rate),
        tb.BAMM(rate),
        tb.SOBA(rate),
        tb.SRBA(rate),
        tb.FSLA(rate),
        tb.AmIGO(inner),
        tb.MRBO(rate),
        tb.VRBO(rate),
        tb.SUSTAIN(rate),
    ]
    assert all(method.takes_second_derivatives for method in methods)


def of_vectors(z: Any) -> tf.Tensor:
    """A derivative-less operation between vectors."""
    return tf.reduce_sum(dilation(tf.reshape(z, [1, 1, -1, 1])))


def vector_problem() -> tb.Problem:
    return tb.Problem(
        upper_loss=lambda x, y, batch: tf.reduce_sum(y**2),
        lower_loss=lambda x, y, batch: of_vectors(tf.sin(x * y)) + tf.reduce_sum(y**2),
    )


def test_every_loop_looks_first() -> None:
    problem, method = vector_problem(), tb.Implicit(tb.InnerSolver(SGD(0.1), 2))
    x, none = tf.constant([0.1, 0.2, 0.4]), tb.Batches(None, None)
    with pytest.raises(tb.MissingSecondDerivativeError, match="Dilation2D"):
        tb.minimize(problem, method, x, x, SGD(0.1), none, steps=2)
    with pytest.raises(tb.MissingSecondDerivativeError, match="Dilation2D"):
        tb.check_hypergradient(problem, method, x, x, none)
    tasks = tb.over_tasks(problem)
    batches = tb.Batches(tf.zeros([2]), tf.zeros([2]))
    with pytest.raises(tb.MissingSecondDerivativeError, match="Dilation2D"):
        tb.minimize(tasks, method, x, tf.stack([x, x]), SGD(0.1), batches, steps=2)
    model = bilevel(part(dilation))
    model.compile(unroll(), SGD(0.1), jit_compile=False)
    with pytest.raises(tb.MissingSecondDerivativeError, match="net/part"):
        model.train_on_batch(BATCHES)
    dynamic = tb.Dynamic(
        ll_objective=lambda s: lower_loss(s[2], s[3], s[:2]),
        lower_loop=2,
        ul_model=model.upper,
        ul_objective=lambda s: upper_loss(s[2], s[3], s[:2]),
        ll_model=model.lower,
        ll_opt=SGD(0.1),
    )
    with pytest.raises(tb.MissingSecondDerivativeError, match="net/part"):
        dynamic.optimize(PIXELS, TARGETS, validate_data=PIXELS, validate_target=TARGETS)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("kind", [tb.Unroll, tb.Implicit, tb.ForwardUnroll])
def test_a_step_alone_names_the_operation(kind: Any, compiled: bool) -> None:
    """Where nothing looked first, TensorFlow's own error is put into words."""
    problem, method = vector_problem(), kind(tb.InnerSolver(SGD(0.1), 2))
    x = tf.constant([0.1, 0.2, 0.4])

    def step() -> tf.Tensor:
        state = method.init(problem, x, x)
        return method.step(problem, x, x, tb.Batches(None, None), state).upper_gradient

    run = tf.function(step, autograph=False) if compiled else step
    with pytest.raises(tb.MissingSecondDerivativeError, match="Dilation2DBackprop"):
        run()


ORDINARY = {
    "batch norm and dropout": [K.BatchNormalization(), K.ReLU(), K.Dropout(0.3)],
    "layer norm": [K.LayerNormalization(), K.Activation("gelu")],
    "pools": [K.MaxPooling2D(2), K.AveragePooling2D(2)],
    "depthwise": [K.DepthwiseConv2D(2), K.UnitNormalization()],
    "attention": [K.Reshape((16, 2)), K.MultiHeadAttention(1, 2, name="attend")],
    "recurrent": [K.Reshape((16, 2)), K.GRU(2)],
    "straight through by hand": [
        part(lambda z: z + tf.stop_gradient(tf.round(z) - z)),
    ],
    "steps": [part(lambda z: z * tf.floor(z) + z * tf.cast(z > 0, z.dtype))],
    "chosen": [
        part(lambda z: tf.gather(z, tf.argmax(z[0, 0], -1), axis=-1)[..., None])
    ],
    "hard attention": [part(lambda z: z * tf.one_hot(tf.argmax(z, -1), 2))],
    "logsumexp": [part(lambda z: tf.reduce_logsumexp(z, -1, keepdims=True))],
}


@pytest.mark.parametrize("name", ORDINARY)
def test_no_false_alarm(name: str) -> None:
    layers = ORDINARY[name]
    if name == "attention":
        start = keras.Input(PIXELS.shape[1:])
        z = layers[0](K.Conv2D(2, 3)(start))
        last = K.Dense(2)(K.Flatten()(layers[1](z, z)))
        model = tb.BilevelModel(
            tb.ExampleWeights(6), keras.Model(start, last), upper_loss, lower_loss
        )
    else:
        model = bilevel(*layers)
    x, y = model._levels.read()
    found = operations(model.problem, x, y, BATCHES)
    assert [one for one in found if one.verdict in ("missing", "wrong")] == []


def test_no_false_alarm_of_an_embedding() -> None:
    network = keras.Sequential(
        [keras.Input((3,), dtype="int32"), K.Embedding(5, 2), K.LSTM(3), K.Dense(2)]
    )
    model = tb.BilevelModel(tb.ExampleWeights(2), network, upper_loss, lower_loss)
    words = np.array([[1, 2, 3], [4, 0, 1]], "int32"), TARGETS[:2]
    x, y = model._levels.read()
    assert operations(model.problem, x, y, tb.Batches(words, words)) == []


def test_what_stands_beside_the_way_is_not_looked_at() -> None:
    """An operation without a derivative that no variable reaches, or that is held."""

    def beside(z: tf.Tensor) -> tf.Tensor:
        constant = dilation(tf.ones_like(z))
        return z + constant + tf.stop_gradient(dilation(z))

    model = bilevel(part(beside))
    model.compile(unroll(), SGD(0.1), jit_compile=False)
    model.fit(data(), verbose=0)
    assert model.outer_step == 1


def test_the_upper_loss_counts_where_it_is_mixed_in() -> None:
    def pooled(upper: Any, lower: Any, batch: Any) -> tf.Tensor:
        return tf.reduce_mean(dilation(lower(batch[0])[:, None, None, :]) ** 2)

    model = bilevel()
    model = tb.BilevelModel(model.upper, model.lower, pooled, lower_loss)
    model.compile(unroll(), SGD(0.1), jit_compile=False)
    model.fit(data(), verbose=0)
    model.compile(unroll(aggregate=tb.Aggregation(0.5)), SGD(0.1), jit_compile=False)
    with pytest.raises(tb.MissingSecondDerivativeError, match="Dilation2D"):
        model.fit(data(), verbose=0)


def test_looked_at_once_per_compile() -> None:
    calls = []

    def counted(*arguments: Any) -> tf.Tensor:
        calls.append(1)
        return lower_loss(*arguments)

    model = bilevel(loss=counted)
    model.compile(unroll(), SGD(0.1), jit_compile=False)
    model._outer.look(BATCHES, eager=False)
    assert len(calls) == 1
    model.fit(data(), verbose=0)
    model.fit(data(), verbose=0)
    once = len(calls)
    model.fit(data(), verbose=0)
    assert len(calls) == once
    model.compile(unroll(), SGD(0.1), jit_compile=False)
    model._outer.look(BATCHES, eager=False)
    assert len(calls) == once + 1


def test_a_written_gradient_is_caught_by_the_probe() -> None:
    """What only its author can vouch for: the differences find it."""
    report = tb.check_second_derivatives(bilevel(part(turned)), BATCHES, probes=1)
    (one,) = [o for o in report.operations if o.verdict == "own"]
    assert one.name == "turned" and one.layer == "net/part"
    assert not report.right and report.error > 0.01 and report.noise < 1e-6
    assert "WRONG" in str(report)
    report = tb.check_second_derivatives(bilevel(part(sine)), BATCHES, probes=1)
    assert report.right and report.precision == "float64"
    assert report.error < 1e-7 and "right" in str(report)


def test_stop_gradient_in_a_written_gradient_is_seen() -> None:
    report = tb.check_second_derivatives(bilevel(part(halted)), BATCHES, probes=1)
    assert "wrong" in [one.verdict for one in report.operations]
    assert report.error > 0.01


def test_the_table_names_what_is_missing_and_nothing_is_assigned() -> None:
    model = bilevel(part(fractional), K.BatchNormalization())
    before = [(v.dtype, v.numpy()) for v in model.variables]
    policies = [k.dtype_policy for k in model.lower._flatten_layers()]
    report = tb.check_second_derivatives(model, BATCHES)
    assert not report.right and report.probes == () and np.isnan(report.error)
    for words in ("FractionalMaxPoolGrad", "net/part", "missing", "tf.nn.max_pool2d"):
        assert words in str(report)
    good = bilevel(K.BatchNormalization(), K.Dropout(0.5))
    before = [(v.dtype, v.numpy()) for v in good.variables]
    policies = [k.dtype_policy for k in good.lower._flatten_layers()]
    report = tb.check_second_derivatives(good, BATCHES, probes=1)
    assert report.right and report.precision == "float64" and report.error < 1e-7
    assert [k.dtype_policy for k in good.lower._flatten_layers()] == policies
    for variable, (dtype, value) in zip(good.variables, before, strict=True):
        assert variable.dtype == dtype
        np.testing.assert_array_equal(variable, value)


def test_products_of_a_known_loss() -> None:
    """g = x1 sin(y1 y2): by hand g_yy v and g_xy v along the reported directions."""
    problem = tb.Problem(
        upper_loss=lambda x, y, batch: tf.reduce_sum(y),
        lower_loss=lambda x, y, batch: x * tf.sin(y),
    )
    x, y = tf.constant(0.7), tf.constant(0.4)
    report = tb.check_second_derivatives(problem, tb.Batches(None, None), x, y)
    assert report.precision == "float64" and len(report.probes) == 6
    for probe in report.probes:
        # Directions of length 1 in one dimension: plus or minus one.
        exact = -x * np.sin(y) if probe.product == "g_yy v" else np.cos(y)
        np.testing.assert_allclose(abs(probe.claimed), abs(exact), rtol=1e-6)
        np.testing.assert_allclose(probe.difference, probe.claimed, rtol=1e-7)


def test_what_insists_on_float32_is_said() -> None:
    def lower_loss(x: Any, y: Any, batch: Any) -> tf.Tensor:
        return tf.reduce_sum(tf.cast(x, tf.float32) * tf.sin(tf.cast(y, tf.float32)))

    problem = tb.Problem(lambda x, y, b: tf.reduce_sum(y), lower_loss)
    x = tf.constant([0.3, 0.6])
    report = tb.check_second_derivatives(problem, tb.Batches(None, None), x, x)
    assert report.precision == "float64, in part float32"
    assert report.right and 1e-6 < report.noise < 1e-2

    mixed = tb.Problem(
        lambda x, y, b: tf.reduce_sum(y),
        lambda x, y, b: tf.reduce_sum(x * tf.sin(y) * tf.constant([1.0, 2.0])),
    )
    report = tb.check_second_derivatives(mixed, tb.Batches(None, None), x, x)
    assert report.precision == "float32" and report.right and report.noise > 1e-6


def test_arguments() -> None:
    problem, x = vector_problem(), tf.constant([0.1, 0.2, 0.4])
    none = tb.Batches(None, None)
    with pytest.raises(ValueError, match="`upper` and `lower` must be given"):
        tb.check_second_derivatives(problem, none, x)
    with pytest.raises(ValueError, match="must be left out"):
        tb.check_second_derivatives(bilevel(), BATCHES, x, x)
    with pytest.raises(ValueError, match="`problem` must be"):
        tb.check_second_derivatives(None, none, x, x)
    with pytest.raises(ValueError, match="`probes`"):
        tb.check_second_derivatives(problem, none, x, x, probes=0)


@pytest.mark.parametrize("name", ["Dense", "LayerNormalization", "Add"])
def test_a_sample_of_the_sweep(name: str) -> None:
    keywords, inputs = sweep.layers()[name][0]
    row = sweep.checked(functools.partial(sweep.layer_case, name, keywords, inputs))
    assert row.verdict == "right", row


@pytest.mark.parametrize("size", [2, 3])
def test_max_pooling_of_volumes_that_keeps_the_size(size: int) -> None:
    """Found by the sweep: zero in a graph. Against maxima over patches, in a graph."""
    generator = np.random.default_rng(3)
    y, v = (tf.constant(generator.normal(size=(2, 4, 4, 4, 1)), tf.float32),) * 2
    v = tf.reverse(v, [1])
    before, after = (size - 1) // 2, size // 2
    around = [[0, 0], *3 * [[before, after]], [0, 0]]

    def by_patches(z: tf.Tensor) -> tf.Tensor:
        z = tf.pad(z, around, constant_values=-1e9)
        ksizes, strides = [1, size, size, size, 1], [1] * 5
        return tf.reduce_max(
            tf.extract_volume_patches(z, ksizes, strides, "VALID"), -1, keepdims=True
        )

    def product(pool: Callable) -> np.ndarray:
        def curved(y: tf.Tensor, v: tf.Tensor) -> tf.Tensor:
            _, _, pullback = derivatives.lower_gradient_pullback(
                lambda x, y, batch: tf.reduce_sum(x * pool(y) ** 2), 1.0, y, None
            )
            # Made in the graph: what nobody else needs is written over.
            return pullback(tf.sin(v))[1]

        return tf.function(curved, autograph=False)(y, v).numpy()

    made = product(lambda z: tf.nn.max_pool3d(z, size, 1, "SAME"))
    np.testing.assert_allclose(made, product(by_patches), atol=1e-6)
    assert np.abs(made).max() > 0.1


@tf.custom_gradient
def held(z: tf.Tensor) -> Any:
    """The sine, whose gradient is right and constant for TensorFlow."""

    def gradient(upstream: tf.Tensor) -> tf.Tensor:
        return upstream * tf.ensure_shape(
            tf.numpy_function(np.cos, [z], z.dtype), z.shape
        )

    return tf.sin(z), gradient


def test_the_sweep_would_see_a_wrong_product() -> None:
    of = functools.partial(sweep.function_case, "activation", "held", "", held)
    case = functools.partial(of, (2, 4))
    assert sweep.checked(case).verdict == "WRONG"
    assert not sweep.agrees(case("float64"))
    assert sweep.verdict(case) == "WRONG"


def test_the_sweep_knows_all_layers() -> None:
    assert sweep.missing_layers() == []


PARTS = 6


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_nothing_in_the_sweep_is_wrong(part: int) -> None:
    makers = list(sweep.makers())[part::PARTS]
    assert len(makers) > 35
    assert [make.args for make in makers if sweep.verdict(make) == "WRONG"] == []
