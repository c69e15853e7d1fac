"""Pages of images, and curves."""

import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np


def draw_line(
    axes: Any, x: Sequence[float], y: Sequence[float], **options: Any
) -> None:
    """A curve without its NaN, and its points where they are few: one alone would
    show nothing as a line.

    Args:
        axes: matplotlib's.
        x: of the points.
        y: of the points.
        **options: of `axes.plot`.
    """
    known = ~np.isnan(np.asarray(y, float))
    marker = "." if known.sum() <= 20 else None
    axes.plot(np.asarray(x)[known], np.asarray(y)[known], marker=marker, **options)


def draw_images(
    path: pathlib.Path,
    images: np.ndarray,
    captions: Sequence[str],
    title: str,
    red: Sequence[bool] = (),
    columns: int = 8,
) -> None:
    """A page of images, each with a caption, some of them in red.

    Args:
        path: the picture to write.
        images: [n, height, width] or [n, height, width, channels], in [0, 1].
        captions: what to write above each.
        title: what to write above all.
        red: whether each caption is red; none by default.
        columns: images in a row.
    """
    # Only scripts draw; the library does not ask for matplotlib.
    import matplotlib.pyplot as plt

    # In inches. One set of axes for the whole page: one per image takes seconds.
    side, pitch, below = 0.98, 1.13, 1.4
    rows = math.ceil(len(images) / columns)
    width, height = pitch * columns, below * rows + 0.5
    figure = plt.figure(figsize=(width, height))
    page = figure.add_axes((0, 0, 1, 1))
    for place, image in enumerate(images):
        row, column = divmod(place, columns)
        pixels = np.squeeze(image)
        scale = side / max(pixels.shape[:2])
        tall, wide = scale * pixels.shape[0], scale * pixels.shape[1]
        middle = pitch * (column + 0.5)
        bottom = height - 0.5 - below * (row + 1) + 0.1
        extent = (middle - wide / 2, middle + wide / 2, bottom, bottom + tall)
        page.imshow(pixels, cmap="gray", vmin=0, vmax=1, extent=extent)
        page.text(
            middle,
            bottom + tall + 0.05,
            captions[place],
            fontsize=7,
            color="tab:red" if len(red) and red[place] else "black",
            horizontalalignment="center",
        )
    page.set(xlim=(0, width), ylim=(0, height))
    page.axis("off")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)
