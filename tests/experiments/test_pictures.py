"""Figures, curves, pages of images."""

import common
import matplotlib.pyplot as plt
import numpy as np
import pytest
from common import cleaning
from experiment_scripts import drawn
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


def test_a_figure_is_saved_at_the_end_and_closed_in_any_case(tmp_path):
    before = plt.get_fignums()
    with common.figure(tmp_path / "made.png", (2, 1)) as page:
        page.subplots().plot([1, 2])
        assert not (tmp_path / "made.png").exists()
    assert image.imread(tmp_path / "made.png").shape[:2] == (110, 220)
    with pytest.raises(KeyError), common.figure(tmp_path / "broken.png", (2, 1)):
        raise KeyError
    assert not (tmp_path / "broken.png").exists() and plt.get_fignums() == before


def test_panels_hold_columns_of_the_run(tmp_path, monkeypatch):
    run = common.Run(tmp_path / "run", {}, False)
    for step in range(3):
        row = {"step": step, "seconds": 2 * step, "f1": 10 * step, "ci95": 1.5}
        run.log(row | {"loss": 5 - step})
    panels = [
        common.Panel({"F1 score": "f1"}, "kept", "percent", margin="ci95"),
        common.Panel({"": "loss"}, "loss"),
    ]
    page = drawn(monkeypatch, lambda: common.plot_columns(run, panels, "whole"))
    left, right = page.axes
    assert page.get_suptitle() == "whole" and (run.out / "curves.png").exists()
    assert [left.get_title(), left.get_ylabel()] == ["kept", "percent"]
    assert left.get_xlabel() == "seconds of training" and left.get_legend()
    (line,) = left.lines
    assert line.get_xydata().tolist() == [[0, 0], [2, 10], [4, 20]]
    band = left.collections[0].get_paths()[0].vertices
    assert {-1.5, 1.5, 11.5, 18.5, 21.5} <= {*band[:, 1].tolist()}
    assert right.lines[0].get_ydata().tolist() == [5, 4, 3]
    assert right.get_legend() is None


def test_a_matrix_of_counts_names_its_axes():
    _, axes = plt.subplots()
    common.draw_matrix(axes, np.array([[2, 0], [1, 3]]), 3)
    assert [text.get_text() for text in axes.texts] == ["2", "1", "3"]
    assert axes.get_xlabel() == "predicted class"
    plt.close()


def test_the_distrusted_are_those_of_least_trust(tmp_path, monkeypatch):
    """50 of them: two are left out. A caption is red where its label is wrong."""
    trust = np.arange(50.0)[::-1]  # the last example is trusted least
    seen = []
    monkeypatch.setattr(cleaning, "draw_images", lambda *a, **k: seen.append((a, k)))
    given, wrong = np.arange(50) % 10, np.arange(50) == 49
    cleaning.draw_distrusted(
        tmp_path, np.arange(50), trust, given, wrong, lambda worst: worst * 0
    )
    (((_, pixels, captions, _), options),) = seen
    assert pixels.tolist() == list(range(49, 1, -1))
    assert captions[:2] == ["given 9, looks 0", "given 8, looks 0"]
    assert options["red"] == [True] + 47 * [False]


def test_histograms_are_of_true_and_of_wrong_labels():
    _, axes = plt.subplots()
    values, clean = np.array([0.1, 0.2, 0.9]), np.array([True, True, False])
    cleaning.draw_histograms(axes, values, clean, np.array([0.0, 0.5, 1.0]))
    heights = [[bar.get_height() for bar in bars] for bars in axes.containers]
    assert heights == [[2, 0], [0, 1]]
    plt.close()
