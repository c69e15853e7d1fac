"""Hyper-cleaning: settings, losses, runs on small data, files and errors."""

import csv
import functools
import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from experiment_scripts import arrays_of, load_experiment
from suites import fast_where

import tfbilevel as tb

cleaning = load_experiment("data_hyper_cleaning")


SIZES = [
    *("--train-size", "40", "--validation-size", "30", "--test-size", "50"),
    *("--selection-size", "20", "--baseline-epochs", "1"),
]


SMALL = [*SIZES, "--eval-every", "2", "--jit", "off"]


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("method", ["rhg", "bda"])
def test_the_inner_curve_is_that_of_the_next_outer_step(method, tmp_path, monkeypatch):
    taken = {}

    def curve_of(model, data, make=cleaning.inner_curve):
        taken.update(model=model, data=data, curve=make(model, data))
        return taken["curve"]

    monkeypatch.setattr(cleaning, "inner_curve", curve_of)
    net = "linear" if method == "rhg" else "mlp-linear"
    flags = ["--method", method, "--net", net, "--inner-steps", "7", "--jit", "off"]
    steps = ["--outer-steps", "2", "--eval-every", "1", "--inner-lr", "0.3"]
    cleaning.main([*flags, *steps, *SIZES, "--out", str(tmp_path)])
    model, data = taken["model"], taken["data"]
    selection, test = taken["curve"]()
    assert len(test) == 7 and len(set(test)) > 1
    full = tf.data.Dataset.from_tensors
    pairs = tb.pair(full(data["validation"]), full(data["train"]))
    model.fit(pairs, epochs=1, verbose=0)
    for name, curve in (("selection", selection), ("test", test)):
        now = float(cleaning.accuracy(model.lower, data[name]))
        assert now == pytest.approx(curve[-1])


# Four steps from a random network: its Hessian is not definite.
@pytest.mark.filterwarnings("ignore::tfbilevel.DivergenceWarning")
@pytest.mark.parametrize(
    ("method", "net"),
    # Every net. What the names stand for is tested below, and the inner curve's test
    # runs rhg and bda, that of trials g-pbgd.
    fast_where(
        lambda method, net: method == "v-pbgd",
        [
            ("v-pbgd", "linear"),
            ("iaptt-gm", "mlp"),
            ("aid-cg", "mlp-linear"),
            ("penalty", "linear"),
            ("approxgrad", "mlp"),
        ],
    ),
)
def test_cleaning_runs_every_method_and_writes_its_files(method, net, tmp_path):
    steps = ["--outer-steps", "4"]
    if method not in ("v-pbgd", "g-pbgd"):
        steps += ["--inner-steps", "6"]
    flags = ["--method", method, "--net", net, "--out", str(tmp_path)]
    summary = cleaning.main([*flags, *SMALL, *steps])
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert 0 <= summary["test_accuracy"] <= 100 and 0 <= summary["f1"] <= 100
    assert summary["before"]["recall"] == 100
    assert summary["before"]["f1"] == pytest.approx(200 / 3)
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [0, 2, 4]
    assert float(rows[0]["recall"]) == 100  # nothing is doubted before training
    assert {"seconds", "upper_loss", "lower_loss", "test_accuracy", "f1"} <= set(
        rows[0]
    )
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["settings"]["method"] == method
    assert config["versions"]["tensorflow"] == tf.__version__
    for picture in ("curves.png", "distrusted.png"):
        assert (tmp_path / picture).stat().st_size > 10_000


def test_bda_has_the_rule_of_its_own_code_too():
    rules = {}
    for rule in ("aggregated", "bda-repo"):
        flags = ["--out", "x", "--method", "bda", "--bda-rule", rule]
        args = cleaning.parse_args(flags)
        network = cleaning.build_net(args.net, 4, seed=1)
        rules[rule] = cleaning.build_method(args, network).aggregate
    assert not rules["aggregated"].constant_lower
    assert rules["bda-repo"].constant_lower and rules["bda-repo"].decay == 0.9


