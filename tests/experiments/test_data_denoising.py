"""Denoising: networks, losses, noise, importances, files in published formats."""

import csv
import json
import pathlib
from unittest import mock

import common
import keras
import numpy as np
import pytest
import scipy.io
import tensorflow as tf
from experiment_scripts import arrays_of, load_experiment
from published_files import prepare_with_tfds
from suites import fast_where

import tfbilevel as tb
from data_prep import images, svhn

denoising = load_experiment("data_denoising")
SIZES = ["--train-size", "60", "--validation-size", "40", "--test-size", "30"]
SIZES += ["--batch-size", "20"]
SMALL = [*SIZES, "--jit", "off", "--pretrain-epochs", "3"]
EPOCHS = ["--epochs", "2", "--inner-steps", "2"]


def parse(*flags):
    return denoising.parse_args(["--out", "x", *flags])


@pytest.mark.parametrize(
    "net, shape, count",
    [
        ("logistic", (28, 28, 1), 7_850),
        ("mnist-cnn", (28, 28, 1), 1_389_578),
        ("cifar-cnn", (32, 32, 3), 1_172_410),
        ("svhn-cnn", (32, 32, 1), 1_340_650),
    ],
)
def test_networks_have_the_published_parameter_counts(net, shape, count):
    model = denoising.build_net(net, shape, seed=0)
    assert model.count_params() == count
    assert model.output_shape == (None, 10)
    assert model.layers[-1].activation is keras.activations.linear


def test_published_settings_are_the_defaults():
    args = parse("--dataset", "mnist")
    assert (args.epochs, args.inner_steps, args.batch_size) == (101, 20, 200)
    assert (args.train_size, args.validation_size, args.noise) == (59_000, 1000, 0.25)
    assert (args.upper_lr, args.lower_lr, args.multiplier) == (3, 1e-4, 1e-6)
    assert (args.weight, args.lower_weight) == (0.01, 0.01)
    # norm^2 < 0.01 as published: 0.1 for the norm.
    assert args.tolerance == pytest.approx(0.01**0.5)
    method = denoising.Settings.method(args, 295)
    assert method.schedule.tolerance_decay == pytest.approx(0.9**0.5)
    factors = method.schedule
    assert (factors.growth, factors.decay, factors.rate_decay) == (1.1, 0.9, 0.9)
    assert method.initial_multiplier == 1e-6
    assert not args.augment and args.retrain_threshold == 0
    assert parse("--dataset", "cifar10").augment
    hour = parse("--dataset", "cifar10", "--preset", "hour")
    assert not hour.augment and hour.pretrain_epochs == 20
    small = parse("--dataset", "mnist-small")
    assert (small.retrain_threshold, small.net, small.noise) == (0.9, "logistic", 0.5)
    assert (small.train_size, small.validation_size) == (5000, 5000)
    svhn = ["--dataset", "svhn", "--data-file", "x"]
    # specs: penalty 2.1, 2.2 and 4.2. Epochs, rates of both levels, nu or p's rate.
    for flags, method, epochs, upper_lr, lower_lr, own, steps in (
        (["--dataset", "mnist-small"], "penalty", 100, 3, 1e-4, 1e-4, 20),
        (["--dataset", "cifar10"], "penalty", 200, 3, 1e-4, 1e-4, 20),
        (["--dataset", "cifar10"], "approxgrad", 201, 1, 1e-5, 1e-4, 1),
        (svhn, "penalty", 101, 3, 1e-5, 0, 20),
        (svhn, "approxgrad", 101, 1, 1e-6, 1e-5, 20),
    ):
        made = parse(*flags, "--method", method)
        assert (made.epochs, made.inner_steps) == (epochs, steps), flags
        assert (made.upper_lr, made.lower_lr) == (upper_lr, lower_lr), flags
        assert own == (made.multiplier if method == "penalty" else made.solver_lr)
    assert (made.noise, made.batch_size) == (0.5, 200)
    assert parse("--dataset", "cifar10").noise == 0.25
    other = parse("--dataset", "mnist", "--method", "approxgrad")
    assert (other.upper_lr, other.lower_lr, other.solver_lr) == (1, 1e-6, 1e-5)
    solver = denoising.Settings.method(other, 295).solver
    assert float(solver.optimizer.learning_rate) == pytest.approx(1e-5)
    assert (solver.max_steps, solver.damping, solver.objective) == (
        20,
        1e-3,
        "residual",
    )


