"""Label cleaning: the models of the noise, and what is chosen among them."""

import numpy as np
import pytest

from tfbilevel._jobs.cleaning import noise, stages
from tfbilevel._jobs.cleaning.learned_noise import (
    Belief,
    HeldOut,
    Views,
    doubted,
    learned_belief,
    opinion_of,
)
from tfbilevel._jobs.cleaning.rows import Rows
from tfbilevel._jobs.cleaning.training import Targets, target_loss
from tfbilevel._jobs.cleaning.trainings import Split

CONFUSED = np.array([[0.5, 0.4, 0.1], [0.0, 0.7, 0.3], [0.2, 0.2, 0.6]])


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
    losses = -np.log([0.8, 0.6, 0.7, 0.9])
    limit = losses.mean() + losses.std()  # two standard errors above
    assert noise.noticed(np.array([limit + 1e-9]), losses)
    assert not noise.noticed(np.array([limit - 1e-9]), losses)
    # If it is suspected, any larger loss will do.
    assert noise.noticed(np.array([losses.mean() + 1e-9]), losses, suspected=True)
    assert not noise.noticed(np.array([losses.mean() - 1e-9]), losses, suspected=True)
    # Much easier than right ones, by more than three standard errors: learned errors.
    limit = losses.mean() - 3 * losses.std() / 2
    assert noise.noticed(np.array([limit - 1e-9]), losses)
    assert not noise.noticed(np.array([limit + 1e-9]), losses)


def test_the_network_of_trusted_examples_may_suspect_noise() -> None:
    """Given labels are predicted nearly as well as right ones, but T alone is not I."""
    given, losses = np.array([0, 1, 2, 0]), -np.log([0.8, 0.6, 0.7, 0.9])
    p = np.full((4, 3), 0.15)
    p[np.arange(4), given] = 0.7  # a loss of 0.36; right ones have 0.30 +- 0.08
    none = np.zeros(0)

    def noisy(
        transition: np.ndarray, errors: int = 0, sure_losses: np.ndarray = losses
    ) -> bool:
        held = np.zeros(10, int)
        on_held = np.eye(3)[(np.arange(10) < errors).astype(int)]
        seen = stages.Given(p, none, sure_losses, [], none)
        alone = stages.Alone(none, on_held, transition, none)
        return stages.has_noise(given, held, seen, alone, CONFUSED)

    tenth, third = np.eye(3) * 0.85 + 0.05, np.eye(3) * 0.5 + 1 / 6
    assert not noisy(tenth + 1e-9 * np.eye(3))  # calls 10 percent wrong
    assert noisy(tenth - 0.01 * np.eye(3))
    # Not if the network itself errs so often: 0.11 against a third of 0.4.
    assert not noisy(tenth - 0.01 * np.eye(3), errors=4)
    assert noisy(third, errors=4)
    assert not noisy(third, errors=5)  # it knows too little to be asked
    # Without trusted examples T itself decides.
    assert noisy(np.eye(3), sure_losses=none)


class Halves:
    """Stands in for `Trainings`: two networks, told what they say of everything."""

    def __init__(self, p: np.ndarray, given: np.ndarray):
        self.told, self.given, self.classes, self.fitted = p, given, p.shape[2], []
        rows = np.arange(len(given))
        self.split = Split((rows[::2], rows[1::2]), rows, 0)
        self.x, self.sure = "doubtful", Rows(np.zeros((len(given), 2)), given)
        self.network = -1

    def run(self, name, *arguments, **options) -> None:
        self.network += 1

    def seen(self, x) -> tuple:
        return self.told[self.network], None, None


def test_without_noise_given_labels_are_predicted_as_well_as_trusted_ones() -> None:
    """Two networks err independently. Their mean probability errs less than each does,
    and given labels have one network alone: noise must not be seen in that."""
    random = np.random.default_rng(5)
    labels = random.integers(0, 3, 2000)
    logits = np.eye(3)[labels] * 2 + random.normal(size=(2, 2000, 3)) * 1.5
    p = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
    found = stages.given_labels(Halves(p, labels), False)
    each = -np.log(p[:, np.arange(2000), labels])
    np.testing.assert_allclose(found.sure_losses, each.mean(axis=0), rtol=1e-6)
    assert not noise.noticed(-noise.log_likelihoods(found.p, labels), found.sure_losses)
    together = -np.log(found.on_sure[np.arange(2000), labels])
    assert noise.noticed(-noise.log_likelihoods(found.p, labels), together)


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
    seen = stages.Given(good, good, np.zeros(300), [], np.zeros(300))
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


def test_a_doubted_label_counts_as_far_as_it_is_believed() -> None:
    opinion = np.array([[0.25, 0.7, 0.05], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    labels = np.eye(3)[[0, 0, 0]]
    found = doubted(labels, opinion).numpy()
    expected = [[1.0, 0.75, 0.75], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    np.testing.assert_allclose(found, expected)
    # Its loss: -log(q p_label + 1 - q), which is 0 for a label that is surely wrong.
    p = np.array([0.4, 0.5, 0.1])
    targets, log_p = Targets.of(found).values, np.log([p, p, p]).astype(np.float32)
    losses = -np.log([0.25 * 0.4 + 0.75, 0.4, 1.0])
    np.testing.assert_allclose(target_loss(targets, log_p), losses, atol=1e-6)


def test_the_belief_does_not_hear_labels_that_are_surely_wrong() -> None:
    random = np.random.default_rng(0)
    right = np.arange(40) % 4
    sure, n = np.eye(4)[right], len(right)
    features = (sure + 0.3 * random.normal(size=(n, 4))).astype(np.float32)
    halves = np.arange(n // 2), np.arange(n // 2, n)
    few = np.stack([features[:8], features[:8]])
    held = HeldOut(features, halves, few, few, np.stack([np.eye(4)] * 2).astype("f"))

    def losses(shift: int, doubt: bool) -> np.ndarray:
        labels = np.eye(4)[(right + shift) % 4]
        both = np.stack([sure, sure], axis=1)
        views = Views(both, np.ones((n, 4)), 0.9 * both[:8] + 0.025, doubted=doubt)
        start = Belief(trust=0.3, given=0.5, alone=0.2)
        trusted = right[:8]
        _, found = learned_belief(held, start, labels, views, trusted, trusted, 0)
        return np.array([found["learned"], found["start"]])

    one, other = losses(1, True), losses(2, True)
    np.testing.assert_allclose(one, other, rtol=1e-5)
    assert (losses(1, False)[:, 5:] > one[:, 5:] + 0.01).all()  # there they do harm


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
