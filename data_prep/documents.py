"""Generated documents, for experiments on text where there is no text.

Every class has words of its own; all classes share the common words, which are most of
a document and say nothing about its class. A few words in a document are of another
class than its label's. The documents are always the same ones.
"""

from typing import NamedTuple

import numpy as np
from scipy import sparse

CLASSES, DOCUMENTS = 20, {"train": 2000, "test": 1000}
OWN, COMMON = 20, 1600  # words of each class, words that all classes share
LENGTH, TOPICAL, ASTRAY = (
    60,
    0.15,
    0.3,
)  # words, share of classes' words, of which wrong


class Documents(NamedTuple):
    """Word counts, [documents, words], a SciPy CSR matrix, and labels, [documents]."""

    counts: sparse.csr_matrix
    labels: np.ndarray


def words() -> np.ndarray:
    """The names of the words: class 0's, class 1's, ..., the common ones."""
    own = [f"class{label}-{word}" for label in range(CLASSES) for word in range(OWN)]
    return np.array(own + [f"common-{word}" for word in range(COMMON)])


def make(part: str) -> Documents:
    """The documents of one part, "train" or "test"."""
    count = DOCUMENTS[part]
    generator = np.random.default_rng(list(DOCUMENTS).index(part))
    labels = np.arange(count) % CLASSES
    shape = (count, LENGTH)
    astray = generator.random(shape) < ASTRAY
    topic = np.where(astray, generator.integers(0, CLASSES, shape), labels[:, None])
    own = topic * OWN + generator.integers(0, OWN, shape)
    # Frequent and rare words: the k-th has a share of about 1 / (k + 30).
    shares = 1 / (np.arange(COMMON) + 30)
    common = generator.choice(COMMON, shape, p=shares / shares.sum())
    topical = generator.random(shape) < TOPICAL
    numbers = np.where(topical, own, CLASSES * OWN + common)
    rows = np.repeat(np.arange(count), LENGTH)
    entries = (np.ones(count * LENGTH), (rows, numbers.ravel()))
    size = (count, CLASSES * OWN + COMMON)
    return Documents(sparse.csr_matrix(entries, size), labels)
