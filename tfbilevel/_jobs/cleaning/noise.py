"""Models of label noise: how a given label depends on the true class."""

from collections.abc import Callable

import numpy as np

# The fewest pseudo-examples that keep every logarithm finite.
PSEUDO_COUNT = 0.1
SMALLEST = 1e-8
LITTLE = 0.1  # a share of wrong labels of which T is believed
SHARPNESSES = np.exp(np.linspace(-1.5, 2.0, 71))  # from 0.22 to 7.4
# Shares of the wrong labels, up to which too many may be called right.
NEARLY, BY_HEART = 0.01, 0.1


def gold_transition(
    predicted: np.ndarray, trusted: np.ndarray, classes: int
) -> np.ndarray:
    """T[k, j] = mean over trusted examples i of class k of P(given label = j | x_i).

    The start of Gold Loss Correction (Hendrycks et al. 2018). A class without a
    trusted example keeps its label.

    Args:
        predicted: probabilities of a network trained on the given labels, for the
            trusted examples, [m, K].
        trusted: their true classes, [m].
        classes: K.
    """
    sums = PSEUDO_COUNT / classes * np.ones((classes, classes))
    np.add.at(sums, trusted, predicted)
    missing = np.setdiff1d(np.arange(classes), trusted)
    sums[missing, missing] += 1.0
    return sums / sums.sum(axis=1, keepdims=True)


def confident_transition(predicted: np.ndarray, given: np.ndarray) -> np.ndarray:
    """T from the examples that a network is sure of, without trusted labels.

    An example counts for class k if its probability of k is at least the mean of those
    given k (confident learning, Northcutt et al. 2021).

    Args:
        predicted: probabilities of networks that did not see the example, [n, K].
        given: the given labels, [n].
    """
    classes = predicted.shape[1]
    own = np.ones(classes)
    for k in range(classes):
        if (given == k).any():
            own[k] = predicted[given == k, k].mean()
    sure = np.where(predicted >= own, predicted, 0.0)
    some = sure.any(axis=1)
    joint = np.zeros((classes, classes))
    np.add.at(joint, (sure[some].argmax(axis=1), given[some]), 1.0)
    joint[np.arange(classes), np.arange(classes)] += 1.0
    return joint / joint.sum(axis=1, keepdims=True)


def posterior(predicted: np.ndarray, transition: np.ndarray, given: np.ndarray):
    """P(true = k | x, given) ~ p_k(x) T[k, given], [n, K]."""
    joint = predicted * transition[:, given].T
    return joint / np.maximum(joint.sum(axis=1, keepdims=True), SMALLEST)


def likeliest_transition(
    predicted: np.ndarray, given: np.ndarray, start: np.ndarray, rounds: int = 200
) -> np.ndarray:
    """The T with the largest likelihood of the given labels, by EM.

        max_T  sum_i log sum_k p_k(x_i) T[k, given_i]

    The objective is concave in T, so the start only shortens the way (and keeps the
    zeros). It is right as far as p is: probabilities of examples that the network has
    learned by heart make T look better than it is.

    Args:
        predicted: p, [n, K].
        given: the given labels, [n].
        start: T at the start, [K, K].
        rounds: most iterations, each O(n K).
    """
    order = np.argsort(given, kind="stable")
    present, firsts = np.unique(given[order], return_index=True)
    sorted_p, sorted_given = predicted[order], given[order]
    classes = len(start)
    transition = np.maximum(start, SMALLEST)
    for _ in range(rounds):
        shares = posterior(sorted_p, transition, sorted_given)
        sums = np.full((classes, classes), SMALLEST)
        sums[:, present] += np.add.reduceat(shares, firsts, axis=0).T
        after = sums / sums.sum(axis=1, keepdims=True)
        moved = np.abs(after - transition).max()
        transition = after
        if moved < 1e-5:
            break
    return transition