@pytest.mark.slow
def test_nothing_but_test_scores_depends_on_test_labels(tmp_path, monkeypatch):
    """D17: elsewhere "validation" scores were taken on test data, and chosen by."""

    def without_test_scores(name):
        flags = ["--outer-steps", "4", "--out", str(tmp_path / name)]
        summary = cleaning.main([*SMALL, *flags])
        with (tmp_path / name / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        kept = [
            {key: row[key] for key in row if "test" not in key and key != "seconds"}
            for row in rows
        ]
        return kept, summary["best_validation_step"], summary["test_accuracy"]

    for picture in ("draw_curves", "draw_distrusted"):
        monkeypatch.setattr(cleaning, picture, lambda *_: None)
    load = cleaning.load_data

    def with_other_test_labels(args):
        data = load(args)
        pixels, labels = data["test"]
        return data | {"test": (pixels, (labels + 1) % 10)}

    rows, chosen, accuracy = without_test_scores("right")
    assert any("validation" in name for name in rows[0])
    monkeypatch.setattr(cleaning, "load_data", with_other_test_labels)
    other_rows, other_chosen, other_accuracy = without_test_scores("wrong")
    assert (rows, chosen) == (other_rows, other_chosen)
    assert accuracy != other_accuracy


def test_the_step_to_report_is_chosen_by_selection_images():
    def row(step, selection, test):
        scores = {"precision": 1.0 * step, "recall": 2.0 * step, "f1": 3.0 * step}
        accuracies = {"selection_accuracy": selection, "test_accuracy": test}
        return {"step": step, "seconds": step / 10, **accuracies, **scores}

    rows = [row(0, 10.0, 11.0), row(2, 90.0, 80.0), row(4, 85.0, 95.0), row(6, 9.0, 8)]
    summary = cleaning.summarise(cleaning.parse_args(["--out", "x"]), rows)
    assert summary["best_validation_step"] == 2
    assert [summary[name] for name in cleaning.SCORES] == [80.0, 2.0, 4.0, 6.0]
    assert summary["final"]["test_accuracy"] == 8
    assert summary["best_test_accuracy"] == 95.0
    assert summary["f1_at_best_test_accuracy"] == 12.0 and summary["best_f1"] == 18.0


def test_methods_are_what_they_are_called():
    def built(*flags):
        args = cleaning.parse_args(["--out", "x", *flags])
        return cleaning.build_method(args, cleaning.build_net(args.net, 4, seed=1))

    assert built("--method", "t-rhg").last == 100
    assert built("--method", "rhg").last is None
    for method in ("rhg", "iaptt-gm"):
        found = built("--method", method, "--memory", "tape")
        assert found.end == ("pessimistic" if method == "iaptt-gm" else "final")
        assert found.memory == "tape" and found.aggregate is None
        assert callable(found.inner.start) == (method == "rhg")
    for auxiliary in ("persistent", "copy"):
        assert built("--auxiliary", auxiliary).auxiliary == auxiliary
    bda = built("--method", "bda", "--inner-steps", "7")
    assert bda.inner.start == "cold" and bda.inner.steps == 7
    for dynamics, accelerated, momentum in (
        ("gd", False, 0.0),
        ("nesterov-t", True, 0.0),
        ("nesterov-m", False, 0.9),
    ):
        inner = built("--method", "iaptt-gm", "--dynamics", dynamics).inner
        assert inner.accelerated is accelerated
        assert inner.optimizer.momentum == momentum
        assert inner.optimizer.nesterov == (momentum > 0)
    flags = [
        "--method",
        "iaptt-gm",
        "--dynamics",
        "nesterov-m",
        "--inner-momentum",
        "0.5",
    ]
    assert built(*flags).inner.optimizer.momentum == 0.5


# One step on six images of four pixels, against NumPy: which method a name stands for.

PIXELS, IMAGES = 4, 6
STEPS = 5


class Regression:
    """Softmax regression in NumPy: its losses and their derivatives by hand.

    Weights y are [pixels + 1, 10], the last row the biases; x is a logit per image.
    """

    def __init__(self, train: tuple, validation: tuple):
        self.train, self.validation = train, validation

    def terms(self, y, part):
        """Losses of the images, probabilities less labels, and inputs."""
        pixels, labels = part
        inputs = np.hstack([pixels, np.ones((len(labels), 1))])
        logits = inputs @ y
        log_sum = np.log(np.exp(logits).sum(1, keepdims=True))
        losses = log_sum[:, 0] - logits[np.arange(len(labels)), labels]
        return losses, np.exp(logits - log_sum) - np.eye(10)[labels], inputs

    def f(self, y):
        return self.terms(y, self.validation)[0].mean()

    def f_y(self, y):
        _, error, inputs = self.terms(y, self.validation)
        return inputs.T @ error / len(inputs)

    def g_y(self, x, y):
        _, error, inputs = self.terms(y, self.train)
        return inputs.T @ (error / (1 + np.exp(-x[:, None]))) / len(inputs)

    def g_x(self, x, y):
        share = 1 / (1 + np.exp(-x))
        return share * (1 - share) * self.terms(y, self.train)[0] / IMAGES

    def along(self, function, at, vector, width=1e-6):
        """The derivative of a function of y along a vector."""
        size = np.linalg.norm(vector)
        move = width / size * vector
        return size * (function(at + move) - function(at - move)) / (2 * width)

    def hessian(self, x, y):
        columns = [
            self.along(lambda y: self.g_y(x, y), y, unit.reshape(y.shape)).ravel()
            for unit in np.eye(y.size)
        ]
        return np.stack(columns, axis=1)


def expected_upper_gradient(method, problem, x, y, fresh):
    """Of the flags in METHOD_FLAGS; `fresh`: where rhg's inner solves start."""

    def path(x, y, steps=STEPS, mix=lambda t: 0.0):
        made = [y]
        for t in range(steps):
            now, a = made[-1], mix(t)
            made.append(
                now - 0.3 * ((1 - a) * problem.g_y(x, now) + a * problem.f_y(now))
            )
        return made

    def differences(objective):
        units = 1e-5 * np.eye(IMAGES)
        return np.array([(objective(x + u) - objective(x - u)) / 2e-5 for u in units])

    def response(v, end):
        """-g_xy v: what y's part of the upper gradient is, given (g_yy)^-1 f_y."""
        return -problem.along(lambda y: problem.g_x(x, y), end, v.reshape(end.shape))

    if method == "rhg":
        return differences(lambda x: problem.f(path(x, fresh)[-1]))
    if method == "t-rhg":
        begin = path(x, fresh, STEPS - 2)[-1]
        return differences(lambda x: problem.f(path(x, begin, 2)[-1]))
    if method == "bda":
        return differences(
            lambda x: problem.f(path(x, y, mix=lambda t: 0.4 * 0.8**t)[-1])
        )
    if method == "iaptt-gm":
        last = 1 + int(np.argmax([problem.f(made) for made in path(x, y)[1:]]))
        return differences(lambda x: problem.f(path(x, y)[last]))
    if method == "v-pbgd":
        z = path(x, y)[-1]
        return 0.5 * (problem.g_x(x, y) - problem.g_x(x, z))
    if method == "g-pbgd":
        return -0.5 * response(problem.g_y(x, y), y)
    end = path(x, y)[-1]
    matrix, right = problem.hessian(x, end), problem.f_y(end).ravel()
    if method == "aid-cg":
        return response(np.linalg.solve(matrix + 0.1 * np.eye(right.size), right), end)
    v = 0.3 * right if method == "neumann" else 0.0 * right
    for _ in range(3):  # the same recursion: the series has a term more
        v = v + 0.3 * (right - matrix @ v)
    return response(v, end)


METHOD_FLAGS = {
    "v-pbgd": ["--gamma-init", "0.5", "--gamma-max", "1", "--lower-lr", "0.7"],
    "g-pbgd": ["--gamma-init", "0.5", "--gamma-max", "1", "--lower-lr", "0.7"],
    "t-rhg": ["--last", "2"],
    "bda": ["--alpha", "0.4", "--alpha-decay", "0.8"],
    "aid-cg": ["--solver-steps", "60", "--damping", "0.1"],
    "aid-fp": ["--solver-steps", "3"],
    "neumann": ["--solver-steps", "3"],
}


@pytest.mark.parametrize(
    "method", [m for m in cleaning.METHODS if m not in ("penalty", "approxgrad")]
)
def test_hypergradients_are_those_of_the_methods_they_are_called_by(method):
    """Penalty and ApproxGrad are those of several scripts: test_few_shot.py."""
    # With these f is largest after the first inner step: iaptt-gm ends there.
    generator = np.random.default_rng(11)
    parts = [
        (generator.random((count, PIXELS)), generator.integers(0, 10, count))
        for count in (IMAGES, 7)
    ]
    train, validation = (
        (tf.constant(pixels, tf.float32), tf.constant(labels, tf.int32))
        for pixels, labels in parts
    )
    flags = ["--out", "x", "--method", method, *METHOD_FLAGS.get(method, [])]
    if method != "g-pbgd":
        flags += ["--inner-steps", str(STEPS), "--inner-lr", "0.3"]
    args = cleaning.parse_args(flags)
    network = cleaning.build_net("linear", PIXELS, seed=1)
    weights = tb.ExampleWeights(IMAGES)
    logits = generator.normal(size=IMAGES)
    weights.logits.assign(logits)
    model = tb.BilevelModel(
        weights,
        network,
        cleaning.upper_loss,
        functools.partial(cleaning.lower_loss, reg=0.0),
    )
    own = cleaning.build_method(args, network)
    x = [tf.convert_to_tensor(v.value) for v in weights.trainable_variables]
    y = [tf.convert_to_tensor(v.value) for v in network.trainable_variables]
    batches = tb.Batches(upper=validation, lower=train)
    state = own.init(model.problem, x, y)
    run = tf.function(
        lambda *inputs: model.problem.step(own, *inputs).upper_gradient, autograph=False
    )
    (found,) = run(x, y, batches, state)
    fresh = cleaning.draw_weights(
        [v.shape for v in y], args.seed, tf.constant(0, tf.int64)
    )
    stacked = [
        np.vstack([np.asarray(v, "float64") for v in (kernel, bias[None])])
        for kernel, bias in (y, fresh)
    ]
    want = expected_upper_gradient(method, Regression(*parts), logits, *stacked)
    scale = np.abs(want).max()
    np.testing.assert_allclose(found, want, atol=2e-3 * scale)
    assert scale > 1e-6


@pytest.mark.parametrize(
    "baseline", fast_where("oracle".__eq__, ["oracle", "val-only", "train+val"])
)
def test_cleaning_baselines(baseline, tmp_path, monkeypatch):
    seen, fit = [], cleaning.train_plainly

    def train_plainly(args, network, parts, *others):
        seen.append(parts)
        return fit(args, network, parts, *others)

    monkeypatch.setattr(cleaning, "train_plainly", train_plainly)
    flags = [*SIZES, "--baseline-epochs", "2", "--out", str(tmp_path)]
    summary = cleaning.main(["--method", baseline, *flags])
    kept = arrays_of(tmp_path / "predictions.npz")
    (parts,) = seen
    sizes = [len(labels) for _, labels in parts]
    if baseline == "oracle":  # some labels drawn anew are right by chance
        assert kept["clean"].sum() <= sizes[0] < 40 and sizes[1:] == [30]
    else:
        assert sizes == {"val-only": [30], "train+val": [40, 30]}[baseline]
    keep = kept["probabilities"].argmax(axis=1) == kept["labels"]
    precision = 100 * (keep & kept["clean"]).sum() / keep.sum()
    assert summary["precision"] == pytest.approx(precision)
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2"]
    assert float(rows[1]["precision"]) == summary["precision"]
    assert 0 < float(rows[0]["seconds"]) < summary["seconds"]
    for picture in ("curves.png", "distrusted.png"):
        assert (tmp_path / picture).stat().st_size > 10_000


@pytest.mark.slow
def test_training_on_what_a_run_kept(tmp_path, monkeypatch, capsys):
    """Of cleaning runs, of cleanlab and of other baselines: one format."""
    cleaned = tmp_path / "v-pbgd"
    flags = ["--upper-lr", "30", "--outer-steps", "4", "--out", str(cleaned)]
    summary = cleaning.main([*SMALL, *flags])
    made = arrays_of(cleaned / "weights.npz")
    np.testing.assert_array_equal(made["kept"], made["weights"] >= 0.5)
    assert 0 < made["kept"].sum() < 40 and not made["clean"].all()
    right = (made["kept"] & made["clean"]).sum()
    assert summary["final"]["recall"] == pytest.approx(100 * right / 20)

    seen, fit = [], cleaning.train_plainly
    monkeypatch.setattr(
        cleaning,
        "train_plainly",
        lambda args, network, parts, *b: (
            seen.append(parts) or fit(args, network, parts, *b)
        ),
    )
    baseline = [*SIZES, "--method", "kept+val", "--kept", str(cleaned / "weights.npz")]
    retrained = cleaning.main([*baseline, "--out", str(tmp_path / "kept")])
    assert [retrained[k] for k in ("precision", "recall", "f1")] == [
        summary["final"][k] for k in ("precision", "recall", "f1")
    ]
    ((pixels, labels), (_, validation)) = seen[0]
    np.testing.assert_array_equal(labels, made["labels"][made["kept"]])
    assert len(pixels) == len(labels) and len(validation) == 30
    predictions = arrays_of(tmp_path / "kept" / "predictions.npz")
    np.testing.assert_array_equal(predictions["kept"], made["kept"])

    def refused(*flags) -> str:
        with pytest.raises(SystemExit) as stop:
            cleaning.main([*baseline, *flags, "--out", str(tmp_path / "no")])
        assert stop.value.code == 2 and not (tmp_path / "no").exists()
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "is of other examples" in refused("--seed", "1")
    (tmp_path / "x.npz").write_text("no")
    assert "is damaged, or has no" in refused("--kept", str(tmp_path / "x.npz"))
    assert "does not exist" in refused("--kept", str(tmp_path / "nothing.npz"))


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (["--method", "t-rhg", "--inner-steps", "20"], "last", 20),
        (["--method", "t-rhg", "--inner-steps", "200"], "last", 100),
    ],
)
def test_one_flag_shortens_a_run(flags, name, value):
    """What belongs to a length that was not asked for gives way."""
    args = cleaning.parse_args(["--out", "x", *flags])
    assert getattr(args, name) == value


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_a_run_of_any_length_ends_where_it_should(tmp_path):
    """Neither a multiple of the steps between rows nor of those of an execution."""
    flags = ["--outer-steps", "8", "--eval-every", "3", "--method", "g-pbgd"]
    cleaning.main([*SIZES, "--jit", "off", *flags, "--out", str(tmp_path / "one")])
    with (tmp_path / "one" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [0, 3, 6, 8]
    packed = ["--outer-steps", "8", "--eval-every", "6", "--method", "g-pbgd"]
    cleaning.main([*SIZES, "--jit", "off", *packed, "--out", str(tmp_path / "two")])
    with (tmp_path / "two" / "metrics.csv").open() as file:
        others = list(csv.DictReader(file))
    assert [int(row["step"]) for row in others] == [0, 6, 8]
    for column in ("test_accuracy", "f1", "weight"):
        assert float(others[2][column]) == pytest.approx(
            float(rows[3][column]), rel=1e-5
        )


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_trials_are_the_runs_of_their_seeds(tmp_path):
    """What is complete stays when the folder is resumed; the mean is NumPy's."""
    flags = [*SMALL, "--outer-steps", "4", "--method", "g-pbgd", "--out"]
    both = [*flags, str(tmp_path / "both"), "--trials", "2", "--seed", "3"]
    summary = cleaning.main(both)
    alone = cleaning.main([*flags, str(tmp_path / "alone"), "--seed", "4"])
    second = summary["runs"][1]
    assert {k: v for k, v in second.items() if "seconds" not in k} == {
        k: v for k, v in alone.items() if "seconds" not in k
    }
    for name in cleaning.SCORES:
        values = [run[name] for run in summary["runs"]]
        assert summary[name] == pytest.approx(np.mean(values))
        assert summary[f"{name}_std"] == pytest.approx(np.std(values))
    kept = tmp_path / "both" / "seed-3" / "summary.json"
    stamp = kept.stat().st_mtime_ns
    (tmp_path / "both" / "summary.json").unlink()
    (tmp_path / "both" / "seed-4" / "summary.json").unlink()
    again = cleaning.main([*both, "--resume"])
    assert again["runs"][0] == summary["runs"][0] and kept.stat().st_mtime_ns == stamp
    with (tmp_path / "both" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["seed"] for row in rows] == ["3", "4"]
    assert float(rows[1]["f1"]) == pytest.approx(alone["f1"])


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_trials_go_on_past_one_that_fails(tmp_path, monkeypatch, capsys):
    run = cleaning.one_trial

    def failing(args, *others):
        if args.seed == 1:
            raise SystemExit(1)
        return run(args, *others)

    flags = [*SIZES, "--method", "val-only", "--trials", "3", "--out", str(tmp_path)]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(cleaning, "one_trial", failing)
        cleaning.main(flags)
    assert stop.value.code == 1 and "failed: seed-1" in capsys.readouterr().err
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["failed"] == ["seed-1"] and len(summary["runs"]) == 2
    found = [made["f1"] for made in summary["runs"]]
    assert summary["f1"] == pytest.approx(np.mean(found))
    again = cleaning.main([*flags, "--resume"])  # the others are not made again
    assert "failed" not in again and [r for r in again["runs"]][::2] == summary["runs"]


def test_published_settings_are_the_defaults():
    def parse(*flags):
        return vars(cleaning.parse_args(["--out", "x", *flags]))

    v = parse("--method", "v-pbgd", "--net", "linear", "--dataset", "mnist")
    expected = {
        "upper_lr": 0.1, "lower_lr": 0.1, "inner_lr": 0.01, "inner_steps": 1,
        "gamma_init": 0, "gamma_max": 0.2, "gamma_steps": 30_000,
        "outer_steps": 40_000, "regularisation": 0, "train_size": 5000,
        "validation_size": 5000, "test_size": 10_000, "noise": 0.5,
        "noise_kind": "published", "eval_every": 10, "upper_optimizer": "sgd",
    }  # fmt: skip
    assert {k: v[k] for k in expected} == expected
    w = parse("--method", "g-pbgd", "--net", "linear", "--dataset", "mnist")
    assert (w["upper_lr"], w["lower_lr"], w["gamma_max"]) == (0.3, 0.5, 37)
    assert (w["gamma_steps"], w["outer_steps"]) == (5000, 40_000)
    for method, net, rate, last in (
        ("rhg", "linear", 0.1, None),
        ("rhg", "mlp", 0.4, None),
        ("t-rhg", "linear", 0.1, 100),
    ):
        r = parse("--method", method, "--net", net, "--dataset", "mnist")
        assert (r["inner_lr"], r["inner_steps"], r["last"]) == (rate, 500, last)
        assert (r["outer_steps"], r["upper_lr"]) == (100, 0.001)
        assert r["upper_optimizer"] == "sgd"
    g = parse("--method", "g-pbgd", "--net", "mlp", "--dataset", "mnist")
    assert (g["upper_lr"], g["lower_lr"], g["gamma_max"]) == (0.5, 0.5, 37)
    assert (g["gamma_steps"], g["outer_steps"]) == (30_000, 50_000)
    t = parse("--method", "t-rhg", "--net", "mlp")
    assert (t["inner_lr"], t["inner_steps"], t["last"]) == (0.4, 500, 100)
    assert (t["outer_steps"], t["upper_lr"]) == (100, 0.001)
    for dataset in ("mnist", "fashion_mnist"):
        flags = ["--net", "mlp-linear", "--dataset", dataset]
        i = parse("--method", "iaptt-gm", *flags)
        assert (i["outer_steps"], i["inner_steps"], i["inner_lr"]) == (3000, 100, 0.03)
        assert (i["upper_optimizer"], i["upper_lr"]) == ("adam", 0.01)
        assert i["start_lr"] == 0.03
        b = parse("--method", "bda", *flags)
        assert (b["outer_steps"], b["inner_steps"], b["inner_lr"]) == (3000, 100, 0.4)
        assert (b["upper_optimizer"], b["upper_lr"]) == ("adam", 0.01)
        assert (b["alpha"], b["alpha_decay"]) == (0.5, 0.9)
    m = parse("--method", "v-pbgd", "--net", "mlp", "--dataset", "mnist")
    assert (m["lower_lr"], m["gamma_max"], m["gamma_steps"]) == (0.01, 0.1, 10_000)
    assert m["outer_steps"] == 80_000


def test_digits_shorten_the_penalty_methods_fourfold():
    args = cleaning.parse_args(["--out", "x"])
    assert (args.outer_steps, args.gamma_steps) == (10_000, 7_500)


def test_two_linear_layers_are_two_dense_layers():
    """In value and gradients: only the order of the products differs."""
    network = cleaning.build_net("mlp-linear", 784, seed=2)
    layers = [keras.Input((784,)), keras.layers.Dense(300), keras.layers.Dense(10)]
    reference = keras.Sequential(layers)
    shifts = np.linspace(-1, 1, 310, dtype="float32")  # biases that count
    first, _, second, _ = network.get_weights()
    network.set_weights([first, shifts[:300], second, shifts[300:]])
    reference.set_weights(network.get_weights())
    pixels = np.random.default_rng(0).random((20, 784)).astype("float32")

    def gradients(net):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.sin(net(pixels)))
        return tape.gradient(loss, net.trainable_variables)

    np.testing.assert_allclose(network(pixels), reference(pixels), atol=2e-5)
    for ours, keras_own in zip(gradients(network), gradients(reference), strict=True):
        scale = np.abs(keras_own).max()
        np.testing.assert_allclose(ours, keras_own, atol=1e-4 * scale)


