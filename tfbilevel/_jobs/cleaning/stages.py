"""How `LabelCleaner` gets from the examples to labels and a network, step by step."""

import dataclasses
import time
from typing import Any, NamedTuple

import keras
import numpy as np

from tfbilevel._jobs.cleaning import noise
from tfbilevel._jobs.cleaning.learned_noise import (
    Belief,
    HeldOut,
    Views,
    doubted,
    learned_belief,
    opinion_of,
)
from tfbilevel._jobs.cleaning.training import Targets
from tfbilevel._jobs.cleaning.trainings import Split, Trainings

START = Belief(trust=0.3, given=0.5, alone=0.2)
# Labels by which the length of the trainings is chosen.
MEASURED = 2000
# Below this share the opinion of the trusted examples needs no training of its own.
HEARD = 0.2


class Outcome(NamedTuple):
    """What the trainings found.

    Attributes:
        weights: of the final network.
        suggested: class number of every doubtful example, [n].
        right: probability that its given label is right, [n].
        transition: T, [K, K].
        feature_dependent: whether the noise depends on the examples.
        scores: log-loss of given labels that were not seen, by model of the noise.
        trusted_scores: log-loss on held-out trusted labels, "start" and "learned".
        belief: what the final training believed.
        before, after: which held-out trusted examples were predicted right, [b].
        history: of each training, and its seconds.
    """

    weights: list
    suggested: np.ndarray
    right: np.ndarray
    transition: np.ndarray
    feature_dependent: bool
    scores: dict[str, float]
    trusted_scores: dict[str, float]
    belief: Belief
    before: np.ndarray
    after: np.ndarray
    history: dict[str, dict[str, list]]


class Given(NamedTuple):
    """What two networks of the given labels say, each of the half it did not see.

    Attributes:
        p: of the doubtful examples, [n, K].
        on_sure: of the trusted examples, the mean of both, [m, K].
        sure_losses: log-losses of the trusted labels, the mean of both, [m].
        layers: of each network: features of the doubtful and of the trusted examples,
            and the last layer.
        losses: log-losses of the given labels, [n].
    """

    p: np.ndarray
    on_sure: np.ndarray
    sure_losses: np.ndarray
    layers: list
    losses: np.ndarray


class Alone(NamedTuple):
    """What the network of the trusted examples alone says.

    Attributes:
        p: of the doubtful examples, [n, K].
        on_held: of the held-out trusted examples, [b, K].
        transition: the likeliest T with p.
        losses: log-losses of the given labels with p and T, [n].
    """

    p: np.ndarray
    on_held: np.ndarray
    transition: np.ndarray
    losses: np.ndarray


class Corrected(NamedTuple):
    """What networks say that were trained with a model of the noise.

    Attributes:
        first: of the doubtful examples, by the network that trained on all of them.
        weights: of this network.
        on_held: of the held-out trusted examples, by this network.
        unseen: by two networks, each of the half that it did not see.
        transition: T.
        forward: whether they were trained by forward correction with T.
    """

    first: np.ndarray
    weights: list
    on_held: np.ndarray
    unseen: np.ndarray
    transition: np.ndarray
    forward: bool


def run(trainings: Trainings, learn: bool, callbacks: Any, choose: bool) -> Outcome:
    """All steps.

    Args:
        trainings: of the network.
        learn: whether the belief is learned; False: the control.
        callbacks: for the final training.
        choose: whether all trainings become shorter if given labels that a network did
            not see ask for it.
    """
    given, classes, sure = trainings.given, trainings.classes, trainings.sure.labels
    seen = given_labels(trainings, choose)
    transition, alone = first_transition(trainings, seen)
    found = corrected(trainings, seen, transition, alone)
    transition = found.transition

    # Which model explains given labels that it did not see?
    by_class = noise.unseen_log_losses(found.unseen, transition, given).mean()
    scores = {
        "class-dependent": float(by_class),
        "feature-dependent": float(seen.losses.mean()),
    }
    if explains_best(alone, seen):
        scores["class-dependent"] = float(min(by_class, alone.losses.mean()))
    # Without noise both are the same, and T says which labels are wrong.
    noisy = has_noise(given, trainings.held, seen, alone, transition)
    by_features = scores["feature-dependent"] < scores["class-dependent"]
    feature_dependent = bool(noisy and by_features)

    of_class = transition[:, given].T
    factors = np.ones_like(of_class) if feature_dependent else of_class
    forward = found.forward and not feature_dependent
    likelihoods = of_class if forward else np.eye(classes)[given]
    belief, trusted_scores = START, {}
    if not len(sure):
        belief = dataclasses.replace(START, alone=0.0)
    elif learn and len(trainings.held):
        views = Views(
            np.stack([found.first, alone.p], axis=1),
            factors,
            np.stack([found.on_held, alone.on_held], axis=1),
            doubted=feature_dependent,
        )
        belief, trusted_scores = believed(trainings, seen, likelihoods, views)

    p_alone = alone.p
    if len(trainings.held) and belief.alone > HEARD:
        whole = Targets.labels(given, classes)
        trainings.run("all trusted", 1, whole, 1.0, sure, 1.0)
        p_alone = trainings.p()
    views = np.stack([found.unseen, p_alone], axis=1)
    opinion = opinion_of(views, factors, belief.alone).numpy()
    if feature_dependent:
        likelihoods = doubted(likelihoods, opinion).numpy()
    targets = Targets.of(likelihoods, opinion, 1 - belief.given)
    trust = belief.trust if len(sure) else 0.0
    trainings.run(
        "final", found.weights, targets, trust, sure, 1.0, callbacks=callbacks
    )

    last = noise.as_sure(trainings.p(), found.unseen)
    if feature_dependent:
        shares = (last + opinion) / 2
        transition = _counted(shares, given, transition)
    elif noisy:
        heard = noise.seen_posterior(last, found.unseen, transition, given)
        shares = opinion if heard is None else heard
    else:
        shares = noise.posterior(last, transition, given)
    on_held = seen.on_sure[trainings.split.fitted :]
    return Outcome(
        weights=trainings.weights(),
        suggested=shares.argmax(axis=1),
        right=shares[np.arange(len(given)), given],
        transition=transition,
        feature_dependent=feature_dependent,
        scores=scores,
        trusted_scores=trusted_scores,
        belief=belief,
        before=on_held.argmax(axis=1) == trainings.held,
        after=found.on_held.argmax(axis=1) == trainings.held,
        history=trainings.history,
    )


