"""Data poisoning: data sets, losses, the published settings, small runs, errors."""

import csv
import json

import common
import numpy as np
import pytest
import tensorflow as tf
from experiment_scripts import arrays_of, drawn, load_experiment
from suites import fast_where

import tfbilevel as tb
from data_prep import images

poisoning = load_experiment("poisoning_mnist")
SMALL = ["--dataset", "digits", "--outer-steps", "4", "--eval-every", "2"]
SMALL += ["--train-steps", "60", "--inner-steps", "3", "--jit", "off"]


def parse(*flags):
    return poisoning.parse_args(["--out", "x", *flags])


def file_of(count, seed):
    generator = np.random.default_rng(seed)
    labels = np.resize(np.arange(10), count).astype(np.int32)
    generator.shuffle(labels)
    pixels = generator.random((count, 16)).astype(np.float32)
    return images.Part(pixels, labels)


def test_untargeted_parts_are_disjoint_and_labels_wrong():
    args = parse("--dataset", "mnist", "--poisons", "7")
    files = [file_of(12_000, 0), file_of(500, 1)]
    data = poisoning.draw_data(args, files, 7, seed=3)
    sizes = [len(part.labels) for part in (data.train, data.validation, data.test)]
    assert sizes == [1000, 1000, 8000] and data.official is files[1]
    rows = np.concatenate([data.train.images, data.validation.images, data.test.images])
    assert len(np.unique(rows, axis=0)) == 10_000
    np.testing.assert_array_equal(data.poisons.images, data.train.images[:7])
    assert (data.poisons.labels != data.train.labels[:7]).all()
    again = poisoning.draw_data(args, files, 7, seed=3)
    np.testing.assert_array_equal(again.poisons.labels, data.poisons.labels)


def test_targeted_parts():
    flags = ["--dataset", "mnist", "--attack", "targeted", "--poisons", "6"]
    args = parse(*flags)
    files = [file_of(12_000, 0), file_of(6000, 1)]
    data = poisoning.draw_data(args, files, 6, seed=3)
    assert np.bincount(data.train.labels).tolist() == [100] * 10
    first = {tuple(row) for row in files[0].images[:2000]}
    assert all(tuple(row) in first for row in data.train.images)
    assert not any(tuple(row) in first for row in data.validation.images)
    # 400 eights that are called threes.
    assert data.validation.labels.tolist() == [3] * 400
    by_image = {tuple(row): y for row, y in zip(*files[0], strict=True)}
    assert all(by_image[tuple(row)] == 8 for row in data.validation.images)
    assert np.bincount(data.test.labels).tolist() == [500] * 10
    true = [by_image[tuple(row)] for row in data.poisons.images]
    assert sorted(true) == [3, 3, 3, 8, 8, 8]
    swapped = {3: 8, 8: 3}
    assert data.poisons.labels.tolist() == [swapped[y] for y in true]


def test_mnist_is_read_from_both_of_its_files(monkeypatch):
    orders = []

    def load(name, split, folder, download):
        value = {"train": 51, "test": 102}[split]
        return images.Part(np.full((3, 2, 2, 1), value), np.arange(3))

    monkeypatch.setattr(images, "load_file", load)
    monkeypatch.setattr(
        images, "in_published_order", lambda part, split: orders.append(split) or part
    )
    files = poisoning.load_files(parse("--dataset", "mnist"))
    for file, value in zip(files, (0.2, 0.4), strict=True):
        np.testing.assert_allclose(file.images, np.full((3, 4), value), rtol=1e-6)
    assert orders == ["train", "test"]


def test_wrong_labels_are_any_of_the_nine():
    args = parse("--poisons", "900")
    files = [file_of(12_000, 0), file_of(500, 1)]
    data = poisoning.draw_data(args, files, 900, seed=3)
    shifts = (data.poisons.labels - data.train.labels[:900]) % 10
    assert np.bincount(shifts, minlength=10)[1:].min() > 50


