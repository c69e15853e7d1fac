"""The non-convex follower, BDA's counter-example and the convex problem, in NumPy."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import tensorflow as tf
from experiment_scripts import drawn, load_experiment
from suites import fast_where

import tfbilevel as tb

follower = load_experiment("nonconvex_follower")
SINE = follower.EXAMPLES["sine"]
SOLUTION = np.array([11 * np.pi / 4, -2.0])


@dataclasses.dataclass
class Unrolled:
    """The inner steps of the sine problem and their derivatives, forward in NumPy.

        y <- y - a ((1 - w_t) f_y + w_t F_y),      f_y = -x cos(x y),    F_y = x

    Lists over the steps, the start first: y, dy/dx, dy/dz.
    """

    x: float
    y: list[float]
    by_x: list[float]
    by_z: list[float]

    def gradients(self, k: int) -> tuple[float, float]:
        """d/dx and d/dz of F = x + x y_k."""
        return 1 + self.y[k] + self.x * self.by_x[k], self.x * self.by_z[k]

    def worst(self) -> int:
        return 1 + int(np.argmax([self.x + self.x * y for y in self.y[1:]]))


def unroll(x, z, settings, alpha=0.0, decay=1.0) -> Unrolled:
    a, made = settings.inner_lr, Unrolled(x, [z], [0.0], [1.0])
    for t in range(settings.inner_steps):
        y, w = made.y[-1], alpha * decay**t
        step = (1 - w) * -x * np.cos(x * y) + w * x
        curvature = (1 - w) * x**2 * np.sin(x * y)
        mixed = (1 - w) * (x * y * np.sin(x * y) - np.cos(x * y)) + w
        moved = y - a * step
        inside = not settings.project_inner or abs(moved) <= 2
        made.y.append(moved if inside else float(np.clip(moved, -2, 2)))
        made.by_x.append(inside * (made.by_x[-1] * (1 - a * curvature) - a * mixed))
        made.by_z.append(inside * made.by_z[-1] * (1 - a * curvature))
    return made


def first_step(method, x, y, settings):
    learned = method in follower.LEARNED_START
    problem = follower.build_problem(SINE, learned, settings.project_inner)
    chosen = follower.build_method(method, settings)
    x, y = tf.constant(x, tf.float64), tf.constant(y, tf.float64)
    upper = {"x": x, "start": y} if learned else {"x": x}
    state = chosen.init(problem, upper, y)
    return chosen.step(problem, upper, y, tb.Batches(None, None), state)


# The last one's inner steps overshoot: F is largest neither first nor last.
POINTS = [(1, 2, {}), (5, 1, {}), (7, -1, {}), (8.7, -1.9, {"inner_lr": 0.02})]
POINTS += [(8.0, -1.99, {"inner_lr": 0.002, "project_inner": True})]


@pytest.mark.parametrize("x, y, changes", POINTS)
def test_first_pessimistic_gradient_is_that_of_the_recursion(x, y, changes):
    settings = dataclasses.replace(SINE.settings, **changes)
    made = unroll(float(x), float(y), settings)
    k = made.worst()
    step = first_step("iaptt-gm", x, y, settings)
    assert int(step.metrics["truncation"]) == k
    by_x, by_z = made.gradients(k)
    np.testing.assert_allclose(step.upper_gradient["x"], by_x, rtol=1e-9)
    np.testing.assert_allclose(step.upper_gradient["start"], by_z, rtol=1e-9)
    np.testing.assert_allclose(step.lower, made.y[-1], rtol=1e-12)


def test_the_points_have_first_last_and_other_truncations():
    found = set()
    for x, y, changes in POINTS:
        settings = dataclasses.replace(SINE.settings, **changes)
        found.add(unroll(x, y, settings).worst())
    assert {1, 40} < found


@pytest.mark.parametrize("method", ["ls", "ns", "rhg", "bda", "ia-gm"])
def test_first_gradient_of_the_other_methods(method):
    x, y, settings = 7.0, -1.0, SINE.settings
    mixing = {"alpha": 0.4, "decay": 0.9} if method == "bda" else {}
    made = unroll(x, y, settings, **mixing)
    by_x, by_z = made.gradients(settings.inner_steps)
    last = made.y[-1]
    curvature = x**2 * np.sin(x * last)
    mixed = x * last * np.sin(x * last) - np.cos(x * last)
    if method == "ls":
        by_x = 1 + last - mixed * x / curvature
    if method == "ns":
        a = settings.inner_lr
        series = a * sum((1 - a * curvature) ** j for j in range(11))
        by_x = 1 + last - mixed * x * series
    step = first_step(method, x, y, settings)
    np.testing.assert_allclose(step.upper_gradient["x"], by_x, rtol=1e-9)
    if method == "ia-gm":
        np.testing.assert_allclose(step.upper_gradient["start"], by_z, rtol=1e-9)
    np.testing.assert_allclose(step.lower, last, rtol=1e-12)


def test_path_is_that_of_the_published_loop():
    """Projections of x and z, the settling rate, and what belongs to which step."""
    settings = dataclasses.replace(SINE.settings, outer_steps=40, settle=0.25)
    path = follower.solve(SINE, "iaptt-gm", "(7, -1)", settings)
    x, z = 7.0, -1.0
    for step in range(41):
        made = unroll(x, z, settings)
        k = made.worst()
        expected = [x, made.y[k], made.y[-1], x + x * made.y[k], k]
        expected += [-np.sin(x * made.y[k])]
        found = [path.x[step], path.y[step], path.y_last[step], path.upper[step]]
        found += [path.truncation[step], path.lower[step]]
        # The scheduled rate is a float32.
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        rate = 0.1 if step < 30 else 0.01
        by_x, by_z = made.gradients(k)
        x = float(np.clip(x - rate * by_x, 1, 10))
        z = float(np.clip(z - rate * by_z, -2, 2))
    assert len(path.x) == 41 and z == -2


# On one worker: the run they look at takes ten seconds.
ONE_RUN = pytest.mark.xdist_group("follower")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The sine problem by iaptt-gm and the convex one by ia-gm-a, as published."""
    out = tmp_path_factory.mktemp("follower")
    flags = ["--problem", "sine", "convex", "--method", "iaptt-gm", "ia-gm-a"]
    return out, follower.main([*flags, "--out", str(out)])


