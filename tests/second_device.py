"""Fits on one device and on a second one, where all but int32 variables are placed.

A process of its own: TensorFlow makes logical devices before anything else. Arguments:
pairs METHOD:JIT, and `stores` for where unrolled iterates are kept.
"""

import contextlib
import gc
import sys

import tensorflow as tf

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0],
    [tf.config.LogicalDeviceConfiguration()] * 2,
)

import keras  # noqa: E402
import numpy as np  # noqa: E402
from tensorflow.python.eager import context  # noqa: E402

import tfbilevel as tb  # noqa: E402

SECOND = "/CPU:1"
SGD = keras.optimizers.SGD
JIT = {"auto": "auto", "on": True, "off": False}


def inner():
    return tb.InnerSolver(SGD(0.1, momentum=0.9), steps=3)


METHODS = {
    "Unroll": lambda: tb.Unroll(inner()),
    "UnrollHost": lambda: tb.Unroll(inner(), memory="host"),
    "Implicit": lambda: tb.Implicit(inner(), tb.ConjugateGradient(3)),
    "ValueGap": lambda: tb.ValueGap(inner(), SGD(0.1), weight=1.0),
    "GradientNorm": lambda: tb.GradientNorm(SGD(0.1), weight=1.0),
    "AugmentedLagrangian": lambda: tb.AugmentedLagrangian(SGD(0.1), steps=3),
    "StocBiO": lambda: tb.StocBiO(inner(), terms=3, rate=0.1),
}


def as_gpus_do(next_creator, **keywords):
    """TensorFlow keeps int32 variables on the host of a GPU."""
    dtype = keywords.get("dtype")
    if dtype is None:
        value = keywords["initial_value"]
        dtype = tf.convert_to_tensor(value() if callable(value) else value).dtype
    on_host = tf.as_dtype(dtype) == tf.int32
    with tf.device("/CPU:0" if on_host else SECOND):
        return next_creator(**keywords)


def errors(lower, batch):
    return tf.square(lower(batch[0])[:, 0] - batch[1])


def fit(method, jit, second, inside=True):
    keras.utils.set_random_seed(0)
    generator = np.random.default_rng(0)
    data = (generator.normal(size=(12, 3)), generator.normal(size=12))
    data = tf.data.Dataset.from_tensors(tuple(a.astype("float32") for a in data))
    with contextlib.ExitStack() as scopes:
        if second:
            scopes.enter_context(tf.device(SECOND))
            scopes.enter_context(tf.variable_creator_scope(as_gpus_do))
        lower = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        model = tb.BilevelModel(
            tb.ExampleWeights(12),
            lower,
            upper_loss=lambda upper, lower, batch: tf.reduce_mean(errors(lower, batch)),
            lower_loss=lambda upper, lower, batch: tf.reduce_mean(
                upper(None) * errors(lower, batch)
            ),
        )
        before = [v.numpy() for v in model.trainable_variables]
        model.compile(METHODS[method](), keras.optimizers.Adam(0.1), jit_compile=jit)
    assert model._outer.reads.often == (not second)
    pairs = tb.pair(data, data).repeat(3)
    if second and not inside:
        model.warm_up(pairs)  # which moves nothing
        history = model.fit(pairs, epochs=2, verbose=0).history
    else:
        with tf.device(SECOND if second else "/CPU:0"):
            history = model.fit(pairs, epochs=2, verbose=0).history
    variables = [*model.variables, *model.optimizer.variables]
    variables += [v for m in model.metrics for v in m.variables]
    place = "CPU:1" if second else "CPU:0"
    assert all(v.value.device.endswith(place) for v in variables), method
    values = [v.numpy() for v in model.trainable_variables]
    moved = [np.abs(a - b).max() for a, b in zip(values, before, strict=True)]
    assert min(moved) > 1e-4, "nothing was trained"
    return values, history, model.jit_compile


def stored_on(memory):
    """The devices of the lists of iterates in a step on the second device, those to
    which they are sent, and the step's hypergradient."""
    problem = tb.Problem(
        lambda x, y, batch: tf.reduce_sum((y - 1.0) ** 2),
        lambda x, y, batch: tf.reduce_sum(tf.exp(x) * tf.sin(y) ** 2 + y**2),
    )
    method = tb.Unroll(inner(), memory=memory)

    @tf.function(autograph=False)
    def step(x, y):
        with tf.device(SECOND):
            state = method.init(problem, x, y)
            return problem.step(method, x, y, tb.Batches(None, None), state)

    with tf.device(SECOND):
        x, y = tf.linspace(0.0, 0.3, 4), tf.linspace(0.5, 1.0, 4)
        context.enable_run_metadata()
        gradient = step(x, y).upper_gradient.numpy()
        graphs = context.export_run_metadata().function_graphs
        context.disable_run_metadata()
    nodes = [n for g in graphs for part in g.partition_graphs for n in part.node]
    lists = {n.device[-5:] for n in nodes if n.op.startswith("TensorList")}
    sent = [n.attr["T"].type for n in nodes if n.op in ("_Send", "_HostSend")]
    return lists, tf.variant.as_datatype_enum in sent, gradient


def compare_stores():
    """memory="host" keeps the iterates on the host, and never sends a whole list."""
    places, moved, expected = stored_on("replay")
    assert (places, moved) == ({"CPU:1"}, False), (places, moved)
    places, moved, gradient = stored_on("host")
    assert (places, moved) == ({"CPU:0"}, False), (places, moved)
    np.testing.assert_array_equal(gradient, expected)


gc.set_threshold(50_000, 20, 50)  # as in tests/conftest.py
outside_too = set()
for case in sys.argv[1:]:
    if case == "stores":
        compare_stores()
        print("equal stores", flush=True)
        continue
    name, way = case.split(":")
    values, history, chosen = fit(name, JIT[way], second=True)
    # Where "auto" has chosen, one device is told the same: it could choose otherwise.
    expected, logs, _ = fit(name, chosen if way == "auto" else JIT[way], second=False)
    found = [(values, history, chosen)]
    if way not in outside_too:  # how a step is compiled matters there, the method not
        outside_too.add(way)
        found.append(fit(name, chosen, second=True, inside=False))  # of the scope
    for made, logged, _ in found:
        for a, b in zip(made, expected, strict=True):
            np.testing.assert_array_equal(a, b)
        assert logged == logs, (logged, logs)
    print("equal", case, flush=True)
