"""What the experiments on wrong labels share."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from common.pictures import draw_images
from common.progress import FitProgress


def fit(
    network: keras.Model,
    parts: Sequence[tuple[Any, Any]],
    optimizer: keras.optimizers.Optimizer,
    batch_size: int,
    epochs: int,
    name: str,
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> None:
    """Plain training on everything in the parts, every label believed.

    Args:
        network: ends in logits.
        parts: pairs of pixels and integer labels.
        optimizer: of the weights.
        batch_size, epochs: of `fit`.
        name: of the job, for those who wait.
        callbacks: more of them.
    """
    pixels, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    network.compile(
        optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    callbacks = [*callbacks, FitProgress(name)]
    network.fit(pixels, labels, batch_size, epochs, callbacks=callbacks, verbose=0)


def draw_distrusted(
    path: pathlib.Path,
    images: np.ndarray,
    trust: np.ndarray,
    given: np.ndarray,
    wrong: np.ndarray,
    predict: Callable[[np.ndarray], np.ndarray],
) -> None:
    """The 48 training images trusted least, with given and predicted label.

    Args:
        path: the picture to write.
        images: of all training examples, in [0, 1].
        trust: in each example's label.
        given: the labels.
        wrong: whether they are.
        predict: numbers of examples -> what a network takes them for.
    """
    worst = np.argsort(trust, kind="stable")[:48]
    labels = zip(given[worst], predict(worst), strict=True)
    draw_images(
        path,
        images[worst],
        [f"given {given}, looks {looks}" for given, looks in labels],
        "Most distrusted labels (red: the label is wrong)",
        red=wrong[worst].tolist(),
    )


def draw_histograms(
    axes: Any, values: np.ndarray, clean: np.ndarray, bins: np.ndarray
) -> None:
    """How many examples have which value: those of a true label, those of a wrong one.

    Args:
        axes: matplotlib's.
        values: of the examples.
        clean: whether an example's label is the true one.
        bins: the edges.
    """
    for name, mask in (("true label", clean), ("wrong label", ~clean)):
        axes.hist(values[mask], bins.tolist(), alpha=0.6, label=name)
    axes.set(yscale="log")
    axes.legend()