@pytest.mark.parametrize("method", ["penalty", "approxgrad", "oracle"])
@pytest.mark.parametrize("preset", ["published", "hour"])
def test_fashion_mnist_has_the_settings_of_mnist(method, preset):
    flags = ["--method", method, "--preset", preset, "--dataset"]
    made, other = (vars(parse(*flags, name)) for name in ("fashion_mnist", "mnist"))
    assert made.pop("dataset") == "fashion_mnist" and other.pop("dataset") == "mnist"
    assert made == other


def forward_operations(net):
    """Multiplications and additions of convolutions and dense layers, one image."""
    total = 0
    for layer in net.layers:
        places = 1
        if isinstance(layer, keras.layers.Conv2D):
            places = np.prod(layer.output.shape[1:3])
        elif not isinstance(layer, keras.layers.Dense):
            continue
        total += 2 * places * np.prod(layer.kernel.shape)
    return total


@pytest.mark.parametrize(
    "dataset, shape, steps",
    [
        ("mnist", (28, 28, 1), 295),
        ("fashion_mnist", (28, 28, 1), 295),
        ("cifar10", (32, 32, 3), 200),
        ("svhn", (32, 32, 1), 361),
    ],
)
def test_the_preset_of_an_hour_fits_in_one(dataset, shape, steps):
    """On the slowest machine so far: 225 billion operations per second (docs/measured),
    of which an update reached four fifths. A gradient is 3 forward passes, a product
    with the Hessian 6."""
    flags = ["--dataset", dataset, "--preset", "hour"]
    flags += ["--data-file", "x"] * (dataset == "svhn")
    for method in ("penalty", "approxgrad"):
        args = parse(*flags, "--method", method)
        t = args.inner_steps
        passes = (t + 1) * 12  # both gradients and a product
        if method == "approxgrad":  # per solver step a residual and its gradient
            passes = 3 * (t + 2) + 6 * (2 * t + 1)
        each = forward_operations(denoising.build_net(args.net, shape, 0))
        operations = args.epochs * steps * args.batch_size * passes * each
        assert 1100 < operations / (0.8 * 225e9) < 3400, (method, operations)
    assert parse(*flags, "--method", "oracle").baseline_epochs == 10
    assert parse(*flags, "--epochs", "7").epochs == 7


def test_approxgrad_halves_both_rates_by_epochs_and_goes_on_with_adam():
    """specs: penalty 2.2. 20 updates of y in each of x, 295 of x in an epoch."""
    args = parse("--dataset", "mnist", "--method", "approxgrad", "--halve-every", "20")
    inner = denoising.Settings.method(args, 295).inner
    assert inner.optimizer_state == "carry"
    upper, lower = denoising.Settings.upper_rate(args, 295), inner.optimizer
    for rate, first, unit in (
        (upper, 1.0, 295 * 20),
        (lower._learning_rate, 1e-6, 295 * 20 * 20),
    ):
        assert float(rate(unit - 1)) == pytest.approx(first)
        assert float(rate(unit)) == pytest.approx(first / 2)


