"""20 Newsgroups in scikit-learn's format: sparse documents in three parts.

Documents are word counts, scaled to length 1, as returned by
`sklearn.datasets.fetch_20newsgroups_vectorized`. Its training part is divided into two
halves, training and validation, with the same proportions of classes. Generated
documents come in the same form.
"""

import os
import pathlib
import pickle
import zlib
from typing import Any, NamedTuple

import numpy as np
import sklearn.datasets
import sklearn.feature_extraction.text
import sklearn.model_selection
import sklearn.preprocessing
import tensorflow as tf

from data_prep import documents, network
from data_prep.errors import one_line

DATASETS = ("20news", "generated")
BY_HAND = "python -c 'import sklearn.datasets as d; d.fetch_20newsgroups_vectorized()'"


class Part(NamedTuple):
    """Some of the documents.

    Attributes:
        features: [documents, features] float32, a SciPy CSR matrix, rows of length 1.
        labels: [documents] int32.
    """

    features: Any
    labels: np.ndarray


class Data(NamedTuple):
    train: Part
    validation: Part
    test: Part
    words: np.ndarray
    classes: int


def load(
    folder: pathlib.Path | None,
    features: str,
    most: int | None,
    seed: int,
    download: bool | None = None,
    dataset: str = "20news",
) -> Data:
    """The three parts; the split depends only on the seed.

    Args:
        folder: scikit-learn's data folder; `None`: its default.
        features: "counts", scaled to length 1, or "tfidf".
        most: number of features to keep, the most frequent ones; `None`: all.
        seed: the seed of the split.
        download: whether scikit-learn downloads a data set that is missing.
        dataset: one of DATASETS.

    Raises:
        FileNotFoundError: if scikit-learn does not find the data set, and does not
            download it.
        ValueError: if it cannot be split.
    """
    if dataset == "generated":
        corpus = generated(features)
    else:
        corpus = fetch(folder, features, download)
    train, test, words, classes = reduced(*corpus, features, most)
    first, second = sklearn.model_selection.train_test_split(
        np.arange(len(train.labels)),
        test_size=0.5,
        stratify=train.labels,
        random_state=seed,
    )
    return Data(take(train, first), take(train, second), test, words, classes)


def home_of(folder: pathlib.Path | None = None) -> pathlib.Path:
    """The given folder, or where scikit-learn looks by default."""
    default = os.environ.get("SCIKIT_LEARN_DATA", "~/scikit_learn_data")
    return pathlib.Path(folder or default).expanduser()


def is_there(dataset: str) -> bool:
    """Whether a data set is where scikit-learn looks by default."""
    files = ("20news-bydate*.pkz", "20newsgroup_vectorized*.pkl")
    found = any(any(home_of().glob(name)) for name in files)
    return dataset != "20news" or found


def generated(features: str) -> tuple[Part, Part, np.ndarray, int]:
    """As `fetch`, of generated documents."""
    parts = []
    for name in ("train", "test"):
        counts, labels = documents.make(name)
        if features == "counts":
            counts = sklearn.preprocessing.normalize(counts)
        parts.append(Part(counts, labels))
    return *parts, documents.words(), documents.CLASSES


