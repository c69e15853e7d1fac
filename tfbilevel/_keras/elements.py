"""The batches of outer steps that `fit` and related methods take."""

import contextlib
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from tfbilevel._core.batches import Batches
from tfbilevel._keras.replicas.given import (
    is_given,
    require_given_for,
    specification_of_part,
)


def require_dataset_of_batches(x: Any, strategy: Any) -> None:
    """Raise unless `x` is a dataset of `tb.Batches` and not known to be empty.

    Args:
        x: may be distributed by the strategy.
        strategy: that of the model, or `None`.
    """
    if is_given(x):
        require_given_for(x, strategy)
        return
    if not isinstance(x, tf.data.Dataset) or not isinstance(x.element_spec, Batches):
        spec = getattr(x, "element_spec", type(x))
        raise ValueError(
            "`x` must be a tf.data.Dataset of tb.Batches, so that the levels cannot be "
            "swapped. Make it with tb.pair(upper_dataset, lower_dataset), or pass "
            "arrays to fit: fit((x, y), validation_data=(x_val, y_val)). "
            f"Received: x={spec}"
        )
    if int(x.cardinality()) == 0:
        raise empty(x)


def empty(x: Any) -> ValueError:
    return ValueError(
        "`x` must not be empty: there is no outer step to make. "
        f"Received: a dataset of 0 elements, {x.element_spec}"
    )


@contextlib.contextmanager
def not_empty(x: Any) -> Iterator[None]:
    """A context for reading the first element; it raises `empty` if there is none."""
    try:
        yield
    except (StopIteration, tf.errors.OutOfRangeError):
        raise empty(x) from None


def spec_of(x: Any) -> Batches:
    """The specification of a dataset's elements; of one part if it is distributed."""
    return specification_of_part(x.element_spec) if is_given(x) else x.element_spec


def one_of(x: Any) -> Any:
    """A dataset without the elements after the first; a distributed one has all."""
    return x if is_given(x) else x.take(1)


def first_of(x: tf.data.Dataset) -> Batches:
    """A dataset's first element."""
    first = next(iter(x), None)  # an unknown cardinality may be zero
    if first is None:
        raise empty(x)
    return first


def tensors(batches: Batches) -> Batches:
    """The batches with every number as a tensor."""
    return tf.nest.map_structure(
        lambda leaf: leaf if leaf is None or tf.is_tensor(leaf) else tf.constant(leaf),
        batches,
    )
