"""Find and correct wrong labels, in one call."""

import math
import os
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from tfbilevel._core.arguments import require_count
from tfbilevel._jobs.cleaning import findings, stages
from tfbilevel._jobs.cleaning.kept_trainings import KeptTrainings
from tfbilevel._jobs.cleaning.rows import Data, Rows, data_of, inputs_of
from tfbilevel._jobs.cleaning.training import Training
from tfbilevel._jobs.cleaning.trainings import TITLES, Trainings, split_of
from tfbilevel._jobs.default_networks import default_network, kind_of, text_network
from tfbilevel._jobs.estimator import Estimator
from tfbilevel._jobs.networks import (
    fresh,
    gives_probabilities,
    log_probabilities,
    predicted,
)
from tfbilevel._jobs.random_state import random_state_kept
from tfbilevel._jobs.report.label_cleaning import write_cleaning_report

LEAST_STEPS = 150  # of a training on few rows, whose epochs are short


class LabelCleaner(Estimator):
    r"""Finds and corrects wrong labels, and trains a classifier in spite of them.

        P(true = k | x, given) ~ p_k(x) T[k, given]

    p is the network, T the transition matrix: how often class k is called `given`. Both
    are learned from all examples and from a few *trusted* ones, whose labels are right:

    1. Networks trained on the given labels say what is given for trusted examples. This
       starts T (Gold Loss Correction). EM on the probabilities of networks that did not
       see an example makes T the likeliest one, twice.
    2. Networks are trained so that p T explains the given labels (forward correction);
       or on the given labels as they are, where T says that these mislead nobody, or
       held-out trusted labels say that T is wrong.
    3. Either T is taken, or the noise is said to depend on the examples: what explains
       given labels of unseen examples better. (`choice_` says which, and the scores.)
    4. How much to believe the trusted labels, the given ones, and a network trained on
       the trusted examples alone is learned by hypergradients: `tb.Unroll` through
       training of the last layer, so that it does well on trusted examples that were
       held out. It is kept only if it does better there than the same training with the
       numbers at the start.
    5. The final network is trained so, and gives the labels. It has seen the given
       ones, so these count less: P ~ p^s T^c, as sure as networks that did not see
       them, and with as many given labels called right.

    Without trusted examples T starts from confident learning, steps 3 and 5 are the
    same, and nothing can check the result. This is weaker: noise that calls most of a
    class by another name cannot be seen without them.

    Cost: about 5 trainings on all examples. Memory: the examples, and some 10 numbers
    per example and class. Examples must fit in memory.

    When to prefer others: if you have no trusted labels and labels are mostly right,
    `cleanlab` is as good and needs no training of its own. If you have thousands of
    trusted labels, compare with training on them alone.

    Args:
        model: a Keras classifier, which is cloned with new weights; or a function that
            returns a new one, () -> model or (shape of an example, number of classes)
            -> model. Its outputs may be logits or probabilities. `None`: a network for
            the kind of data: pictures [n, h, w, c], tables [n, d], or texts.
        augmentation: batch of examples -> batch, for training only, such as
            keras.layers.RandomTranslation(0.1, 0.1). It helps on pictures. Its random
            numbers follow from `seed`, the training and the batch.
        optimizer: a Keras optimizer, which is copied for each training. `None`: that of
            a compiled model, or Adam with a cosine decay from `learning_rate`.
        learning_rate: the first rate of that Adam.
        batch_size: number of doubtful examples in a batch; a quarter as many trusted
            ones go with them.
        epochs: passes over the doubtful examples in each training, unless `fit` is
            given another number. `None`: 10, or more (up to 100) for few examples;
            fewer if given labels that a network did not see are clearly predicted best
            after fewer (one half of a training more).
        learn: whether step 4 is made. False: for comparison.
        backup: a folder in which every training that ended is kept. `fit` with the same
            data and arguments goes on there after a kill, and deletes it at the end.
        seed: of weights, batches and splits. Your own random numbers (Python, NumPy,
            Keras, TensorFlow) go on after `fit` as if it had not been called.

    Attributes:
        classes_: the classes, in sorted order, [K].
        label_issues_: the suspicious rows, most suspicious first: a pandas table (or a
            dictionary of arrays without pandas) with the columns `row`, `given_label`,
            `suggested_label`, `probability_right` and `rank`.
        corrected_labels_: the suggested label of every row, as the user writes labels.
        weights_: the probability that the given label is right, [n].
        transition_: T, [K, K]: row: true class, column: given class.
        model_: the final Keras network, compiled if `model` is.
        history_: losses and seconds of each training, by name.
        choice_: which model of the noise was taken, why, and the held-out scores.
        accuracy_: accuracy on held-out trusted examples of networks trained on the
            given labels (`before`) and of the first one of step 2 (`after`), with 95
            percent intervals. Each had half the training of the final network, so this
            is a low estimate. `None` if none was held out.
        n_features_in_: how many numbers an example has.

    Raises:
        ValueError: by `fit`, before training: labels that are no classes, fewer than
            two classes, a class that the trusted examples lack, NaN or infinity,
            lengths that differ, a model that does not fit.

    Example:
        >>> random = np.random.default_rng(0)
        >>> x = random.normal(size=(400, 2)).astype("float32")
        >>> right = np.where(x[:, 0] > 0, "cat", "dog")
        >>> given = right.copy()
        >>> wrong = random.choice(300, 100, replace=False)
        >>> given[wrong] = np.where(right[wrong] == "cat", "dog", "cat")
        >>> cleaner = tb.LabelCleaner(epochs=20, batch_size=32)
        >>> cleaner = cleaner.fit(
        ...     x[:300], given[:300], trusted=(x[300:340], right[300:340]), verbose=0)
        >>> bool(np.mean(cleaner.corrected_labels_ == right[:300]) > 0.9)  # was 0.67
        True
        >>> cleaner.predict(x[340:342]).tolist() == right[340:342].tolist()
        True

    Sources: Gold Loss Correction: Hendrycks et al. 2018, "Using trusted data to train
    deep networks on labels corrupted by severe noise". Forward correction: Patrini et
    al. 2017. Confident learning: Northcutt et al. 2021.
    """

    _estimator_type = "classifier"

    def __init__(
        self,
        model: keras.Model | Callable | None = None,
        *,
        augmentation: Callable | None = None,
        optimizer: keras.optimizers.Optimizer | None = None,
        learning_rate: float = 2e-3,
        batch_size: int = 128,
        epochs: int | None = None,
        learn: bool = True,
        backup: str | os.PathLike | None = None,
        seed: int = 0,
    ):
        self.model = model
        self.augmentation = augmentation
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.epochs = epochs
        self.learn = learn
        self.backup = backup
        self.seed = seed

    @random_state_kept()
    def fit(
        self,
        x: Any,
        y: Any = None,
        *,
        trusted: Any = None,
        epochs: int | None = None,
        callbacks: list | None = None,
        verbose: Any = "auto",
    ) -> "LabelCleaner":
        """Train, and find the labels that are wrong.

        Args:
            x: the examples, [n, ...]: numbers or texts; NumPy, pandas or tensors. Or a
                `tf.data.Dataset` of batches (x, y), which is collected in memory.
            y: their labels, some of them wrong, [n]: integers, strings, or one-hot
                rows [n, K].
            trusted: (x, y) of examples whose labels are right, or a dataset of them;
                some of every class. A third of them is held out of the first trainings.
            epochs: as in the constructor, for this `fit`.
            callbacks: Keras callbacks of the final training.
            verbose: as in Keras's `fit`; 0: nothing is printed.

        Returns:
            The cleaner itself.
        """
        data = data_of(x, y, trusted)
        epochs = self.epochs if epochs is None else epochs
        require_count(self.batch_size, "batch_size")
        per_epoch = max(1, len(data.doubtful.labels) // self.batch_size)
        choose = epochs is None
        if epochs is None:
            epochs = min(100, max(10, math.ceil(LEAST_STEPS / per_epoch)))
        require_count(epochs, "epochs")
        if data.doubtful.labels.size < 4:
            raise ValueError(
                "`x` must hold at least 4 examples. Received: "
                f"n_samples={data.doubtful.labels.size}"
            )
        make = self._maker(data)
        network = make(0)
        probabilities = gives_probabilities(network, data.doubtful.x[:32])
        start = network.get_weights()
        kept = KeptTrainings(self.backup, self._job(data, epochs, choose, start))
        if verbose not in (0, "0"):
            _say(data)

        def training(sure: Rows) -> Training:
            return Training(
                network,
                probabilities,
                data.doubtful.x,
                sure.x,
                self.augmentation,
                self.batch_size,
                self._optimizer(network),
                self.seed,
            )

        def report(stage: str) -> Any:
            if verbose not in (0, "0"):
                print(TITLES[stage])
            return verbose

        trainings = Trainings(
            data,
            training,
            lambda number: make(number).get_weights(),
            per_epoch * epochs,
            epochs,
            self.seed,
            report,
            kept,
        )
        found = stages.run(trainings, self.learn, callbacks, choose)
        final = make(0)
        final.set_weights(found.weights)
        self._take(data, found, final, probabilities)
        kept.clear()
        return self

    def predict_proba(self, x: Any) -> np.ndarray:
        """P(class) of every example, [n, K], columns in the order of `classes_`."""
        self._require_fitted()
        inputs = inputs_of(x, "x")
        if inputs.shape[1:] != self._shape:
            raise ValueError(
                f"`x` must hold examples of shape {self._shape}, as in `fit`. Reshape "
                "your data; one example is x[None]. "
                f"Received: shape {inputs.shape[1:]}. X has "
                f"{int(np.prod(inputs.shape[1:]))} features, but LabelCleaner is "
                f"expecting {self.n_features_in_} features as input"
            )
        log_p = log_probabilities(predicted(self.model_, inputs), self._probabilities)
        return np.exp(np.asarray(log_p, np.float64))

    def predict(self, x: Any) -> np.ndarray:
        """The likeliest class of every example, as the user writes labels."""
        found = self.predict_proba(x).argmax(axis=1)
        return self._encoding.original(found)

    def score(self, x: Any, y: Any) -> float:
        """The accuracy on examples with right labels."""
        found = self.predict_proba(x).argmax(axis=1)
        return float(np.mean(found == self._encoding.indices(y, "y")))

    def report(self, path: str | os.PathLike, x: Any = None, **options: Any) -> None:
        """Write what was found as one HTML page, which needs no network.

        Args:
            path: the file.
            x: the examples in the order of `fit`, to show the suspicious ones;
                pictures, texts, or rows of a table.
            **options: `title`, `names` (of all examples), `most` (how many examples the
                page shows), `facts` (a dictionary), `commands` (lines that repeat the
                job).

        Raises:
            ImportError: without the package jinja2.
            ValueError: if not fitted, or `x` has another length.
        """
        self._require_fitted()
        write_cleaning_report(path, self, x, **options)

    def _maker(self, data: Data) -> Callable[[int], keras.Model]:
        """Number of a network -> a network with new weights."""
        x, classes = data.doubtful.x, len(data.classes)
        model: Any = self.model
        if model is None:
            kind = kind_of(x)
            if kind == "text":
                model = text_network(x, classes)
            else:

                def standard() -> keras.Model:
                    return default_network(x.shape[1:], classes, kind, examples=x)

                model = standard

        return lambda number: fresh(model, x.shape[1:], classes, self.seed + number)

    def _optimizer(self, network: keras.Model) -> Any:
        if self.optimizer is not None:
            return self.optimizer
        compiled = getattr(network, "optimizer", None)
        if compiled is None and isinstance(self.model, keras.Model):
            compiled = getattr(self.model, "optimizer", None)
        return self.learning_rate if compiled is None else compiled

    def _job(self, data: Data, epochs: int, choose: bool, start: list) -> list:
        """What the trainings depend on, as far as it can be compared."""
        parts = [] if data.trusted is None else [*data.trusted]
        numbers = [self.batch_size, self.learning_rate, epochs, choose, self.seed]
        own = getattr(self.model, "optimizer", None)
        options = [each and each.get_config() for each in (self.optimizer, own)]
        augmentation = self.augmentation
        name = getattr(augmentation, "__qualname__", type(augmentation).__qualname__)
        return [*data.doubtful, *parts, *start, numbers, options, name]

    def _take(
        self,
        data: Data,
        found: stages.Outcome,
        network: keras.Model,
        probabilities: bool,
    ) -> None:
        self.classes_ = data.classes.values
        self.model_ = network
        self._shape = data.doubtful.x.shape[1:]
        self.n_features_in_ = int(np.prod(self._shape))
        self._probabilities = probabilities
        self._encoding = data.classes
        self.history_ = found.history
        self.transition_ = found.transition
        self.weights_ = found.right
        self.corrected_labels_ = data.classes.original(found.suggested)
        self.label_issues_ = findings.issues(
            data.doubtful.labels, found.suggested, found.right, data.classes.values
        )
        self.accuracy_ = findings.accuracy(found.before, found.after)
        self.choice_ = findings.choice(found)

    def _require_fitted(self) -> None:
        if self.__sklearn_is_fitted__():
            return
        message = (
            "`fit` must be called before this method: this LabelCleaner is not fitted "
            "yet. Received: no results"
        )
        try:
            from sklearn.exceptions import NotFittedError
        except ImportError:
            raise ValueError(message) from None
        raise NotFittedError(message)

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "model_")

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import ClassifierTags, InputTags, Tags, TargetTags

        return Tags(
            estimator_type="classifier",
            target_tags=TargetTags(required=True),
            classifier_tags=ClassifierTags(),
            input_tags=InputTags(three_d_array=True, string=True),
            non_deterministic=False,
        )


def _say(data: Data) -> None:
    if data.trusted is None:
        print("No trusted examples: cross-validated only, which is weaker.")
    elif len(data.trusted.labels) < 5 * len(data.classes):
        count = len(data.trusted.labels)
        held = count - split_of(data, 0).fitted
        print(
            f"Only {count} trusted examples for {len(data.classes)} classes: "
            + (
                f"the accuracy is measured by {held} of them, so its interval is wide. "
                if held
                else "none is left to measure the accuracy by. "
            )
            + "More trusted labels help most."
        )
    if data.repeated:
        print(
            f"{data.repeated} trusted examples stand among the doubtful ones, too. "
            "Their trusted labels count as right."
        )
