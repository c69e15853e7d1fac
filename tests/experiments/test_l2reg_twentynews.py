"""The 20 Newsgroups script on a small corpus in scikit-learn's own file format."""

import csv
import json
import pickle
import sys
import types
import zlib
from typing import Any

import common
import keras
import numpy as np
import pytest
import scipy.sparse.linalg
import scipy.special
import sklearn.datasets
import sklearn.utils
import tensorflow as tf
from experiment_scripts import drawn, load_experiment
from suites import fast_where

import tfbilevel as tb
from data_prep import documents, twentynews

news = load_experiment("l2reg_twentynews")

CLASSES, TRAIN, TEST = 3, 42, 19
SMALL = [
    *("--outer-steps", "4", "--eval-every", "2", "--inner-steps", "3"),
    *("--solver-steps", "2", "--inner-lr", "5"),
]
BATCHES = ["--batch-size", "6", "--validation-batch-size", "8"]


def bunch(count: int, seed: int) -> sklearn.utils.Bunch:
    """Documents of five words every class has and five of its own."""
    generator = np.random.default_rng(seed)
    target = np.arange(count) % CLASSES
    documents = []
    for number, label in enumerate(target):
        own = generator.integers(0, 5, size=generator.integers(3, 9))
        shared = generator.integers(0, 5, size=generator.integers(3, 9))
        words = [f"class{label}word{i}" for i in own] + [f"common{i}" for i in shared]
        documents.append(" ".join([*words, f"document{seed}x{number}"]))
    return sklearn.utils.Bunch(
        data=documents,
        target=target,
        target_names=[f"class{label}" for label in range(CLASSES)],
        filenames=np.array([f"file{number}" for number in range(count)]),
    )


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data folder as scikit-learn leaves it after its download."""
    folder = tmp_path_factory.mktemp("scikit_learn_data")
    parts = {"train": bunch(TRAIN, 1), "test": bunch(TEST, 2)}
    packed = zlib.compress(pickle.dumps(parts))
    (folder / "20news-bydate_py3.pkz").write_bytes(packed)
    return str(folder)


@pytest.fixture(autouse=True)
def home(corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCIKIT_LEARN_DATA", corpus)


def load(*flags: str) -> Any:
    args = news.parse_args(["--out", "x", *flags])
    return twentynews.load(args.data_dir, args.features, args.max_features, args.seed)


# Data.


def test_the_halves_are_disjoint_and_hold_each_class_in_proportion():
    data = load()
    assert (len(data.train.labels), len(data.validation.labels)) == (21, 21)
    assert len(data.test.labels) == TEST and data.classes == CLASSES
    for part in (data.train, data.validation):
        assert np.bincount(part.labels).tolist() == [7, 7, 7]
        assert part.features.dtype == np.float32 and part.labels.dtype == np.int32

    def names(part: Any) -> set[str]:
        used = data.words[part.features.getnnz(axis=0) > 0]
        return {word for word in used if word.startswith("document")}

    first, second = names(data.train), names(data.validation)
    assert not first & second
    assert first | second == {f"document1x{number}" for number in range(TRAIN)}
    again, other = load(), load("--seed", "7")
    assert names(again.train) == first and names(other.train) != first


def test_documents_are_counts_scaled_to_length_one():
    data = load()
    texts = {text.split()[-1]: text.split() for text in bunch(TRAIN, 1).data}
    for row, label in zip(data.train.features, data.train.labels, strict=True):
        words, values = data.words[row.indices], row.data
        [name] = [word for word in words if word.startswith("document")]
        counts = np.array([texts[name].count(word) for word in words])
        np.testing.assert_allclose(values, counts / np.linalg.norm(counts), rtol=1e-6)
        assert any(word.startswith(f"class{label}") for word in words)


def test_other_features():
    counts, weighed = load(), load("--features", "tfidf")
    assert (counts.train.features != weighed.train.features).nnz > 0
    lengths = weighed.test.features.multiply(weighed.test.features).sum(axis=1)
    np.testing.assert_allclose(lengths, 1, rtol=1e-5)
    few = load("--max-features", "9")
    assert few.train.features.shape == (21, 9) and len(few.words) == 9
    assert not any(word.startswith("document") for word in few.words)


def test_minibatches_are_a_fresh_order_every_pass():
    part = load().train
    batches = twentynews.Minibatches(part, 6, (0, 0))
    passes = [[batches.documents(3 * p + i) for i in range(3)] for p in range(2)]
    for order in map(np.concatenate, passes):
        assert len(set(order)) == 18  # 21 documents: three are left out
    assert not np.array_equal(passes[0], passes[1])
    resumed = twentynews.Minibatches(part, 6, (0, 0))
    np.testing.assert_array_equal(resumed.documents(4), passes[1][1])
    features, labels = batches.stack(2, 3)
    for draw in range(3):
        chosen = batches.documents(2 + draw)
        dense = tf.sparse.to_dense(features)[draw]
        np.testing.assert_array_equal(dense, part.features[chosen].toarray())
        np.testing.assert_array_equal(labels[draw], part.labels[chosen])


# The hypergradient.


def in_float64(data: Any) -> tuple[tb.Problem, tb.Batches, tf.Tensor, tf.Tensor]:
    """The script's losses on tensors: its models are stood in for."""

    def models(x: Any, y: Any) -> tuple:
        def penalties(kernel: Any) -> Any:
            return 0.5 * tf.reduce_sum(tf.exp(x)[:, None] * kernel**2)

        return penalties, types.SimpleNamespace(kernel=y, units=CLASSES)

    problem = tb.Problem(
        lambda x, y, batch: news.upper_loss(*models(x, y), batch),
        lambda x, y, batch: news.lower_loss(*models(x, y), batch),
    )

    def batch(part: Any) -> tuple:
        features, labels = twentynews.tensors(part)
        return tf.cast(features, tf.float64), labels

    generator = np.random.default_rng(3)
    features = len(data.words)
    return (
        problem,
        tb.Batches(upper=batch(data.validation), lower=batch(data.train)),
        tf.constant(generator.normal(size=features)),
        tf.constant(generator.normal(size=(features, CLASSES))),
    )


