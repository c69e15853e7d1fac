"""Fits on one device and on several replicas, which must be equal.

A process of its own: TensorFlow makes logical devices before anything else. With
TF_CONFIG set it is one of several workers. Arguments: "derivatives", or
METHOD:SIZE:KIND with the size of batches and the kind of data. METHOD may be "kinds",
one method of each kind of derivative, which the tests run, or "every", by hand. KIND
may be followed by ":split" or ":function": TensorFlow, or a function, distributes the
data before `fit` gets them.
"""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import sys

import tensorflow as tf
from tensorflow.python.distribute import collective_all_reduce_strategy as of_workers

WORKER = json.loads(os.environ.get("TF_CONFIG", "{}")).get("task", {}).get("index")
DEVICES = int(os.environ.get("DEVICES", 2 if WORKER is None else 1))  # of this process

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0],
    [tf.config.LogicalDeviceConfiguration()] * DEVICES,
)
if os.environ.get("GRAPPLER") == "off":
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
if WORKER is None:
    STRATEGY = tf.distribute.MirroredStrategy([f"CPU:{n}" for n in range(DEVICES)])
else:

    def cpus(self, resolver, worker):
        """TensorFlow takes all GPUs of a worker, but one CPU only."""
        return tuple(f"{worker}/device:CPU:{n}" for n in range(DEVICES)), "CPU"

    of_workers.CollectiveAllReduceExtended._initialize_local_devices = cpus
    STRATEGY = tf.distribute.MultiWorkerMirroredStrategy()

import keras  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

import tfbilevel as tb  # noqa: E402
import tfbilevel._calculus.collectives as module  # noqa: E402
from tfbilevel._calculus.collectives import apart, spread, total  # noqa: E402

SGD = keras.optimizers.SGD
STEPS, CLASSES, FEATURES = 3, 3, 4


def inner(**options):
    return tb.InnerSolver(SGD(0.2, momentum=0.5), steps=3, **options)


def plain(steps=3):
    return tb.InnerSolver(SGD(0.2), steps)


def squares(upper, lower):
    """Constraints of both models."""
    of_upper = sum(tf.reduce_mean(v**2) for v in upper.trainable_variables)
    return [tf.reduce_sum(v**2) - 0.1 * of_upper for v in lower.trainable_variables]


METHODS = {
    "unroll": lambda: tb.Unroll(inner()),
    "unroll-checkpoint": lambda: tb.Unroll(inner(), memory="checkpoint"),
    "unroll-last": lambda: tb.Unroll(inner(), last=2),
    "unroll-pessimistic": lambda: tb.Unroll(inner(), end="pessimistic"),
    "unroll-first-order": lambda: tb.Unroll(inner(), first_order=True),
    "unroll-bda": lambda: tb.Unroll(plain(), aggregate=tb.Aggregation(0.4, 0.5)),
    "forward-unroll": lambda: tb.ForwardUnroll(plain()),
    "finite-difference": lambda: tb.FiniteDifference(plain()),
    "rank-one": lambda: tb.RankOne(plain(1)),
    "implicit-cg": lambda: tb.Implicit(inner(), tb.ConjugateGradient(4)),
    "implicit-neumann": lambda: tb.Implicit(inner(), tb.Neumann(4, rate=0.2)),
    "implicit-fixed-point": lambda: tb.Implicit(inner(), tb.FixedPoint(4)),
    "implicit-normal-cg": lambda: tb.Implicit(inner(), tb.NormalConjugateGradient(4)),
    "implicit-minres": lambda: tb.Implicit(inner(), tb.MINRES(4)),
    "implicit-nystrom": lambda: tb.Implicit(inner(), tb.Nystrom(2, damping=0.1)),
    "implicit-identity": lambda: tb.Implicit(
        inner(), tb.Identity(), through="optimizer"
    ),
    "implicit-direct": lambda: tb.Implicit(inner(), tb.Direct()),
    "implicit-gradient-solver": lambda: tb.Implicit(
        inner(), tb.GradientSolver(SGD(0.2), 4)
    ),
    "implicit-gradient-solver-reset": lambda: tb.Implicit(
        inner(), tb.GradientSolver(SGD(0.2), 4, warm_start=False)
    ),
    "implicit-optimizer": lambda: tb.Implicit(
        inner(), tb.NormalConjugateGradient(4), through="optimizer"
    ),
    "implicit-pessimistic": lambda: tb.Implicit(
        inner(), tb.ConjugateGradient(4), end="pessimistic"
    ),
    "stocbio": lambda: tb.StocBiO(plain(2), 2, 0.2),
    "bsa": lambda: tb.BSA(plain(2), 2, 0.2),
    "ttsa": lambda: tb.TTSA(SGD(0.2), 2, 0.2),
    "bamm": lambda: tb.BAMM(SGD(0.2)),
    "soba": lambda: tb.SOBA(SGD(0.2), 0.2),
    "srba": lambda: tb.SRBA(SGD(0.2), 0.2, period=2, upper_parts=3),
    "saba": lambda: tb.SABA(SGD(0.2), 0.2, lower_batches=2, upper_batches=2),
    "fsla": lambda: tb.FSLA(SGD(0.2), 0.2),
    "amigo": lambda: tb.AmIGO(plain(2), 2, 0.2),
    "mrbo": lambda: tb.MRBO(SGD(0.2), 2, 0.2),
    "vrbo": lambda: tb.VRBO(SGD(0.2), 2, 0.2, steps=2, period=2, upper_parts=3),
    "f2sa": lambda: tb.F2SA(plain(2), SGD(0.1), 2.0),
    "bome": lambda: tb.BOME(plain(2), SGD(0.1)),
    "meha": lambda: tb.MEHA(SGD(0.1)),
    "f3sa": lambda: tb.F3SA(SGD(0.1), 2.0),
    "bvfsm": lambda: tb.BVFSM(plain(2), SGD(0.02), 2),
    "gaffa": lambda: tb.GAFFA(SGD(0.1), squares),
    "persistent-es": lambda: tb.PersistentES(
        tb.InnerSolver(SGD(0.2, momentum=0.5), 2, start="cold"), 4, scale=0.01
    ),
    "value-gap": lambda: tb.ValueGap(inner(), SGD(0.1), weight=2.0),
    "value-gap-constant": lambda: tb.ValueGap(None, SGD(0.1), weight=2.0),
    "gradient-norm": lambda: tb.GradientNorm(SGD(0.1), weight=2.0),
    "augmented-lagrangian": lambda: tb.AugmentedLagrangian(SGD(0.05), steps=2),
    "sustain": lambda: tb.SUSTAIN(SGD(0.2), max_steps=2, rate=0.2, scale=1.0),
}


