"""TensorFlow: an iterator that waits for a Python generator cannot be deleted late."""

import gc
from collections.abc import Callable
from typing import Any


def without_frames(function: Callable[[], Any], kinds: tuple) -> Any:
    """What the function returns; errors of these kinds lose the frames behind them.

    These frames, and a cycle of Keras's, hold the dataset's iterator. Deleting one that
    waits for a Python generator never ends once Python shuts down: the generator's
    thread can enter Python no more.

    Args:
        function: called once.
        kinds: of exceptions.
    """
    try:
        return function()
    except kinds as error:
        error = error.with_traceback(None)
        gc.collect()
        raise error from None
