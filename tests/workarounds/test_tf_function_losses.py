"""`tf.function` around losses, helpers, layers and regularisers.

Such a function keeps the weights it was traced with. Steps with it must be those of the
same code without it, eagerly, in graphs and under XLA, or end in an error that says so.
"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from suites import fast_where
from tensorflow.python.eager.polymorphic_function import polymorphic_function

import tfbilevel as tb
from tfbilevel._workarounds import functions_inline, inline_functions

generator = np.random.default_rng(0)
INPUTS = generator.normal(size=(8, 3)).astype("float32")
CLASSES = (INPUTS[:, 0] > 0).astype("int32")
MODES = ["eager", "graph", "xla"]


def entropies(network: Any, batch: Any) -> Any:
    return tf.nn.sparse_softmax_cross_entropy_with_logits(batch[1], network(batch[0]))


def upper_loss(upper: Any, lower: Any, batch: Any) -> Any:
    del upper
    return tf.reduce_mean(entropies(lower, batch))


def lower_loss(upper: Any, lower: Any, batch: Any) -> Any:
    return tf.reduce_mean(upper(None) * entropies(lower, batch))


def network(layer: Any = keras.layers.Dense, **keywords: Any) -> Any:
    keywords = {"kernel_initializer": "zeros"} | keywords
    return keras.Sequential([keras.Input((3,)), layer(2, **keywords)])


def step(
    lower: Any, upper_loss: Callable, lower_loss: Callable, mode: str
) -> np.ndarray:
    """Upper gradient and next lower variables of one outer step, from y that is not
    what the network holds."""
    model = tb.BilevelModel(tb.ExampleWeights(8), lower, upper_loss, lower_loss)
    method = tb.Unroll(tb.InnerSolver(keras.optimizers.SGD(0.5), 3))
    x = [tf.linspace(-0.5, 0.5, 8)]
    y = [
        tf.reshape(tf.linspace(-0.3, 0.4, tf.size(v)), v.shape)
        for v in tb.functional(lower).initial()
    ]

    def run(x: Any, y: Any, batches: Any) -> Any:
        problem = model.problem
        made = problem.step(method, x, y, batches, method.init(problem, x, y))
        return [*made.upper_gradient, *made.lower]

    if mode != "eager":
        run = tf.function(run, autograph=False, jit_compile=mode == "xla")
    data = (INPUTS, CLASSES)
    flat = [np.ravel(v) for v in run(x, y, tb.Batches(data, data))]
    return np.concatenate(flat)


def decorated_losses() -> tuple:
    return network(), tf.function(upper_loss), tf.function(lower_loss)


def ran_before() -> tuple:
    """A helper over a network, traced while this held other weights."""
    lower = network()
    helper = tf.function(lambda inputs, classes: entropies(lower, (inputs, classes)))
    helper(INPUTS, CLASSES)

    def loss(upper: Any, lower: Any, batch: Any) -> Any:
        del lower
        return tf.reduce_mean(upper(None) * helper(*batch))

    return lower, upper_loss, loss


def doubled(value: Any) -> Any:
    if value > 0.0:
        return 2.0 * value
    return 3.0 * value


def control_flow() -> tuple:
    """The loss itself: (x / 2) * 2, by an `if`, a loop and a helper of its own."""

    @tf.function
    def loss(upper: Any, lower: Any, batch: Any) -> Any:
        value = lower_loss(upper, lower, batch)
        if value > 0.0:
            value = value / 4.0
        for _ in tf.range(1):
            value = value * 2.0
        return doubled(value)

    return network(), upper_loss, loss


def compiled() -> tuple:
    return (
        network(),
        tf.function(upper_loss, jit_compile=True),
        tf.function(lower_loss, jit_compile=True, autograph=False),
    )


def signature() -> tuple:
    spec = tf.TensorSpec([None], tf.float32)
    half = tf.TensorSpec([], tf.float32)

    @tf.function(input_signature=[spec, half])
    def mean(values: Any, scale: Any) -> Any:
        return tf.reduce_mean(values) * scale

    def loss(upper: Any, lower: Any, batch: Any) -> Any:
        return mean(upper(None) * entropies(lower, batch), 1)

    return network(), upper_loss, loss


def method() -> tuple:
    class Losses(tf.Module):
        @tf.function
        def lower(self, upper: Any, lower: Any, batch: Any) -> Any:
            return lower_loss(upper, lower, batch)

        @tf.function
        def __call__(self, upper: Any, lower: Any, batch: Any) -> Any:
            return upper_loss(upper, lower, batch)

    losses = Losses()
    return network(), losses, losses.lower


def layer_s_call() -> tuple:
    class Layer(keras.layers.Dense):
        @tf.function
        def call(self, inputs: Any) -> Any:
            if tf.reduce_sum(inputs) > -1e9:
                inputs = inputs * 1.0
            return super().call(inputs)

    return network(Layer), upper_loss, lower_loss


def regulariser() -> tuple:
    lower = network()
    kernel = lower.trainable_variables[0]
    penalty = tf.function(lambda: 0.0 * tf.reduce_sum(tf.square(kernel.value)))
    penalty()

    def loss(upper: Any, lower: Any, batch: Any) -> Any:
        return lower_loss(upper, lower, batch) + penalty()

    return lower, upper_loss, loss


def mapped(how: Callable) -> Callable:
    """A helper of one example, under one of TensorFlow's mappings."""

    def make() -> tuple:
        lower = network()

        @tf.function
        def one(example: Any) -> Any:
            return entropies(lower, (example[0][None], example[1][None]))[0]

        one((tf.constant(INPUTS[0]), tf.constant(CLASSES[0])))

        def loss(upper: Any, lower: Any, batch: Any) -> Any:
            del lower
            batch = tuple(tf.convert_to_tensor(leaf) for leaf in batch)
            return tf.reduce_mean(upper(None) * how(one, batch))

        return lower, upper_loss, loss

    return make


