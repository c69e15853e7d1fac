"""Optimizers as the published programs set them."""

from typing import Any

import keras


def adam(rate: Any) -> keras.optimizers.Adam:
    """Adam with the epsilon of PyTorch and TensorFlow 1.

    Gradients of example weights are averages over thousands of examples: they come
    near Keras's 1e-7, which would then be part of the step.
    """
    return keras.optimizers.Adam(rate, epsilon=1e-8)
