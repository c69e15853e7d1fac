"""`tfbilevel clean` with the real `tb.LabelCleaner`, on small real data.

How many labels must be right comes from logistic regression on the trusted examples
alone, by scikit-learn.
"""

import contextlib
import importlib
import inspect
import json
import pathlib
import re
import subprocess
import sys
from typing import Any, NamedTuple

import numpy as np
import pytest

import tfbilevel as tb
from tfbilevel._jobs.command_line.main import main

pandas = pytest.importorskip("pandas")
pytest.importorskip("sklearn")
# One process runs all: each command is run once.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("real cleaner")]
Z = 1.959963984540054  # 95 percent of a normal distribution


class Run(NamedTuple):
    """A run of the command.

    Attributes:
        folder: where it ran; it has `out`.
        summary: what summary.json says.
        given, cleaned, right: the labels before and after, and the true ones.
        trusted: number of trusted examples.
        least: the share of right labels that logistic regression reaches.
        raw: the examples, as the saved model takes them.
        cleaner: the estimator in memory.
        x: what it was fitted on.
    """

    folder: pathlib.Path
    summary: dict[str, Any]
    given: np.ndarray
    cleaned: np.ndarray
    right: np.ndarray
    trusted: int
    least: float
    raw: dict[str, np.ndarray]
    cleaner: tb.LabelCleaner
    x: np.ndarray


def confused(right: np.ndarray, share: float) -> np.ndarray:
    """Of this share the label is that of the next class: it depends on the class."""
    classes, indices = np.unique(right, return_inverse=True)
    wrong = np.random.default_rng(1).random(len(right)) < share
    return classes[(indices + wrong) % len(classes)]


def digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    return data.data[order], np.array([f"digit {d}" for d in data.target[order]])


SOURCES = {
    "numpy": ("numpy", "numpy.linalg", "numpy.fft", "numpy.random"),
    "keras": ("keras.layers", "keras.losses", "keras.callbacks", "keras.optimizers"),
    "python": ("argparse", "asyncio", "decimal", "logging", "os", "pathlib", "unittest")
    + ("collections", "inspect", "random", "subprocess", "threading"),
}  # fmt: skip


def paragraphs(module: str) -> set[str]:
    """Of the docstrings of its functions and classes: real texts that are installed."""
    found, loaded = set(), importlib.import_module(module)
    names = [name for name in dir(loaded) if not name.startswith("_")]
    for each in [getattr(loaded, name) for name in names]:
        if inspect.isclass(each):
            own = [name for name in dir(each) if not name.startswith("_")]
            described = [each, *(getattr(each, name, None) for name in own)]
        else:
            described = [each] if inspect.isroutine(each) else []
        for one in described:
            for text in (inspect.getdoc(one) or "").split("\n\n"):
                text = " ".join(text.split())
                if len(text) > 60 and not re.search(">>>|```|---", text):
                    found.add(text)
    return found


def texts() -> tuple[np.ndarray, np.ndarray]:
    """Paragraphs, and whose documentation they are from."""
    order, x, y = np.random.default_rng(0), [], []
    for source, modules in SOURCES.items():
        known = sorted(set().union(*map(paragraphs, modules)))
        rows = order.permutation(len(known))[:500]
        x, y = x + [known[row] for row in rows], y + [source] * len(rows)
    rows = order.permutation(len(x))
    return np.array(x)[rows], np.array(y)[rows]


