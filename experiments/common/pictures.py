"""Figures: curves of a run's columns, pages of images."""

import contextlib
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np

from common.run import Run

matplotlib.use("Agg")
# ruff: noqa: E402
import matplotlib.pyplot as plt
from matplotlib.figure import Figure


@contextlib.contextmanager
def figure(
    path: pathlib.Path, size: tuple[float, float], tight: bool = True
) -> Iterator[Figure]:
    """An empty figure, saved when the context ends, and closed also after an error.

    Args:
        path: the picture to write.
        size: width and height in inches.
        tight: whether matplotlib arranges the axes so that no labels overlap.
    """
    opened = plt.figure(figsize=size)
    try:
        yield opened
        if tight:
            opened.tight_layout()
        opened.savefig(path, dpi=110)
    finally:
        plt.close(opened)


class Panel(NamedTuple):
    """The curves of one set of axes.

    Attributes:
        columns: label -> column of the run; a label "" is not shown.
        title: the title above the axes.
        unit: label of the y axis.
        margin: column with half the width of a band around the first curve.
    """

    columns: Mapping[str, str]
    title: str
    unit: str = ""
    margin: str | None = None

    def draw(self, axes: Any, run: Run, x: Sequence[float]) -> None:
        """Draw the curves over `x`, with a grid, and a legend if any has a label."""
        for label, column in self.columns.items():
            draw_line(axes, x, run.column(column), label=label)
        if self.margin is not None:
            middle = np.array(run.column(next(iter(self.columns.values()))))
            margin = np.array(run.column(self.margin))
            axes.fill_between(x, middle - margin, middle + margin, alpha=0.2)
        axes.set(ylabel=self.unit, title=self.title)
        axes.grid(alpha=0.3)
        if any(self.columns):
            axes.legend()


def plot_columns(
    run: Run,
    panels: Sequence[Panel],
    title: str,
    x: tuple[str, str] = ("seconds", "seconds of training"),
) -> None:
    """Draw the run's `curves.png`: its columns in panels side by side.

    Args:
        run: the run whose rows are drawn.
        panels: the panels, from left to right.
        title: the title above all panels.
        x: the column that all panels share as their x axis, and its label.
    """
    column, name = x
    with figure(run.out / "curves.png", (5.5 * len(panels), 4)) as page:
        row = page.subplots(1, len(panels), squeeze=False, sharex=True)[0]
        for axes, panel in zip(row, panels, strict=True):
            panel.draw(axes, run, run.column(column))
            axes.set_xlabel(name)
        page.suptitle(title)


def draw_line(
    axes: Any, x: Sequence[float], y: Sequence[float], **options: Any
) -> None:
    """Draw a curve without its NaN values, with markers if it has few points, because a
    single point would not show as a line.

    Args:
        axes: matplotlib's axes.
        x: the x values of the points.
        y: the y values of the points.
        **options: options of `axes.plot`.
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
    """Draw a page of images, each with a caption, some captions in red.

    Args:
        path: the picture to write.
        images: [n, height, width] or [n, height, width, channels], in [0, 1].
        captions: the text above each image.
        title: the text above all images.
        red: whether each caption is red; by default none is.
        columns: images in a row.
    """
    # In inches. One set of axes serves the whole page, since one per image is slow.
    side, pitch, below = 0.98, 1.13, 1.4
    rows = math.ceil(len(images) / columns)
    width, height = pitch * columns, below * rows + 0.5
    with figure(path, (width, height), tight=False) as whole:
        page = whole.add_axes((0, 0, 1, 1))
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
        whole.suptitle(title)


def draw_matrix(axes: Any, matrix: np.ndarray, most: int) -> None:
    """Draw counts from 0 to `most` in shades of blue, the same in every picture.

    Args:
        axes: matplotlib's axes.
        matrix: [true classes, predicted classes].
        most: the largest number of examples in a class.
    """
    axes.imshow(matrix, cmap="Blues", vmin=0, vmax=most)
    size = 9 if len(matrix) <= 10 else 6
    for row, column in np.ndindex(*matrix.shape):
        if count := int(matrix[row, column]):
            color = "white" if count > most / 2 else "black"
            place = {"ha": "center", "va": "center"}
            axes.text(column, row, str(count), color=color, fontsize=size, **place)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(range(len(matrix)))
    axes.tick_params(labelsize=size)
    axes.set(xlabel="predicted class", ylabel="true class")