@pytest.mark.parametrize("dataset", ["digits", "mnist", "mnist-small", "fashion_mnist"])
def test_the_parts_share_no_image(dataset, monkeypatch):
    """Numbered ones."""

    def file(count, first):
        numbers = np.arange(first, first + count, dtype=np.float32)
        return images.Part(numbers, numbers.astype(np.int32) % 10)

    monkeypatch.setattr(images, "load_digits", lambda: file(5000, 0))
    files = {"train": file(8000, 0), "test": file(50, 8000)}
    monkeypatch.setattr(images, "load_file", lambda name, split, *_: files[split])
    monkeypatch.setattr(images, "in_published_order", lambda part, split: part)
    monkeypatch.setattr(denoising, "scaled", lambda part: part)
    sizes = ["--train-size", "2000", "--validation-size", "1000", "--test-size", "50"]
    parts = denoising.load_parts(parse("--dataset", dataset, *sizes))
    assert [len(part.labels) for part in parts] == [2000, 1000, 50]
    held = [set(part.images.tolist()) for part in parts]
    assert len(set.union(*held)) == 3050


def test_the_best_row_is_that_of_validation_data(tmp_path):
    run = common.Run(tmp_path / "run", {}, False)
    for step, validation, test in ((1, 50.0, 90.0), (2, 80.0, 60.0), (3, 70.0, 70.0)):
        row = {"step": step, "seconds": step, "validation_accuracy": validation}
        run.log(row | {"test_accuracy": test, "f1_at_0.5": 1.0})
    summary = denoising.summarise(parse(*SMALL), run)
    assert summary["best_validation_step"] == 2
    assert summary["test_accuracy_at_best_validation"] == 60.0
    assert summary["best_test_accuracy"] == 90.0 and summary["test_accuracy"] == 70.0


def part_of(count, seed, shape=(4, 4, 1)):
    generator = np.random.default_rng(seed)
    pixels = generator.random((count, *shape)).astype(np.float32)
    return images.Part(pixels, generator.integers(0, 10, count).astype(np.int32))


def test_losses_are_the_formulas():
    args = parse(*SMALL)
    net = denoising.build_net("logistic", (4, 4, 1), seed=0)
    generator = np.random.default_rng(1)
    start = generator.uniform(0.1, 0.9, 60)
    model = denoising.build_model(args, net, start, 3)
    part = part_of(5, 2)
    index = np.array([7, 0, 59, 3, 3], np.int32)
    kernel, bias = net.get_weights()
    logits = part.images.reshape(5, 16) @ kernel + bias
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(5), part.labels]
    x = [tf.convert_to_tensor(model.upper.logits.value)]
    y = [tf.convert_to_tensor(v.value) for v in net.trainable_variables]
    batch = tuple(map(tf.constant, part))
    got = model.problem.upper_loss(x, y, batch)
    assert float(got) == pytest.approx(losses.mean(), rel=1e-5)
    s = start[index]
    got = model.problem.lower_loss(x, y, (*batch, tf.constant(index)))
    assert float(got) == pytest.approx((s * losses).sum() / s.sum(), rel=1e-5)


def test_importances_round_trip_and_have_a_mean_of_a_half():
    s = np.linspace(1e-4, 1 - 1e-4, 50)
    np.testing.assert_allclose(
        denoising.importance(denoising.to_logits(s)), s, rtol=1e-6
    )
    generator = np.random.default_rng(0)
    for scale in (0.1, 4.0):
        a = (scale * generator.normal(size=2000)).astype(np.float32)
        once = denoising.renormalised(a)
        s = 0.5 * (np.tanh(once) + 1)
        assert s.mean() == pytest.approx(0.5, abs=2e-2)  # 1/2 before the clipping
        assert s.min() >= 0.99e-5 and s.max() <= 1 - 0.99e-5
        if scale == 0.1:
            assert s.mean() == pytest.approx(0.5, abs=1e-6)
            np.testing.assert_allclose(denoising.renormalised(once), once, atol=1e-5)
    everything_off = denoising.renormalised(np.full(5, -40.0, np.float32))
    assert np.isfinite(everything_off).all()