# One method of each kind of derivative: through steps that are computed again, once or
# from checkpoints, along them, by differences, without second derivatives; products
# with g_yy, of several vectors at once, with derivatives of a step of the optimizer,
# on batches of their own; gradients of differences of losses; of a gradient's norm;
# vectors that go on from step to step. All methods whose collectives are stated.
KINDS = (
    "unroll",
    "unroll-checkpoint",
    "forward-unroll",
    "finite-difference",
    "unroll-first-order",
    "implicit-cg",
    "implicit-nystrom",
    "implicit-optimizer",
    "stocbio",
    "value-gap",
    "gradient-norm",
    "augmented-lagrangian",
    "soba",
)
# The kinds of data that methods have in "kinds" and "every"; of others "mixed".
OF_METHOD = {
    "unroll-last": "weights",
    "value-gap-constant": "weights",
    "stocbio": "stacked",
    "bsa": "stacked",
    "srba": "stacked",
    "vrbo": "stacked",
    "saba": "numbered",  # its batches carry their numbers
}
# Kinds whose last batch has an example less, so that parts are even, and then not.
MIXED = ("mixed", "weights")
# Refused over tasks on several replicas: they keep something of single tasks, or do not
# solve each task from its start, or couple tasks.
NOT_OVER_TASKS = {
    *("implicit-gradient-solver", "bsa", "ttsa", "bamm", "soba", "saba", "fsla"),
    "amigo",
    *("mrbo", "f2sa", "bome", "meha", "value-gap", "value-gap-constant"),
    *("gradient-norm", "augmented-lagrangian", "sustain", "vrbo", "srba", "bvfsm"),
    *("f3sa", "gaffa", "persistent-es"),
}
# Kinds of data over tasks, and how tasks are mapped.
OVER_TASKS = {"tasks": "vectorized", "sequential-tasks": "sequential"}


def cross_entropy(network, inputs, labels):
    logits = network(inputs)
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)


def decay(network):
    return 0.15 * sum(tf.reduce_sum(v**2) for v in network.trainable_variables)


def upper_loss(upper, lower, batch):
    inputs = upper(batch[0]) if isinstance(upper, keras.Sequential) else batch[0]
    return tf.reduce_mean(cross_entropy(lower, inputs, batch[1]))


def lower_loss(upper, lower, batch):
    if isinstance(upper, keras.Sequential):
        return upper_loss(upper, lower, batch) + decay(lower)
    errors = cross_entropy(lower, *batch[:2])
    return upper.mean(errors, batch[2]) + decay(lower)  # gradients of gathers: slices


