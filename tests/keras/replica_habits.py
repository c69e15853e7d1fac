"""What Keras's users expect of `fit`, on two replicas; errors of bad input.

A process of its own: TensorFlow makes logical devices before anything else. Arguments:
names of functions of this file.
"""

import contextlib
import functools
import pathlib
import sys
import tempfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from replica_fits import (
    METHODS,
    SGD,
    STRATEGY,
    dense,
    function,
    inner,
    pairs,
    split,
)
from replica_fits import fit as a_fit

import tfbilevel as tb
from tfbilevel._jobs.cleaning.training import Targets, Training

CLASSES = 3


def loss(upper, lower, batch):
    logits = lower(upper(batch[0]))
    errors = tf.nn.sparse_softmax_cross_entropy_with_logits(batch[1], logits)
    return tf.reduce_mean(errors)


def weighted(upper, lower, batch):
    logits = lower(batch[0])
    errors = tf.nn.sparse_softmax_cross_entropy_with_logits(batch[1], logits)
    return upper.mean(errors, batch[2])


def of_lower(upper, lower, batch):
    return loss(lambda inputs: inputs, lower, batch)


def make(scope, method="unroll", lower=None, losses=(loss, loss), **options):
    keras.utils.set_random_seed(1)
    with scope:
        upper = dense(4, 3) if losses[1] is loss else tb.ExampleWeights(99)
        lower = lower() if lower else dense(3 if losses[1] is loss else 4, CLASSES)
        model = tb.BilevelModel(upper, lower, *losses)
        made = METHODS[method]() if isinstance(method, str) else method
        options = {"upper_optimizer": "sgd", "jit_compile": False} | options
        model.compile(made, **options)
    return model


def alone(**options):
    # Few steps take less time than a trace.
    return make(contextlib.nullcontext(), run_eagerly=True, **options)


def together(**options):
    return make(STRATEGY.scope(), **options)


@functools.cache
def kept():
    models = alone(), together()
    return [(model, model.get_weights()) for model in models]


def same_again():
    """The two models with their first weights; their steps are traced only once."""
    for model, first in kept():
        model.set_weights(first)
        assert model.outer_step == 0
    return [model for model, _ in kept()]


def values(model):
    return [v.numpy() for v in model.variables]


