"""Label cleaning: trainings, and the estimator."""

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbilevel as tb
from tfbilevel._jobs.cleaning import stages
from tfbilevel._jobs.cleaning.label_cleaner import _say
from tfbilevel._jobs.cleaning.rows import data_of
from tfbilevel._jobs.cleaning.training import Targets, Training, target_loss
from tfbilevel._jobs.cleaning.trainings import Trainings
from tfbilevel._jobs.last_layer import LastLayer, log_probabilities_of


def blobs(n: int, seed: int, wrong: float = 0.4) -> tuple:
    """Three clusters; of a share the label is that of the next class."""
    random = np.random.default_rng(seed)
    right = random.integers(0, 3, n)
    centers = np.array([[0.0, 2.0], [2.0, -1.0], [-2.0, -1.0]])
    x = (centers[right] + 0.6 * random.normal(size=(n, 2))).astype(np.float32)
    flipped = random.random(n) < wrong
    return x, right, np.where(flipped, (right + 1) % 3, right)


def linear() -> keras.Model:
    return keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])


def fitted(epochs: int = 20, **arguments) -> tuple:
    x, right, given = blobs(600, 0)
    sure, sure_labels, _ = blobs(60, 1)
    cleaner = tb.LabelCleaner(linear, batch_size=64, learning_rate=0.05, **arguments)
    cleaner.fit(x, given, trusted=(sure, sure_labels), epochs=epochs, verbose=0)
    return cleaner, x, right, given


def asked_of(trainings: Any, learn: bool, choose: bool) -> list:
    """What the outcome of all trainings depends on."""
    lengths = trainings._steps, trainings._epochs, trainings.seed, learn, choose
    data = trainings.x, trainings.given, *trainings.sure
    return [lengths, *data, *trainings._initial(0)]


@pytest.fixture
def train_once(monkeypatch: pytest.MonkeyPatch) -> list:
    """Only the first `fit` of a test trains. Later ones must ask for the same training
    of the same data, and get its outcome. Returns how often was asked."""
    run, first, asked = stages.run, [], []

    def once(trainings, learn, callbacks, choose):
        asked.append(trainings)
        wanted = asked_of(trainings, learn, choose)
        if not first:
            first.append((wanted, run(trainings, learn, callbacks, choose)))
        before, outcome = first[0]
        for one, other in zip(before, wanted, strict=True):
            np.testing.assert_array_equal(one, other)
        return outcome

    monkeypatch.setattr(stages, "run", once)
    return asked


@pytest.fixture
def same_outcome_for_same_data(monkeypatch: pytest.MonkeyPatch) -> dict:
    """A `fit` that asks for a training made before gets its outcome. Returns them."""
    run, known = stages.run, {}

    def once(trainings, learn, callbacks, choose):
        wanted = map(np.asarray, asked_of(trainings, learn, choose))
        key = tuple((one.dtype.str, one.shape, one.tobytes()) for one in wanted)
        if key not in known:
            known[key] = run(trainings, learn, callbacks, choose)
        return known[key]

    monkeypatch.setattr(stages, "run", once)
    return known


@pytest.fixture
def eagerly() -> Iterator[None]:
    """Nothing is traced, which takes longer than a few small steps do."""
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


# Of TensorFlow: `tf.data` goes on to trace.
EAGER = "ignore:Even though the .tf.config.experimental_run_functions_eagerly"


def noise_layer() -> Any:
    """A random augmentation, whose layer counts its calls."""
    layer = keras.layers.GaussianNoise(0.1, seed=1)

    def moved(batch: tf.Tensor) -> tf.Tensor:
        return layer(batch, training=True)

    return moved


def test_random_augmentation_depends_on_training_and_batch_alone() -> None:
    """Not on how many batches were read ahead before."""
    zeros = np.zeros([40, 2], np.float32)
    labels = Targets.labels(np.zeros(40, int), 3)
    training = Training(linear(), False, zeros, zeros, noise_layer(), 8, 0.1, seed=5)

    def read(number: int, count: int) -> np.ndarray:
        data = training._batches(labels, labels, 0.5, None, number)
        return np.stack([inputs for inputs, *_ in data.take(count)])

    first = read(3, 3)
    again = read(3, 2)
    assert first.std() == pytest.approx(0.1, rel=0.3)
    np.testing.assert_array_equal(again, first[:2])
    assert len(np.unique(first)) > 50  # of 60: the batches differ
    assert not np.isin(read(4, 2), first).any()


