"""A BilevelModel in a `.keras` file: everything except the user's Python functions."""

from collections.abc import Iterable, Mapping
from typing import Any

import keras

SAVED_SETTINGS = ("metrics", "weighted_metrics", "steps_per_execution", "run_eagerly")


def require_serialisable(model: keras.Model, callbacks: Any) -> None:
    """Raise for a callback that would fail to save the model at the end of an epoch."""
    for callback in keras.tree.flatten(getattr(callbacks, "callbacks", callbacks)):
        checkpoint = isinstance(callback, keras.callbacks.ModelCheckpoint)
        if checkpoint and not callback.save_weights_only:
            require_saved_as(callback.filepath)
            keras.saving.serialize_keras_object(model)
            return


def require_saved_as(path: Any) -> None:
    """Raise for the HDF5 format, which cannot load models with their own `compile`."""
    if str(path).endswith((".h5", ".hdf5")):
        raise ValueError(
            "`filepath` must end in .keras: HDF5 files hold weights alone "
            f"(save_weights). Received: filepath={path}"
        )


def require_unshared(upper: Any, lower: Any) -> None:
    """Raise if the models share variables, which a file stores for only one of them."""
    own = {id(variable) for variable in upper.variables}
    shared = [v.path for v in lower.variables if id(v) in own]
    if shared:
        raise ValueError(
            "A model whose `upper` and `lower` share layers cannot be saved whole: "
            "loading would build each layer twice. Use save_weights(...), or "
            "ModelCheckpoint(..., save_weights_only=True). "
            f"Received: {', '.join(shared)} in both"
        )


def given(names: Iterable[str], what: str) -> dict[str, Any]:
    """The objects that the user passed to `load_model` under these names.

    Files do not contain functions or methods: these close over data, and code in a file
    would be executed by everyone who opens it.

    Raises:
        ValueError: if one of them is missing.
    """
    found = {name: keras.saving.get_registered_object(name) for name in names}
    missing = [name for name, value in found.items() if value is None]
    if missing:
        example = ", ".join(f'"{name}": {name}' for name in found)
        raise ValueError(
            f"`custom_objects` must hold {what}, under the names of the arguments: "
            f"keras.saving.load_model(path, custom_objects={{{example}}}). "
            f"Received: no {' and no '.join(missing)}"
        )
    return found


def config_of(model: Any, functions: Iterable[str]) -> dict[str, Any]:
    """A BilevelModel's arguments; for functions, only the names of those it had."""
    require_unshared(model.upper, model.lower)
    serialize = keras.saving.serialize_keras_object
    return {
        "upper": serialize(model.upper),
        "lower": serialize(model.lower),
        "functions": sorted(functions),
        **({} if model.start is None else {"lower_start": "learned"}),
        "tasks": model.tasks,
        "mapping": model.mapping,
        "regularizers": model.regularizers,
    }


def compile_config_of(model: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    """A BilevelModel's arguments of `compile`, except the method.

    Args:
        model: a compiled model.
        known: the arguments that Keras stores.
    """
    serialize = keras.saving.serialize_keras_object
    return {
        "upper_optimizer": serialize(model.optimizer),
        **{name: known[name] for name in SAVED_SETTINGS},
        "on_nonfinite": model.on_nonfinite,
        "microbatches": list(model.microbatches),
        "start_optimizer": serialize(model.start_optimizer),
    }


def arguments_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `config_of`: arguments to build the model with."""
    rest = {k: v for k, v in config.items() if k != "functions"}
    for name in ("upper", "lower"):
        rest[name] = keras.saving.deserialize_keras_object(rest[name])
    return rest | given(config["functions"], "the functions the model was built with")
