"""Shared by the experiments on wrong labels."""

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
    """Plain training on all given parts, trusting every label.

    Args:
        network: a network that outputs logits.
        parts: pairs of pixels and integer labels.
        optimizer: the optimizer of the weights.
        batch_size, epochs: as for `fit`.
        name: the name of the job, shown with the progress.
        callbacks: further callbacks.
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
    """Draw the 48 least trusted training images, with given and predicted label.

    Args:
        path: the picture to write.
        images: the images of all training examples, in [0, 1].
        trust: how much each example's label is trusted.
        given: the given labels.
        wrong: whether each given label is wrong.
        predict: numbers of examples -> the classes predicted for them.
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
    """Draw histograms of the examples' values, separately for true and wrong labels.

    Args:
        axes: matplotlib's axes.
        values: the values of the examples.
        clean: whether an example's label is the true one.
        bins: the edges of the bins.
    """
    for name, mask in (("true label", clean), ("wrong label", ~clean)):
        axes.hist(values[mask], bins.tolist(), alpha=0.6, label=name)
    axes.set(yscale="log")
    axes.legend()
