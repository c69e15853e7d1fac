"""Packages that the library can do without."""

import importlib
import types


class MissingPackageError(ImportError):
    """An optional package is not installed."""


def optional_package(name: str, needed_for: str, install: str = "") -> types.ModuleType:
    """The module `name`, which must be there for `needed_for`.

    Args:
        name: the module, "PIL.Image" for instance.
        needed_for: what needs it, the subject of a sentence.
        install: the name under which it is installed, where that is another.

    Raises:
        MissingPackageError: if it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = install or name.split(".")[0]
        raise MissingPackageError(
            f"{needed_for} needs the package {package}. Install it with `pip install "
            f"{package}`, or all that the jobs can use with `pip install "
            f"'tfbilevel[jobs]'`. Received: {error}"
        ) from error
