"""What all upper layers share: their precision."""

from typing import Any

import keras


class UpperLayer(keras.layers.Layer):
    """A layer that computes in the variables' precision and casts no input.

    Under a mixed policy that is float32, as in Keras's losses.
    """

    def __init__(self, dtype: Any = None, **keywords: Any):
        policy = keras.dtype_policies.get(dtype or keras.config.dtype_policy())
        super().__init__(dtype=policy.variable_dtype, autocast=False, **keywords)
