"""`benchmarks/stochastic.py --quick`: what it reports, goes on with and refuses."""

import importlib
import json
import math
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"
METHODS = ("SOBA", "StocBiO")
TERMS = 10  # of StocBiO's series, and its steps of y
Vector = np.ndarray

# One process for all tests: they share a run of two methods.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("stochastic-benchmark")]


@pytest.fixture(scope="module")
def suite() -> Iterator[Any]:
    """The script, without its peers: those have an environment of their own."""
    with pytest.MonkeyPatch.context() as patch:
        # Its folders hold files of the same names as the experiments' folder.
        patch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
        made = importlib.import_module("stochastic")
        patch.setattr(made.environment, "PYTHON", BENCHMARKS / "no-python")
        yield made


@pytest.fixture(scope="module")
def out(suite: Any, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The folder of two methods on part (a)."""
    folder = tmp_path_factory.mktemp("stochastic")
    assert run(suite, folder, "a", *METHODS) == 0
    return folder


def run(suite: Any, folder: pathlib.Path, part: str, *more: str) -> int:
    return suite.main(
        ["--quick", f"--part={part}", f"--out={folder}", "--methods", *more]
    )


def report(folder: pathlib.Path, part: str) -> dict[str, Any]:
    document = json.loads((folder / f"stochastic-{part}.json").read_text())
    return document["cases"][""]["rows"]


def runs(folder: pathlib.Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


class Counted:
    """The gradients of part (a), each of which counts as one call, and the products,
    each of which counts as two."""

    def __init__(self, problem: Any, upper: Vector, lower: Vector):
        self.upper, self.lower = problem.examples("")
        self.upper_rows, self.lower_rows, self.calls = upper, lower, 0

    def f(self, k: int, x: Vector, y: Vector) -> tuple[Vector, Vector]:
        """f_x and f_y, at one point."""
        self.calls += 1
        d, e = (each[self.upper_rows[k]] for each in self.upper)
        return 0.1 * x, d.T @ (d @ y - e) / len(d)

    def g_y(self, k: int, draw: int, x: Vector, y: Vector) -> Vector:
        self.calls += 1
        a, b = self._rows(k, draw)
        return a.T @ (a @ y - b @ x) / len(a)

    def products(self, k: int, draw: int, v: Vector) -> tuple[Vector, Vector]:
        """g_yy v and g_xy v, of one vector: one call for both."""
        self.calls += 2
        a, b = self._rows(k, draw)
        along = a @ v / len(a)
        return a.T @ along, -b.T @ along

    def _rows(self, k: int, draw: int) -> tuple[Vector, ...]:
        return tuple(each[self.lower_rows[k, draw]] for each in self.lower)


def soba(at: Counted, rate: float, upper_rate: float, steps: int) -> Vector:
    x = y = v = np.zeros(100)
    for k in range(steps):
        d_y, (curved, mixed), (f_x, f_y) = (
            at.g_y(k, 0, x, y),
            at.products(k, 0, v),
            at.f(k, x, y),
        )
        x = x - upper_rate * (f_x - mixed)
        y, v = y - rate * d_y, v - rate * (curved - f_y)
    return x


def stocbio(at: Counted, rate: float, upper_rate: float, steps: int) -> Vector:
    x = y = np.zeros(100)
    for k in range(steps):
        for t in range(TERMS):
            y = y - rate * at.g_y(k, t, x, y)
        f_x, term = at.f(k, x, y)
        total = term
        for j in range(TERMS):
            term = term - rate * at.products(k, TERMS + j, term)[0]
            total = total + term
        _, mixed = at.products(k, 2 * TERMS, rate * total)
        x = x - upper_rate * (f_x - mixed)
    return x


@pytest.mark.parametrize(
    ("name", "steps_of", "draws"),
    [("SOBA", soba, 1), ("StocBiO", stocbio, 2 * TERMS + 1)],
)
def test_calls_are_those_of_the_steps_that_were_made(
    suite: Any, out: pathlib.Path, name: str, steps_of: Callable, draws: int
) -> None:
    """The papers' steps in NumPy, on the same batches, end where the run was at its
    first look; the gradients and products that they take are the reported calls."""
    protocol = sys.modules["stochastic_protocol"]
    problem = suite.load("a", out / "a" / "data.npz")
    look, whole = runs(out / "a", f"{name}.jsonl")
    assert (look["stage"], whole["stage"]) == ("look", "whole")
    steps, (rate, ratio, power) = whole["steps"][0], whole["setting"]
    assert power == 0
    sizes = tuple(len(level[0]) for level in problem.examples(""))
    numbers = next(protocol.batches("random", draws, steps, sizes, whole["seed"]))
    at, rate = Counted(problem, *numbers), rate / problem.largest
    x = steps_of(at, rate, ratio * rate, steps)
    (wanted,) = problem.measured(x, None)
    (start,) = problem.measured(0 * x, None)
    assert whole["found"][0] == [pytest.approx(wanted, rel=1e-3)]  # made in float32
    assert wanted < 0.9 * start  # far from where all methods are alike
    assert report(out, "a")[name]["calls_per_step"] == at.calls / steps


def test_part_b_is_run_and_reported(suite: Any, tmp_path: pathlib.Path) -> None:
    """On fewer rows: the least h of all takes a minute to find."""
    (tmp_path / "b").mkdir()
    arrays = suite.PARTS["b"].made(rows=1024)
    np.savez(tmp_path / "b" / "data.npz", **arrays)
    assert run(suite, tmp_path, "b", "MEHA") == 0
    row = report(tmp_path, "b")["MEHA"]
    # z, y and f_y; x by g at both points, and by f.
    assert row["calls_per_step"] == 6 and row["order"] == 1
    problem = suite.load("b", tmp_path / "b" / "data.npz")
    least, begun = float(problem.least), problem.measured(*problem.start())[0]
    assert 0 < row["value"] < begun - least < math.inf


def test_a_finished_run_is_not_made_again(suite: Any, out: pathlib.Path) -> None:
    files = [out / "a" / f"{name}.jsonl" for name in METHODS]
    before, shown = [path.read_bytes() for path in files], report(out, "a")
    assert all(len(each.splitlines()) == 2 for each in before)
    (out / "stochastic-a.json").unlink()
    assert run(suite, out, "a", *METHODS) == 0
    assert [path.read_bytes() for path in files] == before
    assert report(out, "a") == shown


@pytest.mark.parametrize("options", [["--quick", "--condition=20"], []])
def test_other_options_are_refused(
    suite: Any, out: pathlib.Path, options: list[str]
) -> None:
    """Another problem; the whole grid after one setting of it."""
    before = {path: path.read_bytes() for path in (out / "a").iterdir()}
    with pytest.raises(SystemExit, match="has results of other options"):
        suite.main([*options, f"--out={out}", "--methods", *METHODS])
    assert {path: path.read_bytes() for path in (out / "a").iterdir()} == before


@pytest.mark.parametrize(
    ("flag", "value"), [("look", "-1"), ("seconds", "nan"), ("condition", "0")]
)
def test_bad_number_is_refused_before_anything_is_written(
    suite: Any,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    flag: str,
    value: str,
) -> None:
    with pytest.raises(SystemExit):
        run(suite, tmp_path / "new", "a", "SOBA", f"--{flag}", value)
    rule = f"argument --{flag}: must be above zero and finite, got {value}"
    assert rule in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
