"""The cells of `benchmarks/label_cleaning.py`: real data with labels that are wrong."""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

IMAGES, TEXTS = ("fashion_mnist", "mnist"), "newsgroups"
KINDS = ("none", "sym-50", "sym-80", "class-45", "class-60", "feat-40")
TRUSTED, SEEDS = (200, 1000), (0, 1, 2)
DOUBTFUL = 10_000


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell of the table.

    Attributes:
        dataset: "fashion_mnist", "mnist" or "newsgroups".
        kind: of noise: "none", or "sym-", "class-" or "feat-" and a percentage.
        trusted: number of examples with right labels.
        seed: of the sample of rows, the noise and the networks.
    """

    dataset: str
    kind: str
    trusted: int
    seed: int

    @classmethod
    def of(cls, text: str) -> "Cell":
        dataset, kind, trusted, seed = text.split("/")
        return cls(dataset, kind, int(trusted), int(seed))

    def __str__(self) -> str:
        return f"{self.dataset}/{self.kind}/{self.trusted}/{self.seed}"


class Data(NamedTuple):
    """The examples of a cell.

    Attributes:
        x, given, true: the doubtful examples, their labels, and the right ones.
        sure_x, sure_y: the trusted examples.
        test_x, test_y: those that measure.
        network: number of a seed -> a new network of logits.
        augment: batch -> batch, or `None`.
        classes: their number.
    """

    x: np.ndarray
    given: np.ndarray
    true: np.ndarray
    sure_x: np.ndarray
    sure_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    network: Callable[[int], keras.Model]
    augment: Callable | None
    classes: int


def all_cells() -> list[Cell]:
    """All of them; the first seed of everything comes first."""
    images = [
        Cell(dataset, kind, trusted, seed)
        for seed in SEEDS
        for dataset in IMAGES
        for kind in KINDS
        for trusted in TRUSTED
    ]
    texts = [
        Cell(TEXTS, "sym-40", trusted, seed) for seed in SEEDS for trusted in TRUSTED
    ]
    return sorted(images + texts, key=lambda cell: cell.seed)


def load(cell: Cell) -> Data:
    """The data of a cell; the same in every process."""
    random = np.random.default_rng(1000 + cell.seed)
    if cell.dataset == TEXTS:
        return _texts(cell, random)
    x, y, _, _ = _images(cell.dataset)
    order = random.permutation(50_000)
    sure, rows = order[: cell.trusted], order[cell.trusted :][:DOUBTFUL]
    given = _polluted(cell, x[rows], y[rows], 10, random)
    return _of_images(cell.dataset, rows, given, sure, cnn)


def _of_images(
    dataset: str,
    rows: np.ndarray,
    given: np.ndarray,
    sure: np.ndarray,
    network: Callable[[int], keras.Model],
) -> Data:
    """The data of some training images and all test images."""
    x, y, test_x, test_y = _images(dataset)
    x, sure_x, test_x = (_scaled(part) for part in (x[rows], x[sure], test_x))
    augment, classes = shifted, 10
    true, sure_y = y[rows], y[sure]
    return Data(
        x, given, true, sure_x, sure_y, test_x, test_y, network, augment, classes
    )


def cnn(seed: int) -> keras.Model:
    """A CNN with 108,618 parameters."""
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(16, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dense(10),
        ]
    )


def word_network(length: int, vocabulary: int, seed: int) -> keras.Model:
    """The mean of the embedded words, and two layers."""
    keras.utils.set_random_seed(seed)
    layers, ops = keras.layers, keras.ops
    words = keras.Input((length,), dtype="int32")
    there = ops.expand_dims(ops.cast(ops.not_equal(words, 0), "float32"), -1)
    embedded = layers.Embedding(vocabulary, 64)(words)
    mean = ops.sum(embedded * there, axis=1) / ops.maximum(ops.sum(there, axis=1), 1)
    return keras.Model(words, layers.Dense(20)(layers.Dense(64, "relu")(mean)))


def shifted(x: tf.Tensor) -> tf.Tensor:
    """Every image moved by up to two pixels in both directions."""
    padded = tf.pad(x, [[0, 0], [2, 2], [2, 2], [0, 0]])

    def pixels() -> tf.Tensor:
        first = tf.random.uniform([tf.shape(x)[0], 1], 0, 5, tf.int32)
        return first + tf.range(28)[None]

    rows = tf.gather(padded, pixels(), axis=1, batch_dims=1)
    return tf.gather(rows, pixels(), axis=2, batch_dims=1)


def _scaled(x: np.ndarray) -> np.ndarray:
    return (x / 255.0).astype("float32").reshape(-1, 28, 28, 1)


@functools.cache
def _images(name: str) -> tuple[np.ndarray, ...]:
    import tensorflow_datasets as tfds

    parts = tfds.load(name, batch_size=-1, as_supervised=True, download=False)
    found = []
    for part in ("train", "test"):
        x, y = parts[part]
        found += [np.asarray(x), np.asarray(y).astype(int)]
    return tuple(found)


def _texts(cell: Cell, random: np.random.Generator) -> Data:
    from sklearn.datasets import fetch_20newsgroups

    from tfbilevel._jobs.default_networks import text_layer

    def part(subset: str) -> tuple[np.ndarray, np.ndarray]:
        found = fetch_20newsgroups(subset=subset, download_if_missing=False)
        return np.array(found.data, object), np.asarray(found.target)

    (texts, y), (test_texts, test_y) = part("train"), part("test")
    order = random.permutation(len(y))
    sure, rows = order[: cell.trusted], order[cell.trusted :][:DOUBTFUL]
    layer = text_layer(texts[rows])

    def words(some: np.ndarray) -> np.ndarray:
        pieces = [some[i : i + 500].astype(str) for i in range(0, len(some), 500)]
        return np.concatenate([np.asarray(layer(tf.constant(p))) for p in pieces])

    x = words(texts)
    return Data(
        x[rows],
        _polluted(cell, x[rows], y[rows], 20, random),
        y[rows],
        x[sure],
        y[sure],
        words(test_texts),
        test_y,
        functools.partial(word_network, x.shape[1], layer.vocabulary_size()),
        None,
        20,
    )


def _polluted(
    cell: Cell, x: np.ndarray, y: np.ndarray, classes: int, random: np.random.Generator
) -> np.ndarray:
    """The given labels of a cell.

    "sym": another class, all equally likely. "class": class k becomes k + 1. "feat":
    type I of Zhang et al. 2021, "Learning with feature-dependent label noise: a
    progressive approach": a linear classifier's best other class, the likelier the less
    sure that classifier is.
    """
    given = y.copy()
    if cell.kind == "none":
        return given
    kind, percent = cell.kind.split("-")
    rate = int(percent) / 100
    if kind == "feat":
        return _confused(cell.dataset, x, y, rate, random)
    wrong = random.random(len(y)) < rate
    step = random.integers(1, classes, wrong.sum()) if kind == "sym" else 1
    given[wrong] = (y[wrong] + step) % classes
    return given


def _confused(
    dataset: str, x: np.ndarray, y: np.ndarray, rate: float, random: np.random.Generator
) -> np.ndarray:
    logits = _linear(dataset).decision_function(x.reshape(len(x), -1) / 255.0)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    order, rows = np.argsort(-p, axis=1), np.arange(len(y))
    first, second = order[:, 0], order[:, 1]
    unsure = 0.5 - 0.5 * (p[rows, first] - p[rows, second]) ** 2
    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        small = np.clip(unsure * middle, 0, 1).mean() < rate
        low, high = (middle, high) if small else (low, middle)
    wrong = random.random(len(y)) < np.clip(unsure * high, 0, 1)
    return np.where(wrong, np.where(first == y, second, first), y)


@functools.cache
def _linear(dataset: str):
    """Softmax regression on the last 10,000 training images, which no cell uses."""
    from sklearn.linear_model import LogisticRegression

    x, y, _, _ = _images(dataset)
    last = x[-10_000:].reshape(10_000, -1) / 255.0
    return LogisticRegression(max_iter=300, C=0.05).fit(last, y[-10_000:])


def published(seed: int) -> tuple[Data, np.ndarray]:
    """The published split: MNIST, 5,000 doubtful, half of them sampled again from all
    classes, 5,000 trusted, and the 10,000 test images; 784-300-10. And a mask of the
    labels that were not sampled again."""
    from data_prep import label_noise

    labels = _images("mnist")[1]
    random = np.random.default_rng(1000 + seed)
    order = random.permutation(len(labels))
    rows, sure = order[:5000], order[5000:10_000]
    given, clean = label_noise.pollute(labels[rows], 0.5, random, "published")
    data = _of_images("mnist", rows, given, sure, _two_layers)
    return data, clean


def _two_layers(seed: int) -> keras.Model:
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Flatten(),
            layers.Dense(300, activation="relu"),
            layers.Dense(10),
        ]
    )
