"""Examples as a command has read them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np


@dataclasses.dataclass(frozen=True)
class Data:
    """Examples with labels from one file or folder.

    Attributes:
        source: its name, for messages.
        shown: the examples as a reader sees them: a table, pictures or texts, [n, ...].
        inputs: what `Preparation.model` takes: an array, or column -> array [n, 1].
        labels: [n].
        names: of the pictures' files, [n]; else `None`.
    """

    source: str
    shown: Any
    inputs: Any
    labels: np.ndarray
    names: list[str] | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True)
class Preparation:
    """From raw examples to the numbers that a network is trained on.

    Attributes:
        kind: "tabular", "image" or "text", of `default_network`.
        model: raw inputs -> numbers, [n, ...].
        vocabulary: of texts, the number of words.
        note: a sentence about what the network sees.
    """

    kind: str
    model: keras.Model
    note: str
    vocabulary: int = 0


@dataclasses.dataclass(frozen=True)
class Source:
    """What a command works on.

    Attributes:
        data: the examples.
        trusted: other ones, whose labels are right; or `None`.
        prepare: () -> how they become numbers.
        corrected: labels [n] -> (name of the file, its writer): the input again, with
            other labels.
    """

    data: Data
    trusted: Data | None
    prepare: Callable[[], Preparation]
    corrected: Callable[[np.ndarray], tuple[str, Callable[[Any], None]]]
