"""Label cleaning: models of the noise, trainings, and the estimator."""

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbilevel as tb
from tfbilevel._jobs.cleaning import noise, stages
from tfbilevel._jobs.cleaning.label_cleaner import _say
from tfbilevel._jobs.cleaning.learned_noise import opinion_of
from tfbilevel._jobs.cleaning.rows import Rows, data_of
from tfbilevel._jobs.cleaning.training import Targets, Training, target_loss
from tfbilevel._jobs.cleaning.trainings import Split
from tfbilevel._jobs.last_layer import LastLayer, log_probabilities_of

CONFUSED = np.array([[0.5, 0.4, 0.1], [0.0, 0.7, 0.3], [0.2, 0.2, 0.6]])


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


def test_gold_transition_is_the_mean_of_the_predictions_by_class() -> None:
    predicted = np.array([[0.8, 0.2, 0.0], [0.6, 0.4, 0.0], [0.1, 0.1, 0.8]])
    found = noise.gold_transition(predicted, np.array([0, 0, 2]), 3)
    # The sums, plus 0.1 pseudo-examples spread over the classes.
    third = 0.1 / 3
    first = np.array([1.4 + third, 0.6 + third, third]) / 2.1
    np.testing.assert_allclose(found[0], first, rtol=1e-12)
    assert found[1].argmax() == 1  # a class without a trusted example keeps its label
    np.testing.assert_allclose(found.sum(axis=1), 1)


def test_em_finds_the_transition_where_classes_are_known() -> None:
    """With p one-hot the likeliest T is the table of counts."""
    random = np.random.default_rng(0)
    right = random.integers(0, 3, 500)
    given = np.array([random.choice(3, p=CONFUSED[k]) for k in right])
    counts = np.zeros((3, 3))
    np.add.at(counts, (right, given), 1)
    expected = counts / counts.sum(axis=1, keepdims=True)
    start = np.full((3, 3), 1 / 3)
    found = noise.likeliest_transition(np.eye(3)[right], given, start)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_em_reaches_a_stationary_point_of_the_likelihood() -> None:
    """At the maximum over the simplex each row's gradient is equal where T > 0."""
    random = np.random.default_rng(1)
    p = random.dirichlet([0.3, 0.3, 0.3], 2000)
    right = np.array([random.choice(3, p=row) for row in p])
    given = np.array([random.choice(3, p=CONFUSED[k]) for k in right])
    found = noise.likeliest_transition(p, given, np.full((3, 3), 1 / 3), 5000)
    explained = np.take_along_axis(p @ found, given[:, None], axis=1)
    gradient = np.zeros((3, 3))
    for label in range(3):
        gradient[:, label] = (p / explained)[given == label].sum(axis=0)
    inside = found > 1e-3
    for row, used in zip(gradient, inside, strict=True):
        np.testing.assert_allclose(row[used], row[used].mean(), rtol=0.02)
    np.testing.assert_allclose(found, CONFUSED, atol=0.06)


def test_posterior_is_bayes_rule() -> None:
    p = np.array([[0.5, 0.3, 0.2]])
    found = noise.posterior(p, CONFUSED, np.array([1]))
    joint = np.array([0.5 * 0.4, 0.3 * 0.7, 0.2 * 0.2])
    np.testing.assert_allclose(found[0], joint / joint.sum())


def test_noise_is_harmless_if_a_label_is_likeliest_where_it_is_right() -> None:
    symmetric = np.full((10, 10), 0.08 / 0.9 * 0.5)
    np.fill_diagonal(symmetric, 0.6)
    assert noise.harmless(symmetric)
    to_next = 0.45 * np.eye(10) + 0.55 * np.roll(np.eye(10), 1, axis=1)
    assert not noise.harmless(to_next)
    # The given label is likeliest where it is right, but one other class stands out.
    assert not noise.harmless(0.6 * np.eye(10) + 0.4 * np.roll(np.eye(10), 1, axis=1))
    assert not noise.harmless(np.array([[0.4, 0.6], [0.6, 0.4]]))
    assert noise.harmless(np.array([[0.7, 0.3], [0.3, 0.7]]))
    assert noise.share(symmetric, np.arange(10)) == pytest.approx(0.4)


def test_sharpness_is_the_one_that_held_out_labels_ask_for() -> None:
    random = np.random.default_rng(3)
    p = random.dirichlet([2.0, 2.0, 2.0], 3000)
    right = np.array([random.choice(3, p=row) for row in p])
    flat = p**0.5 / (p**0.5).sum(axis=1, keepdims=True)  # too unsure by s = 2
    np.testing.assert_allclose(noise.sharpened(flat, 2.0), p, rtol=1e-6)
    assert abs(noise.sharpness(flat, right) - 2) < 0.15
    assert abs(noise.sharpness(p, right) - 1) < 0.1
    assert noise.sharpness(p[:0], right[:0]) == 1
    # Two examples say little: the answer stays near 1.
    assert 0.6 < noise.sharpness(flat[:2], p[:2].argmin(axis=1)) <= 1


