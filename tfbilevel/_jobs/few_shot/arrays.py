"""Labelled examples of a few-shot learner, checked and ordered by class."""

import dataclasses
from typing import Any

import numpy as np
import tensorflow as tf

from tfbilevel._jobs.few_shot.episodes import Sizes
from tfbilevel._jobs.labels import Classes, classes_of


@dataclasses.dataclass(frozen=True)
class Examples:
    """Examples ordered by class.

    Attributes:
        x: the examples, [n, ...].
        labels: int32 [n], ascending.
        classes: the classes, in sorted order.
        sizes: the number of examples of every class.
    """

    x: np.ndarray
    labels: np.ndarray
    classes: Classes
    sizes: np.ndarray


def examples_of(x: Any, y: Any, names: tuple[str, str] = ("x", "y")) -> Examples:
    """Checked examples.

    Args:
        x: an array; or a `tf.data.Dataset` of (x, y), batched or not.
        y: the labels; `None` for a dataset.
        names: what errors call them.

    Raises:
        ValueError: for examples that are no numbers or not finite, lengths that differ,
            labels that are none, or a class without any example.
    """
    x_name, y_name = names
    if isinstance(x, tf.data.Dataset):
        if y is not None:
            raise ValueError(
                f"`{y_name}` must be None if `{x_name}` is a dataset, which has the "
                f"labels. Received: {y_name} of type {type(y).__name__}"
            )
        x, y = _of_dataset(x, x_name)
    elif y is None:
        raise ValueError(
            f"`{y_name}` must be given: one label per row of `{x_name}`, unless that "
            f"is a tf.data.Dataset of (x, y). Received: {y_name}=None"
        )
    x = numbers(x, x_name)
    classes = classes_of(y, arguments=(y_name,))
    labels = classes.indices(y, y_name)
    if len(x) != len(labels):
        raise ValueError(
            f"`{x_name}` and `{y_name}` must have the same length, one label per row. "
            f"Received: {len(x)} rows and {len(labels)} labels"
        )
    sizes = np.bincount(labels, minlength=len(classes))
    if not sizes.all():  # one-hot columns
        raise ValueError(
            f"`{y_name}` must hold an example of every class. Remove the columns of "
            "classes without any, or give examples of them. Received: none of class "
            f"{classes.values[int(sizes.argmin())]}"
        )
    order = np.argsort(labels, kind="stable")
    return Examples(x[order], labels[order], classes, sizes)


def numbers(x: Any, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Examples as an array of finite numbers, [n, ...], of the known shape."""
    array = np.asarray(x)
    if array.dtype.kind not in "biuf" or array.ndim < 2 or not len(array):
        raise ValueError(
            f"`{name}` must be an array of numbers with an example per row, [n, ...]. "
            f"Received: shape {array.shape} of {array.dtype}"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        rows = np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(axis=1))
        raise ValueError(
            f"`{name}` must not hold NaN or infinity. Remove or fill these rows. "
            f"Received: {len(rows)} such rows, the first is {rows[0]}"
        )
    if shape is not None and array.shape[1:] != shape:
        raise ValueError(
            f"`{name}` must hold examples of the shape of training, {shape}. "
            f"Received: {array.shape[1:]}"
        )
    return array


def validation_examples(data: Any, shape: tuple[int, ...], sizes: Sizes) -> Examples:
    """The checked examples of `validation_data`."""
    pair = (data, None) if isinstance(data, tf.data.Dataset) else data
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ValueError(
            "`validation_data` must be (x, y), or a tf.data.Dataset of (x, y). "
            f"Received: {type(data).__name__}"
        )
    names = "validation_data[0]", "validation_data[1]"
    made = examples_of(pair[0], pair[1], names)
    numbers(made.x, names[0], shape)
    require_episodes(made, sizes, names)
    return made


def require_episodes(
    examples: Examples, sizes: Sizes, names: tuple[str, str] = ("x", "y")
) -> None:
    """Raise unless tasks of these sizes can be sampled from the examples."""
    ways, shots, queries = sizes
    if ways > len(examples.sizes):
        raise ValueError(
            f"`ways` must not exceed the number of classes of `{names[1]}`, "
            f"{len(examples.sizes)}. Take fewer ways, or give more classes. Received: "
            f"ways={ways}"
        )
    smallest = int(examples.sizes.argmin())
    if shots + queries > examples.sizes[smallest]:
        small = np.count_nonzero(examples.sizes < shots + queries)
        raise ValueError(
            f"every class of `{names[1]}` must have shots + queries examples, {shots} "
            f"+ {queries}. Take fewer queries, or remove smaller classes. Received: "
            f"class {examples.classes.values[smallest].item()!r} with "
            f"{examples.sizes[smallest]}, and {small} such classes in all"
        )


def _of_dataset(dataset: tf.data.Dataset, name: str) -> tuple[np.ndarray, np.ndarray]:
    spec = dataset.element_spec
    if not isinstance(spec, tuple) or len(spec) != 2:
        raise ValueError(
            f"`{name}` must be a dataset of (x, y), examples and labels. Received: "
            f"elements {spec}"
        )
    if not spec[1].shape.rank:  # a label of one example
        dataset = dataset.batch(1024)
    parts = list(dataset.as_numpy_iterator())
    if not parts:
        raise ValueError(f"`{name}` must have elements. Received: an empty dataset")
    xs, ys = zip(*parts, strict=True)
    return np.concatenate(xs), np.concatenate(ys)
