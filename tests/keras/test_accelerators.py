"""What a GPU needs, as far as TensorFlow tells without one."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from suites import fast_where
from tensorflow.python.framework import kernels

import tfbilevel as tb
from tfbilevel._minimize import _batch_source, _compile

SGD = keras.optimizers.SGD


def inner():
    return tb.InnerSolver(SGD(0.2, momentum=0.5), steps=3)


def squares(upper, lower):
    return [tf.reduce_sum(v**2) - 1.0 for v in lower.trainable_variables]


# Together they have every operation that the library uses in a step.
METHODS = {
    "replay": lambda: tb.Unroll(inner(), end="pessimistic"),
    "checkpoint": lambda: tb.Unroll(inner(), memory="checkpoint"),
    "tape": lambda: tb.Unroll(inner(), memory="tape"),
    "host": lambda: tb.Unroll(inner(), memory="host"),
    "low-rank": lambda: tb.Implicit(inner(), tb.Nystrom(2, damping=0.1)),
    "minimal-residuals": lambda: tb.Implicit(inner(), tb.MINRES(3)),
    "barrier": lambda: tb.BOME(tb.InnerSolver(SGD(0.2), 3), SGD(0.1)),
    "barriers": lambda: tb.BVFSM(tb.InnerSolver(SGD(0.2), 3), SGD(0.1), 2),
    "constraints": lambda: tb.GAFFA(SGD(0.1), squares),
    "particles": lambda: tb.PersistentES(
        tb.InnerSolver(SGD(0.2, momentum=0.5), 3, start="cold"), 6
    ),
    "forward": lambda: tb.ForwardUnroll(tb.InnerSolver(SGD(0.2), 3)),
    "differences": lambda: tb.FiniteDifference(tb.InnerSolver(SGD(0.2), 3)),
    "solver": lambda: tb.Implicit(inner(), tb.ConjugateGradient(4)),
    "direct": lambda: tb.Implicit(inner(), tb.Direct()),
    "sampled": lambda: tb.BSA(tb.InnerSolver(SGD(0.2), 3), 2, 0.2),
    "averaged": lambda: tb.BAMM(SGD(0.2)),
    "penalty": lambda: tb.ValueGap(inner(), SGD(0.1), weight=2.0),
    "multipliers": lambda: tb.AugmentedLagrangian(SGD(0.05), steps=2),
}
# One of each kind of operations: lists, solvers, tasks, plain loops.
KINDS = {"replay", "solver", "tasks", "minimize"}
CASES = fast_where(KINDS.__contains__, [*METHODS, "tasks", "minimize"])
TASKS, EXAMPLES, CLASSES = 2, 6, 3


def errors(lower, batch):
    logits = lower(batch[0], training=True)
    return tf.nn.sparse_softmax_cross_entropy_with_logits(batch[1], logits)


def weighted(upper, lower, batch):
    return upper.mean(errors(lower, batch), batch[2])


def mean(upper, lower, batch):
    return tf.reduce_mean(errors(lower, batch))


def of_features(upper, lower, batch):
    return mean(upper, lower, (upper(batch[0]), batch[1]))


def network():
    layers = keras.layers
    hidden = [layers.Dense(4, activation="tanh"), layers.BatchNormalization()]
    return [keras.Input((4,)), *hidden, layers.Dropout(0.1), layers.Dense(CLASSES)]


def model_of(case):
    if case == "tasks":
        features = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4)])
        last = keras.Sequential([keras.Input((4,)), keras.layers.Dense(CLASSES)])
        model = tb.BilevelModel(features, last, of_features, of_features, tasks=TASKS)
        method = METHODS["replay"]()
    else:
        weights, lower = tb.ExampleWeights(EXAMPLES), keras.Sequential(network())
        model = tb.BilevelModel(weights, lower, mean, weighted)
        method = METHODS[case]()
    model.compile(method, keras.optimizers.Adam(0.1), jit_compile=False)
    return model


def batches_of(case):
    generator = np.random.default_rng(0)
    shape = (TASKS, EXAMPLES) if case == "tasks" else (EXAMPLES,)
    part = (
        tf.constant(generator.normal(size=(*shape, 4)), tf.float32),
        tf.constant(generator.integers(CLASSES, size=shape)),
    )
    return tb.Batches(part, part if case == "tasks" else (*part, tf.range(EXAMPLES)))


@functools.cache
def traced(case):
    """A compiled step, or the whole loop of tb.minimize."""
    if case != "minimize":
        model = model_of(case)
        model._ensure_carried()
        step = tf.function(model.train_step, autograph=False)
        return step.get_concrete_function(batches_of(case))

    def loss(x, y, batch):
        return tf.reduce_sum((tf.sin(x) * y - batch) ** 2)

    x = tf.constant([1.0, 2.0])
    problem = tb.Problem(loss, loss)

    method, batches = METHODS["solver"](), tb.Batches(x, x)
    source, data = _batch_source(batches, 2, x.dtype)
    rule, run = _compile(problem, method, SGD(0.1), "", source, 2, None, None, False)
    state = (method.init(problem, x, x), rule.init(x))
    return run.get_concrete_function(x, x, state, data)


def nodes(case):
    graph = traced(case).graph.as_graph_def()
    bodies = [graph.node, *(f.node_def for f in graph.library.function)]
    return [node for body in bodies for node in body]


def variables(function):
    """The dtypes of all variables that a compiled function uses."""
    return [
        tf.as_dtype(part.dtype).name
        for given in function.captured_inputs
        if given.dtype == tf.resource
        for part in given._handle_data.shape_and_type
    ]


@pytest.mark.parametrize("case", fast_where(KINDS.__contains__, [*METHODS, "tasks"]))
def test_no_variable_of_a_step_is_int32(case) -> None:
    """TensorFlow keeps those on the host, where a step that XLA compiled for another
    device cannot reach them."""
    found = variables(traced(case))
    assert len(found) > 5
    assert "int32" not in found


def test_an_int32_variable_is_seen() -> None:
    """Within a branch of a step, too."""
    counter, one = tf.Variable(tf.constant(0)), tf.Variable(1.0)

    @tf.function(autograph=False)
    def step(x):
        return tf.cond(x > one, lambda: counter.assign_add(1), lambda: 0)

    found = variables(step.get_concrete_function(tf.constant(2.0)))
    assert sorted(found) == ["float32", "int32"]


@functools.cache
def kernels_of(operation):
    every = kernels.get_registered_kernels_for_op(operation).kernel
    return [kernel for kernel in every if kernel.device_type in ("GPU", "DEFAULT")]


def fits(kernel, node):
    def types(attribute):
        return [attribute.type] if attribute.type else list(attribute.list.type)

    return all(
        set(types(node.attr[rule.name])) <= set(rule.allowed_values.list.type)
        for rule in kernel.constraint
    )


@pytest.mark.skipif(
    not tf.test.is_built_with_cuda(), reason="TensorFlow is built without GPU kernels"
)
@pytest.mark.parametrize("case", CASES)
def test_every_operation_of_a_step_has_a_gpu_kernel(case) -> None:
    """Without one TensorFlow copies to the host and back in every step."""
    found = nodes(case)
    assert len(found) > 100
    missing = {
        (node.op, tf.as_dtype(node.attr["T"].type).name if "T" in node.attr else "")
        for node in found
        if not any(fits(kernel, node) for kernel in kernels_of(node.op))
    }
    # Particles: a shape, which is on the host, and is folded where it is static.
    assert missing - {("Split", "int32")} == set()


@pytest.mark.parametrize("case", CASES)
def test_no_step_calls_python_or_strings(case) -> None:
    kinds = {node.op for node in nodes(case)}
    assert not kinds & {"PyFunc", "EagerPyFunc", "PyFuncStateless", "StringFormat"}
    assert not kinds & {"PrintV2", "Assert"}


# With enable_op_determinism TensorFlow (release notes of 2.8) computes the first three
# on the host, and refuses the others on a GPU.
NOT_DETERMINISTIC = (
    "ScatterNd",
    "TensorScatter",
    "ResourceScatter",
    "Bincount",
    "DenseBincount",
    "SparseTensorDenseMatMul",
    "Svd",
    "TridiagonalSolve",
    "AdjustContrast",
    "CropAndResizeGrad",
    "FakeQuantWithMinMaxVars",
    "MaxPoolGradWithArgmax",
    "Timestamp",
)


@pytest.mark.parametrize("case", CASES)
def test_every_operation_of_a_step_has_a_deterministic_form(case) -> None:
    kinds = {node.op for node in nodes(case)}
    assert not [kind for kind in kinds if kind.startswith(NOT_DETERMINISTIC)]
