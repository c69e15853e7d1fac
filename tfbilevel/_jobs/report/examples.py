"""How examples are shown on a page: as images, as text or as rows."""

import dataclasses
from typing import Any

import numpy as np

from tfbilevel._jobs.report.png import thumbnail

SNIPPET = 300  # characters of a text
MOST_COLUMNS = 12
CHANNELS = (1, 3, 4)


@dataclasses.dataclass(frozen=True)
class ShownExamples:
    """Some examples, ready for the page.

    Attributes:
        kind: "image", "text", "row", or "none" where the page has the labels alone.
        columns: the headings of what is shown beside the labels.
        shown: of each example its `Thumbnail`, its snippet, or its list of cells.
    """

    kind: str
    columns: list[str]
    shown: list[Any]


def shown_examples(x: Any, rows: np.ndarray) -> ShownExamples:
    """The examples `rows` of `x`.

    Args:
        x: images [n, h, w], [n, h, w, c] or [n, c, h, w]; texts [n]; a pandas table
            or an array of rows [n, d]; None.
        rows: their numbers, from 0.
    """
    if x is None:
        return ShownExamples("none", [], [[] for _ in rows])
    if hasattr(x, "iloc"):  # a pandas table or series
        if x.ndim == 1:
            return _of_array(np.asarray(x.iloc[rows], object))
        return _of_rows([str(c) for c in x.columns], x.iloc[rows].to_numpy(object))
    x = x if isinstance(x, np.ndarray) else np.asarray(x)
    if x.ndim in (3, 4):
        return _of_images(x, rows)
    return _of_array(x[rows])


def _of_array(x: np.ndarray) -> ShownExamples:
    if x.ndim == 1 and x.dtype.kind in "OUST":
        return ShownExamples("text", ["text"], [_snippet(text) for text in x.tolist()])
    x = x.reshape(len(x), -1) if len(x) else x.reshape(0, 1)
    return _of_rows([f"x[{column}]" for column in range(x.shape[1])], x)


def _of_rows(columns: list[str], rows: np.ndarray) -> ShownExamples:
    left = len(columns) - MOST_COLUMNS
    cells = [[_cell(value) for value in row[:MOST_COLUMNS]] for row in rows.tolist()]
    if left > 0:
        columns = [*columns[:MOST_COLUMNS], f"and {left} more"]
        cells = [[*row, ""] for row in cells]
    return ShownExamples("row", columns, cells)


def _of_images(x: np.ndarray, rows: np.ndarray) -> ShownExamples:
    if x.ndim == 4 and x.shape[-1] not in CHANNELS and x.shape[1] in CHANNELS:
        x = np.moveaxis(x, 1, -1)
    if x.ndim == 3:
        x = x[..., None]
    images = x[rows]
    low, high = _black_and_white(images)
    return ShownExamples("image", [], [thumbnail(i, low, high) for i in images])


def _black_and_white(images: np.ndarray) -> tuple[float, float]:
    """The usual ranges of pixels, 0 to 1 and 0 to 255; else what occurs."""
    if not images.size:
        return 0.0, 1.0
    low, high = float(np.nanmin(images)), float(np.nanmax(images))
    if images.dtype == np.uint8:
        return 0.0, 255.0
    if low >= 0 and high <= 1:
        return 0.0, 1.0
    if low >= 0 and 2 < high <= 255:
        return 0.0, 255.0
    return low, high


def _snippet(text: Any) -> str:
    if isinstance(text, bytes):
        text = text.decode(errors="replace")
    text = " ".join(str(text).split())
    return text if len(text) <= SNIPPET else text[:SNIPPET].rstrip() + " …"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"
    return _snippet(value)[:80]
