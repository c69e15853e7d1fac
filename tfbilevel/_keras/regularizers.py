"""A network's own penalties: regularisers, and losses of its layers' `add_loss`."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

CHOICES = ("add", "ignore")


def with_own_losses(
    loss: Callable[[], Any], model: keras.layers.Layer, scope: keras.StatelessScope
) -> Any:
    """A loss plus those of `model.losses` that it has not added itself.

    The result is the same as with `+ sum(model.losses)` at the end of the loss. Terms
    that the loss already took from `losses` of the model or a layer, or by calling a
    `keras.regularizers.Regularizer`, are detected and left out.

    Args:
        loss: evaluates the loss; called once.
        model: the model of the loss's level.
        scope: the open scope that holds the variables' values and collects losses.
    """
    held = [v for v in model.trainable_variables if v.regularizer is not None]
    # Keras identifies losses of a model by the ids of tensors, also of earlier ones.
    model._clear_losses()
    taken = _Taken(held, model)
    with _noticing(taken, held):
        value = loss()
    made = [own for own in model.losses if any(own is one for one in scope.losses)]
    terms = [own for own in made if not taken.has(own)]
    terms += [v.regularizer(v) for v in held if id(v) not in taken.variables]
    if not terms or value is None:
        return value
    value = tf.convert_to_tensor(value)
    if value.shape.rank != 0 or not value.dtype.is_floating:
        return value  # not a valid loss; the differentiation raises the error
    try:
        return tf.add_n([value, *(_scalar(term, value.dtype) for term in terms)])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The losses of `{model.name}` (activity regularisers, add_loss) must be "
            "made outside of loops, mappings and separate tf.functions, where the loss "
            "can use them. Call the model outside of these, or add its losses inside "
            "and pass tb.BilevelModel(..., regularizers='ignore'). "
            f"Received: {error}"
        ) from error


def _scalar(term: Any, dtype: tf.DType) -> tf.Tensor:
    return tf.reduce_sum(tf.cast(term, dtype))


class _Taken:
    """The penalties of a model that a loss used while it was evaluated.

    Attributes:
        variables: ids of the variables whose regulariser was called.
    """

    def __init__(self, held: list, model: keras.layers.Layer):
        self.variables: set[int] = set()
        self._held, self._losses = held, []
        layers = model._flatten_layers()
        self._of_activities = {id(one.activity_regularizer) for one in layers}

    def has(self, loss: Any) -> bool:
        return any(loss is one for one in self._losses)

    def read(self, layer: keras.layers.Layer, losses: list) -> None:
        """Record that `layer.losses` was read."""
        self._losses += losses
        self.variables |= {id(v) for v in layer.trainable_variables}

    def called(self, regularizer: Any, argument: Any) -> None:
        """Record that a regulariser was called with a variable, its value or other."""
        mine = [v for v in self._held if v.regularizer is regularizer]
        exactly = [v for v in mine if argument is v or argument is v.value]
        if exactly or id(regularizer) not in self._of_activities:
            self.variables |= {id(v) for v in exactly or mine}


_threads = threading.local()  # .taken: penalties used by the thread's current losses


def _all_taken() -> list[_Taken]:
    return getattr(_threads, "taken", [])


@contextlib.contextmanager
def _noticing(taken: _Taken, held: list) -> Iterator[None]:
    """While it is open, this thread's uses of penalties are recorded."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_replaced(keras.layers.Layer, "losses", _noted_losses))
        for kind in {type(v.regularizer) for v in held}:
            if issubclass(kind, keras.regularizers.Regularizer):
                stack.enter_context(_replaced(kind, "__call__", _noted_call))
        outer = _all_taken()
        _threads.taken = [*outer, taken]
        try:
            yield
        finally:
            _threads.taken = outer


def _noted_losses(original: property) -> property:
    def losses(self: Any) -> list:
        assert original.fget is not None
        found = original.fget(self)
        for taken in _all_taken():
            taken.read(self, found)
        return found

    return property(losses, doc=original.__doc__)


def _noted_call(original: Callable) -> Callable:
    def call(self: Any, argument: Any) -> Any:
        for taken in _all_taken():
            taken.called(self, argument)
        return original(self, argument)

    return call


_lock = threading.Lock()
_replacements: dict[tuple[type, str], list] = {}  # number of users, original value


@contextlib.contextmanager
def _replaced(owner: type, name: str, made: Callable[[Any], Any]) -> Iterator[None]:
    """An attribute of a class replaced; the last user to leave restores it."""
    key = owner, name
    with _lock:
        if key not in _replacements:
            own = name in vars(owner)
            original = getattr(owner, name)
            setattr(owner, name, made(original))
            _replacements[key] = [0, own, original]
        _replacements[key][0] += 1
    try:
        yield
    finally:
        with _lock:
            _replacements[key][0] -= 1
            if _replacements[key][0] == 0:
                _, own, original = _replacements.pop(key)
                if own:
                    setattr(owner, name, original)
                else:
                    delattr(owner, name)
