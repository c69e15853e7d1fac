"""What training on doubtful labels should believe, learned by hypergradients."""

import dataclasses
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbilevel._core.batches import StackedBatches
from tfbilevel._core.inner_solver import InnerSolver
from tfbilevel._core.problem import Problem
from tfbilevel._jobs.cleaning.training import target_loss
from tfbilevel._jobs.networks import SMALLEST
from tfbilevel._methods.hypergradient.unroll import Unroll
from tfbilevel._minimize import minimize

# The features have learned the given labels already, so the last layer needs them less
# than the network does: without these limits it would do without.
TRUST = (0.2, 0.6)
GIVEN = (0.1, 0.9)
ALONE = (0.0, 1.0)
NAMES = ("trust", "given", "alone")
# Few held-out examples say little about these numbers: a priori each logit is as at the
# start, with this standard deviation.
DEVIATION = 1.5
BATCH = 256
INNER_STEPS = 20
OUTER_STEPS = 40


@dataclasses.dataclass(frozen=True)
class Belief:
    """How much a training believes whom; the upper variables.

    Attributes:
        trust: the weight of the trusted examples in the loss.
        given: the weight of the given labels beside the opinions.
        alone: the share of the network of the trusted examples alone in the opinion
            about the class, which has the weight 1 - given.
    """

    trust: float
    given: float
    alone: float


@dataclasses.dataclass(frozen=True)
class Views:
    """What two networks say about the class of each example.

        opinion_k ~ ((1 - alone) p_k + alone p'_k) factor_k

    p is the network that learned the given labels, p' that of the trusted examples
    alone. The factor is P(given label | class k) where noise depends on the class.

    Attributes:
        doubtful: p and p' of the doubtful examples, [n, 2, K].
        factors: of the doubtful examples, [n, K].
        held: p and p' of the trusted examples that trained neither, [b, 2, K].
        doubted: whether a given label counts as far as the opinion believes it.
    """

    doubtful: np.ndarray
    factors: np.ndarray
    held: np.ndarray
    doubted: bool = False


def opinion_of(views: Any, factors: Any, alone: Any) -> Any:
    """The opinion above, [..., K], of NumPy arrays or tensors."""
    mixed = (1 - alone) * views[..., 0, :] + alone * views[..., 1, :]
    weighed = mixed * factors
    total = tf.reduce_sum(weighed, axis=-1, keepdims=True)
    return weighed / tf.maximum(total, tf.cast(SMALLEST, total.dtype))


