"""`FewShotLearner`: its steps by hand, its tasks, its models for new classes."""

import functools
import itertools
import pathlib
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbilevel as tb
from tfbilevel._jobs.few_shot import networks
from tfbilevel._jobs.few_shot.episodes import Sizes, meta_batches

WAYS, SHOTS, QUERIES, TASKS = 3, 2, 4, 2


def blobs(classes: int, each: int = 8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Points around a random centre per class, in random order."""
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), each)
    centres = generator.normal(size=(classes, 4))
    x = centres[labels] + 0.2 * generator.normal(size=(len(labels), 4))
    order = generator.permutation(len(labels))
    return x[order].astype("float32"), labels[order]


def linear(ways: int) -> keras.Model:
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(ways)])


def deep(ways: int) -> keras.Model:
    hidden = keras.layers.Dense(8, "tanh")
    return keras.Sequential([keras.Input((4,)), hidden, keras.layers.Dense(ways)])


def with_softmax(ways: int) -> keras.Model:
    layers = [*deep(ways).layers, keras.layers.Softmax()]
    return keras.Sequential([keras.Input((4,)), *layers])


def branched(ways: int) -> keras.Model:
    inputs = keras.Input((4,))
    parts = [keras.layers.Dense(ways)(inputs) for _ in range(2)]
    return keras.Model(inputs, keras.layers.Add()(parts))


def normalised(ways: int) -> keras.Model:
    norm = keras.layers.BatchNormalization(epsilon=0.01, gamma_initializer="ones")
    return keras.Sequential([keras.Input((4,)), norm, keras.layers.Dense(ways)])


def fitted(network: Any, method: Any, steps: int = 1, **arguments: Any) -> Any:
    arguments = {"tasks": TASKS, **arguments}
    learner = tb.FewShotLearner(network, method, **arguments)
    sizes = {"ways": WAYS, "shots": SHOTS, "queries": QUERIES}
    return learner.fit(*blobs(9), **sizes, epochs=1, steps_per_epoch=steps, verbose=0)


@pytest.fixture(scope="module")
def maml() -> Any:
    return fitted(linear, "maml", inner_steps=3, inner_learning_rate=0.3)


@pytest.fixture(scope="module")
def anil() -> Any:
    return fitted(deep, "anil", inner_steps=2, inner_learning_rate=0.5)


def first_batch() -> tb.Batches:
    """The first meta-batch of `fitted`."""
    x, y = blobs(9)
    order = np.argsort(y, kind="stable")
    sizes = Sizes(WAYS, SHOTS, QUERIES)
    counts = np.bincount(y)
    data = meta_batches(x[order], counts, sizes, TASKS, 0, itertools.count, "float32")
    return next(iter(data))


def loss(network: Any, inputs: Any, labels: Any) -> tf.Tensor:
    return tf.reduce_mean(tb.sparse_cross_entropy(network(inputs), labels))


def one_step(
    model: tb.BilevelModel, batch: tb.Batches, steps: int, rate: float
) -> list:
    """The upper variables after one outer step."""
    inner = tb.InnerSolver(keras.optimizers.SGD(rate), steps)
    optimizer = keras.optimizers.Adam(0.001 if model.start is None else 0.002)
    model.compile(tb.Unroll(inner), optimizer, jit_compile=False)
    model.train_on_batch(batch)
    return [variable.numpy() for variable in model.upper_variables]


def require_equal(found: list, expected: list) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_step_of_maml_is_that_of_a_model_made_by_hand(maml: Any) -> None:
    keras.utils.set_random_seed(0)
    start, network = linear(WAYS), linear(WAYS)
    (queries, answers, _), support = first_batch()
    model = tb.BilevelModel(
        start,
        network,
        lambda start, network, batch: loss(network, *batch),
        lambda start, network, batch: loss(network, *batch),
        lower_start=lambda start: start.trainable_variables,
        tasks=TASKS,
    )
    before = [v.numpy() for v in start.trainable_variables]
    after = one_step(model, tb.Batches((queries, answers), support), 3, 0.3)
    require_equal([v.numpy() for v in maml.model_.upper_variables], after)
    assert all((a != b).any() for a, b in zip(before, after, strict=True))


def test_a_step_of_anil_is_that_of_a_model_made_by_hand(anil: Any) -> None:
    keras.utils.set_random_seed(0)
    encoder, head = networks.split(deep(WAYS))

    def features(encoder: Any, batches: tb.Batches) -> tb.Batches:
        (queries, answers), (support, labels) = batches
        return tb.Batches((encoder(queries), answers), (encoder(support), labels))

    model = tb.BilevelModel(
        encoder,
        head,
        lambda encoder, head, batch: loss(head, *batch),
        lambda encoder, head, batch: loss(head, *batch),
        lower_start="learned",
        prepare=features,
        tasks=TASKS,
    )
    (queries, answers, _), support = first_batch()
    after = one_step(model, tb.Batches((queries, answers), support), 2, 0.5)
    require_equal([v.numpy() for v in anil.model_.upper_variables], after)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def test_adapting_is_so_many_steps_of_gradient_descent(maml: Any) -> None:
    x, y = blobs(WAYS, each=5, seed=3)
    kernel, bias = (v.numpy().astype(float) for v in maml.model_.upper_variables)
    for _ in range(3):
        error = (softmax(x @ kernel + bias) - np.eye(WAYS)[y]) / len(x)
        kernel, bias = kernel - 0.3 * x.T @ error, bias - 0.3 * error.sum(axis=0)
    np.random.seed(1)
    model = maml.adapt(x, np.array(["a", "b", "c"])[y])
    assert np.random.rand() == np.random.RandomState(1).rand()  # left alone
    np.testing.assert_allclose(
        model.predict(x, verbose=0), x @ kernel + bias, rtol=1e-5, atol=1e-5
    )
    assert model.classes_.tolist() == ["a", "b", "c"]


@pytest.mark.slow
def test_dropout_is_for_training_only() -> None:
    def network(ways: int) -> keras.Model:
        layers = [keras.layers.Dropout(0.5), *normalised(ways).layers]
        return keras.Sequential([keras.Input((4,)), *layers])

    learner = fitted(network, "maml", inner_steps=1, inner_learning_rate=1e-9)
    x, y = blobs(WAYS, seed=5)
    model = learner.adapt(x[:12], y[:12])
    scale, shift, kernel, bias = (v.numpy() for v in model.trainable_variables)
    logits = (standardised(x, x[:12]) * scale + shift) @ kernel + bias
    np.testing.assert_allclose(model(x), logits, rtol=1e-4, atol=1e-5)
    assert model.layers[0].rate == 0.5
    order = np.argsort(y, kind="stable")
    data = meta_batches(
        x[order],
        np.bincount(y),
        Sizes(WAYS, SHOTS, QUERIES),
        TASKS,
        2**41,
        itertools.count,
        "float32",
    )
    right = []
    for (queries, answers, _), (support, _) in data.take(2):
        for task in range(TASKS):
            asked, known = queries[task].numpy(), support[task].numpy()
            logits = (standardised(asked, known) * scale + shift) @ kernel + bias
            right.append(np.mean(logits.argmax(axis=1) == answers[task].numpy()))
    assert learner.score(x, y, episodes=4).accuracy == pytest.approx(np.mean(right))


@pytest.mark.slow
def test_imaml_stays_close_to_the_start() -> None:
    learner = fitted(linear, "imaml", inner_steps=2, inner_learning_rate=0.2)
    x, y = blobs(WAYS, each=5, seed=3)
    start = [v.numpy().astype(float) for v in learner.model_.upper_variables]
    kernel, bias = start
    for _ in range(2):
        error = (softmax(x @ kernel + bias) - np.eye(WAYS)[y]) / len(x)
        away = 2 * (kernel - start[0]), 2 * (bias - start[1])
        kernel = kernel - 0.2 * (x.T @ error + away[0])
        bias = bias - 0.2 * (error.sum(axis=0) + away[1])
    found = learner.adapt(x, y)(x)
    np.testing.assert_allclose(found, x @ kernel + bias, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_network_that_ends_with_a_softmax_learns_the_same() -> None:
    x, y = blobs(WAYS, seed=10)
    outputs = [
        np.asarray(fitted(network, "anil", 3).adapt(x, y)(x))
        for network in (deep, with_softmax)
    ]
    np.testing.assert_allclose(softmax(outputs[0]), outputs[1], rtol=1e-4, atol=1e-5)


def test_a_head_starts_at_the_learned_one_and_its_mean_for_more_classes(
    anil: Any,
) -> None:
    kernel, bias, start_kernel, start_bias = (
        v.numpy().astype(float) for v in anil.model_.upper_variables
    )
    for ways in (WAYS, 5):
        x, y = blobs(ways, each=3, seed=4)
        features = np.tanh(x @ kernel + bias)
        head, shift = start_kernel, start_bias
        if ways != WAYS:
            head = np.tile(head.mean(axis=1, keepdims=True), ways)
            shift = np.full(ways, shift.mean())
        for _ in range(2):
            error = (softmax(features @ head + shift) - np.eye(ways)[y]) / len(x)
            head = head - 0.5 * features.T @ error
            shift = shift - 0.5 * error.sum(axis=0)
        found = anil.adapt(x, y).predict(x, verbose=0)
        np.testing.assert_allclose(found, features @ head + shift, rtol=1e-4, atol=1e-5)


def meanings(labels: Any, examples: Any) -> set[tuple[int, int]]:
    """The label of every class in a task."""
    classes = examples[:, 0].numpy().astype(int)
    return set(zip(labels.numpy().tolist(), classes.tolist(), strict=True))


def test_tasks_have_other_queries_than_examples_and_every_class_equally_often() -> None:
    counts = np.array([7, 5, 6, 5, 9])
    x = np.stack([np.repeat(np.arange(5), counts), np.arange(counts.sum())], axis=1)
    data = meta_batches(x, counts, Sizes(2, 2, 3), 2, 7, itertools.count, "float32")
    seen = []
    for (queries, answers, again), (support, labels) in data.take(100):
        np.testing.assert_array_equal(again, support)
        assert support.shape == (2, 4, 2) and queries.shape == (2, 6, 2)
        for task in range(2):
            rows = np.concatenate([support[task, :, 1], queries[task, :, 1]])
            assert len(set(rows.tolist())) == 10
            pairs = meanings(labels[task], support[task])
            assert pairs == meanings(answers[task], queries[task])
            assert {label for label, _ in pairs} == {0, 1} and len(pairs) == 2
            seen += [of for _, of in pairs]
    # 400 samples of five classes: 80 each, with a standard deviation below 8.
    assert len(seen) == 400 and np.abs(np.bincount(seen) - 80).max() < 30


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(-np.log(softmax(logits)[np.arange(len(labels)), labels]).mean())


def standardised(x: np.ndarray, by: np.ndarray) -> np.ndarray:
    return (x - by.mean(axis=0)) / np.sqrt(by.var(axis=0) + 0.01)


@pytest.mark.parametrize(
    "transductive", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_queries_are_normalised_by_the_examples_unless_transductive(
    transductive: bool,
) -> None:
    """Inner steps of almost no length: the losses are those of the start."""
    none = {"inner_steps": 1, "inner_learning_rate": 1e-9}
    learner = fitted(normalised, "maml", transductive=transductive, **none)
    keras.utils.set_random_seed(0)
    kernel, bias = (v.numpy() for v in normalised(WAYS).trainable_variables[2:])
    (queries, answers, _), (support, labels) = first_batch()
    expected = {"upper_loss": [], "lower_loss": []}
    for task in range(TASKS):
        known, asked = support[task].numpy(), queries[task].numpy()
        logits = standardised(asked, asked if transductive else known) @ kernel + bias
        expected["upper_loss"].append(cross_entropy(logits, answers[task].numpy()))
        logits = standardised(known, known) @ kernel + bias
        expected["lower_loss"].append(cross_entropy(logits, labels[task].numpy()))
    for name, values in expected.items():
        assert learner.history_[name] == [pytest.approx(np.mean(values), rel=1e-5)]

    x, y = blobs(WAYS, seed=5)
    model = learner.adapt(x[:12], y[:12])
    scale, shift, kernel, bias = (v.numpy() for v in model.trainable_variables)
    by = x if transductive else x[:12]
    logits = (standardised(x, by) * scale + shift) @ kernel + bias
    np.testing.assert_allclose(model(x), logits, rtol=1e-4, atol=1e-5)
    alone = np.concatenate([model(row[None]) for row in x])
    assert np.allclose(alone, logits, rtol=1e-4, atol=1e-5) != transductive


def test_the_score_is_that_of_the_models_of_adapt(anil: Any) -> None:
    x, y = blobs(6, seed=6)
    order = np.argsort(y, kind="stable")
    sizes, counts = Sizes(WAYS, SHOTS, QUERIES), np.bincount(y)
    data = meta_batches(
        x[order], counts, sizes, TASKS, 2**41 + 1, itertools.count, "float32"
    )
    found = []
    for (queries, answers, _), (support, labels) in data.take(3):
        for task in range(TASKS):
            predicted = anil.predict(support[task], labels[task], queries[task])
            found.append(np.mean(predicted == answers[task].numpy()))
    score = anil.score(x, y, episodes=5, seed=1)
    assert score.accuracy == pytest.approx(np.mean(found[:5]))
    spread = np.sqrt(np.sum((np.array(found[:5]) - score.accuracy) ** 2) / 4)
    assert score.margin == pytest.approx(1.96 * spread / 5**0.5)
    assert 0.4 < score.accuracy <= 1


def test_a_model_of_adapt_is_saved_loaded_and_evaluated(
    anil: Any, tmp_path: pathlib.Path
) -> None:
    x, y = blobs(WAYS, seed=7)
    model = anil.adapt(x, np.eye(WAYS)[y])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(x), model(x))
    right = np.mean(np.argmax(model(x), axis=1) == y)
    assert model.evaluate(x, y, verbose=0)[1] == pytest.approx(right)
    one_hot = anil.predict(x, np.eye(WAYS)[y], x)
    np.testing.assert_array_equal(one_hot.argmax(axis=1), np.argmax(model(x), axis=1))
    assert one_hot.shape == (len(x), WAYS)


class Killed(Exception):
    pass


class Kill(keras.callbacks.Callback):
    """Ends training in the second epoch."""

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self.model.outer_step == 5:
            raise Killed


@pytest.mark.slow
def test_a_killed_run_that_is_resumed_equals_an_uninterrupted_one(
    tmp_path: pathlib.Path,
) -> None:
    def run(*callbacks: Any) -> Any:
        learner = tb.FewShotLearner(deep, inner_steps=1, tasks=TASKS)
        sizes = {"ways": WAYS, "queries": 3, "epochs": 2, "steps_per_epoch": 3}
        held = {"validation_data": blobs(5, seed=8), "validation_episodes": 4}
        more = {"callbacks": list(callbacks), "verbose": 0}
        return learner.fit(*blobs(9), **sizes, **held, **more)

    whole = run()
    backup = tb.Backup(tmp_path, steps_per_epoch=3)
    with pytest.raises(Killed):
        run(backup, Kill())
    resumed = run(backup)
    variables = [
        [v.numpy() for v in learner.model_.upper_variables]
        for learner in (whole, resumed)
    ]
    require_equal(*variables)
    for name, values in whole.history_.items():
        assert resumed.history_[name] == values[1:]
    assert len(whole.history_["val_accuracy"]) == 2


@pytest.mark.slow
def test_a_dataset_with_names_equals_arrays_with_numbers() -> None:
    x, y = blobs(9)
    names = np.array([f"class {c}" for c in range(9)])[y]
    data = tf.data.Dataset.from_tensor_slices((x, names))
    sizes = {"ways": WAYS, "queries": 2, "epochs": 1, "steps_per_epoch": 2}
    made = [
        tb.FewShotLearner(deep, "fomaml", inner_steps=1, tasks=2).fit(
            *given, **sizes, verbose=0
        )
        for given in ((x, y), (data,), (data.batch(7),))
    ]
    for learner in made[1:]:
        assert learner.classes_.tolist() == [f"class {c}" for c in range(9)]
        assert learner.history_ == made[0].history_


def clone_safe() -> tb.FewShotLearner:
    return tb.FewShotLearner(deep, "maml", inner_steps=2, seed=3)


def test_parameters_are_those_of_the_constructor() -> None:
    learner = clone_safe()
    assert learner.get_params()["inner_steps"] == 2
    assert learner.get_params()["network"] is deep
    assert learner.set_params(inner_steps=4) is learner
    assert learner.inner_steps == 4
    with pytest.raises(ValueError, match="`steps` must be an argument of FewShot"):
        learner.set_params(steps=4)
    sklearn = pytest.importorskip("sklearn.base")
    other = sklearn.clone(learner)
    assert other is not learner and other.get_params() == learner.get_params()


def test_the_published_network_is_four_blocks_with_a_head() -> None:
    images = np.zeros((1, 28, 28, 1), np.uint8)
    model = networks.new_network(None, images, 5, 0, cosine=False)
    # 9 c 64 + 64 of the convolutions, 128 of each normalisation, 64 * 5 + 5.
    convolutions = 9 * 64 + 64 + 3 * (9 * 64 * 64 + 64)
    trained = sum(np.prod(v.shape) for v in model.trainable_variables)
    assert trained == convolutions + 4 * 128 + 325
    assert isinstance(model.layers[0], keras.layers.Rescaling)
    encoder, head = networks.split(model)
    assert encoder.output_shape == (None, 64) and head.output_shape == (None, 5)
    bright = np.full((3, 28, 28, 1), 255, np.float32)
    np.testing.assert_array_equal(head(encoder(bright)), model(bright))


def test_a_model_is_cloned_and_its_head_made_for_other_ways() -> None:
    model = networks.new_network(deep(3), np.zeros((1, 4), np.float32), 6, 0, False)
    assert model.output_shape == (None, 6)
    assert model.layers[0].units == 8
    ended = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3), keras.layers.PReLU()]
    )
    with pytest.raises(ValueError, match="one output per class, 6 here"):
        networks.new_network(ended, np.zeros((1, 4), np.float32), 6, 0, False)


X, Y = blobs(6)
shared = functools.cache(lambda: deep(3))
ODD = np.where(np.arange(len(Y)) == np.flatnonzero(Y == 2)[0], 9, Y)


@pytest.mark.parametrize(
    "given, arguments, message",
    [
        ((X, Y), {"ways": 7}, "`ways` must not exceed the number of classes of `y`, 6"),
        ((X, ODD), {}, "shots \\+ queries examples, 1 \\+ 5.*class 9 with 1"),
        ((X, Y), {"queries": 8}, "every class of `y` must have shots \\+ queries"),
        ((X[:-1], Y), {}, "`x` and `y` must have the same length.*47 rows and 48"),
        ((np.where(X > 1, np.nan, X), Y), {}, "`x` must not hold NaN.*such rows"),
        ((X, None), {}, "`y` must be given"),
        ((X.astype(str), Y), {}, "`x` must be an array of numbers"),
        ((X, np.zeros(48)), {}, "at least two classes"),
        ((X, Y), {"ways": 1}, "`ways` must be an integer of at least 2"),
        ((X, Y), {"shots": 0}, "`shots` must be an integer of at least 1"),
        (
            (X, Y),
            {"validation_data": (X[:, :2], Y)},
            r"`validation_data\[0\]` must hold",
        ),
        ((X, Y), {"validation_data": X}, r"`validation_data` must be \(x, y\)"),
        ((X, Y), {"network": None}, "`network` must be given, unless `x` holds images"),
        ((X, Y), {"network": lambda: deep(4)}, "`network` must have one output per cl"),
        (
            (X, Y),
            {"network": shared},
            "`network` must return a new Keras model",
        ),
        ((X, Y), {"network": lambda ways: ways}, "which returned 3"),
        ((X, Y), {"network": linear}, "must have trained layers before its head"),
        ((X, Y), {"network": branched}, "functional model that ends with its head"),
        ((X, Y), {"method": "protonet"}, "`method` must be one of 'anil', 'iaptt'"),
        ((X, Y), {"method": tb.GradientNorm("sgd", 5)}, "must have an inner solver"),
        ((X, Y), {"adapts": "all"}, '`adapts` must be "head" for method="anil"'),
        ((X, Y), {"inner_steps": 0}, "`inner_steps` must be an integer of at least 1"),
        ((X, Y), {"inner_learning_rate": 0.0}, "`inner_learning_rate` must be"),
        ((X, Y), {"tasks": 0}, "`tasks` must be an integer of at least 1"),
        ((X, Y), {"optimizer": "none"}, "`optimizer` must be a Keras optimizer"),
        ((X, Y), {"seed": -1}, "`seed` must be an integer of at least 0"),
    ],
)
def test_what_cannot_be_learned_is_refused(
    given: Any, arguments: dict, message: str
) -> None:
    own = tb.FewShotLearner(deep).get_params()
    learner = tb.FewShotLearner(
        **{name: arguments.get(name, value) for name, value in own.items()}
    )
    rest = {k: v for k, v in arguments.items() if k not in own}
    with pytest.raises(ValueError, match=message):
        learner.fit(*given, **{"ways": 3, "verbose": 0, **rest})
    with pytest.raises(ValueError, match="`adapt` needs a trained learner"):
        learner.adapt(X, Y)


def test_new_classes_that_do_not_fit_are_refused(maml: Any, anil: Any) -> None:
    x, y = blobs(WAYS, each=2, seed=9)
    with pytest.raises(ValueError, match="`y_support` must have 3 classes, as in tr"):
        maml.adapt(x[y < 2], y[y < 2])
    with pytest.raises(ValueError, match="`ways` must have 3 classes"):
        maml.score(X, Y, ways=4)
    missing = np.eye(4)[y]  # no example of the last class
    with pytest.raises(ValueError, match="an example of every class.*none of class 3"):
        anil.adapt(x, missing)
    with pytest.raises(ValueError, match="`x_support` and `y_support` must have the s"):
        anil.adapt(x, y[:-1])
    with pytest.raises(ValueError, match="`x_support` must hold examples of the shape"):
        anil.adapt(x[:, :3], y)
    with pytest.raises(ValueError, match="`x_query` must not hold NaN"):
        anil.predict(x, y, np.full((2, 4), np.nan))
    with pytest.raises(ValueError, match="`episodes` must be an integer of at least 2"):
        anil.score(X, Y, episodes=1)