def test_f_sees_validation_data_and_g_training_data(monkeypatch, tmp_path):
    """Targeted: the parts have other sizes, and validation labels are wrong."""
    args = parse("--attack", "targeted", "--poisons", "4", "--jit", "off")
    data = poisoning.draw_data(args, [file_of(12_000, 0), file_of(6000, 1)], 4, seed=3)
    seen = []

    def train(model, batches, *others, **keywords):
        seen.append(next(iter(batches(0))))
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "train", train)
    clean = poisoning.build_model(args, data, seed=1).lower
    run = common.Run(tmp_path / "run", {}, False)
    with pytest.raises(KeyboardInterrupt):
        poisoning.optimise(args, run, data, clean, 0)
    for level, part in (("upper", data.validation), ("lower", data.train)):
        for found, wanted in zip(getattr(seen[0], level), part, strict=True):
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("attack", ["untargeted", "targeted"])
def test_losses_are_the_formulas(attack):
    args = parse("--attack", attack, "--poisons", "4", "--stay-close", "0.5")
    part = file_of(30, 0)
    data = poisoning.Data(part, part, part, None, poisoning.take(part, np.arange(4)))
    model = poisoning.build_model(args, data, seed=1)
    kernel = model.lower.get_weights()[0]
    assert kernel.shape == (16, 10)  # no bias
    moved = data.poisons.images + 0.1
    model.upper.images.assign(moved)

    def losses(pixels, labels):
        logits = pixels @ kernel
        return np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels]

    every = np.concatenate([losses(*part), losses(moved, data.poisons.labels)])
    want = every.mean() + 0.0025 * (kernel**2).sum()
    x = [tf.constant(moved)]
    y = [tf.constant(kernel)]
    batch = tuple(map(tf.constant, part))
    assert float(model.problem.lower_loss(x, y, batch)) == pytest.approx(want, rel=1e-5)
    sign = -1 if attack == "untargeted" else 1
    close = 0.5 * 0.01 * moved.size
    want = sign * losses(*part).mean() + close
    assert float(model.problem.upper_loss(x, y, batch)) == pytest.approx(want, rel=1e-4)
    clipped = model.problem.projected_upper([tf.constant(10 * moved - 5)])[0].numpy()
    assert clipped.min() == 0 and clipped.max() == 1


def test_scores_count_eights_read_as_threes():
    pixels = np.eye(10, dtype=np.float32)
    part = images.Part(pixels, np.arange(10, dtype=np.int32))

    def net(inputs):
        table = np.eye(10, dtype=np.float32)
        table[8] = table[3]
        return tf.constant(np.asarray(inputs) @ table)

    data = poisoning.Data(part, part, part, part, part)
    made = poisoning.scores(parse("--attack", "targeted"), net, data)
    assert made["test_accuracy"] == made["official_test_accuracy"] == 90
    assert made["attack_success"] == 100
    assert made["accuracy_of_8"] == 0 and made["accuracy_of_3"] == 100
    # What an untargeted attack is not after is no success of it.
    assert made.keys() - poisoning.scores(parse(), net, data) == {"attack_success"}


@pytest.mark.parametrize("attack", poisoning.ATTACKS)
def test_curves_of_one_evaluation(attack, tmp_path, monkeypatch):
    """f is not known before training: what is left of it is one point."""
    run = common.Run(tmp_path / "run", {}, False)
    for step in (0, 3):
        numbers = {"test_accuracy": 80 + step, "attack_success": step}
        known = {"step": step, "upper_loss": step or float("nan")}
        run.log(known | {name: numbers[name] for name in poisoning.ATTACKS[attack]})
    args = parse("--attack", attack)
    figure = drawn(monkeypatch, lambda: poisoning.draw_curves(run, args))
    left, right = figure.axes
    (line,) = left.lines
    assert line.get_xydata().tolist() == [[3, 3]] and line.get_marker() != "None"
    assert left.get_xlim() == right.get_xlim()
    want = ["test accuracy", "attack success"][: 1 + (attack == "targeted")]
    assert [line.get_label() for line in right.lines] == want


