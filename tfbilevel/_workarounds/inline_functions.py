"""The user's `tf.function`s in code that the library evaluates.

A `tf.function` keeps what it was traced with: the weights of models, derivatives and
everything else that is not an argument. When the library evaluates a model at other
values of its weights, a cached trace would return wrong numbers. Therefore its Python
code is run instead, converted by AutoGraph if a graph is built and the function uses
AutoGraph.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf
from tensorflow.python.autograph.core import ag_ctx
from tensorflow.python.eager.polymorphic_function import (
    autograph_util,
    function_type_utils,
    polymorphic_function,
)
from tensorflow.python.eager.polymorphic_function.concrete_function import (
    ConcreteFunction,
)

from tfbilevel._workarounds.swap import Replacement, Swap

# Functions of these packages read no model, and some must be compiled: Keras compiles
# grouped convolutions.
STAY_COMPILED = {"tfbilevel", "tensorflow", "keras"}

_Function: Any = polymorphic_function.Function
_call = _Function.__call__
_call_traced = ConcreteFunction._call_flat


class _ThreadState(threading.local):
    """The open scopes of this thread, each with the variables it replaces."""

    def __init__(self) -> None:
        self.scopes: list[dict[int, str]] = []


_here = _ThreadState()


@contextlib.contextmanager
def functions_inline(variables: Sequence[keras.Variable] = ()) -> Iterator[None]:
    """While it is open, this thread runs the user's `tf.function`s as Python code.

    Args:
        variables: the variables whose values are replaced within. A function with a
            fixed trace (`get_concrete_function`, a loaded one) that reads one of them
            is rejected.

    Raises:
        ValueError: when such a function is called.
    """
    handles = {id(copy.handle): v.path for v in variables for copy in _copies(v)}
    with _functions.in_use():
        _here.scopes.append(handles)
        try:
            yield
        finally:
            _here.scopes.pop()


def _copies(variable: keras.Variable) -> tuple:
    """The variable on each device: TensorFlow's own handle has one in replicas only."""
    value = variable._value
    mirrored = isinstance(value, tf.distribute.DistributedValues)
    return value._values if mirrored else (value,)


def _call_inline(self: Any, *arguments: Any, **keywords: Any) -> Any:
    function = self.python_function
    module = getattr(function, "__module__", None) or ""
    if not _here.scopes or module.split(".")[0] in STAY_COMPILED:
        return _call(self, *arguments, **keywords)
    # Bind as tf.function does: defaults, arrays to tensors, an input signature.
    bound = function_type_utils.canonicalize_function_inputs(
        arguments, keywords, self._function_type, self._default_values, self._is_pure
    )
    if not self._autograph or tf.executing_eagerly():
        return function(*bound.args, **bound.kwargs)
    converted = autograph_util.py_func_from_autograph(
        function, self._experimental_autograph_options
    )
    # The library traces without AutoGraph, and the functions it calls would inherit
    # that.
    with ag_ctx.ControlStatusCtx(ag_ctx.Status.UNSPECIFIED, options=None):
        return converted(*bound.args, **bound.kwargs)


def _call_traced_checked(self: Any, tensors: Any, captured_inputs: Any) -> Any:
    for handle in captured_inputs:
        for scope in _here.scopes:
            if id(handle) in scope:
                raise ValueError(
                    "A loss called code that is decorated with tf.function and was "
                    "traced for good: it would read the stored weights, not those "
                    "that the loss is evaluated at. Call the Python function, or the "
                    "tf.function instead of its concrete function. Received: "
                    f"{self.name!r}, which reads {scope[id(handle)]!r}"
                )
    return _call_traced(self, tensors, captured_inputs)


_functions = Swap(
    [
        Replacement(_Function, "__call__", _call_inline),
        Replacement(ConcreteFunction, "_call_flat", _call_traced_checked),
    ]
)
