"""Lower directions that grow: a rate that is too large for the penalised loss."""

import tensorflow as tf

from tfbilevel._calculus.aliases import Metrics, State

TOO_LONG = 10.0


def grown(
    sizes: tuple[tf.Tensor, tf.Tensor], state: State
) -> tuple[Metrics, tf.Tensor]:
    """The metric `diverged`, and the length of the very first direction.

    Args:
        sizes: lengths of the first and of the last lower direction of this outer step;
            over tasks, one per task.
        state: the method's, with "step" and with "first", the length of the very first.
    """
    first = tf.where(state["step"] == 0, sizes[0], state["first"])
    long = sizes[1] > TOO_LONG * first
    return {"diverged": tf.cast(long, first.dtype)}, first