@pytest.mark.slow
@ONE_RUN
def test_iaptt_gm_arrives_from_every_start(run):
    ends = run[1]["examples"]["sine"]["iaptt-gm"]
    assert set(ends) == {"(1, 2)", "(5, 1)", "(7, -1)"}
    for end in ends.values():
        assert abs(end["x"] - SOLUTION[0]) < 0.05 and abs(end["y"] - SOLUTION[1]) < 0.05
        assert end["distance_last"] < 0.05
        assert 1 < end["mean_truncation"] < 40
    assert run[1]["arrived_from_every_start"]["sine"] == ["iaptt-gm"]


@pytest.mark.parametrize(
    "method", fast_where("rhg".__eq__, ["ls", "ns", "rhg", "bda", "ia-gm"])
)
def test_the_other_methods_miss_from_the_first_start(method):
    path = follower.solve(SINE, method, "(1, 2)", SINE.settings)
    assert np.hypot(*(np.array([path.x[-1], path.y[-1]]) - SOLUTION)) > 0.5
    if method != "ia-gm":  # published: a relative residual of 0.88, the lower bound
        assert path.x[-1] == 1.0


def counter_minimum(settings, alpha, decay):
    """Where F(x, y_K(x)) is least: y_K = slope x + offset, by linearity."""

    def last(x):
        y = np.zeros(2)
        for t in range(settings.inner_steps):
            w = alpha * decay**t
            step = (1 - w) * np.array([y[0] - x, 0.0])
            y = y - settings.inner_lr * (step + w * np.array([y[0] - 1, y[1] - x]))
        return y

    offset = last(0.0)
    slope = last(1.0) - offset
    # F = ((1 - s2) x - o2)^2 / 2 + (s1 x + o1 - 1)^2 / 2
    numerator = (1 - slope[1]) * offset[1] + slope[0] * (1 - offset[0])
    return numerator / ((1 - slope[1]) ** 2 + slope[0] ** 2)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rhg", "bda", "ia-gm"])
def test_counter_example_needs_aggregation_or_a_learned_start(method):
    example = follower.EXAMPLES["counter"]
    settings = example.settings
    path = follower.solve(example, method, "0", settings)
    end = [path.x[-1], *path.y[-1]]
    if method == "rhg":
        assert counter_minimum(settings, 0.0, 1.0) == pytest.approx(0.5)
        np.testing.assert_allclose(end, [0.5, 0.5, 0], atol=1e-6)
    elif method == "bda":
        expected = counter_minimum(settings, settings.alpha, settings.alpha_decay)
        assert end[0] == pytest.approx(expected, abs=1e-9)
        np.testing.assert_allclose(end, 1, atol=0.01)
    else:
        np.testing.assert_allclose(end, 1, atol=1e-6)


