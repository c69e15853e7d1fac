"""Creating variables while TensorFlow traces a function."""

import concurrent.futures
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def outside_traces(make: Callable[[], T]) -> T:
    """The result of `make()`, called outside of any trace.

    TensorFlow traces a `tf.function` a second time if a variable was created during the
    first trace. `tf.init_scope` does not prevent that, although it creates variables
    eagerly. A new thread does, because no trace is active in it.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()
