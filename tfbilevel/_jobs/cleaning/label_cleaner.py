"""Find and correct wrong labels, in one call."""

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from tfbilevel._core.arguments import require_count
from tfbilevel._jobs.cleaning import findings, stages
from tfbilevel._jobs.cleaning.rows import Rows, data_of, inputs_of
from tfbilevel._jobs.cleaning.training import Training
from tfbilevel._jobs.networks import fresh, gives_probabilities, log_probabilities

LEAST_STEPS = 600  # of a training on few rows, whose epochs are short


class LabelCleaner:
    """Finds and corrects wrong labels, and trains a classifier in spite of them."""

    def __init__(
        self,
        model: keras.Model | Callable,
        *,
        augmentation: Callable | None = None,
        optimizer: keras.optimizers.Optimizer | None = None,
        learning_rate: float = 2e-3,
        batch_size: int = 128,
        learn: bool = True,
        seed: int = 0,
    ):
        self.model = model
        self.augmentation = augmentation
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.learn = learn
        self.seed = seed

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
        """Train, and find the labels that are wrong."""
        data = data_of(x, y, trusted)
        doubtful, classes = data.doubtful, len(data.classes)
        require_count(self.batch_size, "batch_size")
        per_epoch = max(1, len(doubtful.labels) // self.batch_size)
        if epochs is None:
            epochs = min(100, max(10, math.ceil(LEAST_STEPS / per_epoch)))
        require_count(epochs, "epochs")
        shape = doubtful.x.shape[1:]
        network = fresh(self.model, shape, classes, self.seed)
        probabilities = gives_probabilities(network, doubtful.x[:32])

        def training(sure: Rows) -> Training:
            return Training(
                network,
                probabilities,
                doubtful.x,
                sure.x,
                self.augmentation,
                self.batch_size,
                self._optimizer(network),
                self.seed,
            )

        def initial(number: int) -> list:
            return fresh(self.model, shape, classes, self.seed + number).get_weights()

        silent = verbose in (0, "0")

        def report(stage: str) -> Any:
            if not silent:
                print(f"LabelCleaner: {stage}")
            return verbose

        found = stages.run(
            data,
            training,
            initial,
            per_epoch * epochs,
            epochs,
            self.seed,
            self.learn,
            callbacks,
            report,
        )
        self._learned(data, found, fresh(self.model, shape, classes, self.seed))
        return self

    def _learned(self, data: Any, found: stages.Outcome, network: keras.Model) -> None:
        network.set_weights(found.weights)
        given = data.doubtful.labels
        self.classes_ = data.classes.values
        self.model_ = network
        self.n_features_in_ = int(np.prod(data.doubtful.x.shape[1:]))
        self._probabilities = gives_probabilities(network, data.doubtful.x[:32])
        self._encoding = data.classes
        self.history_ = found.history
        self.transition_ = found.transition
        self.weights_ = found.right
        self.corrected_labels_ = data.classes.original(found.suggested)
        self.label_issues_ = findings.issues(
            given, found.suggested, found.right, data.classes.values
        )
        self.accuracy_ = (
            findings.accuracy(found.before, found.after) if len(found.before) else None
        )
        name = "feature-dependent" if found.feature_dependent else "class-dependent"
        other = "class-dependent" if found.feature_dependent else "feature-dependent"
        self.choice_ = findings.Choice(
            name,
            f"Given labels that a model did not see are {name} rather than {other}: "
            f"log-loss {found.scores[name]:.3f} against {found.scores[other]:.3f}.",
            found.scores,
            found.trusted_scores,
            {
                "trust": found.belief.trust,
                "given": found.belief.given,
                "opinions": found.belief.opinions.tolist(),
            },
        )

    def predict_proba(self, x: Any) -> np.ndarray:
        """P(class) of every example, [n, K], columns in the order of `classes_`."""
        outputs = self.model_.predict(inputs_of(x, "x"), batch_size=1000, verbose=0)
        log_p = log_probabilities(outputs, self._probabilities)
        return np.exp(np.asarray(log_p, np.float64))

    def predict(self, x: Any) -> np.ndarray:
        """The likeliest class of every example, as the user writes classes."""
        return self._encoding.original(self.predict_proba(x).argmax(axis=1))

    def score(self, x: Any, y: Any) -> float:
        """The accuracy."""
        right = self._encoding.indices(y, "y")
        return float(np.mean(self.predict_proba(x).argmax(axis=1) == right))

    def _optimizer(self, network: keras.Model) -> Any:
        if self.optimizer is not None:
            return self.optimizer
        compiled = getattr(network, "optimizer", None)
        return self.learning_rate if compiled is None else compiled
