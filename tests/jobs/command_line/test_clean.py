"""`tfbilevel clean` on small files, from the command line to what is in the folder.

The cleaner is a quick stand-in, except in the slow tests at the end.
"""

import json
import pathlib
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from stand_in_cleaner import StandInCleaner

import tfbilevel as tb
import tfbilevel._jobs.command_line.clean
from tfbilevel._jobs.command_line.main import main

pandas = pytest.importorskip("pandas")
RESULTS = ["cleaned.csv", "issues.csv", "model.keras", "report.html", "summary.json"]
WRONG = np.arange(0, 90, 5)  # rows whose label is wrong


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty folder to work in, and the stand-in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tb, "LabelCleaner", StandInCleaner, raising=False)


def run(*arguments: str) -> int:
    return main(["clean", *arguments])


def flipped(right: np.ndarray) -> np.ndarray:
    """Labels with those of `WRONG` exchanged for the other class."""
    labels, wrong = right.copy(), WRONG[WRONG < len(right)]
    first, second = np.unique(right)
    labels[wrong] = np.where(right[wrong] == first, second, first)
    return labels


def people(n: int, seed: int):
    """Rows, and what is right: yes for the old and for the red."""
    generator = np.random.default_rng(seed)
    age = generator.integers(20, 80, n)
    colour = generator.choice(["red", "green", "blue"], n)
    right = np.where((age > 50) | (colour == "red"), "yes", "no")
    columns = {"name": [f"n{i}" for i in range(n)], "age": age, "a/colour": colour}
    return pandas.DataFrame(columns), right


def write_people(wrong: bool = True) -> np.ndarray:
    table, right = people(90, 0)
    table["likes"] = flipped(right) if wrong else right
    table["zero"] = [f"{i:03d}" for i in range(90)]  # must stay as it is written
    table.to_csv("data.csv", index=False)
    trusted, labels = people(120, 1)
    trusted["likes"], trusted["zero"] = labels, 7
    trusted.to_csv("trusted.csv", index=False)
    return right


CSV = ("data.csv", "--label", "likes", "--trusted", "trusted.csv", "--out", "out")


def found(folder: str = "out") -> list[int]:
    return sorted(pandas.read_csv(f"{folder}/issues.csv")["row"])


def names(folder: str) -> list[str]:
    return sorted(path.name for path in pathlib.Path(folder).iterdir())


def predicted(inputs) -> np.ndarray:
    """Classes that the saved model predicts, as raw examples are given."""
    summary = json.loads(pathlib.Path("out/summary.json").read_text())
    model = keras.models.load_model("out/model.keras")
    probabilities = model.predict(inputs, verbose=0)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    return np.array(summary["classes"])[probabilities.argmax(axis=1)]


def test_a_table(capsys):
    right = write_people()
    assert run(*CSV, "--columns", "age,a/colour", "--epochs", "20") == 0
    assert names("out") == RESULTS and names(".") == ["data.csv", "out", "trusted.csv"]
    rows = set(found())
    assert len(rows & set(WRONG)) >= len(WRONG) - 1 and len(rows) < len(WRONG) + 8
    data = pandas.read_csv("data.csv", dtype=str)
    cleaned = pandas.read_csv("out/cleaned.csv", dtype=str)
    assert list(cleaned) == list(data)
    assert cleaned.drop(columns="likes").equals(data.drop(columns="likes"))
    changed = np.flatnonzero(cleaned["likes"] != data["likes"])
    assert sorted(changed) == sorted(rows)
    assert (cleaned["likes"] == right).mean() > 0.9
    inputs = {
        "age": tf.constant(data[["age"]].astype("float32")),
        "a_colour": tf.constant(data[["a/colour"]].astype(str)),
    }
    assert (predicted(inputs) == right).mean() > 0.9
    summary = json.loads(pathlib.Path("out/summary.json").read_text())
    assert summary["issues"] == len(rows) and summary["examples"] == 90
    assert summary["accuracy"]["after"]["share"] == 0.75
    assert summary["command"].startswith("tfbilevel clean data.csv --label likes")
    report = pathlib.Path("out/report.html").read_text()
    assert summary["command"] in report and "a/colour" in report
    assert f"{len(rows)} of 90 labels" in report
    assert f"{len(rows)} of 90 labels look wrong" in capsys.readouterr().err