def baseline(x: Any, y: np.ndarray, trusted: int) -> float:
    """The share of right labels, on the others, of a model of the trusted examples."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=100.0 if x.shape[1] > 1000 else 1.0, max_iter=2000)
    return model.fit(x[:trusted], y[:trusted]).score(x[trusted:], y[trusted:])


def clean(*arguments: str) -> tuple[dict[str, Any], Any, Any]:
    """Runs the command here: what summary.json says, the cleaner, what it was given."""
    kept = []

    class Kept(tb.LabelCleaner):
        def fit(self, x: Any, y: Any = None, **options: Any) -> Any:
            kept.extend([super().fit(x, y, **options), x])
            return self

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tb, "LabelCleaner", Kept)
        assert main(["clean", *arguments, "--out", "out", "--quiet"]) == 0
    return json.loads(pathlib.Path("out/summary.json").read_text()), *kept


def a_table() -> Any:
    """Digits as 64 columns of numbers; a column of strings that tells nothing."""
    x, right = digits()
    x, right, trusted = x[:1000], right[:1000], 100
    table = pandas.DataFrame(x, columns=[f"p{i}" for i in range(64)])
    table["pen"] = np.random.default_rng(2).choice(["blue", "black"], len(x))
    given = confused(right[trusted:], 0.4)
    table[:trusted].assign(digit=right[:trusted]).to_csv("trusted.csv", index=False)
    shown = table[trusted:]
    shown.assign(digit=given).to_csv("data.csv", index=False)
    arguments = "data.csv", "--label", "digit", "--trusted", "trusted.csv"
    summary, cleaner, seen = clean(*arguments)
    cleaned = pandas.read_csv("out/cleaned.csv")["digit"].to_numpy()
    raw = {name: shown[[name]].to_numpy(np.float32) for name in list(shown)[:-1]}
    raw["pen"] = shown[["pen"]].to_numpy(str)
    least = baseline(x / 16, right, trusted)
    answers = given, cleaned, right[trusted:]
    return summary, *answers, trusted, least, raw, cleaner, seen


def a_folder_of_pictures() -> Any:
    image = pytest.importorskip("PIL.Image")
    x, right = digits()
    x, right, trusted = x[:700], right[:700], 100
    given = np.concatenate([right[:trusted], confused(right[trusted:], 0.4)])
    pixels = np.rint(x.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)
    for row, (picture, label) in enumerate(zip(pixels, given, strict=True)):
        folder = pathlib.Path("trusted" if row < trusted else "data", label)
        folder.mkdir(parents=True, exist_ok=True)
        image.fromarray(picture).save(folder / f"{row:03d}.png")
    summary, cleaner, seen = clean("data", "--trusted", "trusted")
    table = pandas.read_csv("out/cleaned.csv")
    parts = [pathlib.Path(file) for file in table["file"]]
    rows = np.array([int(part.stem) for part in parts])
    assert sorted(rows) == list(range(trusted, 700))
    assert (np.array([part.parent.name for part in parts]) == given[rows]).all()
    issues = pandas.read_csv("out/issues.csv")
    assert (issues["file"] == table["file"].to_numpy()[issues["row"]]).all()
    least = baseline(x / 16, right, trusted)
    answers = given[rows], table["label"].to_numpy(), right[rows]
    raw = {"picture": pixels[rows][..., None]}
    return summary, *answers, trusted, least, raw, cleaner, seen


def a_table_of_texts() -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    x, right = texts()
    trusted = 200
    given = confused(right[trusted:], 0.4)
    table = pandas.DataFrame({"text": x})
    table[:trusted].assign(of=right[:trusted]).to_csv("trusted.csv", index=False)
    table[trusted:].assign(of=given).to_csv("data.csv", index=False)
    options = "--label", "of", "--text", "text", "--trusted", "trusted.csv"
    summary, cleaner, seen = clean("data.csv", *options)
    cleaned = pandas.read_csv("out/cleaned.csv")["of"].to_numpy()
    words = TfidfVectorizer(ngram_range=(1, 2)).fit_transform(x)
    least = baseline(words, right, trusted)
    answers = given, cleaned, right[trusted:]
    return summary, *answers, trusted, least, {"text": x[trusted:, None]}, cleaner, seen


KINDS = {
    each.__name__: each for each in (a_table, a_folder_of_pictures, a_table_of_texts)
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    found = {}
    for name, kind in KINDS.items():
        folder = tmp_path_factory.mktemp(name)
        with contextlib.chdir(folder):
            found[name] = Run(folder, *kind())
    return found


@pytest.fixture(params=KINDS)
def run(request: Any, runs: dict[str, Run]) -> Any:
    found = runs[request.param]
    with contextlib.chdir(found.folder):
        yield found


def test_labels_are_right(run: Run) -> None:
    """More than those that a model of the trusted examples gets right."""
    before, after = (np.mean(each == run.right) for each in (run.given, run.cleaned))
    assert before < 0.65 < run.least
    assert after > run.least + 0.01


LOADS = """
import os, sys, keras, numpy as np, tensorflow as tf
for folder in sys.argv[1:]:
    os.chdir(folder)
    model = keras.models.load_model("out/model.keras")
    with np.load("raw.npz") as file:
        raw = {k: tf.constant(file[k]) for k in file.files}
    np.save("made.npy", model.predict(raw.get("picture", raw), verbose=0))
"""


def test_the_saved_models_predict_the_same(runs: dict[str, Run]) -> None:
    """They are given raw examples, in a new process without tfbilevel."""
    for run in runs.values():
        np.savez(run.folder / "raw.npz", **run.raw)  # pyright: ignore[reportArgumentType]
    folders = [str(run.folder) for run in runs.values()]
    command = [sys.executable, "-c", LOADS, *folders]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for run in runs.values():
        expected = run.cleaner.predict_proba(run.x)
        made = np.load(run.folder / "made.npy")
        np.testing.assert_allclose(made, expected, rtol=1e-3, atol=1e-5)


def test_summary_and_report_tell_what_the_tables_hold(run: Run) -> None:
    given, cleaned, summary = run.given, run.cleaned, run.summary
    issues = pandas.read_csv("out/issues.csv")
    rows = issues["row"].to_numpy(int)
    assert sorted(rows) == np.flatnonzero(cleaned != given).tolist()
    assert (issues["given_label"] == given[rows]).all()
    assert (issues["suggested_label"] == cleaned[rows]).all()
    assert (np.diff(issues["probability_right"]) >= 0).all()
    assert issues["rank"].tolist() == list(range(1, len(rows) + 1))
    n = len(given)
    assert summary["issues"] == len(rows) and summary["examples"] == n
    assert summary["trusted"] == run.trusted
    assert summary["classes"] == sorted(set(given.tolist()))
    assert summary["noise_model"] in summary["scores"]
    np.testing.assert_allclose(np.sum(summary["transition"], axis=1), 1, atol=1e-6)

    report = pathlib.Path("out/report.html").read_text()
    share = f"{100 * len(rows) / n:.1f}\u00a0%"
    assert f"{len(rows):,} of {n:,} labels ({share}) look wrong." in report
    shown = [int(row) for row in re.findall(r'data-row="(\d+)"', report)]
    assert shown == rows[:200].tolist()
    accuracy = summary["accuracy"]
    assert run.trusted / 5 < accuracy["n"] < run.trusted / 2
    for each in accuracy["before"], accuracy["after"]:
        m, p = accuracy["n"], each["share"]
        assert p * m == pytest.approx(round(p * m))  # a number of examples
        middle = (p + Z**2 / (2 * m)) / (1 + Z**2 / m)
        half = Z * np.sqrt(p * (1 - p) / m + Z**2 / (4 * m**2)) / (1 + Z**2 / m)
        found = each["low"], each["high"]
        assert found == pytest.approx((middle - half, middle + half))
        assert f"{100 * p:.1f}\u00a0%" in report
    sure = int((run.cleaner.weights_ >= 0.9).sum())
    assert f"Of {n:,} given labels, {sure:,} are right" in report