def test_published_settings_are_the_defaults():
    args = parse()
    assert (args.outer_steps, args.inner_steps, args.train_steps) == (5000, 20, 10_001)
    method = poisoning.Settings.method(args)
    assert (method.weight, method.lower_weight, method.atol) == (10, 100, 1)
    assert (args.upper_lr, args.lower_lr, method.initial_multiplier) == (0.1, 1e-3, 0)
    targeted = parse("--attack", "targeted")
    assert (targeted.lower_weight, targeted.lower_lr) == (1, 1e-4)
    other = parse("--method", "approxgrad")
    assert (other.upper_lr, other.lower_lr, other.solver_lr) == (1e-2, 1e-3, 1e-2)
    assert (other.damping, other.halve_every) == (1e-3, 1000)
    rate = poisoning.Settings.method(other).inner.optimizer._learning_rate
    assert float(rate(20 * 1000 - 1)) == pytest.approx(1e-3)
    assert float(rate(20 * 1000)) == pytest.approx(5e-4)


@pytest.mark.filterwarnings("ignore::tfbilevel.DivergenceWarning")
@pytest.mark.parametrize(
    ("method", "attack"),
    fast_where(
        lambda method, attack: (method, attack) == ("label-flip", "targeted"),
        [
            ("penalty", "targeted"),
            ("penalty", "untargeted"),
            ("approxgrad", "untargeted"),
            ("label-flip", "targeted"),
        ],
    ),
)
def test_every_attack_and_method_runs(method, attack, tmp_path):
    flags = [*SMALL, "--attack", attack, "--method", method, "--poisons", "4"]
    if method == "label-flip":
        flags = ["--dataset", "digits", "--train-steps", "60", *flags[-6:]]
    summary = poisoning.main([*flags, "--out", str(tmp_path)])
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["poisons"] == 4
    assert summary["clean"]["test_accuracy"] > 50
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    targeted = attack == "targeted"
    assert ("attack_success" in summary) == targeted == ("attack_success" in rows[0])
    assert (tmp_path / "poisons.png").stat().st_size > 10_000
    if method == "label-flip":
        assert summary["poisoned"] == summary["label_flip"]
        accuracy = summary["label_flip"]["test_accuracy"]
        assert [float(row["test_accuracy"]) for row in rows] == [accuracy]
        return
    assert [int(row["step"]) for row in rows] == [0, 2, 4]
    made = arrays_of(tmp_path / "poisons.npz")
    assert made["images"].shape == (4, 784)
    assert made["images"].min() >= 0 and made["images"].max() <= 1
    assert summary["distance"] > 0
    assert (tmp_path / "curves.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_optimised_poisons_do_more_harm_than_flipped_labels(tmp_path):
    flags = ["--dataset", "digits", "--poisons", "60", "--outer-steps", "60"]
    flags += ["--train-steps", "500", "--jit", "off", "--out", str(tmp_path)]
    summary = poisoning.main(flags)
    harm = summary["label_flip"]["test_accuracy"] - summary["test_accuracy"]
    assert harm > 3


@pytest.mark.slow
def test_several_counts_and_trials_resume(tmp_path, monkeypatch):
    """Of networks at random, other ones for other data: training is tested above."""

    def drawn(part, seed):
        return poisoning.build_net(part.images.shape[1], seed + len(part.labels))

    monkeypatch.setattr(poisoning, "trainer", lambda args: drawn)
    flags = ["--dataset", "digits", "--method", "label-flip"]
    flags += ["--poisons", "2", "4", "--trials", "2", "--out", str(tmp_path)]
    summary = poisoning.main(flags)
    assert set(summary["by_poisons"]) == {"2", "4"}
    for count, row in summary["by_poisons"].items():
        runs = [run for run in summary["runs"] if run["poisons"] == int(count)]
        assert len(runs) == 2
        for state in poisoning.SCORES:
            found = [run[state]["test_accuracy"] for run in runs]
            assert row[f"{state}_test_accuracy"] == pytest.approx(np.mean(found))
            assert row[f"{state}_test_accuracy_std"] == pytest.approx(np.std(found))
    folder = tmp_path / "poisons-4-seed-1"
    stamps = (tmp_path / "poisons-2-seed-0" / "summary.json").stat().st_mtime_ns
    (folder / "summary.json").unlink()
    again = poisoning.main([*flags, "--resume"])
    assert again["by_poisons"] == summary["by_poisons"]
    after = (tmp_path / "poisons-2-seed-0" / "summary.json").stat().st_mtime_ns
    assert after == stamps


def test_retraining_is_on_clean_data_and_poisons_alone():
    """Against NumPy's Adam on the same g."""
    import references

    args = parse("--train-steps", "25", "--train-lr", "0.03")
    part = file_of(30, 0)
    data = poisoning.Data(part, part, part, None, poisoning.take(part, np.arange(4)))
    pixels = data.poisons.images + 0.3
    net = poisoning.trainer(args)(poisoning.poisoned(data, pixels), seed=2)
    start = poisoning.build_net(16, 2).get_weights()[0]
    inputs = np.concatenate([part.images, pixels]).astype(np.float64)
    labels = np.concatenate([part.labels, data.poisons.labels])

    def gradient(y):
        kernel = y.reshape(16, 10)
        logits = inputs @ kernel
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        p[np.arange(len(labels)), labels] -= 1
        return (inputs.T @ p / len(labels) + 0.005 * kernel).ravel()

    want = references.adam(gradient, start.ravel(), 0.03, 25, epsilon=1e-8)
    np.testing.assert_allclose(net.get_weights()[0].ravel(), want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--attack", "targeted", "--poisons", "5"], "must be even"),
        (["--poisons", "2000"], "at most 1000"),
        (["--attack", "targeted", "--poisons", "300"], "at most 200"),
        (["--method", "label-flip", "--upper-lr", "1"], "--upper-lr has no effect"),
        (["--method", "label-flip", "--jit", "off"], "--jit needs a --method that"),
        (["--method", "penalty", "--solver-lr", "1"], "--solver-lr has no effect"),
        (["--dataset", "mnist", "--data-dir", "/nowhere"], "not prepared"),
        (["--data-dir", "/nowhere"], "--data-dir needs --dataset mnist"),
        (["--lower-weight", "-1"], "at least 0"),
        (["--multiplier", "nan"], "must be finite"),
        (["--stay-close", "inf"], "at least 0"),
        (["--resume"], "folder with a run"),
    ],
)
def test_bad_flags_are_one_line_and_leave_nothing(flags, message, tmp_path, capsys):
    out = tmp_path / "run"
    given = [] if "--dataset" in flags else ["--dataset", "digits"]
    with pytest.raises(SystemExit) as stop:
        poisoning.main(["--out", str(out), *given, *flags])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not out.exists()


def test_projected_images_stay_in_the_box_at_every_step():
    args = parse("--poisons", "4", "--upper-lr", "5.0", "--inner-steps", "2")
    part = file_of(30, 0)
    data = poisoning.Data(part, part, part, None, poisoning.take(part, np.arange(4)))
    model = poisoning.build_model(args, data, seed=1)
    method = poisoning.Settings.method(args)
    x = [tf.constant(data.poisons.images)]
    y = [tf.convert_to_tensor(v.value) for v in model.lower.trainable_variables]
    result = tb.minimize(
        model.problem,
        method,
        x,
        y,
        common.adam(5.0),
        tb.Batches(*[tuple(map(tf.constant, part))] * 2),
        20,
        trace=lambda point: point.upper[0],
    )
    seen = result.trace.numpy()
    assert seen.min() == 0 and seen.max() == 1
