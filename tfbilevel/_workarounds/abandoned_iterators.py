"""TensorFlow: deleting an iterator over a Python generator at shutdown hangs."""

import gc
from collections.abc import Callable
from typing import Any


def without_frames(function: Callable[[], Any], kinds: tuple) -> Any:
    """The function's result; errors of the given kinds lose their traceback frames.

    These frames, and a reference cycle in Keras, keep the dataset's iterator alive.
    If it waits for a Python generator, deleting it while Python shuts down never ends,
    because the generator's thread can no longer run Python code.

    Args:
        function: called once.
        kinds: the types of exceptions.
    """
    try:
        return function()
    except kinds as error:
        error = error.with_traceback(None)
        gc.collect()
        raise error from None