def sharpened(predicted: np.ndarray, sharpness: float) -> np.ndarray:
    """p_k^s / sum_j p_j^s, [n, K]: surer for s > 1, flatter for s < 1."""
    return _softmax(sharpness * np.log(np.maximum(predicted, SMALLEST)))


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def sharpness(predicted: np.ndarray, right: np.ndarray) -> float:
    """The s with which p^s does best on labels that the network did not see.

        min_s  sum_i -log p_s(label_i | x_i) + (log s)^2 / (2 0.5^2)

    Networks that learn wrong labels are too unsure of the right ones, and networks that
    learn examples by heart are too sure. The second term keeps s near 1 where there are
    few examples. Without any, s = 1.

    Args:
        predicted: p of examples that did not train, [b, K].
        right: their labels, [b].
    """
    return _best(lambda s: log_likelihoods(sharpened(predicted, s), right))


def unseen_log_losses(
    predicted: np.ndarray, transition: np.ndarray, given: np.ndarray
) -> np.ndarray:
    """-log (p^s T)[given label] of examples that did not train, [n], with the best s.

    Args:
        predicted: p, [n, K].
        transition: T, [K, K].
        given: the given labels, [n].
    """

    def likelihoods(s: float) -> np.ndarray:
        return log_likelihoods(sharpened(predicted, s) @ transition, given)

    return -likelihoods(_best(likelihoods))


def clearly_better(one: np.ndarray, other: np.ndarray, right: np.ndarray) -> bool:
    """Whether `one` predicts right labels better than `other`, by two standard errors.

    Both are p, [b, K], with the sharpness that is best for each: not how sure they are
    is compared, but what they know.
    """
    if len(right) < 2:
        return False
    same = np.eye(one.shape[1])
    gained = unseen_log_losses(other, same, right) - unseen_log_losses(one, same, right)
    error = gained.std(ddof=1) / np.sqrt(len(right))
    return bool(gained.mean() > 2 * error)


def _best(log_likelihoods: Callable[[float], np.ndarray]) -> float:
    losses = [2 * np.log(s) ** 2 - log_likelihoods(s).sum() for s in SHARPNESSES]
    return float(SHARPNESSES[np.argmin(losses)])


def log_likelihoods(given_probabilities: np.ndarray, given: np.ndarray) -> np.ndarray:
    """log P(given label), [n], cut off so that no single row decides."""
    own = given_probabilities[np.arange(len(given)), given]
    return np.log(np.maximum(own, 1e-6))


def share(transition: np.ndarray, given: np.ndarray) -> float:
    """The share of given labels that T calls wrong, with the classes as frequent as
    the labels."""
    frequency = np.bincount(given, minlength=len(transition)) / len(given)
    return float(1 - frequency @ np.diagonal(transition))


def as_sure(predicted: np.ndarray, other: np.ndarray) -> np.ndarray:
    """`predicted`, sharpened so that its mean largest probability is that of `other`.

    A network is not sure of wrong labels that it half learned, and too sure of examples
    that it learned by heart; `other` did not see the examples.
    """
    wanted, low, high = other.max(axis=1).mean(), -2.0, 3.0
    for _ in range(30):  # the mean grows with the sharpness
        middle = (low + high) / 2
        less = sharpened(predicted, np.exp(middle)).max(axis=1).mean() < wanted
        low, high = (middle, high) if less else (low, middle)
    return sharpened(predicted, np.exp(low))


def suspected(
    transition: np.ndarray, given: np.ndarray, on_held: np.ndarray, held: np.ndarray
) -> bool:
    """Whether the trusted examples alone say that more than a tenth is wrong.

    Their network's own errors make right labels look wrong, too. So it is asked only if
    it knows more than half of the held-out labels, and believed only if T calls more
    wrong than a third of what it errs on there. (In 17 cells T called up to 0.38 of
    that wrong without noise, 0.27 where the network was asked, and 0.43 or more with
    noise that depends on the example.)

    Args:
        transition: the likeliest T with its probabilities.
        given: the given labels, [n].
        on_held: its probabilities of held-out trusted examples, [b, K]; b may be 0.
        held: their classes, [b].
    """
    if not len(held):
        return False
    errors = np.mean(on_held.argmax(axis=1) != held)
    return bool(errors < 0.5 and share(transition, given) > max(LITTLE, errors / 3))


