"""`keras.layers.SpectralNormalization` with the derivative of its power iteration.

Keras holds the singular vectors constant. That is right to first order where they have
converged; after its one iteration they have not, and second derivatives need theirs.
"""

from typing import Any

from keras.src.layers.normalization import spectral_normalization as layer

from tfbilevel._workarounds.swap import Replacement


class _Differentiable:
    """Keras's operations, of which none stops a gradient."""

    def __init__(self, operations: Any):
        self._operations = operations

    def __getattr__(self, name: str) -> Any:
        return getattr(self._operations, name)

    def stop_gradient(self, value: Any) -> Any:
        return value


REPLACEMENTS = [Replacement(layer, "ops", _Differentiable(layer.ops))]