def convex_distances(settings, accelerated):
    """|x - e| at every step; y1 is linear in x and its start, y2 is its start."""

    def last(x, z):
        y, u, s = z, z, 1.0
        for _ in range(settings.inner_steps):
            moved = u - settings.inner_lr * (u - x)
            after = (1 + np.sqrt(1 + 4 * s * s)) / 2
            ahead = (s - 1) / after * (moved - y) if accelerated else 0.0
            y, u, s = moved, moved + ahead, after
        return y

    by_x, by_z = last(1.0, 0.0), last(0.0, 1.0)
    x = z1 = z2 = 0.0  # all 50 components are equal
    found = []
    for _ in range(settings.outer_steps + 1):
        found.append(np.sqrt(50) * abs(x - 1))
        y1 = by_x * x + by_z * z1
        g1, g2 = 4 * 50 * (y1 - 1) ** 3, 4 * 50 * (x - z2) ** 3
        x -= settings.upper_lr * (by_x * g1 + g2)
        z1 -= settings.upper_lr * by_z * g1
        z2 += settings.upper_lr * g2
    return np.array(found)


@pytest.mark.slow
@ONE_RUN
def test_acceleration_brings_the_convex_problem_nearer(run):
    example = follower.EXAMPLES["convex"]
    plain = follower.solve(example, "ia-gm", "0", example.settings)
    away = follower.distances(example, plain)
    expected = convex_distances(example.settings, accelerated=False)
    np.testing.assert_allclose(away["x_distance"], expected, rtol=1e-7)
    accelerated = run[1]["examples"]["convex"]["ia-gm-a"]["0"]
    expected = convex_distances(example.settings, accelerated=True)
    assert accelerated["x_distance"] == pytest.approx(expected[-1], rel=1e-7)
    assert accelerated["x_distance"] < 0.7 * away["x_distance"][-1]
    assert accelerated["y_distance"] < 0.9 * away["y_distance"][-1]