def assert_equal(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


def labelled(size):
    return pairs(size, "dense").map(lambda batches: batches.upper[:2])


def with_bad(size, where):
    """The batches of three steps; a feature of the second one is NaN."""

    def spoil(number, batches):
        inputs, *others = batches.lower
        bad = tf.one_hot(where, size, dtype=inputs.dtype)[:, None]
        inputs = tf.where(
            (number == 1) & (bad > 0), tf.constant(np.nan, inputs.dtype), inputs
        )
        return batches._replace(lower=(inputs, *others))

    return pairs(size, "dense").enumerate().map(spoil)


def metrics_and_validation_data():
    """Of labelled data and of batches, with a last batch of another size."""
    histories = []
    for make_model in (alone, together):
        accuracy = keras.metrics.SparseCategoricalAccuracy("accuracy")
        model = make_model(metrics=[accuracy], losses=(of_lower, weighted))
        logs = model.fit(
            pairs(5, "dense"), epochs=2, validation_data=labelled(4), verbose=0
        ).history
        more = model.fit(
            pairs(5, "dense"), validation_data=pairs(3, "dense"), verbose=0
        )
        logs = logs | {f"more_{k}": v for k, v in more.history.items()}
        logs |= model.evaluate(labelled(4), return_dict=True, verbose=0)
        inputs = np.ones([5, 4])
        histories.append((logs, model.predict(inputs, batch_size=4, verbose=0)))
    (expected, outputs), (made, predicted) = histories
    assert {"val_accuracy", "more_val_lower_loss", "accuracy"} <= expected.keys()
    assert made.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(made[name], value, rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(predicted, outputs, rtol=1e-10)


def one_step_at_a_time():
    """`train_on_batch`, and a warm-up that moves nothing."""
    one, two = same_again()
    before = values(two)
    two.warm_up(pairs(5, "dense"))
    assert_equal(values(two), before)
    assert two.outer_step == 0
    for batches in pairs(5, "dense"):
        logs = one.train_on_batch(batches, return_dict=True)
        made = two.train_on_batch(batches, return_dict=True)
        assert made == pytest.approx(logs, rel=1e-6)
    assert_equal(values(two), values(one))


def nan_stops_or_is_skipped_by_all():
    """The NaN is in the second replica's part; nothing of the step is kept."""
    one, two = same_again()
    for model in (one, two):
        with pytest.raises(tb.NonFiniteError, match="at outer step 1"):
            model.fit(with_bad(5, 4), verbose=0)
    assert two.outer_step == 1
    assert_equal(values(two), values(one))

    one, two = alone(), together()
    logs, made = (
        model.fit(with_bad(5, 4), on_nonfinite="skip", verbose=0).history
        for model in (one, two)
    )
    assert logs["skipped"] == [1.0] == made["skipped"]
    assert made["upper_loss"] == pytest.approx(logs["upper_loss"], rel=1e-6)
    assert_equal(values(two), values(one))
    assert all(np.isfinite(value).all() for value in values(two))


def index_out_of_range_is_named():
    """In the second replica's part."""

    def beyond(batches):
        index = tf.tensor_scatter_nd_update(batches.lower[2], [[4]], [[99]][0])
        return batches._replace(lower=(*batches.lower[:2], index))

    model = together(losses=(of_lower, weighted))
    with pytest.raises(ValueError, match="index 99, out of range"):
        model.fit(pairs(5, "dense").map(beyond), verbose=0)


def random_layers_and_statistics():
    """All copies of statistics and seeds are the same, and they move."""

    def lower():
        layers = keras.layers
        return keras.Sequential(
            [
                keras.Input((3,)),
                layers.Dense(4),
                layers.BatchNormalization(),
                layers.Dropout(0.5, seed=3),
                layers.Dense(CLASSES),
            ]
        )

    def at(upper, lower, batch):
        return loss(upper, lambda inputs: lower(inputs, training=True), batch)

    with STRATEGY.scope():
        keras.utils.set_random_seed(1)
        model = tb.BilevelModel(dense(4, 3), lower(), at, at)
        model.compile(tb.Unroll(inner()), SGD(0.1), jit_compile=False)
    before = values(model)
    model.fit(pairs(5, "dense"), verbose=0)
    moved = [np.any(a != b) for a, b in zip(before, values(model), strict=True)]
    assert sum(moved) >= len([v for v in model.lower.variables])
    for variable in model.variables:
        first, second = (copy.numpy() for copy in variable.value.values)
        np.testing.assert_array_equal(first, second, err_msg=variable.path)


def saved_and_resumed():
    """One epoch on two replicas, the next on one device, and the other way round."""
    data = pairs(5, "dense")
    whole = alone()
    whole.fit(data, epochs=2, verbose=0)
    for first, second in ((1, 0), (0, 1)):
        with tempfile.TemporaryDirectory() as folder:
            path = str(pathlib.Path(folder) / "model.weights.h5")
            begun = same_again()[first]
            begun.fit(data, verbose=0)
            begun.save_weights(path)
            resumed = same_again()[second]
            resumed.load_weights(path)
            assert resumed.outer_step == 3
            resumed.fit(data, verbose=0)
            assert_equal(values(resumed), values(whole))


def backed_up():
    """The callbacks that write files."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        callbacks = [
            keras.callbacks.ModelCheckpoint(
                str(path / "best.weights.h5"), save_weights_only=True
            ),
            tb.Backup(str(path / "backup")),
        ]
        _, model = same_again()
        model.fit(pairs(5, "dense"), epochs=2, callbacks=callbacks, verbose=0)
        again = together()
        again.load_weights(str(path / "best.weights.h5"))
        assert_equal(values(again), values(model))
        saved = str(path / "model.keras")
        model.save(saved)
        with STRATEGY.scope():
            named = {"upper_loss": loss, "lower_loss": loss, "method": model.method}
            loaded = keras.saving.load_model(saved, custom_objects=named)
        assert_equal(values(loaded), values(model))
        loaded.fit(pairs(5, "dense"), verbose=0)
        model.fit(pairs(5, "dense"), verbose=0)
        assert_equal(values(loaded), values(model))


def refusals():
    scope = STRATEGY.scope
    data = pairs(5, "dense")
    outside = dense(4, 3), dense(3, CLASSES)
    with pytest.raises(ValueError, match="`upper` and the tb.BilevelModel must be"):
        with scope():
            tb.BilevelModel(*outside, loss, loss)
    with scope():
        within = dense(4, 3), dense(3, CLASSES)
    with pytest.raises(ValueError, match="created outside of any scope"):
        tb.BilevelModel(*within, loss, loss)
    optimizer = SGD(0.1)
    with pytest.raises(ValueError, match="`upper_optimizer` and the tb.BilevelModel"):
        together(upper_optimizer=optimizer)
    model = alone()
    with scope(), pytest.raises(ValueError, match="must be called in the scope"):
        model.compile(METHODS["unroll"](), "sgd")
    with scope(), pytest.raises(ValueError, match="must be called in the scope"):
        model.fit(data, verbose=0)
    for options, message in (
        ({"jit_compile": True}, "`jit_compile` must be False"),
        ({"steps_per_execution": 2}, "`steps_per_execution` must be 1"),
    ):
        with pytest.raises(ValueError, match=message):
            together(**options)
    tape = together(method=tb.Unroll(inner(), memory="tape"))
    with pytest.raises(ValueError, match="`memory` must be 'replay' or 'checkpoint'"):
        tape.fit(data, verbose=0)
    few = together()
    with pytest.raises(ValueError, match="at least one example.*batches of 1"):
        few.fit(pairs(1, "dense"), verbose=0)
    with pytest.raises(ValueError, match="not some examples of each"):
        few.fit(split(pairs(5, "stacked")), verbose=0)
    with pytest.raises(ValueError, match="a model of no strategy"):
        model.fit(split(data), verbose=0)
    with pytest.raises(ValueError, match="a dataset of tb.Batches for the losses"):
        few.evaluate(next(iter(data)), verbose=0)
    ragged = data.map(lambda b: b._replace(upper=(*b.upper, tf.ones([7]))))
    with pytest.raises(ValueError, match="examples along axis 0 of every tensor"):
        few.fit(ragged, verbose=0)
    apart = together(
        losses=(of_lower, lambda upper, lower, batch: of_lower(0, lower, batch))
    )
    with pytest.raises(ValueError, match="does not depend on the upper variable"):
        apart.fit(data, verbose=0)
    assert apart.outer_step == 0
    with tf.distribute.experimental.CentralStorageStrategy().scope():
        with pytest.raises(ValueError, match="Received: CentralStorageStrategy"):
            tb.BilevelModel(*outside, loss, loss)


def unknown_number_of_steps():
    """Keras then reads to the end of the data, and finds out there."""
    histories = []
    for model in same_again():
        data = pairs(5, "dense").filter(lambda batches: batches.upper[2][0] >= 0)
        assert int(data.cardinality()) == tf.data.UNKNOWN_CARDINALITY
        logs = model.fit(data, epochs=2, verbose=0).history
        assert model.outer_step == 6
        histories.append((logs["upper_loss"], values(model)))
    (expected, before), (made, after) = histories
    assert made == pytest.approx(expected, rel=1e-6)
    assert_equal(after, before)


def every_part_of_the_problem():
    """A learned start, projections of both levels, `prepare`, two optimizers."""

    def prepare(upper, batches):
        def features(level):
            return (upper(level[0]), *level[1:])

        return batches._replace(
            upper=features(batches.upper), lower=features(batches.lower)
        )

    def clipped(variables):
        return [tf.clip_by_value(v, -0.5, 0.5) for v in variables]

    def fitted(scope, **options):
        keras.utils.set_random_seed(1)
        with scope:
            model = tb.BilevelModel(
                dense(4, 3),
                dense(3, CLASSES),
                of_lower,
                of_lower,
                lower_start="learned",
                prepare=prepare,
                project_upper=clipped,
                project_lower=clipped,
            )
            model.compile(
                tb.Unroll(inner()),
                keras.optimizers.AdamW(0.05, weight_decay=0.1),
                start_optimizer=keras.optimizers.Adam(0.02, clipnorm=0.1),
                jit_compile=False,
                **options,
            )
        before = values(model)
        model.fit(pairs(5, "dense"), verbose=0)
        assert any(np.any(a != b) for a, b in zip(before, values(model), strict=True))
        optimizers = (model.optimizer, model.start_optimizer)
        slots = [v.numpy() for one in optimizers for v in one.variables]
        return values(model) + slots

    expected = fitted(contextlib.nullcontext())
    assert_equal(fitted(STRATEGY.scope()), expected)


def distributed_before():
    """`fit`, `evaluate` and `warm_up` take a dataset that is distributed already."""
    one, two = same_again()
    data = pairs(5, "dense")
    two.warm_up(split(data))
    assert two.outer_step == 0
    logs = one.fit(data, validation_data=data, verbose=0).history
    made = two.fit(split(data), validation_data=function(data), verbose=0)
    assert made.history.keys() == logs.keys()
    for name, expected in logs.items():
        assert made.history[name] == pytest.approx(expected, rel=1e-6), name
    assert_equal(values(two), values(one))
    again = two.fit(function(data), verbose=0)
    assert again.params["steps"] == 3  # not one for each part
    before = values(two)
    with pytest.raises(tf.errors.InvalidArgumentError, match="must have at least one"):
        two.fit(split(data.unbatch().skip(14).batch(5)), verbose=0)
    assert_equal(values(two), before)


def other_strategies():
    """One replica, and OneDeviceStrategy, are equal to no strategy."""
    one_device = tf.distribute.OneDeviceStrategy("CPU:1")
    one_replica = tf.distribute.MirroredStrategy(["CPU:1"])
    expected = a_fit("unroll", 5, "dense", contextlib.nullcontext(), eager=True)
    for strategy in (one_device, one_replica):
        kept, logs = a_fit("unroll", 5, "dense", strategy.scope())
        assert_equal(kept, expected[0])
        assert logs["upper_loss"] == pytest.approx(expected[1]["upper_loss"])


def labels_are_cleaned():
    """A training of a LabelCleaner is Keras's; with random augmentation.

    A whole one, by hand: `python experiments/label_cleaning.py --replicas 2 --out OUT`.
    """
    random = np.random.default_rng(0)
    x, labels = random.normal(size=(160, 4)), random.integers(3, size=160)
    targets, sure = (Targets.labels(some, 3) for some in (labels, labels[:40]))
    layer = keras.layers.GaussianNoise(0.3, seed=1)

    def trained(scope, batch_size=8):
        keras.utils.set_random_seed(0)
        with scope:
            network = dense(4, 3)
            first = network.get_weights()
            training = Training(
                network,
                False,
                x,
                x[:40],
                lambda batch: layer(batch, training=True),
                batch_size,
                0.01,
                seed=0,
            )
            for number in (0, 1):  # what is read ahead must not matter
                training.run(first, targets, sure, 0.4, number, 20, 1)
            assert np.abs(network.get_weights()[0] - first[0]).max() > 0.01
            return *network.get_weights(), training.probabilities_of(x)

    assert_equal(trained(STRATEGY.scope()), trained(contextlib.nullcontext()))
    with pytest.raises(ValueError, match="divided evenly among 2 replicas"):
        trained(STRATEGY.scope(), batch_size=9)


def losses_without_metrics():
    """`evaluate` on batches needs no metrics."""
    one, two = same_again()
    logs, made = (
        model.evaluate(pairs(5, "dense"), return_dict=True, verbose=0)
        for model in (one, two)
    )
    assert logs.keys() == {"upper_loss", "lower_loss"}
    assert made == pytest.approx(logs, rel=1e-6)


if __name__ == "__main__":
    keras.config.set_floatx("float64")
    for name in sys.argv[1:]:
        globals()[name]()
        print("equal", name, flush=True)