def doubted(labels: Any, opinion: Any) -> Any:
    """P(given label | class), up to a factor, if each label is doubted by itself.

        r_k = q [k = label] + 1 - q,    q = opinion_label

    A label that is surely wrong says nothing: -log sum_k p_k r_k is 0 for every p.

    Args:
        labels: the given labels, one-hot, [..., K]; NumPy arrays or tensors.
        opinion: P(class), [..., K].
    """
    right = tf.reduce_sum(labels * opinion, axis=-1, keepdims=True)
    return right * labels + (1 - right)


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Two halves of the doubtful examples as the other half's network sees them.

    Attributes:
        features: of the doubtful examples, from the network that did not train on
            them, [n, d].
        halves: row numbers of the examples of either network, two arrays.
        trusted: features of the trusted examples that trained, [2, a, d].
        held: those of the trusted examples that did not, [2, b, d].
        weights: the last layers, [2, d, K].
    """

    features: np.ndarray
    halves: tuple[np.ndarray, np.ndarray]
    trusted: np.ndarray
    held: np.ndarray
    weights: np.ndarray


def learned_belief(
    seen: HeldOut,
    start: Belief,
    likelihoods: np.ndarray,
    views: Views,
    trusted: np.ndarray,
    held: np.ndarray,
    seed: int,
) -> tuple[Belief, dict[str, list[float]]]:
    """Learn the belief with which the last layers do best on held-out trusted labels.

        x = (trust, given, alone, sharpness)
        g(x, y) = (1 - trust) mean_i l_i(y; given, alone) + trust mean cross-entropy
        f(x, y) = mean cross-entropy on the b held-out trusted examples, half of it of
                  softmax(sharpness z), half of (1 - alone) p + alone p'
                  + |x - x_start|^2 / (2 b deviation^2)

    y are the last layers of two networks, each on the features of examples that its
    network did not see. (Training on wrong labels makes all probabilities too flat.
    Without the sharpness of the logits z that would count as an error.) `tb.Unroll`
    differentiates through 20 steps of Adam. Cost: 40 outer steps on features, a second
    or two; and the same steps of y with x as at the start but the sharpness, the
    control. The learned belief is taken only if f ends below the control's.

    Args:
        seen: the features.
        start: the belief at the start.
        likelihoods: P(given label | class) of every doubtful example, [n, K]; the given
            labels, one-hot, if they are doubted.
        views: what two networks say.
        trusted, held: true classes of the trusted examples, [a] and [b].
        seed: the seed of the batches.

    Returns:
        The belief, and by name ("learned", "start") the mean cross-entropy on the
        held-out examples after every outer step.
    """
    features, likelihood = tf.constant(seen.features), _single(likelihoods)
    two, factors = _single(views.doubtful), _single(views.factors)
    classes = likelihood.shape[1]
    rows = [tf.constant(half, tf.int32) for half in seen.halves]
    own = tf.one_hot(held, classes)
    own_views = tf.einsum("bqk,bk->bq", _single(views.held), own)

    def log_p(features: Any, heads: Any, sharpness: Any = 1.0) -> tf.Tensor:
        return tf.nn.log_softmax(sharpness * tf.matmul(features, heads))

    def of_labels(features: np.ndarray, labels: np.ndarray) -> Any:
        inputs, wanted = tf.constant(features), tf.one_hot(labels, classes)

        def mean(heads: Any, sharpness: Any = 1.0) -> tf.Tensor:
            own = wanted * log_p(inputs, heads, sharpness)
            return -tf.reduce_mean(tf.reduce_sum(own, axis=-1))

        return mean

    sure, unseen = of_labels(seen.trusted, trusted), of_labels(seen.held, held)

    def lower_loss(x: dict, heads: Any, index: Any) -> tf.Tensor:
        of_rows = tf.reshape(index, [2, -1])
        trust, given = _within(TRUST, x["trust"]), _within(GIVEN, x["given"])
        alone = _within(ALONE, x["alone"])
        opinion = opinion_of(
            tf.gather(two, of_rows), tf.gather(factors, of_rows), alone
        )
        labels = tf.gather(likelihood, of_rows)
        if views.doubted:
            labels = doubted(labels, opinion)
        targets = tf.stack([labels, (1 - given) * opinion], axis=2)
        outputs = log_p(tf.gather(features, of_rows), heads)
        doubtful = target_loss(
            tf.reshape(targets, [-1, 2, classes]), tf.reshape(outputs, [-1, classes])
        )
        decay = 1e-4 * tf.reduce_sum(tf.square(heads))
        mean = (1 - trust) * tf.reduce_mean(doubtful) + trust * sure(heads)
        # The sum over the heads. The sharpness is in f alone, but a variable with no
        # path through g is refused, so it has one of weight zero.
        return 2 * mean + decay * (1 + 0 * x["sharpness"])

    def batches(step: tf.Tensor) -> StackedBatches:
        picked = []
        for number, half in enumerate(rows):
            at = tf.random.stateless_uniform(
                [INNER_STEPS, BATCH],
                tf.stack([2 * seed + number, step]),
                0,
                len(half),
                tf.int32,
            )
            picked.append(tf.gather(half, at))
        return StackedBatches(upper=tf.zeros([]), lower=tf.concat(picked, axis=1))

    first = {
        "trust": _logit(TRUST, start.trust),
        "given": _logit(GIVEN, start.given),
        "alone": _logit(ALONE, start.alone),
        "sharpness": tf.constant(0.0),
    }
    strength = 1 / (2 * len(held) * DEVIATION**2)

    def prior(x: dict) -> tf.Tensor:
        moved = [tf.square(x[name] - first[name]) for name in NAMES]
        return strength * tf.add_n(moved)

    def on_held(x: dict, heads: Any) -> tf.Tensor:
        alone = _within(ALONE, {**first, **x}["alone"])
        mixed = (1 - alone) * own_views[:, 0] + alone * own_views[:, 1]
        direct = -tf.reduce_mean(tf.math.log(tf.maximum(mixed, 1e-6)))
        return (unseen(heads, tf.exp(x["sharpness"])) + direct) / 2

    def upper_loss(x: dict, heads: Any, batch: Any) -> tf.Tensor:
        return on_held(x, heads) + prior(x)

    problem = Problem(upper_loss, lower_loss)
    inner = InnerSolver(
        keras.optimizers.Adam(2e-3), INNER_STEPS, optimizer_state="carry"
    )
    ends = {}
    for name in ("learned", "start"):
        # The control learns the sharpness alone.
        kept = () if name == "learned" else NAMES
        ends[name] = minimize(
            _frozen(problem, first, kept),
            Unroll(inner),
            {key: value for key, value in first.items() if key not in kept},
            tf.constant(seen.weights),
            keras.optimizers.Adam(0.15),
            batches,
            OUTER_STEPS,
            trace=lambda point: on_held(point.upper, point.lower),
        )
    losses = {name: [float(v) for v in end.trace] for name, end in ends.items()}
    x = ends["learned"].upper
    settled = {name: np.mean(values[-5:]) for name, values in losses.items()}
    if settled["learned"] + float(prior(x)) >= settled["start"]:
        return start, losses
    found = Belief(
        float(_within(TRUST, x["trust"])),
        float(_within(GIVEN, x["given"])),
        float(_within(ALONE, x["alone"])),
    )
    return found, losses


def _frozen(problem: Problem, first: dict, kept: tuple[str, ...]) -> Problem:
    """The problem with some of the upper variables as at the start."""
    fixed = {name: first[name] for name in kept}

    def of(loss: Any) -> Any:
        return lambda x, heads, batch: loss({**fixed, **x}, heads, batch)

    return Problem(of(problem.upper_loss), of(problem.lower_loss))


def _single(values: Any) -> tf.Tensor:
    return tf.constant(np.asarray(values), tf.float32)


def _logit(range_: tuple[float, float], value: float) -> tf.Tensor:
    """x with _within(range_, x) = value."""
    low, high = range_
    share = (value - low) / (high - low)
    return tf.constant(np.log(share / (1 - share)), tf.float32)


def _within(range_: tuple[float, float], x: tf.Tensor) -> tf.Tensor:
    low, high = range_
    return low + (high - low) * tf.sigmoid(x)
