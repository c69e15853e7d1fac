"""Types of what problems, methods and solvers hand to one another."""

from collections.abc import Callable
from typing import Any, TypeAlias

import tensorflow as tf

# A tensor, or lists, tuples and dictionaries of tensors, as `tf.nest` takes them.
Nest: TypeAlias = Any
# What is carried from one outer step to the next: a nest.
State: TypeAlias = Any
# Name -> scalar tensor, or one value per task.
Metrics: TypeAlias = dict[str, tf.Tensor]
# (x, y, batch) -> scalar.
Loss: TypeAlias = Callable[[Nest, Nest, Nest], tf.Tensor]
