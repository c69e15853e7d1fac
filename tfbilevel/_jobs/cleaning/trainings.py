"""The trainings of `LabelCleaner`: who trains on what, each under its name."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tfbilevel._jobs.cleaning.kept_trainings import KeptTrainings
from tfbilevel._jobs.cleaning.rows import Data, Rows
from tfbilevel._jobs.cleaning.training import Targets, Training

# Of the trusted examples this share trains in the first trainings. The others measure.
FITTED = 2 / 3

TITLES = {
    "length": "0/7 how long to train",
    "given 1": "1/7 what labels are given, first half",
    "given 2": "2/7 what labels are given, second half",
    "trusted": "3/7 the trusted examples alone",
    "start": "4/7 corrected for the first estimate of the noise",
    "as given": "4/7 not corrected: the first estimate made it worse",
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


class Trainings:
    """One network, trained again and again; every training has a name of `TITLES`.

    Args:
        data: the examples.
        training: trusted examples in their order -> the `Training` of the network.
        initial: number of a network -> its random weights.
        steps: of one training on all doubtful examples.
        epochs: of the same.
        seed: of the split and the batches.
        report: name of a training -> verbosity of its `fit`.
        kept: the trainings that an earlier process ended.

    Attributes:
        x, given: the doubtful examples and their labels, [n].
        sure: the trusted examples, those that train first.
        fitted, held: the labels of the trusted examples that train, and of those that
            are held out.
        classes: K.
        length: all trainings are this much shorter, from 0 to 1.
        history: losses and seconds, by name.
    """

    def __init__(
        self,
        data: Data,
        training: Callable[[Rows], Training],
        initial: Callable[[int], list],
        steps: int,
        epochs: int,
        seed: int,
        report: Callable[[str], Any],
        kept: KeptTrainings,
    ):
        self.x, self.given = data.doubtful
        self.classes, self.seed = len(data.classes), seed
        self.split = split_of(data, seed)
        self.sure = Rows(self.x[:0], self.given[:0])
        if data.trusted is not None:
            order = self.split.order
            self.sure = Rows(data.trusted.x[order], data.trusted.labels[order])
        self.fitted = self.sure.labels[: self.split.fitted]
        self.held = self.sure.labels[self.split.fitted :]
        self.length = 1.0
        self.history: dict[str, dict[str, list]] = {}
        self._training = training(self.sure)
        self._initial, self._report, self._kept = initial, report, kept
        self._steps, self._epochs = steps, epochs

    def run(
        self,
        name: str,
        start: int | list,
        targets: Targets,
        trust: float,
        known: np.ndarray,
        part: float = 0.5,
        measured: Callable[[], dict] = dict,
        **rest: Any,
    ) -> None:
        """Train, unless an earlier process did.

        Args:
            name: of the training.
            start: number of the random weights, or weights.
            targets: of the doubtful examples.
            trust: the weight of the trusted examples, 0 to 1.
            known: labels of the trusted examples that train, the first ones.
            part: of the steps of a whole training.
            measured: () -> what else belongs to the history.
            **rest: for `Training.run`.
        """
        before = self._kept.find(name)
        if before is not None:
            weights, self.history[name] = before
            self._training.network.set_weights(weights)
            return
        began, part = time.monotonic(), part * self.length
        found = self._training.run(
            self._initial(start) if isinstance(start, int) else start,
            targets,
            Targets.labels(known, self.classes),
            trust,
            list(TITLES).index(name),
            max(1, round(part * self._steps)),
            max(1, round(part * self._epochs)),
            verbose=self._report(name),
            **rest,
        )
        seconds = [time.monotonic() - began]
        self.history[name] = {**found, **measured(), "seconds": seconds}
        if name != "final":
            self._kept.keep(name, self.weights(), self.history[name])

    def weights(self) -> list:
        """The network's weights now."""
        return self._training.network.get_weights()

    def p(self, x: np.ndarray | None = None) -> np.ndarray:
        """P(class) as the network sees it now; `None`: of the doubtful examples."""
        return self._training.probabilities_of(self.x if x is None else x)

    def on_held(self) -> np.ndarray:
        """P(class) of the held-out trusted examples, [b, K]."""
        if not len(self.held):
            return np.zeros((0, self.classes))
        return self.p(self.sure.x[self.split.fitted :])

    def seen(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """P(class), the features of the last layer, and its weights."""
        return self._training.seen(x)
