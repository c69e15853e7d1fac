"""The clean-label attack: its losses, its pipeline on a small problem, bad files."""

import csv
import dataclasses
import json

import common
import keras
import numpy as np
import pytest
import tensorflow as tf
from experiment_scripts import arrays_of, drawn, load_experiment
from settings.clean_label_attack import METHODS

import tfbilevel as tb

attack = load_experiment("clean_label_attack")
SMALL = ["--train-size", "30", "--test-size", "10", "--feature-epochs", "1"]
SMALL += ["--max-targets", "2", "--outer-steps", "6", "--train-steps", "150"]
SMALL += ["--jit", "off"]


@pytest.fixture
def _few_images(monkeypatch):
    """The feature network is trained on all images of the other classes."""
    files = [
        attack.images.Part(*(array[:700] for array in part))
        for part in attack.load_files(attack.parse_args(["--out", "x"]))
    ]
    monkeypatch.setattr(attack, "load_files", lambda args: files)


def tiny(method="penalty", poisons=1, *flags):
    """Images of 3 x 3, features of a fixed dense layer."""
    generator = np.random.default_rng(0)
    keras.utils.set_random_seed(1)
    extractor = keras.Sequential(
        [
            keras.Input((3, 3, 1)),
            keras.layers.Flatten(),
            keras.layers.Dense(4, activation="tanh"),
        ]
    )
    pixels = generator.uniform(-1, 1, (11, 3, 3, 1)).astype(np.float32)
    labels = (np.arange(11) % 2).astype(np.int32)
    clean = attack.Pictures(pixels, extractor(pixels).numpy(), labels)
    args = attack.parse_args(
        ["--out", "x", "--method", method, "--poisons", str(poisons), "--beta", "0.3"]
        + [*flags]
    )
    return attack.Attack(args, clean, extractor), clean, extractor


@pytest.mark.parametrize(
    ("distortions", "successes", "points"),
    [
        ([0.5], [1], [(0, 0), (0.5, 100)]),
        ([0.5, 0.2, 0.3, 0.4], [1, 0, 1, 0],
         [(0, 0), (0.2, 0), (0.3, 25), (0.4, 25), (0.5, 50)]),
    ],
)  # fmt: skip
def test_the_curve_of_distortions_begins_at_nothing(
    distortions, successes, points, tmp_path, monkeypatch
):
    run = common.Run(tmp_path / "run", {}, False)
    for step, (far, won) in enumerate(zip(distortions, successes, strict=True)):
        run.log({"step": step, "success": won, "distortion": far})
    figure = drawn(monkeypatch, lambda: attack.draw_curve(run, "penalty"))
    (line,) = figure.axes[0].lines
    np.testing.assert_allclose(line.get_xydata(), points)


def batches_of(made, clean, target):
    base = made.base_of(target, 0)
    upper = {
        "target": tf.constant(target[None]),
        "wanted": tf.constant([1], tf.int32),
        "base": tf.constant(clean.images[base]),
    }
    lower = {
        "features": tf.constant(clean.features),
        "labels": tf.constant(clean.labels),
        "poison_labels": tf.constant(clean.labels[base]),
    }
    return tb.Batches(upper, lower), base


def test_bases_are_the_nearest_of_the_other_class():
    made, clean, _ = tiny(poisons=3)
    target = np.array([0.1, -0.2, 0.3, 0.0], np.float32)
    base = made.base_of(target, 0)
    assert (clean.labels[base] == 1).all()
    distances = np.linalg.norm(clean.features - target, axis=1)
    others = distances[clean.labels == 1]
    np.testing.assert_allclose(distances[base], np.sort(others)[:3])


