"""The tutorials: each runs, and gives what its page claims."""

import json
import os
import pathlib
import re

import matplotlib
import numpy as np
import pytest
from test_docs import ROOT, WHOLE, run, shorter

from tfbilevel._jobs.cleaning.kept_trainings import KeptTrainings

TUTORIALS = ROOT / "docs" / "tutorials"
PICTURES = ROOT / "docs" / "images" / "tutorials"


def table(page: pathlib.Path) -> dict[str, float]:
    """The page's table of results."""
    rows = re.findall(r"^\| (.+?) \| ([0-9.]+) \|$", page.read_text(), re.MULTILINE)
    return {name: float(value) for name, value in rows}


@pytest.mark.parametrize(
    "name",
    [
        "label_cleaner",
        "hyperparameter_tuner",
        "few_shot_learner",
        "noisy_labels",
        "regularisation",
        "maml",
        "own_method",
    ],
)
def test_a_tutorial_is_short_and_shows_a_small_picture(name: str) -> None:
    text = (TUTORIALS / f"{name}.md").read_text()
    assert text.count("\n") < 150
    assert f"../images/tutorials/{name}.png" in text
    assert (PICTURES / f"{name}.png").stat().st_size < 60_000
    assert len(table(TUTORIALS / f"{name}.md")) >= 2


def look_at(name: str, results: dict[str, float], tolerance: float) -> None:
    """The picture that was made, and the results beside the page's table."""
    assert pathlib.Path(f"{name}.png").stat().st_size < 60_000
    stated = table(TUTORIALS / f"{name}.md")
    assert stated.keys() == results.keys()
    for row, value in stated.items():
        assert results[row] == pytest.approx(value, abs=tolerance * value), row


@pytest.fixture
def made(request, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """What a tutorial's code defines, after a look at its picture and its table."""
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    name, tolerance = request.param
    if name == "label_cleaner":  # the folder that the control goes on with
        monkeypatch.setattr(KeptTrainings, "clear", lambda self: None)
    namespace = run(TUTORIALS / f"{name}.md")
    look_at(name, namespace["results"], tolerance)
    return namespace


@pytest.mark.slow
@pytest.mark.parametrize("made", [("label_cleaner", 0.03)], indirect=True)
def test_labels_are_cleaned_and_the_control_is_no_better(made: dict) -> None:
    cleaner, other = (made[name].history_ for name in ("cleaner", "control"))
    shared = [name for name in other if other[name] == cleaner[name]]
    assert len(shared) == (0 if WHOLE else 6)  # all but the last, with their seconds
    plain, *accuracies, given, cleaned, control = made["results"].values()
    assert min(accuracies) > plain + 0.1
    assert cleaned > given + 0.3 and cleaned > control - 0.01
    suspects = made["issues"]["row"].to_numpy()
    assert np.mean(made["given"][suspects] != made["right"][suspects]) > 0.9
    assert pathlib.Path("report.html").exists()


# The last cell: it leaves what the test looks at.
LEAVES = """
import json
read = keras.saving.load_model("digits.keras").predict(test[0], verbose=0)
right = float(np.mean(read.argmax(axis=1) == test[1]))
with open("left.json", "w") as file:
    json.dump([{row: float(value) for row, value in results.items()}, right], file)
"""


@pytest.mark.slow
def test_in_a_kernel_tuning_is_as_good_as_the_best_choice_by_hand(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The notebook, as a user runs it. The others are compared with their pages."""
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    )
    page = TUTORIALS / "hyperparameter_tuner.md"
    notebook = nbformat.read(page.with_suffix(".ipynb"), 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    changed = shorter(page, [cell.source for cell in code])
    for cell, source in zip(code, changed, strict=True):
        cell.source = source
    notebook.cells.append(nbformat.v4.new_code_cell(LEAVES))
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, resources=place).execute()
    (tuned,) = [cell for cell in notebook.cells if "tuner.plot()" in cell.source]
    kinds = [output.output_type for output in tuned.outputs]
    assert "stream" in kinds  # the values; the picture is a file
    results, read = json.loads((tmp_path / "left.json").read_text())
    look_at("hyperparameter_tuner", results, 0.02)
    nothing, dropout, best, tuned = results.values()
    assert tuned > max(nothing, dropout) + 0.01 and tuned > best - 0.01
    assert read == pytest.approx(tuned, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("made", [("noisy_labels", 0.03)], indirect=True)
def test_learned_weights_beat_every_choice_of_labels(made: dict) -> None:
    *plain, learned, right = made["results"].values()
    assert max(plain) + 0.01 < learned < right
    wrong, weights = made["wrong"], made["learned"]
    assert weights[~wrong].mean() > weights[wrong].mean() + 0.5


@pytest.mark.slow
@pytest.mark.parametrize("made", [("regularisation", 0.02)], indirect=True)
def test_learned_strengths_beat_the_best_single_one(made: dict) -> None:
    one, more_data, learned = made["results"].values()
    assert learned > max(one, more_data) + 0.02
    strength = made["strength"].reshape(16, 16)
    digit = strength[4:12, 4:12]
    noise = (strength.sum() - digit.sum()) / 192
    assert noise > 3 * digit.mean()


@pytest.mark.slow
@pytest.mark.parametrize("made", [("maml", 0.2)], indirect=True)
def test_maml_adapts_better_than_pretraining(made: dict) -> None:
    pretraining, maml = made["results"].values()
    assert maml < pretraining / 3


@pytest.mark.slow
@pytest.mark.parametrize("made", [("few_shot_learner", 0.03)], indirect=True)
def test_new_classes_are_told_apart_better_than_by_the_nearest_image(
    made: dict,
) -> None:
    nearest, one, three = made["results"].values()
    assert nearest + 0.03 < one and one + 0.01 < three < 1
    assert np.mean(made["guessed"] == made["names"]) >= 0.8


@pytest.mark.slow
@pytest.mark.parametrize("made", [("own_method", 0.01)], indirect=True)
def test_a_method_of_ones_own_is_checked_and_beats_one_strength(made: dict) -> None:
    one, own, implicit = made["results"].values()
    assert own > one + 0.04
    assert own == pytest.approx(implicit, abs=0.01)
    assert max(report.error for report in made["reports"]) < 1e-5
    off = [report.implicit_error for report in made["reports"]]
    assert off[1] < off[0] / 5 and off[2] < off[1] / 5
