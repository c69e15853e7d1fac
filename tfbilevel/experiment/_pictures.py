"""Pages of images."""

import math
import pathlib
from collections.abc import Sequence

import numpy as np


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

    rows = math.ceil(len(images) / columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(1.13 * columns, 1.4 * rows + 0.5), squeeze=False
    )
    for axes in grid.flat:
        axes.axis("off")
    for place, image in enumerate(images):
        axes = grid.flat[place]
        axes.imshow(np.squeeze(image), cmap="gray", vmin=0, vmax=1)
        colour = "tab:red" if len(red) and red[place] else "black"
        axes.set_title(captions[place], fontsize=7, color=colour)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