@pytest.mark.parametrize("net", cleaning.NETS)
def test_networks_start_uniform_in_fan_in_bounds(net):
    model = cleaning.build_net(net, 784, seed=5)
    shapes = [tuple(w.shape) for w in model.weights]
    widths = {
        "linear": [(784, 10), (10,)],
        "mlp": [(784, 300), (300,), (300, 10), (10,)],
        "mlp-linear": [(784, 300), (300,), (300, 10), (10,)],
    }
    assert shapes == widths[net]
    fan_in = 1
    for weight in model.weights:
        fan_in = weight.shape[0] if len(weight.shape) == 2 else fan_in
        values = weight.numpy()
        assert np.abs(values).max() <= fan_in**-0.5
        if values.size > 1000:
            assert values.std() == pytest.approx(fan_in**-0.5 / 3**0.5, rel=0.05)


def test_cleaning_losses_are_the_formulas():
    generator = np.random.default_rng(0)
    pixels = generator.uniform(size=(6, 4)).astype("float32")
    labels = np.array([0, 1, 2, 0, 1, 2], "int32")
    network = cleaning.build_net("linear", 4, seed=1)
    weights = tb.ExampleWeights(6)
    weights.logits.assign(generator.normal(size=6))
    batch = pixels, labels
    f = float(cleaning.upper_loss(weights, network, batch))
    g = [float(cleaning.lower_loss(weights, network, batch, reg)) for reg in (0, 0.3)]
    kernel, bias = (w.numpy() for w in network.weights)
    logits = pixels @ kernel + bias
    log_sum = np.log(np.exp(logits).sum(axis=1))
    losses = log_sum - logits[np.arange(6), labels]
    share = 1 / (1 + np.exp(-weights.logits.numpy()))
    penalty = 0.3 * ((kernel**2).sum() + (bias**2).sum())
    assert f == pytest.approx(losses.mean(), rel=1e-5)
    assert g[0] == pytest.approx((share * losses).mean(), rel=1e-5)
    assert g[1] == pytest.approx((share * losses).mean() + penalty, rel=1e-5)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--metod", "v-pbgd"], "unrecognized arguments"),
        (["--method", "nope"], "invalid choice"),
        (["--outer-steps", "0"], "above zero"),
        (["--upper-lr", "nan"], "above zero"),
        (["--method", "rhg", "--gamma-max", "1"], "--gamma-max has no effect"),
        (["--method", "rhg", "--start-lr", "1"], "--start-lr has no effect"),
        (["--method", "rhg", "--auxiliary", "copy"], "--auxiliary has no effect"),
        (["--method", "aid-fp", "--memory", "tape"], "--memory has no effect"),
        (["--method", "oracle", "--outer-steps", "7"], "--outer-steps has no effect"),
        (["--method", "val-only", "--jit", "off"], "--jit has no effect"),
        (["--method", "val-only", "--kept", "x"], "--kept needs --method kept+val"),
        (["--method", "kept+val"], "needs --kept FILE"),
        (["--method", "kept+val", "--kept", "x", "--trials", "2"], "no --trials"),
        (["--method", "train+val", "--dynamics", "nesterov-t"], "--dynamics has"),
        (["--method", "bda", "--alpha", "2"], "--alpha: must be above 0 and at"),
        (["--method", "bda", "--alpha-decay", "1.1"], "--alpha-decay: must be"),
        (
            ["--method", "g-pbgd", "--dynamics", "nesterov-t"],
            "--dynamics has no effect",
        ),
        (["--method", "t-rhg", "--last", "501"], "--last must not exceed"),
        (["--method", "rhg", "--last", "50"], "--last has no effect"),
        (["--gamma-init", "1"], "--gamma-max must not be below"),
        (["--dynamics", "nesterov-t"], "a single inner step"),
        (["--dataset", "mnist", "--data-dir", "/nowhere"], "not prepared"),
        (["--inner-momentum", "0.5"], "--inner-momentum needs --dynamics nesterov-m"),
        (
            ["--dynamics", "nesterov-m", "--inner-momentum", "1"],
            "--inner-momentum/--momentum: must be in [0, 1)",
        ),
        (["--train-size", "9999"], "fit in 5000"),
        (["--noise", "1.5"], "pollution rate"),
        (["--gamma-init", "-1"], "at least 0"),
        (["--regularisation", "nan"], "at least 0"),
        (["--resume"], "folder with a run"),
        (["--seed", "-1"], "--seed: must be from 0"),
    ],
)
def test_bad_flags_are_one_line_and_leave_nothing(flags, message, tmp_path, capsys):
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        cleaning.main(["--out", str(out), *flags])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not out.exists()


