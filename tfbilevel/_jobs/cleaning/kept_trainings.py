"""Trainings that are kept in a folder, so that a job that was killed goes on."""

import hashlib
import io
import json
import os
import pathlib
import zipfile
from typing import Any

import numpy as np


class KeptTrainings:
    """The weights at the end of each training, one file for each.

    Args:
        folder: where; it is made. `None`: nothing is kept.
        job: what belongs to the trainings: arrays, and whatever `repr` tells apart.
            Files of another job are refused.

    Raises:
        ValueError: if the folder holds trainings of another job.
    """

    def __init__(self, folder: str | os.PathLike | None, job: list):
        self.folder = None if folder is None else pathlib.Path(folder)
        if self.folder is None:
            return
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(
                "`backup` must be a folder. Name another one. Received: a file, "
                f"backup={str(self.folder)!r}"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        mark = self.folder / "job.txt"
        own = _fingerprint(job)
        if mark.exists() and mark.read_text() != own:
            raise ValueError(
                "`backup` must be a folder of its own for each job: other data or "
                "arguments were used there. Delete it, or name another one. Received: "
                f"backup={str(self.folder)!r}"
            )
        _write(mark, own.encode())

    def find(self, name: str) -> tuple[list, dict] | None:
        """Weights and history of a training that ended, or `None`."""
        path = self._path(name)
        if path is None or not path.exists():
            return None
        try:
            with np.load(path) as found:
                history = json.loads(str(found["history"]))
                count = len(found.files) - 1
                return [found[f"weight_{i}"] for i in range(count)], history
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"`backup` holds a damaged file, {path}. Delete it. Received: {error}"
            ) from error

    def keep(self, name: str, weights: list, history: dict) -> None:
        path = self._path(name)
        if path is None:
            return
        arrays = {f"weight_{i}": value for i, value in enumerate(weights)}
        content = io.BytesIO()
        np.savez(content, history=json.dumps(history), **arrays)
        _write(path, content.getvalue())

    def clear(self) -> None:
        """Delete the files, and the folder if nothing else is in it."""
        if self.folder is None:
            return
        for path in [*self.folder.glob("*.npz"), self.folder / "job.txt"]:
            path.unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _path(self, name: str) -> pathlib.Path | None:
        return self.folder and self.folder / f"{name.replace(' ', '-')}.npz"


def _write(path: pathlib.Path, content: bytes) -> None:
    """All of it or nothing."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)


def _fingerprint(job: list[Any]) -> str:
    found = hashlib.sha256()
    for part in job:
        if isinstance(part, np.ndarray) and part.dtype != object:
            found.update(f"{part.dtype}{part.shape}".encode())
            found.update(np.ascontiguousarray(part).data)
        else:
            part = part.tolist() if isinstance(part, np.ndarray) else part
            found.update(repr(part).encode())
    return found.hexdigest()
