"""Creating variables while TensorFlow traces a function."""

import concurrent.futures
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def outside_traces(make: Callable[[], T]) -> T:
    """The result of `make()`, called outside of any trace.

    A `tf.function` that sees a variable being created is traced a second time.
    `tf.init_scope` creates variables eagerly but does not hide them from the trace;
    another thread does.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()