def test_losses_are_the_formulas():
    made, clean, extractor = tiny(poisons=2)
    target = np.array([0.1, -0.2, 0.3, 0.0], np.float32)
    batches, base = batches_of(made, clean, target)
    u = tf.constant(clean.images[base] + 0.1)
    heads = attack.draw_heads(1, 4, [3])
    assert heads[0].shape == (1, 4, 2) and not heads[1].numpy().any()
    kernel, bias = heads[0].numpy()[0], heads[1].numpy()[0]

    def losses(features, labels):
        logits = features @ kernel + bias
        return np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels]

    made_features = extractor(u).numpy()
    want = losses(target[None], [1]).sum()
    want += ((made_features - target) ** 2).sum() + 0.3 * 0.01 * u.numpy().size
    ready = made.problem.prepare(u, batches)
    got = float(made.problem.upper_loss(u, heads, ready.upper))
    assert got == pytest.approx(want, rel=1e-5)
    every = np.concatenate([clean.features, made_features])
    labels = np.concatenate([clean.labels, clean.labels[base]])
    got = float(made.problem.lower_loss(u, heads, ready.lower))
    assert got == pytest.approx(losses(every, labels).mean(), rel=1e-5)
    # Each head on its own: two heads side by side have the sum of their losses.
    pair = attack.draw_heads(2, 4, [4])
    apart = sum(
        float(attack.mean_loss([k[None], b[None]], every, labels))
        for k, b in zip(*pair, strict=True)
    )
    assert float(attack.mean_loss(pair, every, labels)) == pytest.approx(apart)


def test_the_gradient_passes_through_the_features():
    """Computed once per outer step, outside the inner loop."""
    made, clean, _ = tiny()
    target = np.array([0.1, -0.2, 0.3, 0.0], np.float32)
    batches, base = batches_of(made, clean, target)
    u, heads = tf.constant(clean.images[base] * 0.9), attack.draw_heads(1, 4, [3])
    calls = []
    inner = made.problem.prepare

    def counting(u, batches):
        calls.append(1)
        return inner(u, batches)

    problem = tb.Problem(
        made.problem.upper_loss, made.problem.lower_loss, prepare=counting
    )
    method = tb.AugmentedLagrangian(
        keras.optimizers.SGD(0.1), 4, initial_multiplier=0.2
    )
    state = method.init(problem, u, heads)
    step = method.step(problem, u, heads, batches, state)
    assert len(calls) == 1
    value = method.objective(problem, u, heads, batches, state)
    generator = np.random.default_rng(5)
    direction = generator.normal(size=u.shape).astype(np.float32)
    slope = (
        float(value(u + 0.01 * direction)) - float(value(u - 0.01 * direction))
    ) / 0.02
    assert float((step.upper_gradient.numpy() * direction).sum()) == pytest.approx(
        slope, rel=2e-3
    )


def test_feature_collision_is_one_level():
    """Adam on |phi(u) - phi(t)|^2 + beta |u - b|^2, in the box, and nothing else."""
    made, clean, extractor = tiny("feature-collision")
    target = clean.features[0] * 0.9 + 0.05
    poison = made.poison(target, 0, 0)
    _, base = batches_of(made, clean, target)

    def collision(u):
        apart = ((extractor(u).numpy() - target) ** 2).sum()
        return apart + 0.3 * ((u - clean.images[base]) ** 2).sum()

    assert collision(poison) < 0.9 * collision(clean.images[base])
    assert poison.min() >= clean.images.min() and poison.max() <= clean.images.max()


@pytest.mark.slow
def test_all_targets_are_attacked_by_one_compiled_loop():
    few = "penalty", 1, "--outer-steps", "20"
    made, clean, _ = tiny(*few)
    calls = []
    plain = made.problem.upper_loss
    counted = dataclasses.replace(
        made.problem, upper_loss=lambda *a: calls.append(1) or plain(*a)
    )
    made.problem = counted
    first = made.poison(clean.features[0] * 0.9, 0, 0)
    traced = len(calls)
    second = made.poison(clean.features[2] * 1.1, 0, 1)
    assert traced > 0 and len(calls) == traced
    # And the second starts anew: as alone.
    alone, _, _ = tiny(*few)
    np.testing.assert_array_equal(second, alone.poison(clean.features[2] * 1.1, 0, 1))
    assert not np.array_equal(first, second)