@pytest.mark.parametrize("rate", fast_where((0.5).__eq__, [0.25, 0.5, 0.75]))
def test_noise_is_always_wrong_and_over_all_other_classes(rate):
    sizes = "--train-size", "2500", "--validation-size", "500"
    args = parse("--noise", str(rate), *sizes)
    data = denoising.with_noise(args, denoising.load_parts(args))
    wrong = data.train.labels != data.true_labels
    assert wrong.sum() == int(rate * 2500)
    np.testing.assert_array_equal(wrong, ~data.clean)
    shift = (data.train.labels - data.true_labels)[wrong] % 10
    counts = np.bincount(shift, minlength=10)[1:]
    assert counts.min() > 0.5 * counts.mean()
    assert wrong[: wrong.sum()].mean() < 0.9  # not a prefix


def test_batches_carry_the_numbers_of_their_examples():
    args = parse(*SMALL)
    data = denoising.with_noise(args, denoising.load_parts(args))
    seen = []
    for upper, lower in denoising.batches(args, data, 0).take(3):
        pixels, labels, index = (part.numpy() for part in lower)
        np.testing.assert_array_equal(pixels, data.train.images[index])
        np.testing.assert_array_equal(labels, data.train.labels[index])
        assert upper[0].shape == (20, 28, 28, 1)
        seen += index.tolist()
    assert sorted(seen) == list(range(60))
    later = next(iter(denoising.batches(args, data, 2)))
    np.testing.assert_array_equal(later.lower[2], seen[40:])


def test_augmentation_changes_pixels_and_nothing_else():
    args = parse(*SMALL, "--augment")
    data = denoising.with_noise(args, denoising.load_parts(args))
    batch = next(iter(denoising.batches(args, data, 0)))
    pixels, labels, index = (part.numpy() for part in batch.lower)
    original = data.train.images[index]
    np.testing.assert_array_equal(labels, data.train.labels[index])
    assert pixels.shape == original.shape
    assert pixels.min() >= -1e-6 and pixels.max() <= 1 + 1e-6
    assert (np.abs(pixels - original).max(axis=(1, 2, 3)) > 0.1).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::tfbilevel.DivergenceWarning")
@pytest.mark.parametrize("method", denoising.METHODS)
def test_methods_write_their_files(method, tmp_path):
    flags = [*SMALL, *EPOCHS, "--method", method, "--retrain-epochs", "2"]
    summary = denoising.main([*flags, "--out", str(tmp_path)])
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [0, 3, 6]
    # Before training: the importances say whether the network agrees.
    agreed = 0.4 + 0.2 * float(rows[0]["train_accuracy"]) / 100
    assert float(rows[0]["mean_importance"]) == pytest.approx(agreed, rel=1e-5)
    kept = arrays_of(tmp_path / "importances.npz")
    believed = (kept["importance"] > 0.9).sum()
    assert summary["retrained_on"] == believed + 40
    scores = (kept["importance"] > 0.5) & kept["clean"]
    assert summary["recall_at_0.5"] == pytest.approx(
        100 * scores.sum() / kept["clean"].sum()
    )
    order = np.argsort(kept["importance"])
    ranks = np.empty(60)
    ranks[order] = np.arange(60)
    if len(np.unique(kept["importance"])) == 60:
        positives = ranks[kept["clean"]]
        n = len(positives)
        auc = (positives.sum() - n * (n - 1) / 2) / (n * (60 - n))
        assert summary["auc"] == pytest.approx(100 * auc)
    if method == "penalty":
        assert {"weight", "lower_weight", "tolerance", "rate_scale"} <= set(rows[0])
    for picture in ("importances.png", "distrusted.png", "curves.png"):
        assert (tmp_path / picture).stat().st_size > 5_000


@pytest.mark.slow
@pytest.mark.parametrize("method", denoising.BASELINES)
def test_baselines_see_what_they_may(method, tmp_path, monkeypatch):
    seen = []
    fit = denoising.fit_plainly
    monkeypatch.setattr(
        denoising,
        "fit_plainly",
        lambda a, net, parts, *b: seen.append(parts) or fit(a, net, parts, *b),
    )
    flags = [*SIZES, "--method", method, "--baseline-epochs", "2"]
    summary = denoising.main([*flags, "--noise", "0.25", "--out", str(tmp_path)])
    sizes = [len(part.labels) for part in seen[0]]
    assert (
        sizes == {"oracle": [45, 40], "val-only": [40], "train+val": [60, 40]}[method]
    )
    assert 0 <= summary["test_accuracy"] <= 100
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2"]
    assert float(rows[1]["test_accuracy"]) == summary["test_accuracy"]
    assert (tmp_path / "curves.png").stat().st_size > 10_000