def test_columns_are_chosen_by_what_they_hold(capsys):
    write_people()
    assert run(*CSV, "--epochs", "1", "--quiet") == 0
    assert capsys.readouterr() == ("", "")
    assert run(*CSV, "--epochs", "1", "--overwrite") == 0
    said = capsys.readouterr().err
    assert "Columns: age (number), a/colour (category), zero (number)." in said
    assert "Left out, because of many different values: name" in said


def test_quiet_has_no_warnings(monkeypatch, capsys):
    class Warner(StandInCleaner):
        def fit(self, *arguments, **options):
            warnings.warn("something of Keras", UserWarning, stacklevel=2)
            return super().fit(*arguments, **options)

    write_people()
    monkeypatch.setattr(tb, "LabelCleaner", Warner)
    with pytest.raises(UserWarning):  # the tests make errors of them
        run(*CSV)
    assert run(*CSV, "--quiet") == 0
    assert capsys.readouterr().out == ""


def test_integer_labels_and_parquet():
    pytest.importorskip("pyarrow")
    for file, n, seed in (("data", 90, 0), ("trusted", 120, 1)):
        table, right = people(n, seed)
        numbers = (right == "yes").astype(int) + 3
        table["likes"] = flipped(numbers) if file == "data" else numbers
        table.drop(columns="name").to_parquet(f"{file}.parquet")
    files = "data.parquet", "--trusted", "trusted.parquet"
    assert run(*files, "--label", "likes", "--out", "out", "--quiet") == 0
    assert len(set(found()) & set(WRONG)) >= len(WRONG) - 1
    assert set(pandas.read_csv("out/cleaned.csv")["likes"]) == {3, 4}


def write_reviews() -> np.ndarray:
    good = ["a good film", "good, really good", "what a good story", "good"]
    bad = ["a bad film", "bad, really bad", "what a bad story", "bad"]
    texts = np.array(good * 10 + bad * 10)
    right = np.repeat(["+", "-"], 40)
    order = np.random.default_rng(0).permutation(80)
    texts, right = texts[order], right[order]
    frame = pandas.DataFrame({"review": texts, "stars": range(80), "kind": right})
    frame.to_csv("trusted.csv", index=False)
    frame["kind"] = flipped(right)
    frame.to_csv("data.csv", index=False)
    return right


def test_texts():
    right = write_reviews()
    columns = "--label", "kind", "--text", "review"
    assert run("data.csv", *columns, *CSV[3:], "--quiet") == 0
    assert found() == sorted(WRONG[WRONG < 80])
    texts = pandas.read_csv("data.csv")[["review"]].astype(str)
    assert (predicted({"review": tf.constant(texts)}) == right).all()
    assert (pandas.read_csv("out/cleaned.csv")["kind"] == right).all()


def test_texts_beside_other_columns():
    write_reviews()
    columns = "--label", "kind", "--text", "review", "--columns", "stars"
    assert run("data.csv", *columns, *CSV[3:], "--quiet", "--epochs", "30") == 0
    assert len(set(found()) & set(WRONG)) > 12