def test_published_settings_are_the_defaults():
    """specs: penalty 7."""
    args = attack.parse_args(["--out", "x"])
    assert (args.outer_steps, args.upper_lr, args.beta) == (201, 0.01, 0.01)
    assert (args.train_steps, args.train_lr, args.poisons) == (2001, 0.001, 1)
    assert (args.inner_steps, args.lower_lr) == (10, 0.001)
    assert (args.weight, args.lower_weight, args.tolerance) == (1, 1, 1)
    sizes = attack.parse_args(["--out", "x", "--dataset", "mnist"])
    assert (sizes.train_size, sizes.test_size) == (900, 300)


@pytest.mark.slow
@pytest.mark.usefixtures("_few_images")
@pytest.mark.parametrize("method", METHODS)
def test_the_whole_pipeline(method, tmp_path):
    summary = attack.main([*SMALL, "--method", method, "--out", str(tmp_path)])
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == summary["targets"] == 2
    for row in rows:
        kept = arrays_of(tmp_path / "poisons" / f"target-{row['target']}.npz")
        change = (kept["poison"] - kept["base"]).ravel()
        assert float(row["distortion"]) == pytest.approx(
            np.linalg.norm(change), rel=1e-4
        )
        assert float(row["largest_change"]) == pytest.approx(np.abs(change).max())
        assert float(row["probability_before"]) > 0.5
        flipped, after = int(row["flipped_heads"]), float(row["probability_after"])
        assert (flipped >= 2) == bool(int(row["success"]))
        if flipped in (0, 3):  # of the target's own class, in all heads alike
            assert (after < 0.5) == (flipped == 3)
        distances = (
            float(row["feature_distance"]),
            float(row["feature_distance_before"]),
        )
        assert distances[0] < 0.999 * distances[1]  # of the poison, not of its base
    rate = np.mean([int(row["success"]) for row in rows])
    assert summary["success_rate"] == pytest.approx(100 * rate)
    for picture in ("attacks.png", "distortion.png"):
        assert (tmp_path / picture).stat().st_size > 5_000
    with np.load(tmp_path / "images.npz") as bundle:
        assert bundle["X_train"].shape == (60, 28, 28, 1)
        assert bundle["X_train"].min() == -1 and bundle["X_train"].max() == 1
        assert np.bincount(bundle["Y_test"]).tolist() == [10, 10]


def test_the_files_share_no_image(monkeypatch):
    numbers = np.arange(5000, dtype=np.float32)
    file = attack.images.Part(numbers, numbers.astype(int) % 10)
    monkeypatch.setattr(attack.images, "load_digits", lambda: file)
    parts = attack.load_files(attack.parse_args(["--out", "x"]))
    held = [set(part.images.tolist()) for part in parts]
    assert sum(map(len, held)) == len(set.union(*held)) == 5000