@pytest.mark.slow
def test_dropout_is_off_unless_asked_for():
    part = part_of(40, 0, (28, 28, 1))

    def trained(dropout: bool, rate: float | None = None) -> list:
        """The weights after two updates, at another rate of the Dropout layers."""
        net = denoising.build_net("mnist-cnn", (28, 28, 1), seed=0)
        for layer in net.layers:
            if rate is not None and isinstance(layer, keras.layers.Dropout):
                layer.rate = rate
        keras.utils.set_random_seed(1)
        flags = ["--net", "mnist-cnn", "--batch-size", "40"]
        args = parse(*flags, "--dropout" if dropout else "--no-dropout")
        denoising.fit_plainly(args, net, [part], 1e-3, 2)
        return [net.get_weights()[-2], net.get_weights()[2]]

    without = trained(dropout=False, rate=0.0)
    for kernel, expected in zip(trained(dropout=False), without, strict=True):
        np.testing.assert_allclose(kernel, expected, atol=1e-6)
    assert abs(trained(dropout=True)[0] - without[0]).max() > 1e-4
    args = parse(*SMALL)
    net = denoising.build_net("mnist-cnn", (28, 28, 1), seed=0)
    model = denoising.build_model(args, net, np.full(60, 0.5), 3)
    x = [tf.convert_to_tensor(model.upper.logits.value)]
    y = [tf.convert_to_tensor(v.value) for v in net.trainable_variables]
    batch = tuple(map(tf.constant, part))
    twice = [float(model.problem.upper_loss(x, y, batch)) for _ in range(2)]
    assert twice[0] == twice[1]


