"""The trainings of `LabelCleaner`, in their order."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np

from tfbilevel._jobs.cleaning import noise
from tfbilevel._jobs.cleaning.kept_trainings import KeptTrainings
from tfbilevel._jobs.cleaning.learned_noise import (
    Belief,
    HeldOut,
    Views,
    learned_belief,
    opinion_of,
)
from tfbilevel._jobs.cleaning.rows import Data, Rows
from tfbilevel._jobs.cleaning.training import Targets, Training

START = Belief(trust=0.3, given=0.5, alone=0.2)
LITTLE = 0.1  # a share of wrong labels of which T is believed
# Of the trusted examples this share trains in the first stages. The others measure.
FITTED = 2 / 3
# Labels by which the length of the trainings is chosen.
MEASURED = 2000
# Below this share the opinion of the trusted examples needs no training of its own.
HEARD = 0.2


TITLES = {
    "length": "0/7 how long to train",
    "given 1": "1/7 what labels are given, first half",
    "given 2": "2/7 what labels are given, second half",
    "trusted": "3/7 the trusted examples alone",
    "start": "4/7 corrected for the first estimate of the noise",
    "corrected 1": "5/7 corrected for the likeliest noise, first half",
    "corrected 2": "6/7 corrected for the likeliest noise, second half",
    "all trusted": "6/7 all trusted examples alone",
    "final": "7/7 the final network",
}


class Split(NamedTuple):
    """Who trains what.

    Attributes:
        halves: the doubtful rows in two halves; a network for each sees one of them.
        order: the trusted rows, those that train first.
        fitted: their number; the remaining ones are held out.
    """

    halves: tuple[np.ndarray, np.ndarray]
    order: np.ndarray
    fitted: int


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


def split_of(data: Data, seed: int) -> Split:
    """Random halves, and the trusted rows with those that train first.

    Every class has a trusted example that trains.
    """
    random = np.random.default_rng(seed)
    rows = random.permutation(len(data.doubtful.labels))
    half = len(rows) // 2
    if data.trusted is None:
        return Split((rows[:half], rows[half:]), np.arange(0), 0)
    labels = data.trusted.labels
    order = random.permutation(len(labels))
    _, firsts = np.unique(labels[order], return_index=True)
    rest = np.setdiff1d(np.arange(len(order)), firsts)
    order = order[np.concatenate([np.sort(firsts), rest])]
    fitted = max(len(firsts), math.ceil(FITTED * len(order)))
    return Split((rows[:half], rows[half:]), order, min(fitted, len(order)))


def shortened(losses: list[float]) -> float:
    """The share of a training after which unseen labels were predicted best.

    1 if it is the last quarter: there the learning rate is small, and little changes.

    Args:
        losses: log-loss of unseen labels after each epoch.
    """
    share = (int(np.argmin(losses)) + 1) / len(losses)
    return share if share < 0.75 else 1.0


def run(
    data: Data,
    training: Callable[[Rows], Training],
    initial: Callable[[int], list],
    steps: int,
    epochs: int,
    seed: int,
    learn: bool,
    callbacks: Any,
    report: Callable[[str], Any],
    kept: KeptTrainings,
    choose: bool,
) -> Outcome:
    """All trainings.

    Args:
        data: the examples.
        training: trusted examples in their order -> the `Training` of the network.
        initial: number of a network -> its random weights.
        steps: of one training on all doubtful examples.
        epochs: of the same.
        seed: of the split and the batches.
        learn: whether the belief is learned; False: the control.
        callbacks: for the final training.
        report: name of a stage -> verbosity of its `fit`.
        kept: the trainings that an earlier process ended.
        choose: whether all trainings become shorter if given labels that a network did
            not see ask for it; `steps` is the most then.
    """
    doubtful, classes = data.doubtful, len(data.classes)
    given, n = doubtful.labels, len(doubtful.labels)
    split = split_of(data, seed)
    sure = Rows(doubtful.x[:0], given[:0])
    if data.trusted is not None:
        sure = Rows(data.trusted.x[split.order], data.trusted.labels[split.order])
    fitted, held = sure.labels[: split.fitted], sure.labels[split.fitted :]
    trainer = training(sure)
    p = trainer.probabilities_of
    history: dict[str, dict[str, list]] = {}
    trust = START.trust if len(sure.labels) else 0.0

    def train(
        stage: str,
        start: int | list,
        targets: Targets,
        trust: float,
        known: np.ndarray,
        part: float = 0.5,
        **rest: Any,
    ) -> None:
        before = kept.find(stage)
        if before is not None:
            weights, history[stage] = before
            trainer.network.set_weights(weights)
            return
        began = time.monotonic()
        found = trainer.run(
            initial(start) if isinstance(start, int) else start,
            targets,
            Targets.labels(known, classes),
            trust,
            max(1, round(part * length * steps)),
            max(1, round(part * length * epochs)),
            verbose=report(stage),
            **rest,
        )
        history[stage] = found | {"seconds": [time.monotonic() - began]}
        if stage == "length":
            history[stage]["unseen_loss"] = unseen_losses
        if stage != "final":
            kept.keep(stage, trainer.network.get_weights(), history[stage])

    # What the given labels look like: two networks, each on one half.
    plain = Targets.labels(given, classes)
    length, unseen_losses = 1.0, []
    if choose:

        def measure(epoch: int, logs: Any = None) -> None:
            del epoch, logs
            rows = split.halves[1][:MEASURED]
            losses = -noise.log_likelihoods(p(doubtful.x[rows]), given[rows])
            unseen_losses.append(float(losses.mean()))

        watch = keras.callbacks.LambdaCallback(on_epoch_end=measure)
        first_half = split.halves[0]
        train("length", 0, plain, 0.0, fitted, rows=first_half, callbacks=[watch])
        length = shortened(history["length"]["unseen_loss"])
    as_given, layers = np.zeros((n, classes)), []
    on_sure = np.zeros((len(sure.labels), classes))
    for number, half in enumerate(split.halves):
        if number or not choose or length < 1:
            train(f"given {number + 1}", 0, plain, 0.0, fitted, rows=half)
        other = split.halves[1 - number]
        now, features, weights = trainer.seen(doubtful.x)
        as_given[other] = now[other]
        if len(sure.labels):
            of_sure, sure_features, _ = trainer.seen(sure.x)
            on_sure += of_sure / 2
            layers.append((features, sure_features, weights))
    if len(sure.labels):
        transition = noise.gold_transition(on_sure[: split.fitted], fitted, classes)
        # What the trusted examples alone say.
        train("trusted", 1, plain, 1.0, fitted)
        alone = p(doubtful.x)
        alone_on_held = p(sure.x[split.fitted :]) if len(held) else on_sure[:0]
        surer = noise.sharpness(alone_on_held, held)
        of_alone = noise.sharpened(alone, surer)
        by_alone = noise.likeliest_transition(of_alone, given, transition)
        alone_losses = noise.unseen_log_losses(of_alone, by_alone, given)
    else:
        transition = noise.confident_transition(as_given, given)
        transition = noise.likeliest_transition(as_given, given, transition)
        alone, by_alone, alone_losses = as_given, transition, as_given[:, 0] + np.inf

    # The trusted examples alone may explain the given labels best. No network that says
    # this has seen them.
    by_features = noise.unseen_log_losses(as_given, np.eye(classes), given)
    sure_enough = alone_losses.mean() < by_features.mean()
    if sure_enough:
        transition = by_alone

    # The likeliest transition needs good probabilities, which need a transition. Where
    # the given labels mislead nobody, they are learned faster as they are; then they
    # make the probabilities too flat, and held-out labels say by how much.
    plainly = noise.harmless(transition)
    likelihoods = np.eye(classes)[given] if plainly else transition[:, given].T
    train("start", 2, Targets.of(likelihoods), trust, fitted)
    on_held = p(sure.x[split.fitted :]) if len(held) else on_sure[:0]
    sharpness = noise.sharpness(on_held, held) if plainly else 1.0
    on_held = noise.sharpened(on_held, sharpness)
    first = noise.sharpened(p(doubtful.x), sharpness)
    if not sure_enough:
        transition = noise.likeliest_transition(first, given, transition)
    # T is known better now, so this is asked again.
    corrected = not plainly and not noise.harmless(transition)
    likelihoods = transition[:, given].T if corrected else np.eye(classes)[given]
    second = Targets.of(likelihoods)
    whole = trainer.network.get_weights()
    unseen = np.zeros((n, classes))
    for number, half in enumerate(split.halves):
        train(f"corrected {number + 1}", 2, second, trust, sure.labels, rows=half)
        other = split.halves[1 - number]
        now = p(doubtful.x)
        if plainly:
            now = noise.sharpened(now, sharpness)
        elif not corrected:
            now = noise.as_sure(now, first)
        unseen[other] = now[other]
    if not sure_enough:
        transition = noise.likeliest_transition(unseen, given, transition)

    # Which model explains given labels that it did not see?
    by_class = noise.unseen_log_losses(unseen, transition, given)
    if sure_enough and alone_losses.mean() < by_class.mean():
        by_class = alone_losses
    scores = {
        "class-dependent": float(by_class.mean()),
        "feature-dependent": float(by_features.mean()),
    }
    # Without noise both are the same, and T says which labels are wrong.
    if len(sure.labels):
        noisy = noise.noticed(by_features, on_sure, sure.labels)
    else:
        noisy = noise.share(transition, given) > LITTLE
    feature_dependent = noisy and (
        scores["feature-dependent"] < scores["class-dependent"]
    )
    factors = np.ones((n, classes)) if feature_dependent else transition[:, given].T
    if feature_dependent:
        likelihoods = np.eye(classes)[given]
    elif corrected:
        likelihoods = factors
    belief, trusted_scores = START, {}
    if not len(sure.labels):
        belief = dataclasses.replace(START, alone=0.0)
    if learn and len(held) and len(fitted):
        began = time.monotonic()
        belief, losses = learned_belief(
            _held_out(split, layers),
            START,
            likelihoods,
            Views(
                np.stack([first, alone], axis=1),
                factors,
                np.stack([on_held, alone_on_held], axis=1),
            ),
            fitted,
            held,
            seed,
        )
        trusted_scores = {
            name: float(np.mean(each[-5:])) for name, each in losses.items()
        }
        history["belief"] = losses | {"seconds": [time.monotonic() - began]}
    if len(held) and belief.alone > HEARD:
        train("all trusted", 1, plain, 1.0, sure.labels)
        alone = p(doubtful.x)

    views = np.stack([unseen, alone], axis=1)
    opinion = opinion_of(views, factors, belief.alone).numpy()
    targets = Targets.of(likelihoods, opinion, 1 - belief.given)
    final = belief.trust if len(sure.labels) else 0.0
    train("final", whole, targets, final, sure.labels, 1.0, callbacks=callbacks)
    end = p(doubtful.x)
    last = noise.as_sure(end, unseen)
    if feature_dependent:
        shares = (last + opinion) / 2
        transition = _counted(shares, given, transition)
    elif noise.by_heart(end, unseen, transition, given):
        shares = opinion
    else:
        shares = noise.posterior(last, transition, given)
    return Outcome(
        weights=trainer.network.get_weights(),
        suggested=shares.argmax(axis=1),
        right=shares[np.arange(n), given],
        transition=transition,
        feature_dependent=feature_dependent,
        scores=scores,
        trusted_scores=trusted_scores,
        belief=belief,
        before=on_sure[split.fitted :].argmax(axis=1) == held,
        after=on_held.argmax(axis=1) == held,
        history=history,
    )


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
