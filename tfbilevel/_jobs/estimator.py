"""The constructor's arguments of an estimator, as scikit-learn asks for them."""

import inspect
from typing import Any, TypeVar

_Self = TypeVar("_Self", bound="Estimator")


class Estimator:
    """`get_params` and `set_params` for a class whose constructor stores its
    arguments unchanged."""

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's arguments."""
        del deep
        names = list(inspect.signature(type(self)).parameters)
        return {name: getattr(self, name) for name in names}

    def set_params(self: _Self, **params: Any) -> _Self:
        """Set arguments of the constructor, for the next `fit`.

        Raises:
            ValueError: for an unknown name.
        """
        known = self.get_params()
        for name in params.keys() - known.keys():
            raise ValueError(
                f"`{name}` must be an argument of {type(self).__name__}: "
                f"{', '.join(known)}. Received: {name}={params[name]!r}"
            )
        vars(self).update(params)
        return self