def noticed(
    of_given: np.ndarray, of_right: np.ndarray, suspected: bool = False
) -> bool:
    """Whether given labels are not predicted as well as right ones: there is noise.

    Right labels must have a mean log-loss that is smaller by more than two standard
    errors: random errors cannot be predicted. Or larger by more than three: errors were
    learned. Where another network suspects noise, any smaller loss will do: errors that
    depend on the example can be predicted nearly as well as right labels.

    Args:
        of_given: log-losses of given labels, by networks that did not see them, [n].
        of_right: of trusted labels, the mean of the same networks' log-losses, [m].
            (The loss of their mean probability would be smaller than that of one.)
        suspected: whether the network of the trusted examples alone suspects noise.
    """
    error = of_right.std() / np.sqrt(len(of_right))
    smaller = of_given.mean() - of_right.mean()
    return bool(smaller > (0 if suspected else 2 * error) or smaller < -3 * error)


def mostly_right(transition: np.ndarray) -> bool:
    """Whether every class is called by its own name most often, and no label is given
    to another class more often than to its own."""
    own = np.arange(len(transition))
    rows, columns = transition.argmax(axis=1), transition.argmax(axis=0)
    return bool((rows == own).all() and (columns == own).all())


def harmless(transition: np.ndarray, most: float = 0.45) -> bool:
    """Whether training on the given labels as they are finds the right classes.

    It does if a given label j is likeliest where it is right, T[j, j] > T[k, j], and
    errors are spread: none of the others stands out. With m_j the mean of T[k, j] over
    k != j, the ratio (max_k T[k, j] - m_j) / (T[j, j] - m_j), as a mean over j, must be
    clearly below 1. Then plain cross-entropy learns faster than a corrected loss.
    """
    own = np.diagonal(transition)
    others = transition - np.diag(own)
    largest = others.max(axis=0)
    if np.mean(largest / np.maximum(own, SMALLEST)) >= 1:
        return False
    mean = others.sum(axis=0) / (len(own) - 1)
    return bool(np.mean((largest - mean) / np.maximum(own - mean, 1e-3)) < most)


def seen_posterior(
    predicted: np.ndarray, unseen: np.ndarray, transition: np.ndarray, given: np.ndarray
) -> np.ndarray | None:
    """P(true = k | x, given) by a network that trained on the given labels, [n, K].

        ~ p_k(x)^s T[k, given]^c

    Such a network has heard the given label, so Bayes' rule (c = 1) would count it
    twice. c and s are chosen so that the answer is like one of networks that did not
    see the labels: as sure (the mean largest probability), and calling as many given
    labels right. c is the largest from 0 to 1 that does not call more right, up to a
    hundredth of the wrong ones. s is from 1/2 to 2: far outside, p or T alone would
    decide, and be as sure, too. `None` if even c = 0
    calls clearly more right: then the network has learned wrong labels by heart, and
    believes them.

    Args:
        predicted: p, as sure as that of networks that did not see the labels, [n, K].
        unseen: the same of networks that did not see the labels.
        transition: T, [K, K].
        given: the labels, [n].
    """
    honest = posterior(unseen, transition, given)
    logits = np.log(np.maximum(predicted, SMALLEST))
    evidence = np.log(np.maximum(transition, SMALLEST))[:, given].T
    right, sure = _share_right(honest, given), honest.max(axis=1).mean()

    def of(weight: float) -> np.ndarray:
        best, error = honest, np.inf
        for sharpness in np.logspace(-1, 1, 21, base=2):
            found = _softmax(sharpness * logits + weight * evidence)
            off = abs(found.max(axis=1).mean() - sure)
            if off < error:
                best, error = found, off
        return best

    unheard = of(0.0)
    if _share_right(unheard, given) > right + BY_HEART * (1 - right):
        return None
    most = right + NEARLY * (1 - right)
    found = of(1.0)
    if _share_right(found, given) <= most:
        return found
    low, high, found = 0.0, 1.0, unheard
    for _ in range(7):  # the share grows with the weight
        middle = (low + high) / 2
        tried = of(middle)
        if _share_right(tried, given) > most:
            high = middle
        else:
            low, found = middle, tried
    return found


def _share_right(shares: np.ndarray, given: np.ndarray) -> float:
    return float(shares[np.arange(len(given)), given].mean())
