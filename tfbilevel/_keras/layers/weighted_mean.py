"""The mean of weighted losses."""

from typing import Any

import tensorflow as tf


def one_loss_each(losses: Any) -> tf.Tensor:
    """Losses as [batch]; they may be a column, [batch, 1].

    Raises:
        ValueError: if they are not floating-point.
    """
    losses = tf.convert_to_tensor(losses)
    if not losses.dtype.is_floating:
        raise ValueError(
            "`losses` must be floating-point. "
            f"Received: losses of dtype {losses.dtype.name}"
        )
    return without_column(losses)


def without_column(values: tf.Tensor) -> tf.Tensor:
    """[batch, 1] as [batch]."""
    column = values.shape.rank == 2 and values.shape[1] == 1
    return tf.squeeze(values, axis=1) if column else values