def noisy(loss):
    """A loss of noisy inputs, the same for a task on any replica."""

    def at(upper, lower, batch):
        noise = tf.random.normal(tf.shape(batch[0]), dtype=batch[0].dtype)
        return loss(upper, lower, (batch[0] + 0.1 * noise, *batch[1:]))

    return at


def dense(inputs, outputs):
    return keras.Sequential([keras.Input((inputs,)), keras.layers.Dense(outputs)])


def pairs(size, kind):
    """Three outer steps with other examples in each."""
    generator = np.random.default_rng(0)
    draws, same = (4 if kind == "stacked" else 1), kind not in MIXED

    def level(steps):
        count = steps * size - (not same)
        shape = (count, 4) if kind in OVER_TASKS else (count,)
        parts = (
            generator.normal(size=(*shape, FEATURES)),
            generator.integers(CLASSES, size=shape),
            np.arange(count),
        )
        made = tf.data.Dataset.from_tensor_slices(parts).batch(size, same)
        if kind == "numbered":  # two batches; the third step has the first one again
            made = made.take(2).repeat().take(steps).enumerate()
            made = made.map(lambda number, batch: (*batch, number % 2))
        return made

    return tb.pair(level(STEPS), level(STEPS * draws), draws)


def split(data):
    return STRATEGY.experimental_distribute_dataset(data)


def function(data):
    """The first replica has one example of each batch, the others divide the rest."""
    replicas = STRATEGY.num_replicas_in_sync

    def own(context):
        count = replicas // context.num_input_pipelines

        def parts(batches):
            def part(number):
                def cut(leaf, axis=0):
                    rest = tf.shape(leaf)[axis] - 1
                    ends = [
                        tf.where(n > 0, 1 + (n - 1) * rest // (replicas - 1), 0)
                        for n in (number, number + 1)
                    ]
                    return tf.gather(leaf, tf.range(*ends), axis=axis)

                axis = int(isinstance(batches, tb.StackedBatches))
                lower = tuple(cut(leaf, axis) for leaf in batches.lower)
                return type(batches)(tuple(map(cut, batches.upper)), lower)

            first = context.input_pipeline_id * count
            return tf.data.Dataset.range(
                first, first + count, output_type=tf.int32
            ).map(part)

        return data.flat_map(parts).apply(
            tf.data.experimental.assert_cardinality(STEPS * count)
        )

    return STRATEGY.distribute_datasets_from_function(own)


BEFORE = {"split": split, "function": function}  # what distributes data before `fit`


def make(method, size, kind, scope, eager=False):
    keras.utils.set_random_seed(1)
    with scope:
        upper = tb.ExampleWeights(99) if kind == "weights" else dense(FEATURES, 3)
        lower = dense(FEATURES if kind == "weights" else 3, CLASSES)
        losses = upper_loss, lower_loss
        options = {}
        if kind in OVER_TASKS:
            losses = noisy(upper_loss), noisy(lower_loss)
            options = {"tasks": size, "mapping": OVER_TASKS[kind]}
        model = tb.BilevelModel(upper, lower, *losses, **options)
        # Of the whole gradient, not of parts of it.
        clipped = SGD(0.5, momentum=0.9, global_clipnorm=0.05)
        parts = 2 if kind == "microbatches" else 1
        model.compile(
            METHODS[method](),
            clipped,
            jit_compile=False,
            microbatches=parts,
            run_eagerly=eager,
        )
    return model


def fit(method, size, kind, scope, eager=False, distribute=lambda data: data):
    """Everything that is saved, and the logs."""
    model = make(method, size, kind, scope, eager)
    trained = model.trainable_variables if not model.tasks else model.upper.weights
    before = [v.numpy() for v in trained]
    history = model.fit(distribute(pairs(size, kind)), verbose=0).history
    assert model.outer_step == STEPS
    moved = zip(before, trained, strict=True)
    assert min(np.abs(a - b.numpy()).max() for a, b in moved) > 1e-3, "nothing trained"
    kept = [v.numpy() for v in (*model.variables, *model.optimizer.variables)]
    return kept, history


def of_three_orders(loss, x):
    """A loss, its gradient, and derivatives of order two and three along vectors."""
    with tf.GradientTape() as third:
        third.watch(x)
        with tf.GradientTape() as second:
            second.watch(x)
            with tf.GradientTape() as first:
                first.watch(x)
                value = loss(x)
            gradient = tf.convert_to_tensor(first.gradient(value, x))
            along = tf.reduce_sum(tf.sin(gradient) * x)
        product = tf.convert_to_tensor(second.gradient(along, x))
        along = tf.reduce_sum(product * tf.cos(x))
    return value, gradient, product, third.gradient(along, x)


def within_a_loop(loss, x):
    def body(t, y):
        value, *others = of_three_orders(loss, y)
        return t + 1, y - 0.1 * value * tf.add_n(others)

    return tf.while_loop(lambda t, y: t < 3, body, (0, x))[1]


def derivatives():
    """Of a loss of five examples, of which one replica has three."""
    generator = np.random.default_rng(0)
    data = tf.constant(generator.normal(size=(5, 3)))
    x = tf.constant(generator.normal(size=3))
    parts, shares = (data[:3], data[3:]), (0.6, 0.4)

    def mean(x, data):
        values = tf.sin(tf.linalg.matvec(data, x)) ** 3
        return tf.reduce_mean(values) + 0.1 * tf.reduce_sum(tf.gather(x, [0, 2]) ** 4)

    def everything(loss):
        return (*of_three_orders(loss, x), within_a_loop(loss, x))

    @tf.function(autograph=False)
    def alone():
        return everything(lambda x: mean(x, data))

    def replica():
        context = tf.distribute.get_replica_context()
        number = int(tf.get_static_value(context.replica_id_in_sync_group))

        def whole(x):
            own = mean(spread(x), parts[number])
            return total(shares[number] * own)

        return apart(lambda: everything(whole))()

    together = tf.function(lambda: STRATEGY.run(replica), autograph=False)
    for expected, made in zip(alone(), together(), strict=True):
        values = STRATEGY.experimental_local_results(made)
        assert len(values) == 2
        for value in values:
            np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-12)


