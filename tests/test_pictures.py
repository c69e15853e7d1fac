"""Pages of images."""

import common
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib import image


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (8, 8, 3)])
@pytest.mark.parametrize("kind", [list, np.asarray])
def test_a_page_holds_every_image(shape, kind, tmp_path):
    """Five white images in rows of three: as many white pixels as five of one."""
    whites = []
    for count in (1, 5):
        path = tmp_path / f"{count}.png"
        common.draw_images(
            path,
            np.zeros((count, *shape)),
            ["x"] * count,
            "title",
            red=kind([False] * count),
            columns=3,
        )
        page = image.imread(path)[..., :3]
        whites.append((page.max(axis=2) < 0.01).mean() * page.size)
    assert whites[1] > 4 * whites[0] > 0


def test_captions_in_red(tmp_path):
    pixels = np.ones((2, 4, 4))
    for name, red in (("none", ()), ("one", [True, False])):
        path = tmp_path / f"{name}.png"
        common.draw_images(path, pixels, ["label", "label"], "title", red)
        page = image.imread(path)[..., :3]
        reddish = (page[..., 0] > 0.7) & (page[..., 1] < 0.4)
        assert reddish.any() == (name == "one")


@pytest.mark.parametrize(
    ("y", "known", "marked"),
    [
        ([np.nan, 3.0], [(1, 3)], True),  # a point that no line leads to
        ([2.0, np.nan, 4.0], [(0, 2), (2, 4)], True),
        ([np.nan], [], True),
        (list(range(30)), [(n, n) for n in range(30)], False),
    ],
)
def test_a_curve_of_few_points_shows_them(y, known, marked):
    figure, axes = plt.subplots()
    common.draw_line(axes, range(len(y)), y, label="x", color="C3")
    (line,) = axes.lines
    assert [tuple(point) for point in line.get_xydata()] == known
    assert (line.get_marker() != "None") == marked
    assert (line.get_label(), line.get_color()) == ("x", "C3")
    plt.close(figure)
