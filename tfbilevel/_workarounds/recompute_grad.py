"""`tf.recompute_grad` and `keras.remat`, which have a first derivative only.

Where the library differentiates, the wrapped function is called directly: nothing is
computed twice, and the memory is that of the function without the wrapper.
"""

import inspect
from typing import Any

from tensorflow.python.ops import custom_gradient

from tfbilevel._workarounds.swap import Replacement

RECOMPUTED = "recompute_grad.<locals>.inner"  # the name of TensorFlow's closure


def _plain(decorated: Any) -> Any:
    def call(function: Any, arguments: Any, keywords: Any) -> Any:
        if getattr(function, "__qualname__", None) == RECOMPUTED:
            original = inspect.getclosurevars(function).nonlocals["f"]
            return original(*arguments, **keywords)
        return decorated(function, arguments, keywords)

    return call


REPLACEMENTS = [
    Replacement(custom_gradient, name, _plain(getattr(custom_gradient, name)))
    for name in ("_eager_mode_decorator", "_graph_mode_decorator")
]