def write_pictures(folder: str, n: int, wrong: bool) -> list[str]:
    """Bright and dark pictures of different sizes in folders of these names."""
    image = pytest.importorskip("PIL.Image")
    generator = np.random.default_rng(n)
    misplaced = []
    for i in range(n):
        bright = i % 2
        size = (9, 7) if i % 7 == 3 else (8, 8)
        pixels = generator.integers(150 * bright, 105 + 150 * bright, size)
        label = bright ^ (wrong and i in WRONG)
        path = pathlib.Path(folder, ("dark", "bright")[label], f"{i:03d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(pixels.astype(np.uint8)).save(path)
        if label != bright:
            misplaced.append(str(path.relative_to(folder)))
    return misplaced


def test_pictures():
    misplaced = write_pictures("data", 60, True)
    write_pictures("trusted", 40, False)
    options = "--trusted", "trusted", "--out", "out", "--quiet"
    assert run("data", *options) == 0
    issues = pandas.read_csv("out/issues.csv")
    assert sorted(issues["file"]) == sorted(misplaced)
    cleaned = pandas.read_csv("out/cleaned.csv")
    assert list(cleaned) == ["file", "label"] and len(cleaned) == 60
    image = pytest.importorskip("PIL.Image")
    raw = np.asarray(image.open("data/" + cleaned["file"][0]))[None, ..., None]
    assert predicted(raw)[0] == cleaned["label"][0]
    larger = np.repeat(np.repeat(raw, 3, axis=1), 3, axis=2)  # any size
    assert predicted(larger)[0] == cleaned["label"][0]
    assert pathlib.Path("out/report.html").read_text().count("<img ") == len(misplaced)


@pytest.mark.parametrize("kind", ["rows", "images", "texts"])
def test_arrays(kind):
    right = np.arange(60) % 2
    noise = np.random.default_rng(0).normal(size=60)
    x = {
        "rows": np.stack([4.0 * right + noise, noise], axis=1),
        "images": (200 * right[:, None, None] + np.arange(25).reshape(5, 5) * 2),
        "texts": np.where(right, "up and up", "down"),
    }[kind]
    x = x.astype(np.uint8) if kind == "images" else x
    np.savez("trusted.npz", x=x, y=right)
    np.savez("data.npz", x=x, y=flipped(right), more=np.arange(3))
    assert run("data.npz", "--trusted", "trusted.npz", "--out", "out", "--quiet") == 0
    assert len(set(found()) & set(WRONG)) >= 11
    with np.load("out/cleaned.npz") as cleaned:
        np.testing.assert_array_equal(cleaned["x"], x)
        np.testing.assert_array_equal(cleaned["more"], np.arange(3))
        assert (cleaned["y"] == right).mean() > 0.9
    raw = tf.constant(x[:, None]) if kind == "texts" else x
    assert (predicted(raw) == right).mean() > 0.9


def test_without_trusted_examples():
    write_people()
    without = (*CSV[:3], "--out", "out", "--quiet", "--epochs", "1")
    assert run(*without) == 0
    summary = json.loads(pathlib.Path("out/summary.json").read_text())
    assert summary["accuracy"] is None and summary["trusted"] == 0
    assert "Not measured" in pathlib.Path("out/report.html").read_text()


def test_overwrite_keeps_other_files():
    write_people()
    pathlib.Path("out").mkdir()
    assert run(*CSV, "--quiet", "--epochs", "1") == 0  # an empty folder is none
    pathlib.Path("out/notes.txt").write_text("mine")
    pathlib.Path("out/issues.csv").write_text("old")
    assert run(*CSV, "--quiet", "--epochs", "1", "--overwrite") == 0
    assert names("out") == sorted([*RESULTS, "notes.txt"])
    assert pathlib.Path("out/notes.txt").read_text() == "mine"
    assert pathlib.Path("out/issues.csv").read_text() != "old"


def test_a_failure_leaves_nothing(monkeypatch, capsys):
    write_people()

    def full(*arguments, **options):
        raise OSError("no space left on device")

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    module = tfbilevel._jobs.command_line.clean
    for failure, code in ((full, 1), (interrupted, 130)):
        monkeypatch.setattr(module, "write_cleaning_report", failure)
        arguments = (*CSV[:-1], "new/out", "--epochs", "1")
        assert run(*arguments, "--quiet") == code
        assert names(".") == ["data.csv", "trusted.csv"]
        assert capsys.readouterr().err.count("\n") == 1
