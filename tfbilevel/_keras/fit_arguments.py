"""The arguments of `BilevelModel.fit`: arrays of both levels become batches."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf

from tfbilevel._core.batches import Batches
from tfbilevel._keras.arrays import examples_of
from tfbilevel._keras.pair import paired
from tfbilevel._keras.passes import FromTheOuterStep, Passes
from tfbilevel._keras.reads import ReadAtEpochEnd

KERAS_BATCH = 32  # the batch size of Keras's `fit` where none is given
NAMES = Batches("validation_data", "x")


def named(function: Callable, *arguments: Any, **keywords: Any) -> dict[str, Any]:
    """The arguments of a method's call by name, without the instance.

    Raises:
        TypeError: for an argument that the function does not take.
    """
    bound = inspect.signature(function).bind(None, *arguments, **keywords)
    return dict(list(bound.arguments.items())[1:])


def batches_of(
    given: dict[str, Any],
    with_index: bool,
    lower_batches: int,
    seed: int,
    tasks: int | None,
    measured: bool,
) -> tuple[Any, dict[str, Any]]:
    """The dataset of batches, and the other arguments for Keras's `fit`.

    Args:
        given: the arguments of Keras's `fit` by name.
        with_index, lower_batches, seed: those of `BilevelModel.fit`.
        tasks: the model's number of tasks.
        measured: whether there are metrics to measure the validation data by.
    """
    x, y = given.get("x"), given.get("y")
    rest = {k: v for k, v in given.items() if k not in ("x", "y", "batch_size")}
    if not _are_arrays(x):
        _require_none_for_arrays(given, with_index, lower_batches, seed)
        return x, rest
    validation = given.get("validation_data")
    _require_levels(validation, given.get("validation_split"), tasks)
    lower = x if y is None else (x, y)
    if with_index and not (isinstance(lower, (tuple, list)) and len(lower) > 1):
        raise ValueError(
            "`with_index` needs labels, because a batch is (x, y, index). Pass "
            "fit((x, y), ...) or fit(x, y, ...). For data without labels there is "
            f"tb.pair(..., index=True). Received: with_index={with_index!r}, x of "
            f"{type(x)}, y=None"
        )
    if measured and not isinstance(validation, tf.data.Dataset):
        _require_labels(validation)
        size = given.get("batch_size")  # of the upper level, if there is one for each
        size = size[0] if isinstance(size, tuple) else size
        rest.setdefault("validation_batch_size", size)
    upper = validation
    if not isinstance(validation, tf.data.Dataset):
        upper = examples_of(validation, NAMES.upper)
    data = Batches(upper, examples_of(lower, NAMES.lower))
    sizes = given.get("batch_size")
    if sizes is None:
        counts = (getattr(level, "count", None) for level in data)
        sizes = tuple(n and min(KERAS_BATCH, n) for n in counts)
    made = paired(data, lower_batches, sizes, with_index, seed, 0, NAMES, "with_index")
    if not measured:
        rest.pop("validation_data")
    return made, rest


def from_the_outer_step(
    x: Any, keywords: dict[str, Any], model: Any
) -> tuple[Any, dict[str, Any]]:
    """The dataset and Keras's arguments, with arrays begun at the model's outer step.

    Args:
        x: a dataset of batches; only `Passes` can begin at a step.
        keywords: arguments for Keras's `fit`.
        model: the `BilevelModel`.
    """
    keywords = model._outer.with_callbacks(keywords)
    first = [] if model._outer.reads.often else [ReadAtEpochEnd()]
    last = [FromTheOuterStep()] if isinstance(x, Passes) else []
    callbacks = _between(first, keywords.get("callbacks"), last)
    keywords = {"shuffle": False, **keywords, "callbacks": callbacks}
    if not isinstance(x, Passes):
        return x, keywords
    (begin,), steps_per_execution = last, model.steps_per_execution
    steps, endless = int(x.cardinality()), keywords.get("steps_per_epoch") is not None
    if not endless and x.goes_on and steps > 0 and steps % steps_per_execution == 0:
        # One iterator for all epochs: to make one takes as long as many steps.
        keywords["steps_per_epoch"], endless = steps, True
    return x.starting_at(begin.position, endless), keywords


def _between(first: list, callbacks: Any, last: list) -> Any:
    """The user's callbacks, with others before and after them."""
    if not isinstance(callbacks, keras.callbacks.CallbackList):
        return [*first, *keras.tree.flatten(callbacks or []), *last]
    for one in (*first, *last):
        one.set_model(callbacks.model)
    callbacks.callbacks[:] = [*first, *callbacks.callbacks, *last]
    return callbacks


def _are_arrays(x: Any) -> bool:
    nest = isinstance(x, (tuple, list, Mapping)) and not isinstance(x, Batches)
    return nest or tf.is_tensor(x) or hasattr(x, "__array__")


def _require_none_for_arrays(
    given: dict[str, Any], with_index: bool, lower_batches: int, seed: int
) -> None:
    """Raise if a dataset is accompanied by what only arrays need."""
    asked = {
        "y": given.get("y"),
        "batch_size": given.get("batch_size"),
        "with_index": with_index or None,
        "lower_batches": None if lower_batches == 1 else lower_batches,
        "seed": None if seed == 0 else seed,
    }
    found = [name for name, value in asked.items() if value is not None]
    if found and given.get("x") is not None:
        raise ValueError(
            f"`{found[0]}` is for arrays: a dataset of tb.Batches holds the batches of "
            "both levels already. Pass it to tb.pair, which makes the dataset. "
            f"Received: {found[0]} of {type(asked[found[0]])}, x={given['x']!r}"
        )


def _require_levels(validation: Any, split: Any, tasks: int | None) -> None:
    """Raise unless there are data for the upper level."""
    if tasks is not None:
        raise ValueError(
            "`x` must be a dataset of tb.Batches over tasks with "
            "tb.BilevelModel(tasks=...): arrays are the examples of one problem. "
            f"Received: tasks={tasks}"
        )
    given = "None" if not split else f"None, validation_split={split!r}"
    if validation is None:
        raise ValueError(
            "`validation_data` must hold the examples of the upper level, because the "
            "lower level trains on `x`. Pass fit((x, y), validation_data=(x_val, "
            "y_val)) with examples that `x` does not hold, or a dataset of tb.Batches "
            "(tb.pair) alone. "
            f"Received: validation_data={given}"
        )
    spec = getattr(validation, "element_spec", None)
    if isinstance(spec, Batches):
        raise ValueError(
            "`validation_data` must hold the upper level's examples where `x` holds "
            "the lower level's, not batches of both. Pass arrays or a dataset of "
            f"(inputs, labels). Received: validation_data={validation!r}"
        )


def _require_labels(validation: Any) -> None:
    if not (isinstance(validation, (tuple, list)) and len(validation) > 1):
        raise ValueError(
            "`validation_data` must hold labels, (inputs, labels), because metrics "
            "were compiled that measure it. Add them, or compile without metrics. "
            f"Received: validation_data of {type(validation)}"
        )