# Per outer step, from what each method evaluates (docs/scaling.md). T = 3 inner steps,
# of which each is a loss and its gradient. f, f_x, f_y: 3. A product: 1.
T = 3
COLLECTIVES = {
    "unroll:mixed": 2 * T + 3 + 3 * T,
    "unroll-checkpoint:mixed": 2 * T + 3 + 5 * T,
    # The gradient of each step is evaluated again.
    "unroll-first-order:mixed": 2 * T + 3 + T,
    "implicit-cg:mixed": 2 * T + 3 + 2 + 4 + 1,
    "stocbio:stacked": 2 * 2 + 2 + 3 * 2 + 3 + 1,  # T = 2, K = 2
    "value-gap:mixed": 2 * T + 3 + 3 + 2,
    "gradient-norm:mixed": 3 + 2 + 2,
    "augmented-lagrangian:mixed": 2 * (3 + 2 + 1) + 3 + 2 + 2,
    "unroll:tasks": 1,
}


def equal(case):
    method, size, kind, *before = case.split(":")
    distribute = [BEFORE[name] for name in before]
    eager = kind not in (
        *OVER_TASKS,
        "microbatches",
    )  # saves a trace, where steps are few
    alone, logs = fit(method, int(size), kind, contextlib.nullcontext(), eager)
    with counting() as counters:
        together, logged = fit(
            method, int(size), kind, STRATEGY.scope(), False, *distribute
        )
    for made, expected in zip(together, alone, strict=True):
        np.testing.assert_allclose(made, expected, rtol=1e-10, atol=1e-10)
    assert logged.keys() == logs.keys()
    for name, values in logs.items():  # means in float32
        np.testing.assert_allclose(logged[name], values, 1e-6, 1e-10, err_msg=name)
    stated = COLLECTIVES.get(f"{method}:{kind}")
    if stated is not None:
        stated += len(before)  # the sizes of parts
    made = [counter.numpy() / STEPS for counter in counters]
    assert stated is None or made == [stated] * len(made), (case, made, stated)


@contextlib.contextmanager
def counting():
    """The number of sums over replicas, on each of this process's replicas."""
    sums = module._collective
    local = len(STRATEGY.extended.worker_devices)
    counters = [tf.Variable(0, trainable=False) for _ in range(local)]

    def counted(leaves):
        made = sums(leaves)
        with tf.control_dependencies(made):
            number = tf.distribute.get_replica_context()._replica_id
            counters[number].assign_add(1)
        return made

    module._collective = counted
    try:
        yield counters
    finally:
        module._collective = sums


def after(epochs, scope, *callbacks):
    model = make(
        "unroll", 5, "mixed", scope, eager=isinstance(scope, contextlib.nullcontext)
    )
    data = pairs(5, "mixed")
    model.fit(data, epochs=epochs, callbacks=list(callbacks), verbose=0)
    return model


