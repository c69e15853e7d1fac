"""`tfbilevel tune` on small files."""

import json
import pathlib

import keras
import numpy as np
import pytest

from tfbilevel._jobs.command_line.main import main
from tfbilevel._jobs.command_line.tune import _parts


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name: str = "data.npz", n: int = 90) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(n, 3))
    x[:, 0] += np.where(np.arange(n) % 2, 1, -1)
    y = np.where(np.arange(n) % 2, "high", "low")
    np.savez(name, x=x, y=y)
    return x, y


@pytest.mark.slow
def test_rows():
    x, y = write()
    quick = "--epochs", "4", "--batch-size", "8", "--quiet"
    arguments = "data.npz", "--search", "l2,label-smoothing", "--out", "out"
    assert main(["tune", *arguments, *quick]) == 0
    names = sorted(path.name for path in pathlib.Path("out").iterdir())
    assert names == [
        "hyperparameters.csv", "model.keras", "report.html", "summary.json"
    ]  # fmt: skip
    summary = json.loads(pathlib.Path("out/summary.json").read_text())
    assert sum(summary["examples"].values()) == 90
    assert summary["examples"]["test"] == 18
    # One L2 penalty of each of the three layers, and the smoothing.
    assert len(summary["best"]) == 4 and "label_smoothing" in summary["best"]
    assert all(1e-8 <= v <= 1 for k, v in summary["best"].items() if "l2[" in k)
    rows = pathlib.Path("out/hyperparameters.csv").read_text().splitlines()
    assert rows[0].startswith("epoch,") and len(rows) == 1 + 5
    model = keras.models.load_model("out/model.keras")
    guessed = np.array(summary["classes"])[model.predict(x, verbose=0).argmax(axis=1)]
    assert (guessed == y).mean() > 0.7
    for each in "plain", "tuned":
        accuracy = summary["accuracy"][each]
        assert 0.5 < accuracy["share"] and accuracy["low"] < accuracy["high"]
    report = pathlib.Path("out/report.html").read_text()
    assert f"{100 * summary['accuracy']['tuned']['share']:.1f}\u00a0% tuned" in report
    assert report.count("<polyline") == 4
    # The guard: the higher accuracy on the tuning examples; if equal, the lower loss.
    assert set(summary["scores"]) == {"search", "starts"}
    ranks = {k: (v["accuracy"], -v["loss"]) for k, v in summary["scores"].items()}
    assert summary["choice"] == max(ranks, key=ranks.__getitem__)
    assert ("values at the start" in report) == (summary["choice"] == "starts")


def test_parts_have_every_class_and_no_example_twice():
    labels = np.repeat([0, 1, 2], [50, 100, 3])
    parts = _parts(labels, True, 0)
    for label, sizes in ((0, (32, 8, 10)), (1, (64, 16, 20)), (2, (1, 1, 1))):
        counts = np.bincount(parts[labels == label], minlength=3)
        np.testing.assert_allclose(counts, sizes, atol=1)
    assert set(_parts(labels, False, 0)) == {0, 2}
    assert (_parts(labels, True, 1) != parts).any()


@pytest.mark.parametrize(
    "n, arguments, line",
    [
        (
            90,
            ("--search", "l3"),
            "--search cannot tune 'l3'. Did you mean 'l2'? It has:",
        ),
        (90, ("--search", "shift"), "images"),
        (2, (), "data.npz has too few examples, 2"),
        (90, ("--validation", "no.npz"), "there is no file or folder no.npz"),
        (
            90,
            ("--validation", "other.npz"),
            "data.npz has no example of class 'middle'",
        ),
    ],
)
def test_refused(capsys, n, arguments, line):
    x, y = write(n=n)
    np.savez("other.npz", x=x, y=np.where(np.arange(n) == 0, "middle", y))
    assert main(["tune", "data.npz", *arguments, "--out", "out", "--quiet"]) == 2
    printed = capsys.readouterr().err
    assert line in printed and printed.count("\n") == 1
    found = sorted(path.name for path in pathlib.Path().iterdir())
    assert found == ["data.npz", "other.npz"]


@pytest.mark.slow
def test_images_with_validation_examples():
    """The default search of images, with a file of one's own to tune by."""
    generator = np.random.default_rng(0)
    for name, n in (("data.npz", 60), ("validation.npz", 30)):
        y = np.arange(n) % 2
        x = generator.integers(0, 100, (n, 8, 8)) + 100 * y[:, None, None]
        np.savez(name, x=x.astype(np.uint8), y=y)
    arguments = "data.npz", "--validation", "validation.npz", "--out", "out"
    assert main(["tune", *arguments, "--epochs", "6", "--quiet"]) == 0
    summary = json.loads(pathlib.Path("out/summary.json").read_text())
    assert summary["examples"] == {"training": 48, "validation": 30, "test": 12}
    assert {"shift", "brightness", "contrast"} < set(summary["best"])
    assert summary["accuracy"]["tuned"]["share"] > 0.8