def fetch(
    folder: pathlib.Path | None, features: str, download: bool | None = None
) -> tuple[Part, Part, np.ndarray, int]:
    """Both official parts, the feature names and the number of classes."""
    home = home_of(folder)
    try:
        if download and not any(home.glob("20news*")):
            network.require()
        if not (home.is_dir() or download):  # otherwise scikit-learn would create it
            raise FileNotFoundError
        train, test = (
            sklearn.datasets.fetch_20newsgroups_vectorized(
                subset=subset,
                data_home=str(home),
                download_if_missing=bool(download),
                normalize=features == "counts",
            )
            for subset in ("train", "test")
        )
    except PermissionError as error:
        raise FileNotFoundError(
            f"scikit-learn stores its vectorised copy with the data, but {home} "
            "is not writable. Copy the folder and set SCIKIT_LEARN_DATA to the copy"
        ) from error
    except (EOFError, pickle.UnpicklingError, zlib.error, ValueError) as error:
        raise ValueError(
            f"a file of 20 Newsgroups in {home} is damaged ({error}). Delete "
            "20newsgroup_vectorized*.pkl there, or copy the folder again"
        ) from None
    except OSError as error:
        if download:
            raise FileNotFoundError(
                f"20 Newsgroups could not be downloaded ({one_line(error)}). On a "
                f"machine with a network run {BY_HAND}, and point --data-dir at a copy "
                "of the folder that it makes"
            ) from None
        raise FileNotFoundError(
            f"20 Newsgroups is not in {home}. Set SCIKIT_LEARN_DATA (or --data-dir) to "
            f"a folder that has it, or fetch it with --download, or by {BY_HAND}"
        ) from error
    parts = Part(train.data, train.target), Part(test.data, test.target)
    return *parts, np.asarray(train.feature_names), len(train.target_names)


def reduced(
    train: Part,
    test: Part,
    words: np.ndarray,
    classes: int,
    features: str,
    most: int | None,
) -> tuple[Part, Part, np.ndarray, int]:
    """The most frequent features of both parts, weighed as asked for."""
    counts, test_counts = train.features, test.features
    if most is not None:
        frequent = np.argsort(-counts.getnnz(axis=0), kind="stable")
        kept = np.sort(frequent[:most])
        counts, test_counts = counts[:, kept], test_counts[:, kept]
        words = words[kept]
    if features == "tfidf":
        weigh = sklearn.feature_extraction.text.TfidfTransformer().fit(counts)
        counts, test_counts = map(weigh.transform, (counts, test_counts))
    return (
        Part(counts.tocsr().astype("float32"), train.labels.astype("int32")),
        Part(test_counts.tocsr().astype("float32"), test.labels.astype("int32")),
        words,
        classes,
    )


def tensors(part: Part) -> tuple[tf.SparseTensor, tf.Tensor]:
    """All documents of a part as one batch: (features, labels)."""
    entries = part.features.tocoo()
    indices = np.stack([entries.row, entries.col], axis=1).astype("int64")
    features = tf.SparseTensor(indices, entries.data, part.features.shape)
    return features, tf.constant(part.labels)


def take(part: Part, numbers: np.ndarray) -> Part:
    return Part(part.features[numbers], part.labels[numbers])


class Minibatches:
    """Endless minibatches of a part's documents, in a new order in every pass.

    Minibatch n depends only on the seed and n, so a resumed run gets the same ones as
    an uninterrupted run. The last documents of a pass that do not fill a minibatch are
    left out.
    """

    def __init__(self, part: Part, size: int, seed: tuple[int, int]):
        self.part, self.size, self.seed = part, size, seed
        self.passes: dict[int, np.ndarray] = {}

    def documents(self, number: int) -> np.ndarray:
        """The numbers of the documents in a minibatch, [size]."""
        each_pass, within = divmod(number, len(self.part.labels) // self.size)
        if each_pass not in self.passes:
            generator = np.random.default_rng([*self.seed, each_pass])
            order = generator.permutation(len(self.part.labels))
            self.passes = {each_pass: order}
        start = within * self.size
        return self.passes[each_pass][start : start + self.size]

    def stack(self, first: int, count: int) -> tuple[tf.SparseTensor, np.ndarray]:
        """`count` minibatches as one batch: features [count, size, features]."""
        chosen = np.stack([self.documents(first + i) for i in range(count)])
        rows = self.part.features[chosen.ravel()]
        entries = rows.tocoo()
        batch, row = np.divmod(entries.row, self.size)
        indices = np.stack([batch, row, entries.col], axis=1).astype("int64")
        shape = (count, self.size, rows.shape[1])
        features = tf.SparseTensor(indices, entries.data, shape)
        return features, self.part.labels[chosen]