def assert_resumed(model, whole, epochs):
    assert (model.outer_step, len(model.history.epoch)) == (epochs * STEPS, 1)
    assert_same(model, whole)


def assert_same(model, whole):
    for made, expected in zip(model.variables, whole.variables, strict=True):
        np.testing.assert_allclose(made.numpy(), expected.numpy(), 1e-10, 1e-10)


def files(folder):
    """Only the first worker writes; all read, and as many as there are then."""
    folder, alone = pathlib.Path(folder), contextlib.nullcontext
    written, save = [], tb.BilevelModel.save_weights

    def noted(self, filepath, *arguments, **options):
        written.append(filepath)
        save(self, filepath, *arguments, **options)

    whole = after(2, alone())
    tb.BilevelModel.save_weights = noted
    model = make("unroll", 5, "mixed", STRATEGY.scope())
    first = model.get_weights()

    def go_on(epochs, *callbacks):
        """With the first weights, if the callbacks restore no others."""
        model.set_weights(first)
        assert model.outer_step == 0
        data = pairs(5, "mixed")
        model.fit(data, epochs=epochs, callbacks=list(callbacks), verbose=0)

    kinds = keras.callbacks.BackupAndRestore, tb.Backup
    paths = [str(folder / name) for name in ("of_keras", "ours")]
    keeps = {"delete_checkpoint": False}
    go_on(
        1,
        keras.callbacks.ModelCheckpoint(
            str(folder / "{epoch}.weights.h5"), save_weights_only=True
        ),
        keras.callbacks.CSVLogger(str(folder / "log.csv")),
        keras.callbacks.TensorBoard(str(folder / "board")),
        kinds[0](paths[0], **keeps),
        kinds[1](paths[1]),
    )
    assert len(written) == (0 if WORKER else 3)
    assert len([*folder.glob("board/train/*")]) <= 1
    go_on(2, kinds[0](paths[0], **keeps))
    assert_resumed(model, whole, 2)
    fewer = folder / f"fewer{WORKER}"
    shutil.copytree(paths[1], fewer)
    assert_resumed(after(2, alone(), tb.Backup(fewer)), whole, 2)
    if not WORKER:
        after(1, alone(), tb.Backup(folder / "more"))
    go_on(2, tb.Backup(folder / "more"))
    assert_resumed(model, whole, 2)
    with pytest.raises(ValueError, match="All workers must begin with the same"):
        go_on(3, tb.Backup(folder / ("more" if WORKER else "nothing")))
    assert model.outer_step == (2 * STEPS if WORKER else 0)
    tb.BilevelModel.save_weights = save


def cleaner():
    """Keras would train it on other batches than one process does."""
    x, labels = np.eye(4), np.array([0, 1, 0, 1])
    one = tb.LabelCleaner(lambda: dense(4, 2), epochs=1)
    with STRATEGY.scope(), pytest.raises(ValueError, match="devices of one machine"):
        one.fit(x, labels, trusted=(x, labels), verbose=0)


class Killed(keras.callbacks.Callback):
    """Kills one worker in the midst of the second epoch."""

    def on_train_batch_end(self, batch, logs=None):
        if self.model.outer_step == STEPS + 1 and WORKER == int(os.environ["VICTIM"]):
            os.kill(os.getpid(), signal.SIGKILL)


def main(case):
    if case == "derivatives":
        derivatives()
    elif case == "cleaner":
        cleaner()
    elif case.startswith("files="):
        files(case.split("=")[1])
    elif case.startswith("killed="):
        after(3, STRATEGY.scope(), tb.Backup(case.split("=")[1]), Killed())
    elif case.startswith("resumed="):
        made = after(3, STRATEGY.scope(), tb.Backup(case.split("=")[1]))
        whole = after(3, contextlib.nullcontext())
        assert (made.outer_step, len(made.history.epoch)) == (3 * STEPS, 2)
        assert_same(made, whole)
    elif case.startswith(("kinds:", "every:")):
        which, size, kind = case.split(":")
        for method in KINDS if which == "kinds" else METHODS:
            if kind in OVER_TASKS and method in NOT_OVER_TASKS:
                with pytest.raises(ValueError, match="`method` must"):
                    fit(method, int(size), kind, STRATEGY.scope())
                print(method, "is refused over tasks", file=sys.stderr, flush=True)
                continue
            equal(f"{method}:{size}:{kind or OF_METHOD.get(method, 'mixed')}")
            print(method, file=sys.stderr, flush=True)
    else:
        equal(case)


if __name__ == "__main__":
    keras.config.set_floatx("float64")
    for case in sys.argv[1:]:
        main(case)
        print("equal", case, flush=True)