def test_target_loss_by_hand() -> None:
    p = np.array([[0.7, 0.2, 0.1]])
    targets = Targets.of(np.array([[0.4, 0.7, 0.2]]), np.array([[0.0, 1.0, 0.0]]), 0.25)
    found = target_loss(tf.constant(targets.values), tf.math.log(tf.constant(p)))
    forward = -np.log(0.7 * 0.4 + 0.2 * 0.7 + 0.1 * 0.2)
    np.testing.assert_allclose(found, [0.75 * forward - 0.25 * np.log(0.2)], rtol=1e-6)


def test_last_layer_gives_the_networks_probabilities() -> None:
    x = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
    layers = keras.layers
    heads = [
        [layers.Dense(3)],
        [layers.Dense(3, "softmax")],
        [layers.Dense(3), layers.Softmax()],
        [layers.Dense(3), layers.BatchNormalization()],  # the last one is not linear
    ]
    for head in heads:
        body = [keras.Input((4,)), layers.Dense(5, "relu")]
        network = keras.Sequential([*body, *head])
        outputs = np.asarray(network(x))
        gives = bool(np.allclose(outputs.sum(axis=1), 1))
        expected = outputs if gives else tf.nn.softmax(outputs).numpy()
        last = LastLayer(network, gives)
        assert (last.dense is None) == (len(head) == 2 and "normal" in head[1].name)
        found = np.exp(log_probabilities_of(last.features(x), last.weights()))
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_wrong_labels_are_found_and_corrected() -> None:
    cleaner, x, right, given = fitted()
    assert np.mean(given == right) < 0.65
    assert np.mean(cleaner.corrected_labels_ == right) > 0.97
    fresh_x, fresh_right, _ = blobs(300, 2)
    assert cleaner.score(fresh_x, fresh_right) > 0.97
    # T is the flipping that was done: 0.6 kept, 0.4 to the next class.
    expected = 0.6 * np.eye(3) + 0.4 * np.roll(np.eye(3), 1, axis=1)
    np.testing.assert_allclose(cleaner.transition_, expected, atol=0.08)
    wrong = given != right
    assert np.median(cleaner.weights_[wrong]) < 0.1
    assert np.median(cleaner.weights_[~wrong]) > 0.9
    issues = {
        name: np.asarray(cleaner.label_issues_[name])
        for name in (
            "row",
            "given_label",
            "suggested_label",
            "probability_right",
            "rank",
        )
    }
    rows = issues["row"]
    np.testing.assert_array_equal(issues["given_label"], given[rows])
    np.testing.assert_array_equal(
        issues["suggested_label"], cleaner.corrected_labels_[rows]
    )
    np.testing.assert_array_equal(
        np.sort(rows), np.flatnonzero(cleaner.corrected_labels_ != given)
    )
    assert (np.diff(issues["probability_right"]) >= 0).all()
    assert cleaner.choice_.name == "class-dependent"
    assert cleaner.accuracy_.n == 20
    assert cleaner.accuracy_.after > cleaner.accuracy_.before


def test_the_control_believes_what_it_did_at_the_start() -> None:
    cleaner, *_ = fitted(epochs=1, learn=False)
    assert cleaner.choice_.belief["trust"] == 0.3
    assert cleaner.choice_.trusted_scores == {}
    assert "belief" not in cleaner.history_