def test_models_of_the_noise_are_compared_at_their_best_sharpness() -> None:
    """-log (p T)[given] does not change if p was made flatter or surer before."""
    random = np.random.default_rng(5)
    p = random.dirichlet([1.0, 1.0, 1.0], 4000)
    given = np.array([random.choice(3, p=row) for row in p @ CONFUSED])
    expected = -np.log((p @ CONFUSED)[np.arange(4000), given]).mean()
    for power in (0.5, 1.0, 2.0):
        changed = noise.sharpened(p, power)
        found = noise.unseen_log_losses(changed, CONFUSED, given).mean()
        assert abs(found - expected) < 2e-3, power


def test_as_sure_undoes_a_sharpness() -> None:
    p = np.random.default_rng(4).dirichlet([4.0, 4.0, 4.0], 200)
    for power in (0.4, 2.0):
        changed = p**power / (p**power).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(noise.as_sure(changed, p), p, atol=1e-5)


def test_noise_is_noticed_if_given_labels_are_predicted_otherwise() -> None:
    on_sure = np.array([[0.8, 0.2], [0.4, 0.6], [0.3, 0.7], [0.9, 0.1]])
    right = np.array([0, 1, 1, 0])
    losses = -np.log([0.8, 0.6, 0.7, 0.9])
    limit = losses.mean() + losses.std() / 2  # one standard error above
    assert noise.noticed(np.array([limit + 1e-9]), on_sure, right)
    assert not noise.noticed(np.array([limit - 1e-9]), on_sure, right)
    # Much easier than right ones, by more than three standard errors: learned errors.
    limit = losses.mean() - 3 * losses.std() / 2
    assert noise.noticed(np.array([limit - 1e-9]), on_sure, right)
    assert not noise.noticed(np.array([limit + 1e-9]), on_sure, right)


def test_one_network_is_clearly_better_by_two_standard_errors() -> None:
    """Right with probability p or 1 - p in two classes, where sharpness cannot help."""
    right = np.zeros(100, int)

    def of(shares: np.ndarray) -> np.ndarray:
        return np.stack([shares, 1 - shares], axis=1)

    random = np.random.default_rng(7)
    one, other = random.uniform(0.3, 0.9, (2, 100))
    same = np.eye(2)
    gained = noise.unseen_log_losses(of(other), same, right)
    gained = gained - noise.unseen_log_losses(of(one), same, right)
    errors = gained.mean() / (gained.std(ddof=1) / 10)
    assert 0.2 < abs(errors) < 2  # so little says nothing
    assert not noise.clearly_better(of(one), of(other), right)
    assert not noise.clearly_better(of(other), of(one), right)
    better = of(np.where(random.random(100) < 0.9, 0.8, 0.2))
    worse = of(np.where(random.random(100) < 0.6, 0.8, 0.2))
    assert noise.clearly_better(better, worse, right)
    assert not noise.clearly_better(worse, better, right)
    # How sure they are is not compared.
    assert not noise.clearly_better(better, noise.sharpened(better, 0.3), right)
    assert not noise.clearly_better(better[:1], worse[:1], right[:1])


class Told:
    """Stands in for `Trainings`: every training gives the p that it is told."""

    def __init__(self, p: dict[str, np.ndarray], given: np.ndarray, fitted: int):
        self.told, self.given, self.classes = p, given, 3
        half = len(given) // 2
        rows = np.arange(len(given))
        self.split = Split((rows[:half], rows[half:]), rows, fitted)
        self.sure = Rows(np.zeros((len(given), 2)), given)
        self.fitted, self.held = given[:fitted], given[fitted:]
        self.ran: dict[str, np.ndarray] = {}

    def run(self, name, start, targets, trust, known, rows=None) -> None:
        self.ran[name] = targets.values[:, 0]

    def p(self) -> np.ndarray:
        return self.told[list(self.ran)[-1].split()[0]]

    def on_held(self) -> np.ndarray:
        return self.p()[self.split.fitted :]

    def weights(self) -> list:
        return []


@pytest.mark.parametrize("misled", [False, True])
def test_a_correction_that_made_it_worse_is_left_out(misled: bool) -> None:
    """Held-out labels decide: T said that classes are confused, and they are not."""
    random = np.random.default_rng(8)
    right = random.integers(0, 3, 300)
    good = noise.sharpened(0.6 * np.eye(3)[right] + 0.4 / 3, 1.5)
    bad = noise.sharpened(0.6 * np.eye(3)[(right + 1) % 3] + 0.4 / 3, 1.5)
    told = {"start": bad if misled else good, "as": good, "corrected": good}
    trainings = Told(told, right, 200)
    plain = np.eye(3)[right]
    never = np.full(300, np.inf)
    seen = stages.Given(good, good, [], np.zeros(300))
    alone = stages.Alone(bad, bad[200:], CONFUSED, never)
    wrong = 0.4 * np.eye(3) + 0.6 * np.roll(np.eye(3), 1, axis=1)
    found = stages.corrected(trainings, seen, wrong, alone)
    np.testing.assert_allclose(trainings.ran["start"], wrong[:, right].T, rtol=1e-6)
    assert ("as given" in trainings.ran) == misled
    if misled:
        np.testing.assert_array_equal(trainings.ran["as given"], plain)
        np.testing.assert_array_equal(trainings.ran["corrected 2"], plain)
        assert not found.forward
    # No label is wrong, and EM sees it.
    np.testing.assert_allclose(found.transition, np.eye(3), atol=0.05)


