"""What the user must correct: one line, exit code 2, nothing written."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from stand_in_cleaner import StandInCleaner

import tfbilevel as tb
from tfbilevel._jobs.command_line.main import main

pandas = pytest.importorskip("pandas")
GOOD = "age,city,y\n1,a,no\n2,b,yes\n3,a,no\n4,b,yes\n"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder with good files, and a cleaner that must not be called."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tb, "LabelCleaner", Unwanted, raising=False)
    pathlib.Path("data.csv").write_text(GOOD)
    pathlib.Path("trusted.csv").write_text(GOOD)


class Unwanted:
    def __init__(self, *arguments, **options):
        raise AssertionError("the input is wrong, and training began")


def files() -> list[str]:
    return sorted(str(path) for path in pathlib.Path().rglob("*"))


def refused(capsys, *arguments: str) -> str:
    """The line about it. Nothing new may be on the disk."""
    before = files()
    assert main(["clean", *arguments]) == 2
    printed = capsys.readouterr()
    assert files() == before
    lines = [line for line in printed.err.splitlines() if "error" in line]
    assert printed.err.splitlines()[-1:] == lines and len(lines) == 1
    assert printed.out == ""
    return lines[0].removeprefix("tfbilevel clean: error: ")


CSV = ("data.csv", "--label", "y", "--trusted", "trusted.csv", "--out", "out")


@pytest.mark.parametrize(
    "data, line",
    [
        ("age,city,Y\n1,a,no\n", "data.csv has no column 'y'. Did you mean 'Y'?"),
        ("age,city,y\n", "data.csv has no rows"),
        ("", "data.csv cannot be read as a table: No columns to parse from file"),
        ("age,y\n1,no,3,4\n2,yes\n3,yes,3,4,5,6\n", "cannot be read as a table"),
        ("age,city,y\n1,a,no\n,b,yes\n", "column 'age' of data.csv has no finite "
         "number in row 2"),
        ("age,city,y\ninf,a,no\n1,b,yes\ninf,b,yes\n", "in 2 rows, the first is row 1"),
        ("age,city,y\n1,a,\n2,b,yes\n", "'y' of data.csv has no label in row 1"),
        ("age,city,y\n1,a,no\n2,b,maybe\n", "has no example of class 'maybe'"),
        ("age,city,y\n1,a,0\n2,b,1\n", "labels of one kind, all text or all numbers"),
        ("age,city,y\n1,a,0.5\n2,b,1.5\n", "must be classes: integers"),
        ("age,city,y\nx,a,no\nz,b,yes\n", "holds text in data.csv but numbers"),
        ("age,y\n1,no\n2,yes\n", ""),
        ("city,other,y\na,1,no\nb,1,yes\n", "trusted.csv has no column 'other'"),
    ],
)  # fmt: skip
def test_tables(capsys, data, line):
    pathlib.Path("data.csv").write_text(data)
    if line:
        assert line in refused(capsys, *CSV)
    else:  # trusted examples may have more columns; then training begins
        with pytest.raises(AssertionError, match="training began"):
            main(["clean", *CSV])
        assert files() == ["data.csv", "trusted.csv"]


@pytest.mark.parametrize(
    "arguments, line",
    [
        ((*CSV[:1], *CSV[3:]), "--label must name the column of labels of data.csv"),
        ((*CSV, "--columns", "agee"), "no column 'agee'. Did you mean 'age'? It has: "),
        ((*CSV, "--columns", "age,y"), "'y' is the label: it cannot be a feature too"),
        ((*CSV, "--text", "town"), "data.csv has no column 'town'"),
        (("no.csv", *CSV[1:]), "there is no file or folder no.csv"),
        ((*CSV[:4], "no.csv", *CSV[5:]), "there is no file or folder no.csv"),
        (("file.txt", *CSV[1:]), "file.txt must be a .csv, .parquet or .npz file"),
        ((*CSV[:4], ".", *CSV[5:]), "they must be alike"),
        ((*CSV[:6], "full"), "the folder full is not empty. Give another --out, or "),
        ((*CSV[:6], "file.txt"), "--out must be a folder, but file.txt is a file"),
        ((".", "--out", "out", "--text", "y"), "--columns and --text are for tables"),
    ],
)
def test_arguments(capsys, arguments, line):
    pathlib.Path("file.txt").write_text("x")
    pathlib.Path("full").mkdir()
    pathlib.Path("full/a").write_text("x")
    assert line in refused(capsys, *arguments)


def test_one_class_only(capsys):
    for name in "data.csv", "trusted.csv":
        pathlib.Path(name).write_text("age,city,y\n1,a,no\n2,b,no\n")
    assert "must hold at least two classes" in refused(capsys, *CSV)


def test_a_column_that_is_none_of_numbers_and_categories(capsys):
    rows = "".join(f"word{i},{'ab'[i % 2]}\n" for i in range(60))
    pathlib.Path("data.csv").write_text("city,y\n" + rows)
    line = refused(capsys, *CSV, "--columns", "city")
    assert "60 values" in line and "--text city" in line
    line = refused(capsys, *CSV)
    assert "no column for the network" in line and "--text city" in line


@pytest.mark.parametrize(
    "arrays, line",
    [
        (dict(x=np.ones((3, 2))), "has no array 'y'"),
        (dict(x=np.ones((3, 2)), y=np.arange(2)), "must have the same length"),
        (dict(x=np.array([[1, np.nan], [1, 2]]), y=[0, 1]), "NaN or infinity in 1"),
        (dict(x=np.ones((0, 2)), y=[]), "has no examples"),
        (dict(x=np.ones((2, 3)), y=[0, 1]), "have another shape, (2,), than"),
        (dict(x=np.ones((2, 2, 2, 2, 2)), y=[0, 1]), ""),
        (dict(x=np.array([None, 1]), y=[0, 1]), "cannot be read as arrays"),
        (dict(x=np.ones((3, 2)), y=[0, 1, 5]), "has no example of class 5"),
    ],
)
def test_arrays(capsys, arrays, line):
    np.savez("data.npz", **arrays)
    np.savez("trusted.npz", x=np.ones((2, 2)), y=[0, 1])
    files = "data.npz", "--trusted", "trusted.npz", "--out", "out"
    assert (line or "another shape") in refused(capsys, *files)
    pathlib.Path("data.npz").write_text("not a zip")
    assert "cannot be read as arrays" in refused(capsys, *files)


def test_pictures(capsys):
    image = pytest.importorskip("PIL.Image")
    options = "--out", "out"
    pathlib.Path("data").mkdir()
    assert "holds no folders" in refused(capsys, "data", *options)
    pathlib.Path("data/cat").mkdir()
    pathlib.Path("data/dog").mkdir()
    image.new("L", (4, 4)).save("data/cat/1.png")
    assert "data/dog holds no pictures" in refused(capsys, "data", *options)
    pathlib.Path("data/dog/1.png").write_text("no picture")
    assert "data/dog/1.png is not a picture" in refused(capsys, "data", *options)
    # The first half of a good one.
    whole = pathlib.Path("data/cat/1.png").read_bytes()
    pathlib.Path("data/dog/1.png").write_bytes(whole[: len(whole) // 2])
    assert "data/dog/1.png is not a picture" in refused(capsys, "data", *options)
    image.new("L", (4, 4)).save("data/dog/1.png")
    pathlib.Path("trusted/cat").mkdir(parents=True)
    image.new("L", (4, 4)).save("trusted/cat/1.png")
    line = refused(capsys, "data", "--trusted", "trusted", *options)
    assert "trusted has no example of class 'dog'" in line


@pytest.mark.parametrize("package", ["pandas", "jinja2", "PIL.Image", "pyarrow"])
def test_a_package_that_is_missing(capsys, monkeypatch, package):
    pathlib.Path("data/cat").mkdir(parents=True)
    pathlib.Path("data/cat/1.png").write_text("")
    pandas.read_csv("data.csv").to_parquet("data.parquet")
    monkeypatch.setitem(sys.modules, package, None)
    data = {"PIL.Image": ["data"], "pyarrow": ["data.parquet"]}.get(
        package, ["data.csv"]
    )
    line = refused(capsys, *data, "--label", "y", "--out", "out")
    install = {"PIL.Image": "pillow"}.get(package, package)
    assert f"pip install {install}`" in line and "tfbilevel[jobs]" in line


def test_what_the_estimator_refuses(capsys, monkeypatch):
    class Refusing(StandInCleaner):
        def fit(self, *arguments, **options):
            raise ValueError("`x` must be\nsomething else. Received: x")

    monkeypatch.setattr(tb, "LabelCleaner", Refusing)
    assert refused(capsys, *CSV) == "`x` must be something else. Received: x"


def test_a_fault_of_ours_is_not_called_bad_input(monkeypatch):
    class Broken(StandInCleaner):
        def fit(self, *arguments, **options):
            raise KeyError("ours")

    monkeypatch.setattr(tb, "LabelCleaner", Broken)
    with pytest.raises(KeyError, match="ours"):
        main(["clean", *CSV])
    assert files() == ["data.csv", "trusted.csv"]


@pytest.mark.parametrize("arguments", [[], ["clear"], ["clean", "--epochs", "0", *CSV]])
def test_options_that_are_wrong(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["clean", "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "tfbilevel clean data.csv --label y --trusted trusted.csv" in printed


@pytest.mark.slow
def test_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "tfbilevel", "clean", "no.csv", "--out", "out"],
        capture_output=True,
        text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    assert done.returncode == 2
    assert "tfbilevel clean: error: there is no file or folder no.csv" in done.stderr