@pytest.mark.slow
def test_noise_that_depends_on_the_example_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of each cluster the upper half is called by the next class: T is of no use."""
    run, targets = Trainings.run, {}

    def noted(self: Trainings, name: str, start: list, values: Targets, *rest, **more):
        targets[name] = values.values
        run(self, name, start, values, *rest, **more)

    monkeypatch.setattr(Trainings, "run", noted)
    x, right, _ = blobs(900, 0, 0.0)
    centers = np.array([2.0, -1.0, -1.0])
    given = np.where(x[:, 1] > centers[right], (right + 1) % 3, right)
    sure, sure_labels, _ = blobs(90, 1)

    def network() -> keras.Model:
        layers = keras.layers
        return keras.Sequential(
            [keras.Input((2,)), layers.Dense(32, "relu"), layers.Dense(3)]
        )

    cleaner = tb.LabelCleaner(network, batch_size=64, learning_rate=0.03)
    cleaner.fit(x, given, trusted=(sure, sure_labels), epochs=20, verbose=0)
    assert cleaner.choice_.name == "feature-dependent"
    assert np.mean(given == right) < 0.6
    assert np.mean(cleaner.corrected_labels_ == right) > 0.9
    # The final network hears a given label as far as the opinion believes it.
    labels, opinion = targets["final"][:, 0], targets["final"][:, 1]
    believed = (opinion / opinion.sum(axis=1, keepdims=True))[np.arange(900), given]
    expected = np.where(np.eye(3)[given] == 1, 1.0, 1 - believed[:, None])
    np.testing.assert_allclose(labels, expected, atol=1e-6)
    assert believed.min() < 0.1


@pytest.mark.slow
def test_a_killed_fit_goes_on_and_ends_in_the_same_place(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def belief_of(seen, start, likelihoods, views, trusted, held, seed):
        """In place of what is learned: it tells what it would be learned from."""
        parts = [*seen.trusted, seen.features, seen.held, seen.weights, likelihoods]
        parts += [views.doubtful, views.factors, views.held, trusted, held]
        sums = [float(np.square(part).sum()) for part in parts]
        return start, {"learned": sums, "start": [float(seed)]}

    monkeypatch.setattr(stages, "learned_belief", belief_of)
    whole, *_ = fitted(epochs=4, augmentation=noise_layer())

    class Killed(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            raise KeyboardInterrupt

    x, _, given = blobs(600, 0)
    trusted = blobs(60, 1)[:2]
    backup = tmp_path / "kept"
    options = {"batch_size": 64, "learning_rate": 0.05, "backup": backup}
    options["augmentation"] = noise_layer()
    cleaner = tb.LabelCleaner(linear, **options)
    with pytest.raises(KeyboardInterrupt):
        cleaner.fit(
            x, given, trusted=trusted, epochs=4, verbose=0, callbacks=[Killed()]
        )
    assert len(list(backup.glob("*.npz"))) >= 6  # all but the final training
    with pytest.raises(ValueError, match="`backup` must be a folder of its own"):
        cleaner.fit(x + 1, given, trusted=trusted, epochs=4, verbose=0)
    other = tb.LabelCleaner(linear, optimizer=keras.optimizers.SGD(0.1), **options)
    with pytest.raises(ValueError, match="`backup` must be a folder of its own"):
        other.fit(x, given, trusted=trusted, epochs=4, verbose=0)
    cleaner.fit(x, given, trusted=trusted, epochs=4, verbose=0)
    np.testing.assert_array_equal(cleaner.weights_, whole.weights_)
    assert list(cleaner.history_) == list(whole.history_)
    for one, other in zip(
        cleaner.history_.values(), whole.history_.values(), strict=True
    ):
        assert one | {"seconds": 0} == other | {"seconds": 0}
    assert "learned" in whole.history_["belief"]
    assert not backup.exists()


def test_labels_of_any_kind_give_the_same_result(train_once: list) -> None:
    x, right, given = blobs(200, 0)
    sure, sure_labels, _ = blobs(30, 1)
    names = np.array(["ape", "bee", "cow"])
    found = []
    for code in (lambda v: v, lambda v: names[v], lambda v: np.eye(3)[v]):
        cleaner = tb.LabelCleaner(linear, batch_size=50, learn=False)
        cleaner.fit(
            x, code(given), trusted=(sure, code(sure_labels)), epochs=1, verbose=0
        )
        found.append((cleaner.corrected_labels_, cleaner.predict(x)))
    assert len(train_once) == 3
    for integers, text, one_hot in zip(*found, strict=True):
        np.testing.assert_array_equal(names[integers], text)
        np.testing.assert_array_equal(integers, one_hot.argmax(axis=1))


@pytest.mark.slow
def test_datasets_softmax_outputs_and_compiled_models(train_once: list) -> None:
    """A dataset of batches is the same as its arrays; a softmax is noticed."""
    x, right, given = blobs(200, 0)
    sure, sure_labels, _ = blobs(30, 1)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, "softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy")
    before = model.get_weights()

    def of(*arrays):
        return tf.data.Dataset.from_tensor_slices(arrays).batch(64)

    one = tb.LabelCleaner(model, learn=False).fit(
        x, given, trusted=(sure, sure_labels), epochs=1, verbose=0
    )
    two = tb.LabelCleaner(model, learn=False).fit(
        of(x, given), trusted=of(sure, sure_labels), epochs=1, verbose=0
    )
    assert len(train_once) == 2
    np.testing.assert_array_equal(one.predict_proba(x), two.predict_proba(x))
    np.testing.assert_allclose(one.predict_proba(x).sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(
        one.predict_proba(x), one.model_.predict(x, verbose=0), atol=1e-6
    )
    for kept, now in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(kept, now)


GOOD_X, _, GOOD_Y = blobs(40, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": GOOD_Y[:30]}, "`x` and `y` must have as many rows"),
        ({"y": np.zeros(40, int)}, "hold at least two classes|every class"),
        ({"y": GOOD_Y + 0.5}, "`y` must be classes"),
        ({"x": np.where(GOOD_X > 3, np.nan, GOOD_X) * np.nan}, "`x` must not hold NaN"),
        ({"trusted": (GOOD_X[:5], np.zeros(5, int))}, r"no trusted example of 1, 2"),
        ({"trusted": (GOOD_X[:, :1], GOOD_Y)}, "examples like those in `x`"),
        ({"trusted": GOOD_X}, r"`trusted` must be \(x, y\)"),
        ({"trusted": (GOOD_X, GOOD_Y.astype(str))}, "labels of one kind"),
        ({"x": GOOD_X[:, :1], "trusted": None}, "must take examples of shape"),
        ({"y": None}, "`y` must be the labels of `x`"),
        ({"y": np.arange(40) % 4, "trusted": None}, "one output per class, 4 here"),
    ],
)
def test_bad_input_is_refused_before_training(change: dict, message: str) -> None:
    def untrained():
        network = linear()
        network.fit = lambda *a, **k: pytest.fail("training began")
        return network

    data = {"x": GOOD_X, "y": GOOD_Y, "trusted": (GOOD_X, GOOD_Y)} | change
    with pytest.raises(ValueError, match=message):
        tb.LabelCleaner(untrained).fit(
            data["x"], data["y"], trusted=data["trusted"], verbose=0
        )


@pytest.mark.parametrize(
    ("count", "classes", "said"),
    [
        (5, 5, "Only 5 trusted examples for 5 classes: none is left to measure"),
        (5, 3, "Only 5 trusted examples for 3 classes: the accuracy is measured by 1"),
        (15, 3, None),
    ],
)
def test_few_trusted_examples_and_known_ones_are_said(
    capsys: pytest.CaptureFixture, count: int, classes: int, said: str | None
) -> None:
    """A third of them measure, but none of which the class has no other."""
    x = np.arange(40.0)[:, None]
    y = np.arange(40) % classes
    _say(data_of(x, y, (x[:count] + 100 * (np.arange(count) > 1)[:, None], y[:count])))
    printed = capsys.readouterr().out
    assert (said or "") in printed and ("Only" in printed) == (said is not None)
    assert "2 trusted examples stand among the doubtful ones, too" in printed


def test_predict_before_fit_and_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="`fit` must be called"):
        tb.LabelCleaner(linear).predict(GOOD_X)


# What scikit-learn asks for and this estimator does otherwise, with the reason.
OTHERWISE = {
    "check_supervised_y_2d": "a column of labels is taken, without a warning",
    "check_methods_sample_order_invariance": "float32: equal to 3e-8, not to 1e-9",
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Estimator LabelCleaner does not inherit", EAGER)
def test_scikit_learns_checks_pass(
    eagerly: None, same_outcome_for_same_data: dict
) -> None:
    """On arrays, with networks for tables."""
    from sklearn.utils.estimator_checks import check_estimator

    cleaner = tb.LabelCleaner(epochs=2, learning_rate=0.01)
    done = check_estimator(
        cleaner, expected_failed_checks=OTHERWISE, on_skip=None, on_fail=None
    )
    found = {
        check["check_name"]: repr(check["exception"])[:300]
        for check in done
        if check["status"] == "failed"
    }
    assert found == {}
    assert sum(check["status"] == "passed" for check in done) > 45
    assert len(same_outcome_for_same_data) > 15


@pytest.mark.slow
@pytest.mark.filterwarnings(EAGER)
def test_a_second_fit_finds_the_same(eagerly: None) -> None:
    """scikit-learn's check of it, with all trainings made twice."""
    from sklearn.utils.estimator_checks import check_fit_idempotent

    cleaner = tb.LabelCleaner(epochs=2, learning_rate=0.01)
    check_fit_idempotent("LabelCleaner", cleaner)
