"""The demo of label cleaning: noise, scores, a whole run on few images, its files."""

import csv
import importlib.util
import json
import webbrowser

import numpy as np
import pytest
from experiment_scripts import load_experiment

from data_prep.images import Part

demo = load_experiment("label_cleaning")

SMALL = [
    *("--train-size", "150", "--validation-size", "60", "--test-size", "70"),
    *("--epochs", "1"),
]


def test_wrong_labels_are_as_many_and_of_the_kind_that_was_asked_for():
    labels = np.repeat(np.arange(10), 50)
    alike = {0: 6, 1: 7, 2: 7, 3: 8, 4: 9, 5: 6, 6: 0, 7: 1, 8: 3, 9: 4}
    for noise in demo.NOISES:
        given = demo.with_noise(labels, noise, 0.4, np.random.default_rng(1))
        wrong = given != labels
        assert wrong.sum() == 200 and given.dtype == labels.dtype
        pairs = {*zip(labels[wrong].tolist(), given[wrong].tolist(), strict=True)}
        if noise == "class-dependent":
            assert pairs == {*alike.items()}
        else:
            assert len(pairs) > 80  # of 90
    same = demo.with_noise(labels, "class-dependent", 0.0, np.random.default_rng(1))
    assert (same == labels).all()


def test_scores_are_those_of_counting():
    """Labels 1 and 2 of five are wrong; 2 and 4 are suspected, 2 and 3 changed."""
    right = np.array([0, 1, 2, 3, 4])
    given = np.array([0, 5, 5, 3, 4])
    test = Part(np.zeros((4, 1)), np.array([1, 2, 3, 4]))
    data = demo.Data(Part(np.zeros((5, 1)), given), test, test, right)
    found = demo.Found(
        suspicious=np.array([False, False, True, False, True]),
        suggested=np.array([0, 5, 2, 7, 4]),
        predicted=np.array([1, 2, 3, 9]),
    )
    assert demo.scores(found, data) == pytest.approx(
        {
            "test_accuracy": 75.0,
            "labels_right": 60.0,
            "precision": 50.0,
            "recall": 50.0,
            "f1": 50.0,
        }
    )
    nothing = demo.scores(demo.as_given(None, None, data), data)
    assert nothing == {
        "test_accuracy": None,
        "labels_right": pytest.approx(60.0),
        "precision": None,
        "recall": None,
        "f1": None,
    }


class OnlyIndices:
    """Stands for a network that says what it is told about each image."""

    def __init__(self, logits):
        self.logits = logits

    def predict(self, pixels, **options):
        return self.logits[np.asarray(pixels, int).ravel()]


def test_probabilities_are_those_of_the_logits():
    found = demo.probabilities(OnlyIndices(np.log([[1.0, 3.0]])), np.zeros((1, 1)))
    np.testing.assert_allclose(found, [[0.25, 0.75]])


def test_cross_validation_asks_networks_that_did_not_see_the_label(monkeypatch):
    args = demo.parse_args(["--out", "x", "--train-size", "40"])
    pixels = np.arange(40.0)[:, None]
    trusted = Part(100 + np.arange(10.0)[:, None], np.arange(10))
    data = demo.Data(
        Part(pixels, np.arange(40) % 10), trusted, trusted, np.arange(40) % 10
    )
    seen, asked = [], []

    def train(args, name, *parts):
        images = np.concatenate([part.images for part in parts])
        seen.append({*images.ravel().tolist()})
        return None

    def shares(network, images):
        asked.append({*images.ravel().tolist()})
        return np.full((len(images), 10), 0.1)

    monkeypatch.setattr(demo, "trained", train)
    monkeypatch.setattr(demo, "probabilities", shares)
    monkeypatch.setattr(demo, "by_cleanlab", lambda args, data, shares: shares)
    demo.cross_validated(args, None, data)
    everything = {*pixels.ravel().tolist()}
    known = {*trusted.images.ravel().tolist()}
    assert len(seen) == 5
    for one, other in zip(seen, asked, strict=True):
        assert one == (everything - other) | known and len(other) == 8
    assert set().union(*asked) == everything


def test_a_row_that_is_done_is_not_made_again(tmp_path, monkeypatch, capsys):
    def one(args, run, data):
        made.append(len(data.train.labels))
        return demo.Found(data.train.labels != data.right, data.right, None)

    def killed(*_):
        raise KeyboardInterrupt

    made = []
    flags = [*SMALL, "--out", str(tmp_path)]
    monkeypatch.setattr(demo, "WAYS", {"perfect": one, "other": killed})
    with pytest.raises(KeyboardInterrupt):
        demo.main(flags)
    monkeypatch.setitem(demo.WAYS, "other", demo.as_given)
    capsys.readouterr()
    summary = demo.main([*flags, "--resume"])
    assert made == [150]
    right = {name: row["labels_right"] for name, row in summary["methods"].items()}
    assert right == {"perfect": 100, "other": 60}
    table = capsys.readouterr().out.splitlines()
    assert ["perfect", "100.0"] in [line.split() for line in table]
    assert ["other", "60.0"] in [line.split() for line in table]


@pytest.mark.slow
def test_a_run_writes_its_files_and_is_resumed(tmp_path, monkeypatch, capsys):
    """The last row fails first, as in a kill; then nothing is trained again."""
    monkeypatch.setattr(demo, "FOLDS", 2)  # that there are five is looked at above
    way = demo.WAYS["LabelCleaner"]

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(demo.WAYS, "LabelCleaner", killed)
    flags = [*SMALL, "--out", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        demo.main(flags)
    monkeypatch.setitem(demo.WAYS, "LabelCleaner", way)
    monkeypatch.setattr(demo, "trained", None)
    opened = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    capsys.readouterr()
    summary = demo.main([*flags, "--resume"])
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert [*summary["methods"]] == [*demo.WAYS]
    as_given = summary["methods"]["labels as given"]
    assert as_given["labels_right"] == 60 and as_given["test_accuracy"] is None
    for name, row in [*summary["methods"].items()][1:]:
        assert all(0 <= row[key] <= 100 for key in demo.COLUMNS), name
    printed = capsys.readouterr().out
    assert "\n6/6 LabelCleaner" in printed
    for name in demo.WAYS:
        assert f"\n{name} " in printed
    report = (tmp_path / "report.html").resolve()
    assert f"Report: {report}\n" in printed and opened == []
    assert "<img" in report.read_text()
    with (tmp_path / "issues.csv").open() as file:
        issues = list(csv.DictReader(file))
    suspicious = [row for row in issues if row["given_label"] != row["suggested_label"]]
    assert suspicious == issues
    assert (tmp_path / "suspicious.png").stat().st_size > 5_000
    # Complete: everything is there, and now it is asked to be shown.
    monkeypatch.setitem(demo.WAYS, "LabelCleaner", killed)
    assert demo.main([*flags, "--resume", "--open"]) == summary
    assert opened == [report.as_uri()]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--validation-size", "10"],
            "every class must occur. Raise --validation-size",
        ),
        (["--train-size", "4000"], "fit in 5000"),
        (["--noise", "1"], "must be in"),
    ],
)
def test_bad_flags_are_one_line_before_training(flags, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        demo.main(["--out", str(tmp_path), *flags])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_without_cleanlab_it_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        demo.main(["--out", str(tmp_path / "new")])
    assert stop.value.code == 2 and not (tmp_path / "new").exists()
    assert "pip install '.[experiments]'" in capsys.readouterr().err
