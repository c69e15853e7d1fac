"""Strengths of augmentations, each differentiable in its strength.

TensorFlow's operations that resample images have no second derivatives, so `Shift`
consists of matrix products.
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tfbilevel._jobs.tuning.hyperparameter import Hyperparameter, Setting


class Augmentation(Hyperparameter):
    """A random change of the training inputs x, with a strength v.

    Args:
        start, range, name: see `tb.hyper.Hyperparameter`; on a linear scale.
    """

    images = True  # whether the examples must be images, [height, width, channels]

    def __init__(
        self,
        start: float = 0.1,
        range: tuple[float, float] = (0.0, 1.0),
        name: str | None = None,
    ):
        super().__init__(start, range, name)

    def entries(self, setting: Setting) -> Sequence[str] | None:
        if self.images and len(setting.shape) != 3:
            raise ValueError(
                f"`search` must hold {self.name} for images only, [height, width, "
                f"channels]. Leave it out. Received: examples of shape {setting.shape}"
            )
        return None


class Brightness(Augmentation):
    r"""x + v s e: one e, uniform in (-1, 1), for each image.

    s is the standard deviation of the training inputs.

    Args:
        start, range, name: see `tb.hyper.Hyperparameter`; on a linear scale.
    """

    def examples(self, value: Any, x: Any, y: Any, setting: Setting) -> tuple[Any, Any]:
        return x + value * setting.deviation * _uniform(x), y


class Contrast(Augmentation):
    r"""m + (x - m) exp(v e): one e, uniform in (-1, 1), for each image of mean m.

    Args:
        start, range, name: see `tb.hyper.Hyperparameter`; on a linear scale.
    """

    def examples(self, value: Any, x: Any, y: Any, setting: Setting) -> tuple[Any, Any]:
        mean = tf.reduce_mean(x, axis=[1, 2, 3], keepdims=True)
        return mean + (x - mean) * tf.exp(value * _uniform(x)), y


class Noise(Augmentation):
    r"""x + v s e: one e ~ N(0, 1) for each number; s as for `Brightness`.

    For examples of any shape.

    Args:
        start, range, name: see `tb.hyper.Hyperparameter`; on a linear scale.
    """

    images = False

    def examples(self, value: Any, x: Any, y: Any, setting: Setting) -> tuple[Any, Any]:
        noise = tf.random.normal(tf.shape(x), dtype=x.dtype)
        return x + value * setting.deviation * noise, y


class Shift(Augmentation):
    r"""Images moved by (v e, v e') pixels, e and e' uniform in (-1, 1), bilinear.

    Row i becomes sum_j max(0, 1 - |i + v e - j|) row_j, and columns likewise; what
    comes from outside is zero. The weights are piecewise linear in v.

    Args:
        start, range, name: see `tb.hyper.Hyperparameter`; in pixels, on a linear scale.
    """

    def __init__(
        self,
        start: float = 0.5,
        range: tuple[float, float] = (0.0, 4.0),
        name: str | None = None,
    ):
        super().__init__(start, range, name)

    def examples(self, value: Any, x: Any, y: Any, setting: Setting) -> tuple[Any, Any]:
        height, width = setting.shape[:2]
        rows = _tents(height, value * _uniform(x)[..., 0])
        columns = _tents(width, value * _uniform(x)[..., 0])
        moved = tf.einsum("nij,njkc->nikc", rows, x)
        return tf.einsum("nlk,nikc->nilc", columns, moved), y


class Mixup(Augmentation):
    r"""(1 - v e) x + v e x', and the targets likewise, e uniform in (0, 1).

    x' is the example before x in the batch. v is the largest share of the other
    example. For examples of any shape.

    Args:
        start, range, name: see `tb.hyper.Hyperparameter`; on a linear scale.
    """

    images = False

    def __init__(
        self,
        start: float = 0.1,
        range: tuple[float, float] = (0.0, 0.5),
        name: str | None = None,
    ):
        super().__init__(start, range, name)

    def examples(self, value: Any, x: Any, y: Any, setting: Setting) -> tuple[Any, Any]:
        share = value * tf.random.uniform(tf.shape(x)[:1], dtype=x.dtype)

        def mixed(a: Any) -> Any:
            weight = tf.reshape(share, [-1] + [1] * (a.shape.rank - 1))
            return a + weight * (tf.roll(a, 1, axis=0) - a)

        return mixed(x), tf.nest.map_structure(mixed, y)


def _uniform(x: Any) -> Any:
    """One number in (-1, 1) for each image, shaped to multiply it."""
    shape = tf.stack([tf.shape(x)[0], 1, 1, 1])
    return tf.random.uniform(shape, -1.0, 1.0, x.dtype)


def _tents(size: int, shift: Any) -> Any:
    """max(0, 1 - |i + shift - j|), [n, size, size], for shifts [n, 1, 1]."""
    position = tf.range(size, dtype=shift.dtype)
    return tf.nn.relu(1 - tf.abs(position[:, None] + shift - position[None, :]))
