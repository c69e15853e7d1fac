"""Making variables while TensorFlow traces a function."""

import concurrent.futures
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def outside_traces(make: Callable[[], T]) -> T:
    """What `make()` returns, called where nothing is being traced.

    A `tf.function` that sees variables being made is traced a second time.
    `tf.init_scope` makes them eagerly but does not hide them; another thread does.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()