def given_labels(trainings: Trainings, choose: bool) -> Given:
    """Two networks learn the given labels as they are, each on one half."""
    given, classes, halves = trainings.given, trainings.classes, trainings.split.halves
    plain, fitted = Targets.labels(given, classes), trainings.fitted
    if choose:
        losses: list[np.ndarray] = []

        def measure(epoch: int, logs: Any = None) -> None:
            del epoch, logs
            rows = halves[1][:MEASURED]
            p = trainings.p(trainings.x[rows])
            losses.append(-noise.log_likelihoods(p, given[rows]))

        trainings.run(
            "length",
            0,
            plain,
            0.0,
            fitted,
            measured=lambda: {
                "unseen_loss": [float(each.mean()) for each in losses],
                "share": [shortened(np.stack(losses))],
            },
            rows=halves[0],
            callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=measure)],
        )
        trainings.length = trainings.history["length"]["share"][0]
    p, layers = np.zeros((len(given), classes)), []
    sure = trainings.sure.labels
    on_sure, sure_losses = np.zeros((len(sure), classes)), np.zeros(len(sure))
    for number, half in enumerate(halves):
        if number or not choose or trainings.length < 1:
            trainings.run(f"given {number + 1}", 0, plain, 0.0, fitted, rows=half)
        other = halves[1 - number]
        now, features, weights = trainings.seen(trainings.x)
        p[other] = now[other]
        if len(sure):
            of_sure, sure_features, _ = trainings.seen(trainings.sure.x)
            on_sure += of_sure / 2
            sure_losses -= noise.log_likelihoods(of_sure, sure) / 2
            layers.append((features, sure_features, weights))
    losses_of_p = noise.unseen_log_losses(p, np.eye(classes), given)
    return Given(p, on_sure, sure_losses, layers, losses_of_p)


def shortened(losses: np.ndarray) -> float:
    """The share of a training after which unseen labels were predicted best.

    1 if the end is not worse by two standard errors: few labels say little. And 1 in
    the last quarter: there the learning rate is small, and little changes.

    Args:
        losses: log-losses of unseen labels after each epoch, [epochs, rows].
    """
    best = int(np.argmin(losses.mean(axis=1)))
    share = (best + 1) / len(losses)
    worse = losses[-1] - losses[best]
    clearly = worse.mean() > 2 * worse.std() / np.sqrt(len(worse))
    return share if clearly and share < 0.75 else 1.0


def first_transition(trainings: Trainings, seen: Given) -> tuple[np.ndarray, Alone]:
    """T at the start, and what the trusted examples alone say."""
    given, classes, fitted = trainings.given, trainings.classes, trainings.fitted
    if not len(trainings.sure.labels):
        start = noise.confident_transition(seen.p, given)
        transition = likeliest(trainings, seen.p, start)
        never = np.full(len(given), np.inf)
        return transition, Alone(seen.p, seen.on_sure, transition, never)
    gold = noise.gold_transition(seen.on_sure[: len(fitted)], fitted, classes)
    trainings.run("trusted", 1, Targets.labels(given, classes), 1.0, fitted)
    p, on_held = trainings.p(), trainings.on_held()
    calibrated = noise.sharpened(p, noise.sharpness(on_held, trainings.held))
    transition = noise.likeliest_transition(calibrated, given, gold)
    losses = noise.unseen_log_losses(calibrated, transition, given)
    alone = Alone(p, on_held, transition, losses)
    return transition if explains_best(alone, seen) else gold, alone


