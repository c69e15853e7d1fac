"""Class labels of any kind as integers from 0, and back."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Classes:
    """The classes of a data set, in sorted order.

    Made by `classes_of`. A label may be an integer, a string, a boolean, or a one-hot
    row; a data set has one kind.

    Attributes:
        values: the classes as the user writes them, [K]; of one-hot rows 0, ..., K - 1.
        one_hot: whether labels are one-hot rows, [n, K].
    """

    values: np.ndarray
    one_hot: bool

    def __len__(self) -> int:
        return len(self.values)

    def indices(self, labels: Any, argument: str) -> np.ndarray:
        """The labels as int32 from 0 to K - 1, [n].

        Raises:
            ValueError: for a label that is none of the classes, or another kind.
        """
        labels = _array(labels, argument)
        if (labels.ndim == 2) != self.one_hot:
            kinds = "one-hot rows", "one label per row"
            raise ValueError(
                f"`{argument}` must be of the same kind as the other labels, "
                f"{kinds[not self.one_hot]}. Convert it, with np.argmax(labels, "
                f"axis=1) for instance. Received: shape {labels.shape}"
            )
        if self.one_hot:
            if labels.shape[1] != len(self):
                raise ValueError(
                    f"`{argument}` must have one column per class, {len(self)}. "
                    f"Received: shape {labels.shape}"
                )
            return labels.argmax(axis=1).astype(np.int32)
        found, where = np.unique(labels, return_inverse=True)
        unknown = [value for value in found.tolist() if value not in self._known]
        if unknown:
            raise ValueError(
                f"`{argument}` must hold no class that is missing among the "
                f"{len(self)} known ones. Received: {_some(unknown)}; known: "
                f"{_some(self.values.tolist())}"
            )
        order = np.array([self._known[v] for v in found.tolist()], np.int32)
        return order[where.reshape(-1)]

    def original(self, indices: np.ndarray) -> np.ndarray:
        """Indices as labels of the user's kind."""
        if self.one_hot:
            return np.eye(len(self), dtype=self.values.dtype)[indices]
        return self.values[indices]

    @property
    def _known(self) -> dict:
        return {value: index for index, value in enumerate(self.values.tolist())}


def classes_of(*labels: Any, arguments: tuple[str, ...] = ("y",)) -> Classes:
    """The classes that occur in any of the arrays of labels.

    Raises:
        ValueError: for labels that are missing, fractions, or rows that are not
            one-hot; for fewer than two classes.
    """
    arrays = [_array(each, name) for each, name in zip(labels, arguments, strict=True)]
    if arrays[0].ndim == 2:
        columns = arrays[0].shape[1]
        return Classes(np.arange(columns), True)
    text = [array.dtype.kind in "OU" for array in arrays]
    if len(set(text)) > 1:
        raise ValueError(
            f"{' and '.join(f'`{a}`' for a in arguments)} must hold labels of one "
            "kind, all text or all numbers. Convert one with .astype(str). Received: "
            f"dtypes {', '.join(str(array.dtype) for array in arrays)}"
        )
    values = np.unique(np.concatenate([array.reshape(-1) for array in arrays]))
    if len(values) < 2:
        raise ValueError(
            f"`{arguments[0]}` must hold at least two classes. Received: only one class"
            f", {values.tolist()[0]!r}"
        )
    return Classes(values, False)


def _array(labels: Any, argument: str) -> np.ndarray:
    """Labels as an array [n], or one-hot rows [n, K], K at least 2."""
    array = np.asarray(labels)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim == 0 or array.ndim > 2 or array.size == 0:
        raise ValueError(
            f"`{argument}` must be one label per row, or one-hot rows. Received: shape "
            f"{array.shape}"
        )
    if array.dtype.kind in "OUS" and array.ndim == 1:
        return _text(array, argument)
    if array.dtype.kind not in "biuf":
        raise ValueError(
            f"`{argument}` must hold integers, strings or one-hot rows. Received: "
            f"dtype {array.dtype}"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(
            f"`{argument}` must not hold NaN or infinity. Remove these rows. Received: "
            f"{np.count_nonzero(~np.isfinite(array))} such labels. Unknown label type: "
            "continuous"
        )
    if array.ndim == 2:
        ones = (array == 1).sum(axis=1)
        if (
            not ((array == 0).sum(axis=1) + ones == array.shape[1]).all()
            or (ones != 1).any()
        ):
            raise ValueError(
                f"`{argument}` must be one label per row, or one-hot rows: one 1 in "
                f"each, else 0. Received: shape {array.shape}, other values"
            )
        return array
    if array.dtype.kind == "f":
        if (array != np.round(array)).any():
            wrong = array[array != np.round(array)][:3]
            raise ValueError(
                f"`{argument}` must be classes: integers, strings or one-hot rows. "
                f"Received: {_some(wrong.tolist())}. Unknown label type: continuous"
            )
    return array


def _text(array: np.ndarray, argument: str) -> np.ndarray:
    """Strings as strings; objects that are all numbers as numbers."""
    values = array.tolist()
    if all(isinstance(v, (int, float, np.number, bool)) for v in values):
        return _array(np.array(values), argument)
    values = [v.decode() if isinstance(v, bytes) else v for v in values]
    missing = [row for row, v in enumerate(values) if not isinstance(v, str)]
    if missing:
        raise ValueError(
            f"`{argument}` must hold text in every row, or numbers in every row. "
            f"Remove or correct these rows. Received: {values[missing[0]]!r} in row "
            f"{missing[0]}, and {len(missing)} such rows in all"
        )
    return np.array(values)


def _some(values: list) -> str:
    shown = ", ".join(repr(value) for value in values[:10])
    return shown + (f", ... ({len(values)})" if len(values) > 10 else "")
