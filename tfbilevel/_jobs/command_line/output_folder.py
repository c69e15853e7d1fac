"""A folder of results that is there whole or not at all."""

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from tfbilevel._jobs.command_line.bad_input import BadInput


@contextlib.contextmanager
def output_folder(out: str | os.PathLike, overwrite: bool) -> Iterator[pathlib.Path]:
    """A new folder to write into, which becomes `out` when the block ends well.

    After an exception nothing is left of it, and `out` is as it was.

    Args:
        out: the folder of the results.
        overwrite: whether it may hold files already. Those of the same name are
            replaced, each in one moment; others stay.

    Raises:
        BadInput: at once, if `out` is a file, is not empty without `overwrite`, or
            cannot be made there.
    """
    target = pathlib.Path(out)
    if target.exists() and not target.is_dir():
        raise BadInput(f"--out must be a folder, but {out} is a file")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise BadInput(
            f"the folder {out} is not empty. Give another --out, or --overwrite to "
            "replace files of the same names"
        )
    # Folders between are made at the end: a failure leaves none of them either.
    above = next(each for each in target.absolute().parents if each.exists())
    try:
        partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=above))
    except OSError as error:
        raise BadInput(f"cannot write to {above}: {error.strerror}") from error
    try:
        partial.chmod(0o755)  # a temporary folder is its owner's alone
        yield partial
        if target.is_dir() and any(target.iterdir()):
            for file in sorted(partial.iterdir()):
                os.replace(file, target / file.name)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
