"""HDF5 files that are filled piece by piece, survive a kill and are never incomplete.

A file is written as `NAME.partial` and renamed when it is complete. It contains a
description of its sources: a second run with the same sources continues where the first
one stopped, and a run with other sources is rejected.
"""

import json
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import keras
import numpy as np


class Writer:
    """Fills the data sets of one file, continuing the work of an earlier run.

    Args:
        path: the file to be written; it must not exist.
        kind: the kind of file, checked by `read_complete`.
        made_from: everything that determines its contents, JSON-serialisable.
        shapes: data set -> (shape, dtype).

    Raises:
        FileExistsError: if the file exists already.
        ValueError: if a partial file was made from other sources.
    """

    def __init__(
        self,
        path: pathlib.Path,
        kind: str,
        made_from: Mapping[str, Any],
        shapes: Mapping[str, tuple[tuple[int, ...], Any]],
    ):
        import h5py

        self.path = pathlib.Path(path)
        if self.path.exists():
            raise FileExistsError(
                f"{self.path} exists already. Delete it or name another --out"
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._partial = self.path.with_name(self.path.name + ".partial")
        source = json.dumps({"kind": kind, **made_from}, sort_keys=True)
        self._file: Any = None
        try:
            self._file = h5py.File(self._partial, "a")
            found = self._file.attrs.setdefault("made_from", source)
            if found == source:
                self._file.attrs["kind"] = kind
                for name, (shape, dtype) in shapes.items():
                    if name not in self._file:
                        made = self._file.create_dataset(name, shape, dtype)
                        made.attrs["filled"] = 0
                    self.filled(name)
                self._file.flush()
        except Exception as error:  # noqa: BLE001  (HDF5 raises many kinds)
            self.close()
            raise ValueError(
                f"{self._partial}, the unfinished work of an earlier run, is damaged "
                f"({error}). Delete it to start again"
            ) from None
        if found != source:
            self.close()
            raise ValueError(
                f"{self._partial} is the unfinished work of another run, from {found}. "
                "Delete it or name another --out"
            )

    def filled(self, name: str) -> int:
        """The number of entries of a data set that are filled."""
        return int(self._file[name].attrs["filled"])

    def fill(self, name: str, pieces: Iterable[np.ndarray]) -> None:
        """Append pieces to a data set, after the entries that are filled."""
        data = self._file[name]
        for piece in pieces:
            at = self.filled(name)
            data[at : at + len(piece)] = piece
            data.attrs["filled"] = at + len(piece)
            self._file.flush()

    def finish(self, **attributes: Any) -> None:
        """Rename the complete file to its final name."""
        for name, data in self._file.items():
            if self.filled(name) != len(data):
                raise ValueError(
                    f"{name} holds {self.filled(name)} of {len(data)} entries: its "
                    f"source ended early. {self._partial} is kept"
                )
        self._file.attrs.update(attributes)
        self._file.close()
        os.replace(self._partial, self.path)

    def close(self) -> None:
        """Close the file; a later run can continue."""
        if self._file is not None:
            self._file.close()


def slices(first: int, count: int, size: int) -> list[slice]:
    """first, ..., count - 1 in slices of `size`."""
    return [slice(at, min(at + size, count)) for at in range(first, count, size)]


def with_bar(
    pieces: Iterable[np.ndarray], where: Iterable[slice], count: int
) -> Iterator[np.ndarray]:
    """The pieces; on a terminal, a bar shows the progress."""
    bar = keras.utils.Progbar(count, unit_name="image")
    for piece, place in zip(pieces, where, strict=True):
        yield piece
        if sys.stdout.isatty():
            bar.update(place.stop)


def read_complete(
    path: pathlib.Path, kind: str, tool: str, names: Iterable[str]
) -> dict[str, np.ndarray]:
    """Data sets of a finished file.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is not an HDF5 file of this kind, or damaged.
    """
    import h5py

    if not pathlib.Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist. Make it with {tool}")
    found: Any = None
    arrays: dict[str, np.ndarray] = {}
    try:
        with h5py.File(path, "r") as opened:
            file: Any = opened
            found = file.attrs.get("kind")
            if found == kind:
                arrays = {name: file[name][:] for name in names}
    except Exception as error:  # noqa: BLE001  (HDF5 raises many kinds)
        raise ValueError(
            f"{path} is not an HDF5 file, or is damaged ({error}). Make it again with "
            f"{tool}"
        ) from None
    if found != kind:
        raise ValueError(f"{path} holds {found!r}, not {kind!r}. Make it with {tool}")
    return arrays