@pytest.mark.slow
@pytest.mark.usefixtures("_few_images")
def test_a_killed_run_resumes(tmp_path, monkeypatch):
    broken = [*SMALL, "--out", str(tmp_path / "broken")]
    one = attack.attack_one
    done = []

    def dying(*arguments):
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return one(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(attack, "attack_one", dying)
        with pytest.raises(KeyboardInterrupt):
            attack.main(broken)
    table = tmp_path / "broken" / "metrics.csv"
    table.write_text(table.read_text() + "1,0.")  # killed while a row was written
    monkeypatch.setattr(attack, "train_feature_model", None)  # it is there already
    counted = []
    monkeypatch.setattr(attack, "attack_one", lambda *a: counted.append(1) or one(*a))
    summary = attack.main([*broken, "--resume"])
    assert summary["targets"] == 2 and len(counted) == 1
    with table.open() as file:
        seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
    assert 0 < seconds[0] < seconds[1] == summary["seconds"]


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_a_bundle_with_a_feature_model(tmp_path, capsys):
    """The published layout and any Keras model, no features prepared."""
    generator = np.random.default_rng(0)
    prototypes = generator.uniform(-0.5, 0.5, (2, 6, 6, 3))
    arrays = {}
    for part, size in (("train", 24), ("test", 8)):
        labels = np.arange(size) % 2
        noise = generator.uniform(-0.4, 0.4, (size, 6, 6, 3))
        arrays[f"X_{part}"], arrays[f"Y_{part}"] = prototypes[labels] + noise, labels
    np.savez(tmp_path / "d.npz", **arrays)
    keras.utils.set_random_seed(0)
    keras.Sequential(
        [keras.Input((6, 6, 3)), keras.layers.Flatten(), keras.layers.Dense(16, "relu")]
    ).save(tmp_path / "m.keras")
    flags = [
        "--data-file",
        str(tmp_path / "d.npz"),
        "--model",
        str(tmp_path / "m.keras"),
    ]
    flags += ["--max-targets", "2", "--outer-steps", "5", "--train-steps", "300"]
    summary = attack.main([*flags, "--out", str(tmp_path / "run")])
    assert summary["targets"] == 2 and summary["clean_test_accuracy"] > 90
    # Classes that are not 0 and 1: said before any feature is made.
    np.savez(tmp_path / "e.npz", **arrays | {"Y_test": arrays["Y_test"] + 1})
    wrong = [
        *flags,
        "--data-file",
        str(tmp_path / "e.npz"),
        "--out",
        str(tmp_path / "e"),
    ]
    with pytest.raises(SystemExit):
        attack.main(wrong)
    assert "Y_test of --data-file must hold the classes" in capsys.readouterr().err
    assert not (tmp_path / "e").exists()
    # Pixels of another range: likewise.
    np.savez(tmp_path / "r.npz", **arrays | {"X_test": arrays["X_test"] * 127.5})
    wrong = [
        *flags,
        "--data-file",
        str(tmp_path / "r.npz"),
        "--out",
        str(tmp_path / "r"),
    ]
    with pytest.raises(SystemExit):
        attack.main(wrong)
    assert "images must lie in [-1, 1]" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
    # The features of another network, though as wide.
    keras.Sequential(
        [keras.Input((6, 6, 3)), keras.layers.Flatten(), keras.layers.Dense(16, "relu")]
    ).save(tmp_path / "m.keras")
    flags += ["--features-file", str(tmp_path / "run" / "features.h5")]
    with pytest.raises(SystemExit):
        attack.main([*flags, "--out", str(tmp_path / "other")])
    assert "features of another network" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--features-file", "x.h5"], "--features-file needs --data-file"),
        (["--weights", "none"], "--weights needs --data-file"),
        (
            ["--data-file", "x.npz", "--classes", "1", "2"],
            "--classes needs no --data-file",
        ),
        (["--method", "feature-collision", "--weight", "2"], "--weight needs --method"),
        (["--classes", "4", "4"], "--classes must be two of"),
        (["--train-size", "5000"], "--train-size must not exceed"),
        (["--data-file", "/nowhere.npz"], "does not exist"),
        (["--dataset", "mnist", "--data-dir", "/nowhere"], "not prepared"),
        (["--data-dir", "/nowhere"], "--data-dir needs --dataset mnist"),
        (["--beta", "-1"], "at least 0"),
        (["--start", "-1"], "at least 0"),
        (["--start", "200"], "--start must be below 200"),
        (["--poisons", "301"], "--poisons must be at most 300"),
        (["--resume"], "folder with a run"),
    ],
)
def test_bad_flags_are_one_line_and_leave_nothing(flags, message, tmp_path, capsys):
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        attack.main(["--out", str(out), *flags])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not out.exists()


@pytest.mark.parametrize(("flags", "jit"), [([], True), (["--jit", "off"], False)])
def test_jit_is_that_of_the_heads_training(flags, jit, monkeypatch):
    seen = []
    monkeypatch.setattr(common, "trainer", lambda *given: seen.append(given))
    attack.head_trainer(attack.parse_args(["--out", "x", *flags]))
    ((_, _, steps, given),) = seen
    assert (steps, given) == (2001, jit)
