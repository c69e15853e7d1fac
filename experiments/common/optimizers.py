"""Optimizers with the settings of the published programs."""

from typing import Any

import keras


def adam(rate: Any) -> keras.optimizers.Adam:
    """Adam with the epsilon of PyTorch and TensorFlow 1.

    Gradients of example weights are averages over thousands of examples. They can be as
    small as Keras's epsilon of 1e-7, which would then change the step.
    """
    return keras.optimizers.Adam(rate, epsilon=1e-8)
