"""`tfbilevel few-shot` on small files."""

import json
import pathlib

import keras
import numpy as np
import pytest

from tfbilevel._jobs.command_line.main import main

QUICK = ("--epochs", "1", "--steps-per-epoch", "2", "--episodes", "20", "--quiet")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def classes(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Six examples of each of so many classes, far apart."""
    generator = np.random.default_rng(seed)
    centres = np.repeat(generator.normal(size=(count, 6)), 6, axis=0)
    x = centres + 0.02 * generator.normal(size=centres.shape)
    return x, np.repeat([f"class {i:02d}" for i in range(count)], 6)


def write(name: str, count: int, seed: int) -> np.ndarray:
    x, y = classes(count, seed)
    np.savez(name, x=x, y=y)
    return x


def test_arrays():
    write("data.npz", 12, 0)
    new = write("new.npz", 3, 1)
    arguments = "data.npz", "--ways", "3", "--shots", "2", "--new", "new.npz"
    assert main(["few-shot", *arguments, "--out", "out", *QUICK]) == 0
    names = sorted(path.name for path in pathlib.Path("out").iterdir())
    assert names == ["model.keras", "report.html", "summary.json"]
    summary = json.loads(pathlib.Path("out/summary.json").read_text())
    assert summary["classes"] == ["class 00", "class 01", "class 02"]
    assert summary["classes_learned_from"] == 9 and summary["classes_measured_by"] == 3
    # Far above the third of chance: the classes are far apart, training was short.
    assert summary["accuracy"] > 0.6 and 0 <= summary["margin_95"] < 0.1
    model = keras.models.load_model("out/model.keras")
    guessed = model.predict(new, verbose=0)
    np.testing.assert_allclose(guessed.sum(axis=1), 1, rtol=1e-5)
    assert (guessed.argmax(axis=1) == np.repeat(range(3), 6)).mean() > 0.6
    report = pathlib.Path("out/report.html").read_text()
    assert f"{100 * summary['accuracy']:.1f}\u00a0% of others" in report
    assert summary["command"] in report


@pytest.mark.parametrize(
    "count, arguments, line",
    [
        (7, ("--ways", "4"), "data.npz has 7 classes, but --ways 4 needs at least 8"),
        (8, ("--shots", "6"), "a class of data.npz has only 6 examples: there must be"),
        (8, ("--new", "no.npz"), "there is no file or folder no.npz"),
        (8, ("--ways", "1"), "`ways` must be "),
    ],
)
def test_refused(capsys, count, arguments, line):
    write("data.npz", count, 0)
    options = "data.npz", "--ways", "3", *arguments, "--out", "out", *QUICK
    assert main(["few-shot", *options]) == 2
    printed = capsys.readouterr().err
    assert line in printed and printed.count("\n") == 1
    assert [path.name for path in pathlib.Path().iterdir()] == ["data.npz"]


@pytest.mark.slow
def test_pictures():
    """A folder of striped pictures: the published network, with its own layers."""
    image = pytest.importorskip("PIL.Image")
    generator = np.random.default_rng(0)
    for label in range(8):
        pathlib.Path(f"data/{label}").mkdir(parents=True)
        pattern = generator.integers(0, 200, (16, 16))
        for i in range(4):
            noisy = pattern + generator.integers(0, 40, (16, 16))
            image.fromarray(noisy.astype(np.uint8)).save(f"data/{label}/{i}.png")
    options = "data", "--ways", "3", "--out", "out", *QUICK
    assert main(["few-shot", *options]) == 0
    summary = json.loads(pathlib.Path("out/summary.json").read_text())
    model = keras.models.load_model("out/model.keras")
    pictures = [np.asarray(image.open(f"data/{c}/3.png")) for c in summary["classes"]]
    guessed = model.predict(np.stack(pictures)[..., None], verbose=0).argmax(axis=1)
    assert (guessed == np.arange(3)).mean() > 0.6
