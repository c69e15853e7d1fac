"""The few-shot instance that all contestants read. Only NumPy is imported here."""

import pathlib
from typing import NamedTuple

import numpy as np

METHODS = ("maml", "anil")
FILTERS, WAYS, SIDE = 64, 5, 28
INNER_RATE, UPPER_RATE, EPSILON = 0.1, 1e-3, 1e-5


class Instance(NamedTuple):
    """A meta-batch and a network.

    Attributes:
        support, query: images, [tasks, n, 28, 28, 1], float32.
        support_labels, query_labels: [tasks, n], int32.
        weights: for each of four blocks the kernel [3, 3, in, 64], bias, scale and
            shift; for the head the kernel [64, 5] and the bias.
        steps: inner steps.
    """

    support: np.ndarray
    support_labels: np.ndarray
    query: np.ndarray
    query_labels: np.ndarray
    weights: list[np.ndarray]
    steps: int


def make(tasks: int, shots: int, queries: int, steps: int) -> Instance:
    """Random strokes as images; weights as initialised in the networks."""
    generator = np.random.default_rng(0)

    def images(each: int) -> tuple[np.ndarray, np.ndarray]:
        classes = generator.uniform(size=(tasks, WAYS, 1, SIDE, SIDE, 1))
        noise = generator.normal(0, 0.2, (tasks, WAYS, each, SIDE, SIDE, 1))
        # No two pixels are equal, because ties in pooling have several derivatives.
        pixels = ((classes > 0.8) + noise).astype("float32")
        labels = np.tile(np.repeat(np.arange(WAYS), each), (tasks, 1)).astype("int32")
        return pixels.reshape(tasks, WAYS * each, SIDE, SIDE, 1), labels

    weights = []
    for channels in (1, FILTERS, FILTERS, FILTERS):
        edge = np.sqrt(6 / (9 * (channels + FILTERS)))
        kernel = generator.uniform(-edge, edge, (3, 3, channels, FILTERS))
        scale = generator.uniform(0, 1, FILTERS)
        weights += [kernel, np.zeros(FILTERS), scale, np.zeros(FILTERS)]
    edge = FILTERS**-0.5
    weights.append(generator.uniform(-edge, edge, (FILTERS, WAYS)))
    weights.append(generator.uniform(-edge, edge, WAYS))
    weights = [leaf.astype("float32") for leaf in weights]
    return Instance(*images(shots), *images(queries), weights, steps)


def save(instance: Instance, path: pathlib.Path) -> None:
    arrays = instance._asdict()
    arrays |= {f"weight_{i}": leaf for i, leaf in enumerate(arrays.pop("weights"))}
    np.savez(path, **arrays)


def load(path: pathlib.Path) -> Instance:
    with np.load(path) as arrays:
        count = sum(name.startswith("weight_") for name in arrays.files)
        fields = {name: arrays[name] for name in Instance._fields if name in arrays}
        fields["weights"] = [arrays[f"weight_{i}"] for i in range(count)]
        fields["steps"] = int(fields["steps"])
        return Instance(**fields)


def flat(gradients: list[np.ndarray]) -> np.ndarray:
    """All entries as one vector, in the weights' order and layout."""
    return np.concatenate([np.asarray(g, "float64").ravel() for g in gradients])