def test_accuracy_counts_every_image_once():
    """70 images are no multiple of anything."""
    net = denoising.build_net("logistic", (28, 28, 1), seed=0)
    part = part_of(70, 1, (28, 28, 1))
    logits = net(part.images).numpy()
    want = 100 * (logits.argmax(1) == part.labels).mean()
    assert denoising.accuracy(net, part) == pytest.approx(want)


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_a_killed_run_resumes_to_the_same_numbers(tmp_path, monkeypatch):
    """From a backup between two rows: 3 updates are an epoch of the data. The rows are
    means over parts of 2 and 1 updates then, and those of a run without them.
    Renormalisation comes before the row of an epoch."""
    flags = [*SMALL, "--inner-steps", "2", "--epochs", "4", "--retrain-threshold", "0"]
    summary = denoising.main([*flags, "--out", str(tmp_path / "whole")])
    assert summary["mean_importance"] == pytest.approx(0.5, abs=0.02)
    assert "retrained_on" not in summary
    monkeypatch.setattr(denoising, "SAVED", 2)

    class Dying(tb.Backup):
        def on_epoch_end(self, epoch, logs=None):
            super().on_epoch_end(epoch, logs)
            if epoch == 1:
                raise KeyboardInterrupt

    broken = ["--out", str(tmp_path / "broken")]
    with monkeypatch.context() as patch:
        patch.setattr(tb, "Backup", Dying)
        with pytest.raises(KeyboardInterrupt):
            denoising.main([*flags, *broken])
    # Pretraining is not done again.
    monkeypatch.setattr(denoising, "fit_plainly", mock.Mock(side_effect=AssertionError))
    denoising.main([*flags, *broken, "--resume"])

    def rows(name):
        with (tmp_path / name / "metrics.csv").open() as file:
            made = list(csv.DictReader(file))
        seconds = [float(row.pop("seconds")) for row in made]
        assert seconds == sorted(set(seconds))
        return made

    for whole, broken in zip(rows("whole"), rows("broken"), strict=True):
        assert set(whole) == set(broken)
        for name, value in whole.items():
            expected = pytest.approx(float(value), rel=1e-5, nan_ok=True)
            assert float(broken[name]) == expected, name
    assert [row["step"] for row in rows("whole")] == ["0", "3", "6", "9", "12"]


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_a_run_that_ends_within_an_epoch_is_renormalised_too(tmp_path):
    flags = [*SMALL, "--inner-steps", "2", "--seconds", "1e-9", "--upper-lr", "0.1"]
    flags += ["--retrain-threshold", "0", "--out", str(tmp_path)]
    summary = denoising.main(flags)
    with (tmp_path / "metrics.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    assert last["step"] == "1" and abs(float(last["mean_importance"]) - 0.5) > 1e-4
    found = arrays_of(tmp_path / "importances.npz")["importance"]
    assert found.mean() == pytest.approx(0.5, abs=1e-6)
    assert summary["mean_importance"] == pytest.approx(0.5, abs=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_trials_are_runs_of_their_own(tmp_path):
    flags = [*SIZES, "--method", "val-only", "--baseline-epochs", "1", "--trials", "2"]
    summary = denoising.main([*flags, "--out", str(tmp_path)])
    found = [run["test_accuracy"] for run in summary["runs"]]
    assert [run["seed"] for run in summary["runs"]] == [0, 1]
    assert summary["test_accuracy"] == pytest.approx(np.mean(found))
    assert summary["test_accuracy_std"] == pytest.approx(np.std(found))


# Published formats.


@pytest.fixture
def svhn_file(tmp_path):
    folder = tmp_path / "mat"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, count in (("train", 120), ("test", 30)):
        scipy.io.savemat(
            folder / f"{name}_32x32.mat",
            {
                "X": generator.integers(0, 256, (32, 32, 3, count)).astype(np.uint8),
                "y": np.resize(np.arange(1, 11), count).astype(np.uint8)[:, None],
            },
        )
    out = tmp_path / "svhn.h5"
    svhn.prepare(folder, out, 3, any_size=True)
    return out


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_svhn_from_its_published_files(svhn_file, tmp_path):
    """By a baseline: CIFAR10's is the bilevel run of a convolutional network."""
    flags = ["--dataset", "svhn", "--data-file", str(svhn_file), *SIZES]
    flags += ["--validation-size", "30", "--method", "val-only"]
    flags += ["--baseline-epochs", "1", "--out", str(tmp_path / "run")]
    summary = denoising.main(flags)
    assert summary["net"] == "svhn-cnn" and summary["method"] == "val-only"


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_cifar10_from_its_published_files(tmp_path):
    """The binary version, read by tensorflow-datasets' own builder."""
    binary = tmp_path / "cifar" / "cifar-10-batches-bin"
    binary.mkdir(parents=True)
    generator = np.random.default_rng(0)

    def write(name, count):
        rows = generator.integers(0, 256, (count, 3073)).astype(np.uint8)
        rows[:, 0] %= 10
        (binary / name).write_bytes(rows.tobytes())
        return rows

    batches = [write(f"data_batch_{n}.bin", 25) for n in range(1, 6)]
    write("test_batch.bin", 30)
    names = "airplane automobile bird cat deer dog frog horse ship truck"
    (binary / "batches.meta.txt").write_text("\n".join(names.split()))
    prepare_with_tfds("cifar10", tmp_path / "cifar", tmp_path / "tfds")
    flags = ["--dataset", "cifar10", "--data-dir", str(tmp_path / "tfds"), *SMALL]
    flags += ["--epochs", "1", "--inner-steps", "1", "--pretrain-epochs", "1"]
    flags += ["--out", str(tmp_path / "run")]
    summary = denoising.main(flags)
    assert summary["net"] == "cifar-cnn"
    args = parse("--dataset", "cifar10", "--data-dir", str(tmp_path / "tfds"), *SMALL)
    train = denoising.load_parts(args)[0]
    first = {tuple(row[1:]) for rows in batches for row in rows}
    pixels = np.round(train.images[0] * 255).astype(np.uint8)
    assert tuple(pixels.transpose(2, 0, 1).ravel()) in first


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--noise", "1.0"], "--noise must be at least 0 and below 1"),
        (["--noise", "-0.1"], "--noise must be at least 0"),
        (["--dataset", "svhn"], "--data-file FILE goes with --dataset svhn"),
        (["--data-file", "x"], "--data-file FILE goes with --dataset svhn"),
        (["--validation-size", "100"], "--validation-size must be at least --batch"),
        (["--train-size", "2900"], "must fit in 3000 images"),
        (["--method", "penalty", "--solver-lr", "1"], "--solver-lr has no effect"),
        (["--method", "oracle", "--epochs", "1"], "--epochs has no effect"),
        (["--method", "oracle", "--seconds", "1"], "--seconds needs a bilevel"),
        (["--baseline-lr", "1"], "--baseline-lr needs a baseline"),
        (["--retrain-threshold", "0", "--retrain-lr", "1"], "--retrain-lr needs"),
        (["--retrain-threshold", "1"], "below 1"),
        (["--dataset", "mnist", "--data-dir", "/nowhere"], "not prepared"),
        (["--data-dir", "/nowhere"], "--data-dir needs a --dataset of"),
        (["--dropout"], "--dropout needs a --net with dropout"),
        (["--test-size", "2001"], "--test-size must fit in 2000"),
        (["--lower-weight", "-1"], "at least 0"),
        (["--resume"], "folder with a run"),
        (["--preset", "hour"], "--preset hour is for the large data sets"),
    ],
)
def test_bad_flags_are_one_line_and_leave_nothing(flags, message, tmp_path, capsys):
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        denoising.main(["--out", str(out), *flags])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not out.exists()


