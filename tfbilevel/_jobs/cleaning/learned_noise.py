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
from tfbilevel._methods.hypergradient.unroll import Unroll
from tfbilevel._minimize import minimize

# The features have seen the trusted examples and the given labels already, so the last
# layer needs both less than the network does: without these floors it would do without.
TRUST = (0.2, 0.9)
GIVEN = (0.4, 0.95)
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
        opinions: the weights of the opinions about the class, [q], sum 1.
    """

    trust: float
    given: float
    opinions: np.ndarray


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
    opinions: np.ndarray,
    trusted: np.ndarray,
    held: np.ndarray,
    seed: int,
) -> tuple[Belief, dict[str, list[float]]]:
    """Learn the belief with which the last layers do best on held-out trusted labels.

        x = (trust, given, opinions, sharpness)
        g(x, y) = (1 - trust) mean_i l_i(y; given, opinions) + trust mean cross-entropy
        f(x, y) = mean cross-entropy of softmax(sharpness z) on the b held-out trusted
                  examples + |x - x_start|^2 / (2 b deviation^2)

    y are the last layers of two networks, each on the features of examples that its
    network did not see. (Training on wrong labels makes all probabilities too flat.
    Without the sharpness of the logits z that would count as an error.) `tb.Unroll`
    differentiates through 20 steps of Adam. Cost: 40 outer steps on features, a second
    or two; and the same steps of y with x as at the start but the sharpness, the
    control. The learned belief is taken only if f ends below the control's.

    Args:
        seen: the features.
        start: the belief at the start.
        likelihoods: P(given label | class) of every doubtful example, [n, K].
        opinions: about the class of every doubtful example, [n, q, K].
        trusted, held: true classes of the trusted examples, [a] and [b].
        seed: the seed of the batches.

    Returns:
        The belief, and by name ("learned", "start") the mean cross-entropy on the
        held-out examples after every outer step.
    """
    features, likelihood = tf.constant(seen.features), _single(likelihoods)
    second = _single(opinions)
    classes = likelihood.shape[1]
    rows = [tf.constant(half, tf.int32) for half in seen.halves]

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
        weights = (1 - given) * tf.nn.softmax(x["opinions"])
        opinion = tf.einsum("frqk,q->frk", tf.gather(second, of_rows), weights)
        targets = tf.stack([tf.gather(likelihood, of_rows), opinion], axis=2)
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
        "opinions": tf.math.log(_single(start.opinions) + 1e-3),
        "sharpness": tf.constant(0.0),
    }
    strength = 1 / (2 * len(held) * DEVIATION**2)

    def prior(x: dict) -> tf.Tensor:
        names = ("trust", "given", "opinions")
        moved = [tf.reduce_sum(tf.square(x[name] - first[name])) for name in names]
        return strength * tf.add_n(moved)

    def upper_loss(x: dict, heads: Any, batch: Any) -> tf.Tensor:
        return unseen(heads, tf.exp(x["sharpness"])) + prior(x)

    problem = Problem(upper_loss, lower_loss)
    inner = InnerSolver(
        keras.optimizers.Adam(2e-3), INNER_STEPS, optimizer_state="carry"
    )
    ends = {}
    for name in ("learned", "start"):
        # The control learns the sharpness alone.
        kept = () if name == "learned" else ("trust", "given", "opinions")
        ends[name] = minimize(
            _frozen(problem, first, kept),
            Unroll(inner),
            {key: value for key, value in first.items() if key not in kept},
            tf.constant(seen.weights),
            keras.optimizers.Adam(0.15),
            batches,
            OUTER_STEPS,
            trace=lambda point: unseen(point.lower, tf.exp(point.upper["sharpness"])),
        )
    losses = {name: [float(v) for v in end.trace] for name, end in ends.items()}
    x = ends["learned"].upper
    settled = {name: np.mean(values[-5:]) for name, values in losses.items()}
    if settled["learned"] + float(prior(x)) >= settled["start"]:
        return start, losses
    found = Belief(
        float(_within(TRUST, x["trust"])),
        float(_within(GIVEN, x["given"])),
        tf.nn.softmax(x["opinions"]).numpy(),
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
