"""The toy of penalty-based descent: its gradients, where it ends, its errors."""

import csv

import numpy as np
import pytest
import tensorflow as tf
from experiment_scripts import load_experiment

import tfbilevel as tb

toy = load_experiment("toy_pbgd")


def test_toy_gradients_are_those_of_the_formulas():
    """The published script's f_x fails this: its square is on the wrong term."""
    x, y = np.array([0.6, 1.7, 2.9]), np.array([2.0, -1.1, 0.3])
    e = np.exp(2 - 4 * x)
    f_x = 4 * e * np.cos(4 * y + 2) / (1 + e) ** 2
    f_x += (16 * x - 8) / ((4 * x - 2) ** 2 + 1)
    f_y = -4 * np.sin(4 * y + 2) / (1 + e)
    s = x + y
    g_x = 2 * s + np.sin(s) ** 2 + 2 * x * np.sin(s) * np.cos(s)
    g_y = 2 * s + 2 * x * np.sin(s) * np.cos(s)
    tx, ty = tf.constant(x), tf.constant(y)
    method = toy.build_method("v-pbgd", 10.0, 0.1)
    step = method.step(
        toy.PROBLEM, tx, ty, tb.Batches(None, None), method.init(toy.PROBLEM, tx, ty)
    )
    np.testing.assert_allclose(step.upper_gradient, (f_x + 10 * g_x) / 10, rtol=1e-8)
    moved = y - 0.1 * (f_y + 10 * g_y) / 10
    np.testing.assert_allclose(step.lower, moved, rtol=1e-8)
    published = 4 * e * np.cos(4 * y + 2) / (1 + e**2)
    published += (16 * x - 8) / ((4 * x - 2) ** 2 + 1)
    assert abs(published - f_x).max() > 0.1


def test_toy_ends_where_the_penalised_problem_has_its_solutions(tmp_path):
    summary = toy.main(["--out", str(tmp_path)])
    with (tmp_path / "end_points.csv").open() as file:
        ends = [(float(r["x"]), float(r["y"])) for r in csv.DictReader(file)]
    expected = np.array([(0.37, -0.33), (1.19, -1.21), (2.82, -2.83)])
    distance = np.linalg.norm(np.array(ends)[:, None] - expected, axis=2)
    assert distance.min(axis=1).max() < 0.02
    assert set(distance.argmin(axis=1)) == {0, 1, 2}
    assert summary["converged"] == 1.0
    # An independent replica of the corrected script took 329 steps on average and
    # ended at a mean distance of 0.0261.
    assert summary["mean_steps"] == pytest.approx(329, rel=0.15)
    assert summary["mean_residual"] == pytest.approx(0.0261, abs=0.003)
    assert (tmp_path / "end_points.png").stat().st_size > 10_000


def test_toy_gradient_norm_variant(tmp_path):
    argv = ["--out", str(tmp_path), "--starts", "20", "--method", "g-pbgd"]
    summary = toy.main(argv)
    points = summary["end_points"]
    assert min(abs(p["x"] - 0.3765) + abs(p["y"] + 0.3663) for p in points) < 1e-3


def test_training_that_diverges_is_one_line(tmp_path, capsys) -> None:
    for rate, flags in (("1e200", []), ("1e300", ["--method", "g-pbgd"])):
        out = tmp_path / rate
        with pytest.raises(SystemExit) as stop:
            toy.main(["--upper-lr", rate, "--starts", "3", *flags, "--out", str(out)])
        assert stop.value.code == 1
        message = capsys.readouterr().err
        assert "became NaN or infinite at outer step" in message
        assert len(message.splitlines()) == 1
        assert not (out / "summary.json").exists()