def test_without_trusted_labels_most_given_ones_must_be_right() -> None:
    assert noise.mostly_right(CONFUSED)
    assert not noise.mostly_right(CONFUSED[[1, 0, 2]])
    # Class 1 is called 0 as often as class 0 is, and more.
    assert not noise.mostly_right(np.array([[0.6, 0.4], [0.7, 0.3]]))
    random = np.random.default_rng(9)
    right = random.integers(0, 3, 600)
    given = np.array([random.choice(3, p=CONFUSED[k]) for k in right])
    trainings = Told({}, given, 0)
    p = 0.8 * np.eye(3)[right] + 0.2 / 3
    former = 0.7 * np.eye(3) + 0.1
    known = stages.likeliest(trainings, p, former)
    np.testing.assert_allclose(known, CONFUSED, atol=0.1)
    # Networks that exchange two classes explain the labels as well.
    exchanged = stages.likeliest(trainings, p[:, [1, 0, 2]], former)
    np.testing.assert_allclose(exchanged, CONFUSED[[1, 0, 2]], atol=0.1)
    trainings.sure = Rows(trainings.sure.x[:0], given[:0])
    found = stages.likeliest(trainings, p[:, [1, 0, 2]], former)
    np.testing.assert_array_equal(found, former)
    np.testing.assert_allclose(stages.likeliest(trainings, p, former), known)


def test_trainings_get_shorter_only_where_unseen_labels_ask_for_it() -> None:
    def losses(*means: float) -> np.ndarray:
        """Of four labels each, which grow by 0.8, 1.2, 0.8 and 1.2 times the mean."""
        return np.array(means)[:, None] * [0.8, 1.2, 0.8, 1.2]

    assert stages.shortened(losses(3.0, 2.0, 2.5, 4.0)) == 0.5
    assert stages.shortened(losses(3.0, 2.5, 2.0, 2.1)) == 1.0  # the end is near
    assert stages.shortened(losses(1.0)) == 1.0
    # The end is worse by 0.5 on average, with a standard error of 0.3: not clearly.
    unclear = np.array([[3.0] * 4, [2.0] * 4, [2.5] * 4, [1.9, 3.1, 1.9, 3.1]])
    assert stages.shortened(unclear) == 1.0
    assert stages.shortened(unclear + [[0], [0], [0], [0.2]]) == 0.5  # 0.7 is


def test_opinion_mixes_two_views_and_weighs_them_by_the_given_label() -> None:
    views = np.array([[[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]]])
    mixed = 0.75 * views[0, 0] + 0.25 * views[0, 1]
    factors = CONFUSED[:, 1]
    expected = mixed * factors / (mixed @ factors)
    found = opinion_of(views, factors[None], 0.25)
    np.testing.assert_allclose(found, expected[None], rtol=1e-12)


def test_a_given_label_is_not_counted_twice() -> None:
    random = np.random.default_rng(6)
    classes = random.integers(0, 3, 3000)
    given = np.array([random.choice(3, p=CONFUSED[k]) for k in classes])
    unseen = 0.5 * random.dirichlet([1.0, 1.0, 1.0], 3000) + 0.5 * np.eye(3)[classes]
    evidence = CONFUSED[:, given].T
    bayes = unseen * evidence / (unseen * evidence).sum(axis=1, keepdims=True)

    def of(predicted: np.ndarray) -> np.ndarray | None:
        return noise.seen_posterior(
            noise.as_sure(predicted, unseen), unseen, CONFUSED, given
        )

    # A network that has heard nothing of the given label needs it whole. How sure it is
    # does not matter.
    for sharpness in (0.5, 1.0, 2.0):
        found = of(noise.sharpened(unseen, sharpness))
        assert found is not None
        np.testing.assert_allclose(found, bayes, atol=0.02)
    # One that has heard all of it, or half of it, needs the remaining part. (0.01 of
    # the wrong labels may be called right too many.)
    for heard in (1.0, 0.5):
        predicted = noise.sharpened(unseen * evidence**heard, 0.7)
        found = of(predicted / predicted.sum(axis=1, keepdims=True))
        assert found is not None
        np.testing.assert_allclose(found, bayes, atol=0.05)
        assert np.abs(noise.posterior(predicted, CONFUSED, given) - bayes).max() > 0.15
    # One that says the given label whatever the example is has learned it by heart.
    assert of(0.9 * np.eye(3)[given] + 0.1 / 3) is None


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
    targets = Targets.of(CONFUSED[:, [1]].T, np.array([[0.0, 1.0, 0.0]]), 0.25)
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
def test_noise_that_depends_on_the_example_is_seen() -> None:
    """Of each cluster the upper half is called by the next class: T is of no use."""
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
