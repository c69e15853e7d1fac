"""The three jobs on which `tuning.py` compares the tuner with searches."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import tfbilevel as tb

hyper, layers = tb.hyper, keras.layers


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is trained, on what, and what is searched.

    Attributes:
        network: () -> a new network that ends with logits.
        search: () -> the hyperparameters with their ranges.
        data: seed -> the examples of training, validation and test, (x, y) each.
        epochs, batch_size, rate: of one training, by Adam with a cosine decay.
        against: the searches it is compared with.
    """

    network: Callable[[], keras.Model]
    search: Callable[[], list]
    data: Callable[[int], tuple]
    epochs: int
    batch_size: int
    rate: float
    against: tuple[str, ...]


class BlockScale(hyper.InputScale):
    """One factor for each block of the columns, of the same width."""

    def __init__(self, blocks: int, range: tuple[float, float]):
        super().__init__("per-feature", 1.0, range, "block_scale")
        self.blocks = blocks

    def entries(self, setting: Any) -> Sequence[str]:
        return [str(k) for k in range(self.blocks)]

    def features(self, value: Any, x: Any, setting: Any) -> Any:
        return x * tf.repeat(value, setting.shape[-1] // self.blocks)

    def built_in(self, value: np.ndarray, network: keras.Model) -> keras.Model:
        width = network.input_shape[-1] // self.blocks
        return super().built_in(np.repeat(value, width), network)


def sequential(shape: tuple, *parts: Any) -> keras.Model:
    return keras.Sequential([keras.Input(shape), *parts])


def images() -> Problem:
    """A CNN of 118,000 weights on 5,000 images of FashionMNIST; 13 numbers."""

    def network() -> keras.Model:
        return sequential(
            (28, 28, 1),
            layers.Conv2D(16, 3, strides=2, activation="relu", name="conv1"),
            layers.Dropout(0.1, name="drop1"),
            layers.Conv2D(32, 3, strides=2, activation="relu", name="conv2"),
            layers.Dropout(0.1, name="drop2"),
            layers.Flatten(),
            layers.Dense(96, activation="relu", name="dense1"),
            layers.Dropout(0.1, name="drop3"),
            layers.Dense(10, name="dense2"),
        )

    def search() -> list:
        return [
            hyper.L2("per-layer"),
            hyper.LabelSmoothing(),
            hyper.Dropout("per-layer"),
            hyper.Brightness(),
            hyper.Contrast(),
            hyper.Noise(),
            hyper.Shift(),
            hyper.Mixup(),
        ]

    def data(seed: int) -> tuple:
        import tensorflow_datasets as tfds

        parts = tfds.as_numpy(tfds.load("fashion_mnist", batch_size=-1))
        (x, y), test = (
            ((p["image"] / 255.0).astype("float32"), p["label"].astype(int))
            for p in (parts["train"], parts["test"])
        )
        rows = np.random.default_rng(seed).permutation(len(x))
        train, held = rows[:5000], rows[5000:6000]
        return (x[train], y[train]), (x[held], y[held]), test

    against = ("random", "bayesian")
    return Problem(network, search, data, 20, 64, 3e-3, against)


def table() -> Problem:
    """A network of two hidden layers on scikit-learn's digits, 64 columns in 8 blocks
    (the rows of the image); 600 rows for training, 300 for validation; 16 numbers."""

    def network() -> keras.Model:
        return sequential(
            (64,),
            layers.Dense(128, activation="relu", name="dense1"),
            layers.Dropout(0.1, name="drop1"),
            layers.Dense(64, activation="relu", name="dense2"),
            layers.Dropout(0.1, name="drop2"),
            layers.Dense(10, name="dense3"),
        )

    def search() -> list:
        return [
            hyper.L2("per-layer"),
            hyper.LabelSmoothing(),
            hyper.Dropout("per-layer"),
            hyper.Noise(),
            hyper.Mixup(),
            BlockScale(8, (0.1, 10.0)),
        ]

    def data(seed: int) -> tuple:
        from sklearn.datasets import load_digits

        found = load_digits()
        x, y = (found.data / 16).astype("float32"), found.target
        rows = np.random.default_rng(seed).permutation(len(x))
        parts = rows[:600], rows[600:900], rows[900:]
        return tuple((x[part], y[part]) for part in parts)

    return Problem(network, search, data, 27, 64, 1e-2, ("randomized", "halving"))


def text() -> Problem:
    """A linear classifier of 20 Newsgroups by the TF-IDF of 2,048 words, in 8 blocks
    from the most to the least frequent; 1,500 posts for training, 750 for validation;
    30 numbers."""

    def network() -> keras.Model:
        return sequential((2048,), layers.Dense(20, name="dense"))

    def search() -> list:
        return [
            hyper.L2("per-layer"),
            hyper.LabelSmoothing(),
            BlockScale(8, (0.1, 10.0)),
            hyper.ClassWeights(),
        ]

    def data(seed: int) -> tuple:
        from sklearn.datasets import fetch_20newsgroups
        from sklearn.feature_extraction.text import TfidfVectorizer

        posts, test = (
            fetch_20newsgroups(subset=part, download_if_missing=False)
            for part in ("train", "test")
        )
        rows = np.random.default_rng(seed).permutation(len(posts.data))
        train, held = rows[:1500], rows[1500:2250]
        turn = TfidfVectorizer(max_features=2048, sublinear_tf=True, dtype=np.float32)
        counts = turn.fit_transform([posts.data[k] for k in train])
        order = np.argsort(-np.asarray((counts > 0).sum(axis=0))[0], kind="stable")

        def part(texts: list[str], labels: np.ndarray) -> tuple:
            return np.asarray(turn.transform(texts).todense())[:, order], labels

        return (
            part([posts.data[k] for k in train], posts.target[train]),
            part([posts.data[k] for k in held], posts.target[held]),
            part(test.data, test.target),
        )

    return Problem(network, search, data, 20, 64, 3e-2, ("random", "bayesian"))


PROBLEMS = {"images": images, "table": table, "text": text}