def test_a_folder_in_use_or_other_settings_are_refused(tmp_path, capsys):
    flags = [*SIZES, "--method", "val-only", "--out", str(tmp_path)]
    cleaning.main(flags)
    for wrong in ([], ["--resume", "--seed", "7"]):
        with pytest.raises(SystemExit) as stop:
            cleaning.main([*flags, *wrong])
        assert stop.value.code == 2
    assert "other seed" in capsys.readouterr().err
    for foreign in ("{}", "[1]", "not JSON"):
        (tmp_path / "config.json").write_text(foreign)
        with pytest.raises(SystemExit) as stop:
            cleaning.main([*flags, "--resume"])
        assert stop.value.code == 2
        assert "was not written by a run" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_a_killed_cleaning_run_resumes_to_the_same_numbers(tmp_path, power_fails):
    """Killed when the row of step 30 is written, and the backup is still of step 20."""
    flags = [*SMALL, "--outer-steps", "40", "--eval-every", "10", "--seed", "3"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    with power_fails(tb.Backup, "on_epoch_end", call=3, run=whole, copy=killed):
        cleaning.main([*flags, "--out", str(whole)])
    assert not (killed / "summary.json").exists()
    before = (killed / "metrics.csv").read_text().splitlines()
    assert len(before) == 5  # the header, and a row of the start
    begun = []
    train = cleaning.tb.BilevelModel.fit

    def noted(model, *arguments, **keywords):
        begun.append(model.outer_step)
        return train(model, *arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cleaning.tb.BilevelModel, "fit", noted)
        cleaning.main([*flags, "--out", str(killed), "--resume"])
    assert begun == [20]
    # From the backup: the row of step 20 still has the seconds of the first sitting.
    assert (killed / "metrics.csv").read_text().splitlines()[:4] == before[:4]

    def numbers(folder):
        with (folder / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            del row["seconds"]
        return rows

    # Training metrics are means over the sitting's epochs: the same too.
    assert numbers(killed) == numbers(whole)
