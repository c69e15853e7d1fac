"""A label cleaner that was never trained: its results are given."""

import types

import numpy as np


class FittedCleaner:
    """What the report reads of a fitted `tb.LabelCleaner`, with chosen results.

    Args:
        given: the given labels, indices of `classes`, [n].
        suggested: the suggested ones, [n].
        weights: the probabilities that the given labels are right, [n].
        classes: the classes.
        accuracy: its `accuracy_`.
    """

    def __init__(self, given=(), suggested=(), weights=(), classes=(), accuracy=None):
        self.classes_ = np.array(classes)
        self.weights_ = np.array(weights, float)
        given, suggested = np.array(given, int), np.array(suggested, int)
        self.accuracy_ = accuracy
        suspicious = np.flatnonzero(given != suggested)
        rows = suspicious[np.argsort(self.weights_[suspicious], kind="stable")]
        if len(given):
            self.label_issues_ = {
                "row": rows,
                "given_label": self.classes_[given[rows]],
                "suggested_label": self.classes_[suggested[rows]],
                "probability_right": self.weights_[rows],
                "rank": np.arange(1, len(rows) + 1),
            }
            k = len(classes)
            counts = np.zeros((k, k))
            np.add.at(counts, (suggested, given), 1)
            self.transition_ = counts / counts.sum(axis=1, keepdims=True)
        self.choice_ = types.SimpleNamespace(
            name="class-dependent",
            reason="It had the least log-loss on held-out trusted examples.",
            scores={"plain": 1.25, "class-dependent": 0.5, "mixed": 0.75},
        )
        self.history_ = {"start": {"loss": [2.0, 1.0]}, "cleaning": {"loss": [0.9]}}
