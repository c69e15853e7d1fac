"""The tutorials: each runs, and gives what its page claims."""

import pathlib
import re

import keras
import matplotlib
import numpy as np
import pytest
from test_docs import ROOT, run

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


@pytest.fixture
def made(request, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """What a tutorial's code defines, after a look at its picture and its table."""
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    name, tolerance = request.param
    namespace = run(TUTORIALS / f"{name}.md")
    assert (tmp_path / f"{name}.png").stat().st_size < 60_000
    stated, results = table(TUTORIALS / f"{name}.md"), namespace["results"]
    assert stated.keys() == results.keys()
    for row, value in stated.items():
        assert results[row] == pytest.approx(value, abs=tolerance * value), row
    return namespace


@pytest.mark.slow
@pytest.mark.parametrize("made", [("label_cleaner", 0.03)], indirect=True)
def test_labels_are_cleaned_and_the_control_is_no_better(made: dict) -> None:
    plain, *accuracies, given, cleaned, control = made["results"].values()
    assert min(accuracies) > plain + 0.1
    assert cleaned > given + 0.3 and cleaned > control - 0.01
    suspects = made["issues"]["row"].to_numpy()
    assert np.mean(made["given"][suspects] != made["right"][suspects]) > 0.9
    assert pathlib.Path("report.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize("made", [("hyperparameter_tuner", 0.02)], indirect=True)
def test_tuning_is_as_good_as_the_best_choice_by_hand(made: dict) -> None:
    nothing, dropout, best, tuned = made["results"].values()
    assert tuned > max(nothing, dropout) + 0.01 and tuned > best - 0.01
    reloaded = keras.saving.load_model("digits.keras")
    images, labels = made["test"]
    read = reloaded.predict(images, verbose=0).argmax(axis=1)
    assert np.mean(read == labels) == pytest.approx(tuned, abs=1e-6)


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