def likeliest(trainings: Trainings, p: np.ndarray, former: np.ndarray) -> np.ndarray:
    """The likeliest T with p; without trusted examples only if labels are mostly right.

    Given labels do not say which class has which name. If nobody else does, that most
    labels of a class are right must be assumed.
    """
    found = noise.likeliest_transition(p, trainings.given, former)
    named = len(trainings.sure.labels) or noise.mostly_right(found)
    return found if named else former


def explains_best(alone: Alone, seen: Given) -> bool:
    """Whether the trusted examples alone explain the given labels better than networks
    of the given labels do. (Neither has seen the labels that it is to explain.)"""
    return bool(alone.losses.mean() < seen.losses.mean())


def has_noise(
    given: np.ndarray,
    held: np.ndarray,
    seen: Given,
    alone: Alone,
    transition: np.ndarray,
) -> bool:
    """Whether some given labels are wrong, as far as can be seen."""
    if not len(seen.sure_losses):
        return noise.share(transition, given) > noise.LITTLE
    of_given = -noise.log_likelihoods(seen.p, given)
    suspected = noise.suspected(alone.transition, given, alone.on_held, held)
    return noise.noticed(of_given, seen.sure_losses, suspected)


def corrected(
    trainings: Trainings, seen: Given, transition: np.ndarray, alone: Alone
) -> Corrected:
    """Networks that explain the given labels by T, and a better T from these.

    The likeliest T needs good probabilities, which need a T. Where the given labels
    mislead nobody, they are learned faster as they are; then they make the
    probabilities too flat, and held-out labels say by how much. They also say whether
    the correction made things worse: networks that are bad themselves give a T that is
    worse than none.
    """
    given, classes = trainings.given, trainings.classes
    trust = START.trust if len(trainings.sure.labels) else 0.0
    known = explains_best(alone, seen)

    def targets(forward: bool) -> Targets:
        return Targets.of(transition[:, given].T if forward else np.eye(classes)[given])

    plainly = noise.harmless(transition)
    trainings.run("start", 2, targets(not plainly), trust, trainings.fitted)
    on_held = trainings.on_held()
    before = seen.on_sure[trainings.split.fitted :]
    if not plainly and noise.clearly_better(before, on_held, trainings.held):
        plainly, known = True, False
        trainings.run("as given", 2, targets(False), trust, trainings.fitted)
        on_held = trainings.on_held()
    sharpness = noise.sharpness(on_held, trainings.held) if plainly else 1.0
    first = noise.sharpened(trainings.p(), sharpness)
    weights = trainings.weights()
    if not known:
        transition = likeliest(trainings, first, transition)
    # T is known better now, so this is asked again.
    forward = not plainly and not noise.harmless(transition)
    second = targets(forward)
    unseen = np.zeros((len(given), classes))
    for number, half in enumerate(trainings.split.halves):
        name = f"corrected {number + 1}"
        trainings.run(name, 2, second, trust, trainings.sure.labels, rows=half)
        other, now = trainings.split.halves[1 - number], trainings.p()
        if plainly:
            now = noise.sharpened(now, sharpness)
        elif not forward:
            now = noise.as_sure(now, first)
        unseen[other] = now[other]
    if not known:
        transition = likeliest(trainings, unseen, transition)
    on_held = noise.sharpened(on_held, sharpness)
    return Corrected(first, weights, on_held, unseen, transition, forward)


def believed(
    trainings: Trainings, seen: Given, likelihoods: np.ndarray, views: Views
) -> tuple[Belief, dict[str, float]]:
    """The learned belief, and its log-loss on held-out labels beside the control's."""
    began = time.monotonic()
    belief, losses = learned_belief(
        _held_out(trainings.split, seen.layers),
        START,
        likelihoods,
        views,
        trainings.fitted,
        trainings.held,
        trainings.seed,
    )
    trainings.history["belief"] = losses | {"seconds": [time.monotonic() - began]}
    return belief, {name: float(np.mean(each[-5:])) for name, each in losses.items()}


def _held_out(split: Split, layers: list) -> HeldOut:
    """Every doubtful example as the network sees it that did not train on it."""
    features = np.zeros_like(layers[0][0])
    for number, half in enumerate(split.halves):
        features[half] = layers[1 - number][0][half]
    of_sure = np.stack([layer[1] for layer in layers])
    return HeldOut(
        features,
        # Head 0 belongs to the network of the first half, which did not see the second.
        (split.halves[1], split.halves[0]),
        of_sure[:, : split.fitted],
        of_sure[:, split.fitted :],
        np.stack([layer[2] for layer in layers]),
    )


def _counted(p: np.ndarray, given: np.ndarray, former: np.ndarray) -> np.ndarray:
    """T[k, j]: how often examples that look like class k are called j."""
    sums = np.full_like(former, 1e-8)
    np.add.at(sums.T, given, p)
    return sums / sums.sum(axis=1, keepdims=True)