def test_noise_that_a_baseline_does_not_see_is_a_warning(capsys):
    args = parse("--method", "val-only", "--noise", "0.25")
    assert args.noise == 0.25
    assert "warning: --noise changes nothing" in capsys.readouterr().err
    parse("--method", "oracle", "--noise", "0.25")
    parse("--method", "val-only")
    assert capsys.readouterr().err == ""


def test_svhn_sizes_must_fit_in_the_file(svhn_file, tmp_path, capsys):
    flags = ["--dataset", "svhn", "--data-file", str(svhn_file), *SMALL]
    held = len(svhn.load(svhn_file)["validation"].labels)
    for size in (held + 1, 1000):
        flags[flags.index("--validation-size") + 1] = str(size)
        with pytest.raises(SystemExit):
            denoising.main([*flags, "--out", str(tmp_path / "out")])
        error = capsys.readouterr().err
        assert f"and {size} of {held}" in error and error.count("\n") == 1


def test_a_foreign_svhn_file(tmp_path, capsys):
    pathlib.Path(tmp_path / "x.h5").write_text("no")
    flags = ["--dataset", "svhn", "--data-file", str(tmp_path / "x.h5")]
    with pytest.raises(SystemExit):
        denoising.main([*flags, "--out", str(tmp_path / "run")])
    assert "not an HDF5 file" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_importances_adam_is_per_example():
    args = parse(*SMALL)
    net = denoising.build_net("logistic", (28, 28, 1), seed=0)
    model = denoising.build_model(args, net, np.full(60, 0.5), 3)
    assert isinstance(model.optimizer, tb.LazyAdam)
    data = denoising.with_noise(args, denoising.load_parts(args))
    before = model.upper.logits.numpy()
    batch = denoising.batches(args, data, 0).take(1)
    index = next(iter(batch)).lower[2].numpy()
    model.fit(batch, steps_per_epoch=1, verbose=0)
    moved = np.flatnonzero(model.upper.logits.numpy() != before)
    assert set(moved) == set(index)