@pytest.mark.slow
@ONE_RUN
def test_files(run):
    out, summary = run
    assert json.loads((out / "summary.json").read_text()) == summary
    with (out / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 501 + 501
    last = next(
        row
        for row in rows[::-1]
        if (row["method"], row["start"]) == ("iaptt-gm", "(5, 1)")
    )
    assert (last["example"], last["step"]) == ("sine", "500")
    x, y = float(last["x"]), float(last["y"])
    end = summary["examples"]["sine"]["iaptt-gm"]["(5, 1)"]
    assert (x, y) == (end["x"], end["y"])
    assert float(last["F"]) == pytest.approx(x + x * y)
    assert float(last["f"]) == pytest.approx(-np.sin(x * y))
    assert float(last["x_distance"]) == pytest.approx(abs(x - SOLUTION[0]))
    assert 1 <= int(last["truncation"]) <= 40
    settings = json.loads((out / "config.json").read_text())["settings"]
    assert settings["sine"]["inner_steps"] == 40 and settings["seed"] == 0
    for picture in ("sine", "truncation", "convex"):
        assert (out / f"{picture}.png").stat().st_size > 10_000


def test_published_settings_are_the_defaults():
    args = follower.parse_args(["--out", "x"])
    assert args.problem == ["sine", "counter", "convex"]
    sine = args.settings["sine"]
    assert (sine.outer_steps, sine.inner_steps) == (500, 40)
    assert (sine.upper_lr, sine.inner_lr) == (0.1, 5e-4)
    assert SINE.starts == {"(1, 2)": (1, 2), "(5, 1)": (5, 1), "(7, -1)": (7, -1)}
    assert (sine.settle, sine.project_inner) == (0.2, False)
    changed = follower.parse_args(["--out", "x", "--inner-steps", "7", "--alpha", "1"])
    assert {s.inner_steps for s in changed.settings.values()} == {7}
    assert changed.settings["sine"].alpha == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ls", "rhg", "iaptt-gm"])
def test_dimensions_of_the_sine_are_so_many_copies_of_one(method):
    """F and f are sums: every component follows the problem of one dimension."""
    flags = ["--out", "x", "--problem", "sine", "--start", "7", "-1"]
    args = follower.parse_args([*flags, "--dimension", "3", "--outer-steps", "30"])
    (start,) = args.examples["sine"].starts
    one = follower.solve(SINE, method, "(7, -1)", args.settings["sine"])
    assert start == "(7, -1)" and one.x.shape == (31,)
    three = follower.solve(args.examples["sine"], method, start, args.settings["sine"])
    copies = {"x": one.x, "y": one.y, "y_last": one.y_last}
    for name, values in copies.items():
        found = getattr(three, name)
        assert found.shape == (31, 3)
        np.testing.assert_allclose(found, np.stack([values] * 3, 1), rtol=1e-9)
    np.testing.assert_allclose(three.upper, 3 * one.upper, rtol=1e-9)
    np.testing.assert_allclose(three.lower, 3 * one.lower, rtol=1e-9)
    np.testing.assert_array_equal(three.truncation, one.truncation)
    away = follower.distances(args.examples["sine"], three)["x_distance"]
    np.testing.assert_allclose(away, 3**0.5 * abs(one.x - SOLUTION[0]), rtol=1e-9)


def test_convex_in_any_dimension_from_any_start():
    """Of NumPy's loop with d for 50, x and y from 0.5 and -1."""
    flags = ["--out", "x", "--problem", "convex", "--dimension", "4"]
    args = follower.parse_args([*flags, "--start", "0.5", "-1", "--outer-steps", "3"])
    example, settings = args.examples["convex"], args.settings["convex"]
    path = follower.solve(example, "ia-gm", "(0.5, -1)", settings)
    x, z1, z2, a = 0.5, -1.0, -1.0, settings.inner_lr
    kept = (1 - a) ** settings.inner_steps
    for step in range(4):
        y1 = kept * z1 + (1 - kept) * x
        np.testing.assert_allclose(path.x[step], [x] * 4, rtol=1e-6)
        np.testing.assert_allclose(path.y[step], [[y1] * 4, [z2] * 4], rtol=1e-6)
        g1, g2 = 4 * 4 * (y1 - 1) ** 3, 4 * 4 * (x - z2) ** 3
        x -= settings.upper_lr * ((1 - kept) * g1 + g2)
        z1 -= settings.upper_lr * kept * g1
        z2 += settings.upper_lr * g2


@pytest.mark.slow
def test_pictures_say_what_they_show(tmp_path, monkeypatch):
    flags = ["--out", "x", "--outer-steps", "2", "--inner-steps", "2"]
    starts = ["--start", "5", "1", "--start", "7", "-1", "--dimension", "3"]
    args = follower.parse_args([*flags, "--method", "ia-gm", *starts])
    titles = {"sine": "not convex", "counter": "counter-example", "convex": "convex"}
    for name, title in titles.items():
        example = args.examples[name]
        found = {
            start: follower.solve(example, "ia-gm", start, args.settings[name])
            for start in example.starts
        }
        paths = {name: {"ia-gm": found}}
        figure = drawn(
            monkeypatch, lambda p=paths: follower.draw(tmp_path, args.examples, p)
        )
        assert title in figure.get_suptitle()
        if name == "convex":
            assert "3 dimensions" in figure.get_suptitle()
        panels = {"sine": 4, "counter": 1, "convex": 2}[name]
        assert len(figure.axes) == panels
        lines = [line for axes in figure.axes for line in axes.lines]
        assert len(lines) == {"sine": 4, "counter": 3, "convex": 4}[name]
        if name != "sine":
            labels = {line.get_label() for line in lines}
            assert {"ia-gm from (5, 1)", "ia-gm from (7, -1)"} <= labels


SHORT = ["--problem", "counter", "--method", "rhg", "--outer-steps", "3"]


@pytest.mark.slow
def test_a_run_is_resumed_to_the_same_rows_and_never_overwritten(tmp_path, capsys):
    flags = [*SHORT, "--out", str(tmp_path)]
    follower.main(flags)

    def rows():
        with (tmp_path / "metrics.csv").open() as file:
            return [row | {"seconds": ""} for row in csv.DictReader(file)]

    before = rows()
    follower.main([*flags, "--resume"])
    assert rows() == before and len(before) == 4
    with pytest.raises(SystemExit) as stop:
        follower.main(flags)
    assert stop.value.code == 2
    assert "new or empty folder" in capsys.readouterr().err
    assert [file.name for file in tmp_path.glob("*.png")] == ["counter.png"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--exmaple", "sine"], "unrecognized arguments"),
        (["--problem", "cosine"], "invalid choice"),
        (["--method", "sgd"], "invalid choice"),
        (["--outer-steps", "0"], "above zero"),
        (["--inner-lr", "nan"], "above zero"),
        (["--settle", "1.5"], "--settle must be between 0 and 1"),
        (["--alpha", "2"], "--alpha: must be above 0 and at most 1"),
        (["--problem", "counter", "--method", "ls"], "--method ls has no effect"),
        (["--problem", "sine", "convex", "--method", "rhg"], "--problem convex has no"),
        (["--method", "ns", "--problem", "sine", "--alpha", "1"], "--alpha has"),
        (["--problem", "convex", "--project-inner"], "--project-inner needs"),
        (["--start", "0.5", "2"], "needs X in [1, 10] with --problem sine, got 0.5"),
        (["--start", "1", "-3"], "needs Y in [-2, 2] with --problem sine, got -3"),
        (["--problem", "counter", "--start", "-101", "0"], "X in [-100, 100]"),
        (["--start", "nan", "0"], "--start: must be finite"),
        (["--start", "1"], "--start: expected 2 arguments"),
        (["--problem", "counter", "--dimension", "2"], "--dimension needs"),
        (["--dimension", "0"], "above zero"),
        (["--resume"], "folder with a run"),
    ],
)
def test_bad_flags_are_one_line_and_leave_nothing(flags, message, tmp_path, capsys):
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        follower.main(["--out", str(out), *flags])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not out.exists()
