"""The experiment of the stochastic methods, on a few of the embedded digits."""

import csv
import json

import common
import keras
import numpy as np
import pytest
import tensorflow as tf
from experiment_scripts import load_experiment
from matplotlib.figure import Figure

import tfbilevel as tb
from data_prep import images

reweighting = load_experiment("mnist_reweighting")

SMALL = [
    *("--dataset", "digits", "--train-size", "60", "--validation-size", "40"),
    *("--test-size", "50", "--inner-steps", "7", "--inner-lr", "0.02"),
]
DRAWS = ["--batch-size", "8", "--eta", "0.02"]
STOCHASTIC = ("stocbio", "bsa", "ttsa")


def parse(*flags):
    return reweighting.parse_args(["--out", "unused", *flags])


def read(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def digits():
    """Training, validation and test images of SMALL."""
    return reweighting.load_parts(parse(*SMALL, *DRAWS))


# On one worker: the comparison they look at takes half a minute.
ONE_COMPARISON = pytest.mark.xdist_group("comparison")
COMPARISON = [
    *("--compare", *SMALL, *DRAWS, "--noise", "0.3", "--jit", "off"),
    *("--outer-steps", "3", "--solver-steps", "7"),
]


DRAWN = ("stocbio-0", "aid-cg-0")


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """One run of every method. The curves of all are drawn, those of two as pictures:
    a method with samples, and one with a solver."""
    out = tmp_path_factory.mktemp("reweighting") / "all"
    save = Figure.savefig

    def saved(figure, path, **options):
        if path.parent.name in ("all", *DRAWN):
            save(figure, path, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", saved)
        return out, reweighting.main(["--out", str(out), *COMPARISON])


def test_published_settings_are_the_defaults():
    for method in reweighting.METHODS:
        args = parse("--dataset", "mnist", "--method", method)
        (job,) = args.jobs
        assert (args.train_size, args.validation_size) == (20_000, 5000)
        assert (args.test_size, args.noise, args.seconds) == (10_000, 0.1, None)
        assert (job.upper_lr, job.inner_lr) == (0.1, 0.1)
        assert job.inner_steps == (None if method == "ttsa" else 200)
        assert job.outer_steps == (10_000 if method == "ttsa" else 50)
        assert job.solver_steps == (100 if method == "hoag" else 3)
        size = {"stocbio": 50, "bsa": 1, "ttsa": 1}.get(method)
        assert job.batch_size == size
        made = reweighting.build_method(job)
        named = {"stocbio": tb.StocBiO, "bsa": tb.BSA, "ttsa": tb.TTSA}
        named["reverse"] = tb.Unroll
        assert type(made) is named.get(method, tb.Implicit)
        solvers = {"aid-fp": tb.FixedPoint, "aid-cg": tb.ConjugateGradient}
        solvers["hoag"] = tb.ConjugateGradient
        assert method not in solvers or type(made.solver) is solvers[method]
        if method in STOCHASTIC:
            eta = {"stocbio": 0.1, "bsa": 0.001, "ttsa": 0.001}[method]
            length = made.terms if method == "stocbio" else made.max_steps
            assert (length, made.rate) == (3, eta)
        if method == "hoag":
            for tolerance in (made.solver.rtol, made.inner.atol):
                assert (tolerance.start, tolerance.ratio) == (0.5, 0.9)
        if method == "reverse":
            assert made.last == 3
    assert reweighting.REGULARISATION == 0.001


def test_compare_is_every_method_with_a_budget_of_time():
    args = parse("--compare", "--trials", "2", "--seed", "5")
    assert len(args.jobs) == 2 * len(reweighting.METHODS)
    assert {job.seed for job in args.jobs} == {5, 6}
    assert {(job.seconds, job.outer_steps) for job in args.jobs} == {(150.0, None)}


@pytest.mark.slow
@ONE_COMPARISON
def test_every_method_runs_and_writes_its_files(compared):
    out, summary = compared
    assert json.loads((out / "summary.json").read_text()) == summary
    assert list(summary["methods"]) == list(reweighting.METHODS)
    assert (out / "comparison.png").stat().st_size > 10_000
    merged = read(out)
    for method, run in zip(reweighting.METHODS, summary["runs"], strict=True):
        folder = out / f"{method}-0"
        assert json.loads((folder / "summary.json").read_text()) == run
        config = json.loads((folder / "config.json").read_text())["settings"]
        assert (config["method"], config["outer_steps"]) == (method, 3)
        if folder.name in DRAWN:
            assert (folder / "curves.png").stat().st_size > 10_000
        rows = read(folder)
        assert [int(row["step"]) for row in rows] == [0, 1, 2, 3]
        seconds = [float(row["seconds"]) for row in rows]
        assert seconds[0] == 0 and seconds == sorted(seconds)
        losses = [float(row["train_loss"]) for row in rows]
        assert losses[-1] < losses[0]  # it learns
        assert all(0 < float(row["upper_loss"]) < 50 for row in rows[1:])
        if method in STOCHASTIC:
            assert all(0 < float(row["growth"]) < 1.001 for row in rows[1:])
        # Everything is kept at the start.
        assert float(rows[0]["recall"]) == 100
        assert float(rows[0]["precision"]) == pytest.approx(70)
        for name in reweighting.SCORES:
            assert run[name] == float(rows[-1][name])
        mine = [row for row in merged if row["method"] == method]
        assert [row["test_loss"] for row in mine] == [row["test_loss"] for row in rows]


def test_the_best_row_is_that_of_validation_data():
    names = ("train_loss", *reweighting.SCORES, "f1", "test_accuracy")

    def row(step, validation, test):
        values = dict.fromkeys(names, float(step)) | {"test_loss": test}
        made = {"step": step, "seconds": step, "validation_loss": validation} | values
        return {k: str(v) for k, v in made.items()} | {"method": "stocbio"}

    rows = [row(0, 0.1, 0.1), row(1, 2.0, 0.2), row(2, 0.5, 3.0), row(3, 0.9, 1.0)]
    summary = reweighting.summarise(parse("--method", "stocbio").jobs[0], rows)
    assert summary["best_validation_step"] == 2
    assert summary["best_by_validation"]["test_loss"] == 3.0
    assert summary["best_test_loss"] == 0.2 and summary["test_loss"] == 1.0


@pytest.mark.slow
@ONE_COMPARISON
def test_the_table_is_of_each_method_s_own_runs(compared):
    for method, run in compared[1]["methods"].items():
        (own,) = (one for one in compared[1]["runs"] if one["method"] == method)
        for name in reweighting.SCORES:
            assert (run[name], run[f"{name}_std"]) == (own[name], 0)


def test_the_parts_share_no_image(monkeypatch):
    """Numbered ones."""
    numbers = np.arange(5000, dtype=np.int64)
    file = images.Part(numbers, numbers % 10)
    monkeypatch.setattr(images, "load_digits", lambda: file)
    args = parse("--dataset", "digits", "--train-size", "2000")
    parts = [set(part.images.tolist()) for part in reweighting.load_parts(args)]
    assert sum(map(len, parts)) == len(set.union(*parts))


def test_mnist_is_read_from_both_of_its_files(monkeypatch):
    """Numbered images: the first ones train, the last ones validate."""
    orders = []

    def load(name, split, folder, download):
        first = {"train": 0, "test": 1000}[split]
        numbers = np.arange(first, first + 500)
        return images.Part(numbers, numbers % 10)

    monkeypatch.setattr(images, "load_file", load)
    monkeypatch.setattr(
        images, "in_published_order", lambda part, split: orders.append(split) or part
    )
    sizes = ["--train-size", "300", "--validation-size", "100", "--test-size", "400"]
    parts = reweighting.load_parts(parse("--dataset", "mnist", *sizes))
    for part, begin, end in zip(parts, (0, 400, 1000), (300, 500, 1400), strict=True):
        np.testing.assert_array_equal(part.images, np.arange(begin, end))
    assert orders == ["train", "test"]


def test_measures_are_the_formulas(digits):
    (job,) = parse(*SMALL, *DRAWS, "--noise", "0.3").jobs
    data = reweighting.add_noise(digits, job)
    model = reweighting.build_model(job, data)
    generator = np.random.default_rng(0)
    logits = generator.normal(size=len(data.clean)).astype("float32")
    model.upper.logits.assign(logits)
    kernel, bias = (v.astype("float64") for v in model.lower.get_weights())

    def loss(part):
        scores = part.pixels.numpy() @ kernel + bias
        right = (scores * part.targets.numpy()).sum(1)
        return (np.log(np.exp(scores).sum(1)) - right).mean()

    found = reweighting.measure(model, data)()
    for name, part in (
        ("train_loss", data.true_train),
        ("validation_loss", data.validation),
        ("test_loss", data.test),
    ):
        assert found[name] == pytest.approx(loss(part), rel=1e-4)
    scores = data.test.pixels.numpy() @ kernel + bias
    right = scores.argmax(1) == data.test.targets.numpy().argmax(1)
    assert found["test_accuracy"] == pytest.approx(100 * right.mean(), rel=1e-5)
    kept = logits >= 0
    precision = (kept & data.clean).sum() / kept.sum()
    assert found["precision"] == pytest.approx(100 * precision)


@pytest.mark.slow
@ONE_COMPARISON
def test_all_methods_start_from_the_same_network(compared):
    starts = [row["test_loss"] for row in read(compared[0]) if row["step"] == "0"]
    assert len(starts) == len(reweighting.METHODS) and len(set(starts)) == 1


@pytest.mark.slow
@ONE_COMPARISON
def test_a_finished_comparison_resumed_trains_nothing(compared, monkeypatch):
    out, summary = compared
    monkeypatch.setattr(reweighting, "train", None)
    argv = ["--out", str(out), *COMPARISON, "--resume"]
    assert reweighting.main(argv) == summary


def test_labels_are_corrupted_once_and_exactly_the_share_asked_for(digits):
    (job,) = parse(*SMALL, *DRAWS, "--noise", "0.4").jobs
    before = digits[0].labels.copy()
    data = reweighting.add_noise(digits, job)
    noisy, true = (
        np.argmax(part.targets, axis=1) for part in (data.train, data.true_train)
    )
    np.testing.assert_array_equal(true, before)
    np.testing.assert_array_equal(digits[0].labels, before)
    np.testing.assert_array_equal(data.clean, noisy == true)
    assert np.sum(~data.clean) == 24
    for part, given in zip((data.validation, data.test), digits[1:], strict=True):
        np.testing.assert_array_equal(np.argmax(part.targets, axis=1), given.labels)


def test_pixels_and_start_are_the_published_ones():
    pixels = np.array([[[[0], [255]]]], np.uint8)
    scaled = reweighting.scale(pixels).numpy()
    np.testing.assert_allclose(scaled, [[-0.1307 / 0.3081, 0.8693 / 0.3081]], rtol=1e-6)
    kernel, bias = reweighting.build_net(784, seed=3).get_weights()
    assert kernel.shape == (784, 10) and bias.shape == (10,)
    assert kernel.std() == pytest.approx(0.2**0.5, rel=0.03)
    assert 0.2 < bias.std() < 0.8


def test_index_batches_go_through_whole_permutations():
    def take(first, number):
        dataset = tb.index_batches(11, 3, seed=4, first=first)
        return np.array([batch.numpy() for batch in dataset.take(number)])

    whole = take(0, 12)
    for start in range(0, 12, 3):  # three batches of 3 out of 11: two are left out
        assert len(set(whole[start : start + 3].ravel())) == 9
    assert set(whole.ravel()) == set(range(11))
    assert not np.array_equal(whole[:3], whole[3:6])
    for first in (2, 3, 7):
        np.testing.assert_array_equal(take(first, 5), whole[first : first + 5])
    with pytest.raises(ValueError, match="`size` must be .* size=12, count=11"):
        tb.index_batches(11, 12, seed=4)


def step_of(model, batches):
    x = [tf.convert_to_tensor(v) for v in model.upper.trainable_variables]
    y = [tf.convert_to_tensor(v) for v in model.lower.trainable_variables]
    state = model.method.init(model.problem, x, y)
    return model.method.step(model.problem, x, y, batches, state)


def test_stocbio_moves_the_drawn_examples_only(digits):
    (job,) = parse(*SMALL, *DRAWS, "--seed", "2").jobs
    model = reweighting.build_model(job, reweighting.add_noise(digits, job))
    batches = next(iter(reweighting.outer_batches(job, model.method)))
    assert batches.lower.shape == (7 + 3 + 1, 8) and batches.upper.shape == (8,)
    step = step_of(model, batches)
    moved = np.flatnonzero(step.upper_gradient[0])
    np.testing.assert_array_equal(moved, np.sort(batches.lower[-1]))


@pytest.fixture
def float64():
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


def test_aid_cg_is_the_dense_solution_of_softmax_regression(float64):
    """Weighted softmax regression differentiated by hand, in NumPy."""
    flags = ["--method", "aid-cg", "--solver-steps", "200", "--inner-steps", "30"]
    flags += ["--train-size", "7", "--validation-size", "6", "--noise", "0.3"]
    (job,) = parse(*flags).jobs
    generator = np.random.default_rng(0)
    parts = [
        images.Part(
            generator.integers(0, 256, (n, 1, 3, 1)).astype(np.uint8),
            generator.integers(0, 10, n),
        )
        for n in (7, 6, 4)
    ]
    data = reweighting.add_noise(parts, job)
    model = reweighting.build_model(job, data)
    logits = generator.normal(size=7)
    model.upper.set_weights([logits])
    kernel, bias = model.lower.get_weights()
    batches = next(iter(reweighting.outer_batches(job, model.method)))
    (found,) = step_of(model, batches).upper_gradient

    def with_ones(part):
        return np.c_[part.pixels.numpy(), np.ones(len(part.pixels))]

    def probabilities(inputs, y):
        e = np.exp(inputs @ y)
        return e / e.sum(axis=1, keepdims=True)

    x, targets = with_ones(data.train), data.train.targets.numpy()
    v, wanted = with_ones(data.validation), data.validation.targets.numpy()
    s = 1 / (1 + np.exp(-logits))
    y = np.vstack([kernel, bias])  # [inputs + 1, 10]
    for _ in range(30):
        errors = s[:, None] * (probabilities(x, y) - targets)
        y = y - 0.1 * (x.T @ errors / 7 + 0.002 * y)
    p = probabilities(x, y)
    hessian = 0.002 * np.eye(y.size)
    for i in range(7):
        curvature = np.diag(p[i]) - np.outer(p[i], p[i])
        hessian += s[i] / 7 * np.kron(np.outer(x[i], x[i]), curvature)
    f_y = v.T @ (probabilities(v, y) - wanted) / 6
    solution = np.linalg.solve(hessian, f_y.ravel())
    own = np.einsum("ni,nc->nic", x, p - targets).reshape(7, -1)  # of each example
    expected = -s * (1 - s) / 7 * (own @ solution)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert np.abs(expected).min() > 1e-6


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_a_run_cut_short_resumes_to_the_same_numbers(tmp_path, power_fails):
    """Killed while it measures after step 4."""
    flags = [*SMALL, *DRAWS, "--outer-steps", "6", "--eval-every", "2", "--jit", "off"]

    def run(name, *more):
        reweighting.main([*flags, "--out", str(tmp_path / name), *more])
        rows = read(tmp_path / name)
        for row in rows:
            del row["seconds"]
        return rows

    folders = {"run": tmp_path / "whole", "copy": tmp_path / "cut"}
    with power_fails(common.Run, "log", call=3, **folders):
        whole = run("whole")
    assert [row["step"] for row in read(tmp_path / "cut")] == ["0", "2"]
    assert run("cut", "--resume") == whole


@pytest.mark.slow
def test_a_budget_of_time_ends_a_run(tmp_path):
    flags = [*SMALL, "--seconds", "0.05", "--method", "ttsa", "--eval-every", "5"]
    flags = [flag for flag in flags if flag not in ("--inner-steps", "7")]
    summary = reweighting.main([*flags, "--jit", "off", "--out", str(tmp_path)])
    assert summary["outer_steps"] % 5 == 0 and summary["outer_steps"] > 0
    seconds = [float(row["seconds"]) for row in read(tmp_path)]
    assert seconds[-1] >= 0.05 and all(s < 0.05 for s in seconds[:-1])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--metod", "stocbio"], "unrecognized arguments"),
        (["--method", "nope"], "invalid choice"),
        (["--seconds", "0"], "above zero"),
        (["--method", "aid-cg", "--tolerance", "0.1"], "--tolerance has no effect"),
        (["--method", "ttsa", "--tolerance-decay", "0.5"], "has no effect"),
        (
            ["--method", "reverse", "--inner-steps", "2", "--solver-steps", "3"],
            "--solver-steps must not exceed",
        ),
        (
            ["--dataset", "mnist", "--batch-size", "6000"],
            "--batch-size must not exceed --validation-size",
        ),
        (["--data-dir", "/nowhere"], "not prepared"),
        (["--dataset", "digits", "--train-size", "4000"], "fit in 3500"),
        (["--dataset", "digits", "--noise", "1.5"], "pollution rate"),
        (["--dataset", "digits", "--resume"], "folder with a run"),
        (["--method", "hoag", "--compare"], "not allowed with argument --method"),
    ],
)
def test_bad_flags_are_one_line_and_leave_nothing(flags, message, tmp_path, capsys):
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        reweighting.main(["--out", str(out), *flags])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_flags_that_the_published_script_ignores_are_warnings(tmp_path, capsys):
    """`mnist_exp.py --alg AID-FP --batch_size 50` works as it is, on full batches."""
    flags = [*SMALL, "--method", "aid-fp", "--outer-steps", "1"]
    summaries = []
    for name, given in (("a", []), ("b", ["--batch-size", "50", "--eta", "0.5"])):
        capsys.readouterr()
        summaries.append(
            reweighting.main([*flags, *given, "--out", str(tmp_path / name)])
        )
    assert summaries[0]["test_loss"] == summaries[1]["test_loss"]
    written = capsys.readouterr().err
    for name in ("--batch-size", "--eta"):
        assert f"warning: {name} has no effect with --method aid-fp" in written
    (job,) = reweighting.parse_args(
        ["--out", "x", "--method", "ttsa", "--inner-steps", "3"]
    ).jobs
    assert job.inner_steps is None
    assert "--inner-steps has no effect with --method ttsa" in capsys.readouterr().err


def test_published_order_undoes_the_hash_that_tensorflow_datasets_sorts_by():
    from tensorflow_datasets.core import hashing

    hasher = hashing.Hasher("train")
    order = sorted(range(50), key=hasher.hash_key)
    stored = images.Part(np.arange(50)[order].reshape(50, 1), np.arange(50)[order])
    assert not np.array_equal(stored.labels, np.arange(50))
    back = images.in_published_order(stored, "train")
    np.testing.assert_array_equal(back.labels, np.arange(50))
    np.testing.assert_array_equal(back.images[:, 0], np.arange(50))