def closed_form(data: Any, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """-g_xy g_yy^{-1} f_y with the Hessian written out, at any y."""

    def softmax(part: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        dense = part.features.toarray().astype("float64")
        return dense, scipy.special.softmax(dense @ y, axis=1), np.eye(3)[part.labels]

    features, classes = y.shape
    share = np.exp(x) / y.size
    dense, p, _ = softmax(data.train)
    blocks = np.einsum("na,ab->nab", p, np.eye(classes)) - np.einsum("na,nb->nab", p, p)
    hessian = np.einsum("nd,ne,nab->daeb", dense, dense, blocks) / len(dense)
    hessian = hessian.reshape(y.size, y.size) + np.diag(np.repeat(share, classes))
    dense, p, right = softmax(data.validation)
    rhs = dense.T @ (p - right) / len(dense)
    v = np.linalg.solve(hessian, rhs.ravel()).reshape(features, classes)
    return -share * np.sum(y * v, axis=1)


def test_hypergradient_is_the_closed_form():
    data = load("--max-features", "12")
    problem, batches, x, y = in_float64(data)
    inner = tb.InnerSolver(keras.optimizers.SGD(1e-12), 1)  # stays at y
    solver = tb.ConjugateGradient(500, rtol=1e-13)
    method = tb.Implicit(inner, solver)
    step = method.step(problem, x, y, batches, method.init(problem, x, y))
    expected = closed_form(data, x.numpy(), y.numpy())
    np.testing.assert_allclose(step.upper_gradient, expected, rtol=1e-7, atol=1e-12)


def plain(data: Any) -> tuple[tb.Problem, tb.Batches]:
    """The same losses in their plainest form, on dense features."""

    def cross_entropy(y: Any, batch: tuple) -> tf.Tensor:
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
            batch[1], tf.matmul(batch[0], y)
        )
        return tf.reduce_mean(losses)

    def lower_loss(x: Any, y: Any, batch: tuple) -> tf.Tensor:
        penalty = tf.reduce_mean(tf.exp(x)[:, None] * tf.square(y))
        return cross_entropy(y, batch) + 0.5 * penalty

    def batch(part: Any) -> tuple:
        return tf.constant(part.features.toarray().astype("float64")), part.labels

    return (
        tb.Problem(lambda x, y, batch: cross_entropy(y, batch), lower_loss),
        tb.Batches(upper=batch(data.validation), lower=batch(data.train)),
    )


@pytest.mark.parametrize(
    "method", fast_where({"rhg", "stocbio"}.__contains__, news.METHODS)
)
def test_sparse_losses_equal_plain_dense_ones(method: str):
    """Losses, weights and hypergradients of one outer step, in float64."""
    data = load()
    flags = ["--inner-steps", "4", "--solver-steps", "4", "--inner-lr", "2"]
    args = news.parse_args(["--out", "x", "--method", method, *flags])
    sparse, batches, x, y = in_float64(data)
    dense, dense_batches = plain(data)
    built = news.build_method(news.with_defaults(args, method))
    steps = [
        built.step(problem, x, y, batch, built.init(problem, x, y))
        for problem, batch in [(sparse, batches), (dense, dense_batches)]
    ]
    for name in ("upper_gradient", "lower", "metrics"):
        for a, b in zip(
            tf.nest.flatten(getattr(steps[0], name)),
            tf.nest.flatten(getattr(steps[1], name)),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-13)


def test_the_unrolled_hypergradient_is_a_central_difference():
    problem, batches, x, y = in_float64(load())
    method = tb.Unroll(tb.InnerSolver(keras.optimizers.SGD(2.0), 3))
    report = tb.check_hypergradient(problem, method, x, y, batches, probes=2)
    assert report.error < 1e-6


def test_methods_are_built_of_the_flags():
    def build(method: str, *flags: str) -> Any:
        args = news.parse_args(["--out", "x", "--method", method, *flags])
        return news.build_method(news.with_defaults(args, method))

    stochastic = build("stocbio")
    assert (stochastic.inner.steps, stochastic.terms) == (10, 10)
    assert stochastic.rate == 0.5 and stochastic.draws == 21
    assert stochastic.inner.optimizer.learning_rate == 100
    fixed_point = build("aid-fp", "--inner-momentum", "0.9").solver
    assert isinstance(fixed_point, tb.FixedPoint) and fixed_point.rate is None
    assert fixed_point.rtol == 1e-12
    conjugate = build("aid-cg", "--solver-steps", "7")
    assert isinstance(conjugate.solver, tb.ConjugateGradient)
    assert conjugate.solver.max_steps == 7 and conjugate.inner.start == "warm"
    assert build("reverse").last == 10
    assert build("reverse", "--solver-steps", "3").last == 3
    hoag = build("hoag")
    assert hoag.inner.atol is hoag.solver.rtol
    assert float(hoag.inner.atol(tf.constant(1))) == pytest.approx(0.009)


def test_published_settings_are_the_defaults():
    for method in news.METHODS:
        args = news.parse_args(["--out", "x", "--method", method])
        plan = vars(news.with_defaults(args, method))
        expected = {
            "inner_lr": 100, "upper_lr": 100, "inner_momentum": 0,
            "upper_momentum": 0, "solver_steps": 10, "outer_steps": 50,
            "seconds": None, "features": "counts", "max_features": None,
        }  # fmt: skip
        if method == "stocbio":
            expected |= {"eta": 0.5, "batch_size": 100, "validation_batch_size": 100}
        if method in ("aid-fp", "aid-cg"):
            expected |= {"tolerance": 1e-12}
        if method != "hoag":
            expected |= {"inner_steps": 10}
        assert {name: plan[name] for name in expected} == expected
    args = news.parse_args(["--out", "x", "--method", "all"])
    for method in args.method:
        plan = news.with_defaults(args, method)
        assert (plan.seconds, plan.outer_steps) == (60, None)


# Runs.


def rows_of(folder: Any) -> list[dict]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.parametrize("method", news.METHODS)
def test_every_method_runs_and_writes_its_files(method: str, tmp_path: Any):
    batches = BATCHES if method == "stocbio" else []
    flags = ["--method", method, "--out", str(tmp_path), *SMALL, *batches]
    summary = news.main(flags)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    rows = rows_of(tmp_path)
    assert [int(row["step"]) for row in rows] == [0, 2, 4]
    assert {row["method"] for row in rows} == {method}
    assert float(rows[0]["test_loss"]) == pytest.approx(np.log(CLASSES))
    assert float(rows[0]["seconds"]) == 0 < float(rows[1]["seconds"])
    assert summary["test_loss"] == float(rows[2]["test_loss"]) < 1
    assert summary["test_accuracy"] > 80
    assert float(rows[2]["largest_x"]) > float(rows[2]["smallest_x"])
    assert summary["peak_memory_mb"] >= summary["peak_memory_before_training_mb"] > 100
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["settings"]["method"] == method
    for picture in ("curves.png", "coefficients.png"):
        assert (tmp_path / picture).stat().st_size > 10_000


@pytest.mark.parametrize("size", [1e-6, 1e-3, 2.0])
def test_bars_are_of_coefficients_that_have_moved(
    size: float, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
):
    """After a step they are 1 within rounding: it is their logarithms that differ."""
    run = common.Run(tmp_path / "run", {}, False)
    words = np.array([f"word {number}" for number in range(60)])
    logits = np.zeros(60, np.float32)
    logits[[7, 9, 11]] = -size, -3 * size, 2 * size
    logits[20:50] = size * np.arange(3, 33)
    figure = drawn(monkeypatch, lambda: news.draw_coefficients(run, logits, words))
    small, large = figure.axes
    widths = {
        axes.get_title(): dict(
            zip(
                [text.get_text() for text in axes.get_yticklabels()],
                [bar.get_width() for bar in axes.patches],
                strict=True,
            )
        )
        for axes in (small, large)
    }
    want = {f"word {number}": logits[number] for number in range(30, 50)}
    assert widths["largest coefficients"] == pytest.approx(want, rel=1e-6)
    want = {"word 7": -size, "word 9": -3 * size}
    assert widths["smallest coefficients"] == pytest.approx(want, rel=1e-6)
    # The picture is as wide as the bars: they fill most of it.
    least, most = small.get_xlim()
    assert most - least < 6 * size


def test_no_bars_before_a_coefficient_has_moved(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
):
    run = common.Run(tmp_path / "run", {}, False)
    words, logits = np.array(["a", "b"]), np.zeros(2)
    figure = drawn(monkeypatch, lambda: news.draw_coefficients(run, logits, words))
    assert [len(axes.patches) for axes in figure.axes] == [0, 0]
    assert all("none has moved" in axes.get_title() for axes in figure.axes)


def test_training_follows_the_formulas(tmp_path: Any, monkeypatch: pytest.MonkeyPatch):
    """Two outer steps of stocBiO, written in NumPy. The second is in Keras's second
    epoch: draws go on there."""
    monkeypatch.setattr(news, "EPOCH", 1)
    flags = ["--out", str(tmp_path), *SMALL, *BATCHES, "--upper-lr", "30"]
    news.main([*flags, "--outer-steps", "2", "--eval-every", "1"])
    data = load()
    features = len(data.words)
    y, x = np.zeros((features, CLASSES)), np.zeros(features)
    lower = twentynews.Minibatches(data.train, 6, (0, 0))
    upper = twentynews.Minibatches(data.validation, 8, (0, 1))

    def batch(part: Any, chosen: np.ndarray) -> tuple:
        dense = part.features[chosen].toarray()
        p = scipy.special.softmax(dense @ y, axis=1)
        return dense, p, p - np.eye(CLASSES)[part.labels[chosen]]

    expected = []
    for step in range(2):
        numbers = iter(range(6 * step, 6 * step + 6))  # T = 3, Q = 2 and one more
        for _ in range(3):
            dense, _, error = batch(data.train, lower.documents(next(numbers)))
            decay = np.exp(x)[:, None] * y / y.size
            y = y - 5 * (dense.T @ error / len(dense) + decay)
        dense, _, error = batch(data.validation, upper.documents(step))
        term = dense.T @ error / len(dense)
        total = term
        for _ in range(2):
            dense, p, _ = batch(data.train, lower.documents(next(numbers)))
            moved = p * (dense @ term)
            moved -= p * moved.sum(axis=1, keepdims=True)
            product = dense.T @ moved / len(dense)
            product += np.exp(x)[:, None] * term / y.size
            term = term - 0.5 * product
            total = total + term
        x = x + 30 * 0.5 * np.exp(x) * np.sum(y * total, axis=1) / y.size
        made = {"largest_x": x.max(), "smallest_x": x.min()}
        for name in ("train", "validation", "test"):
            part = getattr(data, name)
            logs = scipy.special.log_softmax(part.features @ y, axis=1)
            made[f"{name}_loss"] = -logs[np.arange(len(logs)), part.labels].mean()
            right = logs.argmax(axis=1) == part.labels
            made[f"{name}_accuracy"] = 100 * right.mean()
        expected.append(made)
    for row, made in zip(rows_of(tmp_path)[1:], expected, strict=True):
        for name, value in made.items():
            assert float(row[name]) == pytest.approx(value, rel=1e-3), name


def test_losses_after_so_many_seconds():
    times = ((0, 0.0, 3.0), (1, 0.9, 2.0), (2, 1.5, 0.8), (3, 3.0, 0.5))
    rows = [
        {"step": step, "seconds": seconds, "test_loss": loss, "validation_loss": loss,
         "test_accuracy": 1.0, "method": "stocbio"}
        for step, seconds, loss in times
    ]  # fmt: skip
    summary = news.summarise(news.parse_args(["--out", "x"]), rows)
    assert summary["seconds_to_test_loss_1"] == 1.5
    assert summary["test_loss_after"] == {"1": 2.0, "2": 0.8}


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_an_interrupted_run_resumes_to_the_same_numbers(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, power_fails: Any
):
    """Killed after the row of step 5, two steps after the last backup."""
    flags = [*SMALL, *BATCHES, "--outer-steps", "9", "--eval-every", "1"]
    monkeypatch.setattr(news, "EPOCH", 3)
    folders = {"run": tmp_path / "whole", "copy": tmp_path / "broken"}
    with power_fails(common.Evaluate, "on_train_batch_end", call=6, **folders):
        news.main([*flags, "--out", str(tmp_path / "whole")])
    assert [int(row["step"]) for row in rows_of(tmp_path / "broken")] == [*range(6)]
    broken = ["--out", str(tmp_path / "broken")]
    summary = news.main([*flags, *broken, "--resume"])
    whole, resumed = rows_of(tmp_path / "whole"), rows_of(tmp_path / "broken")
    for row in whole + resumed:
        del row["seconds"]
    assert len(whole) == 10 and whole == resumed
    again = news.main([*flags, *broken, "--resume"])  # there is nothing left to do
    assert again["test_loss"] == summary["test_loss"]
    assert len(rows_of(tmp_path / "broken")) == 10


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_seconds_end_a_run_and_retraining_is_on_both_halves(tmp_path: Any):
    flags = ["--method", "reverse", "--inner-lr", "5", "--inner-momentum", "0.5"]
    limits = ["--seconds", "0.001", "--retrain-steps", "6", "--upper-lr", "1000"]
    summary = news.main([*flags, *limits, "--out", str(tmp_path)])
    assert summary["outer_steps"] == 1
    assert [int(row["step"]) for row in rows_of(tmp_path)] == [0, 1]
    data = load()
    dense = np.concatenate(
        [part.features.toarray() for part in (data.train, data.validation)]
    )
    labels = np.concatenate([data.train.labels, data.validation.labels])
    coefficients = np.load(tmp_path / "coefficients.npy")
    assert coefficients.shape == data.words.shape and np.ptp(coefficients) > 0.01
    y = velocity = np.zeros((len(data.words), CLASSES))
    for _ in range(6):
        p = scipy.special.softmax(dense @ y, axis=1)
        gradient = dense.T @ (p - np.eye(CLASSES)[labels]) / len(dense)
        gradient += coefficients[:, None] * y / y.size
        velocity = 0.5 * velocity - 5 * gradient
        y = y + velocity
    logits = data.test.features @ y
    logs = scipy.special.log_softmax(logits, axis=1)
    expected = -logs[np.arange(TEST), data.test.labels].mean()
    assert summary["retrained_steps"] == 6
    assert summary["retrained_test_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_comparison_runs_each_method_and_collects_the_rows(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
):
    calls = []

    def train(args: Any, run: common.Run, data: Any) -> dict:
        """Stands for training: three rows and a summary."""
        rows = [
            {"step": k, "seconds": k / 10, "method": args.method, "test_loss": 0.5 - k,
             "test_accuracy": 70.0, "validation_loss": abs(k - 1)}
            | ({"growth": 0.1 * k} if args.method == "stocbio" else {"residual": k})
            for k in range(3)
        ]  # fmt: skip
        for row in rows:
            run.log(row)
        return news.summarise(args, rows) | {"peak_memory_mb": 1000.0}

    def run_alone(argv: list[str]) -> int:
        calls.append(argv)
        news.main(argv)
        return 0

    monkeypatch.setattr(news, "run_alone", run_alone)
    monkeypatch.setattr(news, "train", train)
    flags = ["--method", "stocbio", "reverse", "--out", str(tmp_path), *BATCHES]
    summary = news.main(flags)
    assert list(summary["methods"]) == ["stocbio", "reverse"]
    assert summary["methods"]["reverse"]["test_loss"] == -1.5
    assert summary["methods"]["reverse"]["best_validation_step"] == 1
    assert summary["methods"]["reverse"]["test_loss_at_best_validation"] == -0.5
    assert summary["methods"]["reverse"]["seconds_per_outer_step"] == 0.1
    assert "--batch-size" in calls[0] and "--batch-size" not in calls[1]
    assert all(call[call.index("--seconds") + 1] == "60.0" for call in calls)
    rows = rows_of(tmp_path)
    assert [(row["method"], row["step"]) for row in rows] == [
        (method, step) for method in ("stocbio", "reverse") for step in "012"
    ]
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    (tmp_path / "summary.json").unlink()
    (tmp_path / "reverse" / "summary.json").unlink()
    calls.clear()
    monkeypatch.setattr(news, "train", lambda *_: summary["methods"]["reverse"])
    assert news.main([*flags, "--resume"]) == summary
    assert len(calls) == 1 and calls[0][1] == "reverse" and "--resume" in calls[0]
    assert rows_of(tmp_path) == rows


def test_a_method_of_a_comparison_is_a_process(monkeypatch: pytest.MonkeyPatch):
    commands = []

    def run(command: list[str], check: bool) -> types.SimpleNamespace:
        commands.append(command)
        return types.SimpleNamespace(returncode=3)

    monkeypatch.setattr(news.subprocess, "run", run)
    assert news.run_alone(["--out", "x"]) == 3
    assert commands == [[sys.executable, news.__file__, "--out", "x"]]


@pytest.mark.slow
def test_the_others_go_on_past_a_failed_method(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    calls = []
    monkeypatch.setattr(news, "run_alone", lambda argv: calls.append(argv[1]) or 1)
    with pytest.raises(SystemExit) as stop:
        news.main(["--method", "aid-cg", "hoag", "--out", str(tmp_path)])
    assert stop.value.code == 1 and calls == ["aid-cg", "hoag"]
    assert "failed: aid-cg, hoag" in capsys.readouterr().err
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == {"methods": {}, "failed": ["aid-cg", "hoag"]}
    # Tried again, the others' results are kept.
    with pytest.raises(SystemExit):
        news.main(["--method", "aid-cg", "hoag", "--out", str(tmp_path), "--resume"])
    assert calls == 2 * ["aid-cg", "hoag"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--metod", "stocbio"], "unrecognized arguments"),
        (["--method", "nope"], "invalid choice"),
        (["--outer-steps", "0"], "above zero"),
        (["--seconds", "nan"], "above zero"),
        (["--inner-momentum", "1"], "in [0, 1)"),
        (["--method", "reverse", "--tolerance", "1"], "--tolerance has no effect"),
        (["--method", "aid-cg", "--tolerance-decay", "0.5"], "has no effect"),
        (["--batch-size", "22"], "got 22 of 21"),
        (["--method", "reverse", "--solver-steps", "20"], "got 20 of 10"),
        (["--method", "all", *BATCHES[:2]], "got 100 of 21"),
        (["--data-dir", "/nowhere"], "20 Newsgroups is not in /nowhere"),
        ([*BATCHES, "--resume"], "folder with a run"),
    ],
)
def test_bad_flags_are_one_line_and_leave_nothing(
    flags: list[str], message: str, tmp_path: Any, capsys: Any
):
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        news.main(["--out", str(out), *flags])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not out.exists()


def test_flags_that_the_published_script_ignores_are_warnings(capsys: Any):
    """`l2reg_on_twentynews.py --alg AID-FP --batch_size 100` works as it is."""
    flags = ["--batch-size", "9", "--validation-batch-size", "9", "--eta", "1"]
    args = news.parse_args(["--out", "x", "--method", "aid-fp", *flags])
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 3
    assert all("has no effect with --method aid-fp" in line for line in warnings)
    plan = news.with_defaults(args, "aid-fp")
    assert plan.batch_size is plan.validation_batch_size is plan.eta is None
    news.parse_args(["--out", "x", "--method", "all", *flags])  # one of them uses them
    assert capsys.readouterr().err == ""


def test_missing_data_names_the_remedy(tmp_path: Any, capsys: Any):
    with pytest.raises(SystemExit) as stop:
        news.main(["--out", str(tmp_path / "run"), "--data-dir", str(tmp_path)])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert "SCIKIT_LEARN_DATA" in error and "download" in error
    assert "\n" not in error and not (tmp_path / "run").exists()


def test_a_data_folder_that_cannot_be_written_is_named(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    def fetch(**keywords: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(
        twentynews.sklearn.datasets, "fetch_20newsgroups_vectorized", fetch
    )
    with pytest.raises(SystemExit) as stop:
        news.main(["--out", str(tmp_path / "run")])
    assert stop.value.code == 2
    assert "is not writable" in capsys.readouterr().err


def test_a_copy_that_a_kill_has_cut_short_is_named(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    """scikit-learn writes its vectorised copy in place; joblib then meets its end."""

    def fetch(**keywords: Any) -> None:
        raise EOFError

    monkeypatch.setattr(
        twentynews.sklearn.datasets, "fetch_20newsgroups_vectorized", fetch
    )
    flags = ["--out", str(tmp_path / "run"), "--data-dir", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        news.main(flags)
    assert stop.value.code == 2
    assert "is damaged" in capsys.readouterr().err


def test_divergence_is_one_line(tmp_path: Any, capsys: Any):
    flags = ["--method", "reverse", "--inner-lr", "1e30", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        news.main(flags)
    assert stop.value.code == 1
    error = capsys.readouterr().err.strip()
    assert "NaN or infinite" in error and "\n" not in error


# Generated documents.


def test_generated_documents_are_as_said():
    """20 classes in proportion, rows of length 1, the same ones every time."""
    data = twentynews.load(None, "counts", None, 0, dataset="generated")
    sizes = [len(part.labels) for part in (data.train, data.validation, data.test)]
    assert sizes == [1000, 1000, 1000] and data.classes == 20
    assert np.bincount(data.test.labels).tolist() == [50] * 20
    counts, labels = documents.make("train")
    assert counts.sum(axis=1).ravel().tolist() == [[60] * 2000]
    lengths = scipy.sparse.linalg.norm(data.train.features, axis=1)
    np.testing.assert_allclose(lengths, 1, rtol=1e-6)
    assert (documents.make("train").counts != counts).nnz == 0
    # 15 percent of the words are classes' words, 0.3 * 19 / 20 of them another's.
    entries = counts.tocoo()
    names = documents.words()[entries.col]
    own = np.array([name.startswith("class") for name in names])
    assert entries.data[own].sum() / counts.sum() == pytest.approx(0.15, abs=0.005)
    of_class = [name.split("-")[0] for name in names[own]]
    wanted = [f"class{label}" for label in labels[entries.row[own]]]
    astray = entries.data[own] @ (np.array(of_class) != wanted)
    assert astray / entries.data[own].sum() == pytest.approx(0.285, abs=0.01)


@pytest.mark.slow
def test_common_words_are_regularised_more_than_the_classes(tmp_path, monkeypatch):
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path / "nothing"))
    news.main(["--method", "aid-cg", "--out", str(tmp_path / "run")])
    coefficients = np.load(tmp_path / "run" / "coefficients.npy")
    common_ones = np.array([w.startswith("common") for w in documents.words()])
    assert np.median(coefficients[common_ones]) > 2 * np.median(
        coefficients[~common_ones]
    )
