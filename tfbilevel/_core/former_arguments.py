"""Arguments of the previous release, which work for one more with a warning."""

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from tfbilevel._core.prepared import Prepared

_Class = TypeVar("_Class", bound=type)


def renamed(
    names: Mapping[str, str],
    *,
    split: Mapping[str, tuple[str, Callable[[Any], bool]]] | None = None,
    gathered: Mapping[str, type] | None = None,
    positional: tuple[str, ...] = (),
) -> Callable[[_Class], _Class]:
    """A decorator for dataclasses that accepts the keywords of the previous release.

    Args:
        names: former keyword -> keyword.
        split: keyword -> the keyword that now takes some of its former values, and a
            function that says whether it takes a value.
        gathered: keyword -> the dataclass whose fields were keywords before.
        positional: names of former positional arguments beyond today's.
    """
    split, gathered = split or {}, gathered or {}

    def decorate(cls: _Class) -> _Class:
        title, init = f"tb.{cls.__name__}", cls.__init__
        kinds = list(inspect.signature(init).parameters.values())[1:]
        places = [one.name for one in kinds if one.kind is not one.KEYWORD_ONLY]
        places.extend(positional)

        @functools.wraps(init)
        def __init__(self: Any, *args: Any, **options: Any) -> None:
            given = dict(zip(places, args, strict=False))
            if len(args) > len(places) or given.keys() & options.keys():
                init(self, *args, **options)  # raises Python's own error
            options = given | options
            for former, name in names.items():
                if former in options:
                    _require_single(title, former, name, options)
                    warn_renamed(title, former, f"`{name}`")
                    options[name] = options.pop(former)
            for former, (name, belongs) in split.items():
                if former in options and belongs(options[former]):
                    _require_single(title, former, name, options)
                    warn_renamed(title, former, f"`{name}` for such a value")
                    options[name] = options.pop(former)
            for name, kind in gathered.items():
                fields = [field.name for field in dataclasses.fields(kind)]
                values = {one: options.pop(one) for one in fields if one in options}
                if values:
                    _require_single(title, ", ".join(values), name, options)
                    now = f"in `{name}`, a tb.{kind.__name__}"
                    warn_renamed(title, "`, `".join(values), now)
                    options[name] = kind(**values)
            init(self, **options)

        cls.__init__ = __init__
        for former, name in names.items():
            setattr(cls, former, _read(title, former, (name,)))
        for name, kind in gathered.items():
            for field in dataclasses.fields(kind):
                path = (name, field.name)
                setattr(cls, field.name, _read(title, field.name, path))
        return cls

    return decorate


def _require_single(title: str, former: str, name: str, given: Mapping) -> None:
    if name in given:
        raise ValueError(
            f"`{former}` of {title} is `{name}` now, and must not be given twice. Give "
            f"`{name}` alone. Received: {name}={given[name]!r} and {former}"
        )


def warn_renamed(title: str, former: str, now: str) -> None:
    """Warn the caller's caller about a former name."""
    warnings.warn(
        f"`{former}` of {title} is {now} now; the former name works for one release",
        DeprecationWarning,
        stacklevel=3,
    )


def _read(title: str, former: str, path: tuple[str, ...]) -> property:
    """A property that returns the attribute for its former name."""

    def read(self: Any) -> Any:
        warn_renamed(title, former, f"`{'.'.join(path)}`")
        return functools.reduce(getattr, path, self)

    return property(read)


def of_former(
    problem: Any, upper: Any, lower: Any, batches: Any, state: dict
) -> tuple[Prepared, Any, dict]:
    """The arguments of `InnerSolver.solve`, from those of the previous release."""
    warnings.warn(
        "solve(problem, upper, lower, batches, state) of tb.InnerSolver will go: call "
        "solve(problem.prepared(upper, batches), lower, state)",
        DeprecationWarning,
        stacklevel=3,
    )
    # Not prepared again: it may be the problem of a `Prepared`, with its batches.
    return Prepared(problem, upper, batches, _total), lower, state


def _total(partial: Any, response: Any) -> Any:
    del partial, response
    raise AssertionError("an inner solve takes no upper gradient")
