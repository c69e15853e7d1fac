"""`keras.layers.SpectralNormalization` with the derivative of its power iteration.

Keras treats the singular vectors as constant. To first order that is right where they
have converged. After Keras's single iteration they have not, and second derivatives
need the derivatives of the singular vectors.
"""

from typing import Any

from keras.src.layers.normalization import spectral_normalization as layer

from tfbilevel._workarounds.swap import Replacement


class _Differentiable:
    """Keras's operations with a `stop_gradient` that does nothing."""

    def __init__(self, operations: Any):
        self._operations = operations

    def __getattr__(self, name: str) -> Any:
        return getattr(self._operations, name)

    def stop_gradient(self, value: Any) -> Any:
        return value


REPLACEMENTS = [Replacement(layer, "ops", _Differentiable(layer.ops))]