def concrete_without_weights() -> tuple:
    mean = tf.function(tf.reduce_mean).get_concrete_function(tf.TensorSpec([8]))

    def loss(upper: Any, lower: Any, batch: Any) -> Any:
        return mean(upper(None) * entropies(lower, batch))

    return network(), upper_loss, loss


CASES = {
    "losses": decorated_losses,
    "ran-before": ran_before,
    "control-flow": control_flow,
    "compiled": compiled,
    "signature": signature,
    "method": method,
    "call": layer_s_call,
    "regulariser": regulariser,
    "map_fn": mapped(
        lambda one, batch: tf.map_fn(one, batch, fn_output_signature=tf.float32)
    ),
    "vectorized_map": mapped(tf.vectorized_map),
    "concrete": concrete_without_weights,
}
UNDER_XLA = ["control-flow", "compiled"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", fast_where("graph".__eq__, MODES))
def test_steps_are_those_without_tf_function(mode):
    want = step(network(), upper_loss, lower_loss, mode)
    assert np.abs(want[:8]).max() > 1e-3
    for name in UNDER_XLA if mode == "xla" else CASES:
        got = step(*CASES[name](), mode)
        np.testing.assert_allclose(got, want, atol=1e-6, err_msg=name)


def test_a_trace_s_weights_are_what_was_wrong(monkeypatch):
    """The same without us: the helper's numbers are those of the stored weights."""
    here = __name__.split(".")[0]
    monkeypatch.setattr(inline_functions, "STAY_COMPILED", {"tfbilevel", here})
    want = step(network(), upper_loss, lower_loss, "graph")
    with pytest.raises(ValueError, match="traced for good"):
        # The other half of the check sees the stored weights read.
        step(*ran_before(), "graph")
    monkeypatch.setattr(inline_functions._here, "scopes", _Forgetful())
    with pytest.raises(tb.UnconnectedGradientError):
        step(*ran_before(), "graph")
    assert np.isfinite(want).all()


class _Forgetful(list):
    def append(self, scope: Any) -> None:
        super().append({})


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_concrete_functions_that_read_the_weights_are_refused(mode):
    lower = network()
    kept = tf.function(lambda inputs: lower(inputs)).get_concrete_function(
        tf.TensorSpec([8, 3])
    )

    def loss(upper: Any, lower: Any, batch: Any) -> Any:
        del lower
        return lower_loss(
            upper, lambda inputs: kept(tf.convert_to_tensor(inputs)), batch
        )

    with pytest.raises(ValueError, match="decorated with tf.function.*dense.*kernel'"):
        step(lower, upper_loss, loss, mode)


@pytest.mark.parametrize("mode", fast_where("graph".__eq__, MODES))
def test_problems_of_tensors(mode):
    """`tb.functional` in a decorated loss, and a layer whose call is decorated."""

    class Layer(keras.layers.Dense):
        @tf.function
        def call(self, inputs: Any) -> Any:
            return super().call(inputs)

    def gradient(layer: Any, wrap: Callable) -> np.ndarray:
        lower = network(layer)
        lower(INPUTS)
        function = tb.functional(lower)

        def loss(x: Any, y: Any, batch: Any) -> Any:
            return tf.reduce_mean(x * entropies(lambda v: function(y, v), batch))

        problem = tb.Problem(wrap(loss), wrap(loss))
        method = tb.Unroll(tb.InnerSolver(keras.optimizers.SGD(0.5), 3))
        x, y = tf.linspace(0.1, 1.0, 8), [v + 0.3 for v in function.initial()]

        def run(x: Any, y: Any, b: Any) -> Any:
            state = method.init(problem, x, y)
            return problem.step(method, x, y, b, state).upper_gradient

        if mode != "eager":
            run = tf.function(run, autograph=False, jit_compile=mode == "xla")
        data = (INPUTS, CLASSES)
        return run(x, y, tb.Batches(data, data)).numpy()

    want = gradient(keras.layers.Dense, lambda loss: loss)
    for layer in (keras.layers.Dense, Layer):
        np.testing.assert_allclose(gradient(layer, tf.function), want, atol=1e-6)


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_fit_with_decorated_call_and_statistics(run_eagerly):
    """The step after which statistics advance calls the decorated network too."""

    def trained(wrap: Callable) -> list:
        class Normalised(keras.Model):
            def __init__(self) -> None:
                super().__init__()
                self.normalise = keras.layers.BatchNormalization(momentum=0.5)
                self.head = keras.layers.Dense(2, kernel_initializer="zeros")
                self.normalise.build((None, 3))
                self.head.build((None, 3))
                self.built = True

            @wrap
            def call(self, inputs: Any, training: Any = None) -> Any:
                return self.head(self.normalise(inputs, training=training))

        lower = Normalised()
        lower(INPUTS, training=False)

        def loss(upper: Any, lower: Any, batch: Any) -> Any:
            return lower_loss(upper, lambda v: lower(v, training=True), batch)

        model = tb.BilevelModel(tb.ExampleWeights(8), lower, upper_loss, loss)
        solver = tb.InnerSolver(keras.optimizers.SGD(0.5), 2)
        model.compile(
            tb.Unroll(solver),
            keras.optimizers.SGD(1.0),
            jit_compile=False,
            run_eagerly=run_eagerly,
        )
        full = tf.data.Dataset.from_tensors((INPUTS, CLASSES))
        model.fit(tb.pair(full, full).repeat(2), verbose=0)
        return [*model.upper.get_weights(), *lower.get_weights()]

    for ours, same in zip(trained(tf.function), trained(lambda f: f), strict=True):
        np.testing.assert_allclose(ours, same, atol=1e-6)


def test_over_tasks_runs_them_inline_too():
    @tf.function
    def loss(x: Any, y: Any, batch: Any) -> Any:
        value = tf.reduce_sum(tf.square(y - batch) * x)
        if value > 0.0:
            value = value / 2.0
        return value

    # y1 = y0 - 0.1 x (y0 - b), f = x (y1 - b)^2 / 2, both tasks from y0 = 0.
    x, y, b = tf.constant(2.0), tf.zeros([2, 1]), tf.constant([[1.0], [3.0]])
    problem = tb.over_tasks(tb.Problem(loss, loss), "sequential")
    method = tb.Unroll(tb.InnerSolver(keras.optimizers.SGD(0.1), 1))
    state = method.init(problem, x, y)
    made = problem.step(method, x, y, tb.Batches(b, b), state)
    # y1 - b = -(1 - 0.1 x) b; d/dx of the mean of x (1 - 0.1 x)^2 b^2 / 2
    want = np.mean((0.8**2 - 0.2 * 2.0 * 0.8) * np.array([1.0, 9.0]) / 2)
    np.testing.assert_allclose(made.upper_gradient, want, rtol=1e-5)


def test_functions_elsewhere_stay_compiled():
    """Outside, in other threads' eyes and after an error: TensorFlow's own call."""
    before = polymorphic_function.Function.__call__
    runs = []

    @tf.function
    def function(value: Any) -> Any:
        runs.append(tf.executing_eagerly())
        return value + 1.0

    function(1.0)
    with pytest.raises(ZeroDivisionError), functions_inline():
        function(1.0)
        1 / 0  # noqa: B018
    function(1.0)
    assert runs == [False, True]
    assert polymorphic_function.Function.__call__ is before
