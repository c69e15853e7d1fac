"""Image features: of a small model as a stand-in, of Inception itself, and resumed."""

from unittest import mock

import keras
import numpy as np
import pytest
from experiment_scripts import load_experiment

from data_prep import dogfish_features, hdf5


def write_bundle(path, sizes=(9, 4), shape=(8, 6, 3), low=-1.0, **others):
    generator = np.random.default_rng(0)
    arrays = {}
    for part, size in zip(("train", "test"), sizes, strict=True):
        arrays[f"X_{part}"] = generator.uniform(low, 1, (size, *shape))
        arrays[f"Y_{part}"] = np.arange(size) % 2
    arrays.update(others)
    np.savez_compressed(path, **arrays)
    return arrays


@pytest.fixture
def model(tmp_path):
    """Means over the image and a dense layer: known in NumPy."""
    keras.utils.set_random_seed(0)
    made = keras.Sequential(
        [
            keras.Input((None, None, 3)),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(5),
        ]
    )
    made.save(tmp_path / "model.keras")
    return made


def test_features_are_the_models(model, tmp_path):
    data, out = tmp_path / "d.npz", tmp_path / "f.h5"
    arrays = write_bundle(data)
    flags = ["--data-file", str(data), "--out", str(out), "--batch", "4"]
    shapes = dogfish_features.main([*flags, "--model", str(tmp_path / "model.keras")])
    assert shapes == {"train": (9, 5), "test": (4, 5)}  # the last batch is there
    kernel, bias = model.get_weights()
    for part, found in dogfish_features.load(out).items():
        means = arrays[f"X_{part}"].mean(axis=(1, 2))
        np.testing.assert_allclose(found.features, means @ kernel + bias, atol=1e-5)
        np.testing.assert_array_equal(found.labels, arrays[f"Y_{part}"])
        assert found.features.dtype == np.float32


def test_other_images_of_the_same_name_and_size_are_not_gone_on_with(
    model, tmp_path, monkeypatch
):
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        images = np.full((9, 8, 6, 3), 0.1 * number)
        parts = {
            "X_train": images,
            "Y_train": np.arange(9) % 2,
            "X_test": images[:4],
            "Y_test": np.arange(4) % 2,
        }
        np.savez(tmp_path / str(number) / "d.npz", **parts)
    first, second = (tmp_path / number / "d.npz" for number in "01")
    assert first.stat().st_size == second.stat().st_size
    out, options = tmp_path / "f.h5", {"model": tmp_path / "model.keras"}
    with monkeypatch.context() as patch:
        patch.setattr(dogfish_features, "in_range", mock.Mock(side_effect=KeyError))
        with pytest.raises(KeyError):
            dogfish_features.prepare(first, out, **options)
    with pytest.raises(ValueError, match="unfinished work of another run"):
        dogfish_features.prepare(second, out, **options)
    kept = options["model"].read_bytes()
    model.set_weights([2 * w for w in model.get_weights()])  # trained on
    model.save(options["model"])
    with pytest.raises(ValueError, match="unfinished work of another run"):
        dogfish_features.prepare(first, out, **options)
    options["model"].write_bytes(kept)
    dogfish_features.prepare(first, out, **options)


@pytest.mark.slow
def test_inception_itself(tmp_path):
    data, out = tmp_path / "d.npz", tmp_path / "f.h5"
    write_bundle(data, sizes=(2, 2), shape=(299, 299, 3))
    flags = ["--data-file", str(data), "--out", str(out), "--weights", "none"]
    assert dogfish_features.main(flags) == {"train": (2, 2048), "test": (2, 2048)}
    features = dogfish_features.load(out)["train"].features
    assert np.ptp(features, axis=0).max() > 0  # of two different images
    # Random, and the same network again, or the attack would refuse these features; it
    # differentiates through it.
    attack = load_experiment("clean_label_attack")
    flags = ["--data-file", str(data), "--features-file", str(out), "--weights", "none"]
    flags += ["--max-targets", "1", "--outer-steps", "1", "--inner-steps", "1"]
    flags += ["--train-steps", "20", "--retrain-seeds", "1", "--jit", "off"]
    summary = attack.main([*flags, "--out", str(tmp_path / "attack")])
    assert summary["targets"] == 1 and summary["distortion"] > 0


@pytest.mark.slow
def test_a_killed_extraction_resumes(model, tmp_path, monkeypatch):
    data = tmp_path / "d.npz"
    write_bundle(data)
    options = {"model": tmp_path / "model.keras", "batch": 2}
    dogfish_features.prepare(data, tmp_path / "whole.h5", **options)
    checked, seen = dogfish_features.in_range, []

    def dying(images, *limits):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(len(images))
        return checked(images, *limits)

    with monkeypatch.context() as patch:
        patch.setattr(dogfish_features, "in_range", dying)
        with pytest.raises(KeyboardInterrupt):
            dogfish_features.prepare(data, tmp_path / "broken.h5", **options)
    monkeypatch.setattr(
        dogfish_features,
        "in_range",
        lambda x, *a: seen.append(len(x)) or checked(x, *a),
    )
    dogfish_features.prepare(data, tmp_path / "broken.h5", **options)
    assert seen == [2, 2, 2] + [2, 1, 2, 2]  # 6 of 9 training images were done
    whole, resumed = (
        dogfish_features.load(tmp_path / f"{name}.h5") for name in ("whole", "broken")
    )
    for part in ("train", "test"):
        np.testing.assert_array_equal(whole[part].features, resumed[part].features)


@pytest.mark.parametrize(
    "damage, message",
    [
        ("missing", "does not exist"),
        ("cut", "cut short or not an .npz"),
        ("foreign", "cut short or not an .npz"),
        ("keys", "must hold X_train, Y_train, X_test and Y_test"),
        ("labels", "their n classes"),
        ("shape", "must be (None, None, 3) for this feature model"),
        ("range", "must lie in [-1, 1]"),
        ("model", "must map images"),
    ],
)
def test_bad_files_are_one_line(damage, message, model, tmp_path, capsys):
    data, chosen = tmp_path / "d.npz", tmp_path / "model.keras"
    write_bundle(data)
    if damage == "missing":
        data.unlink()
    elif damage == "cut":
        data.write_bytes(data.read_bytes()[:3000])
    elif damage == "foreign":
        data.write_text("no")
    elif damage == "keys":
        np.savez(data, images=np.zeros(3))
    elif damage == "labels":
        write_bundle(data, Y_test=np.zeros(3))
    elif damage == "shape":
        write_bundle(data, shape=(8, 8, 1))
    elif damage == "range":
        arrays = write_bundle(data)
        write_bundle(data, X_train=127.5 * (arrays["X_train"] + 1))
    else:
        flat = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
        flat.save(chosen)
    out = tmp_path / "f.h5"
    with pytest.raises(SystemExit) as stop:
        flags = ["--data-file", str(data), "--out", str(out), "--model", str(chosen)]
        dogfish_features.main(flags)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not out.exists()


def test_a_damaged_array_is_named(tmp_path):
    data = tmp_path / "d.npz"
    write_bundle(data)
    content = bytearray(data.read_bytes())
    content[2000:2010] = bytes(10)  # inside the compressed images
    data.write_bytes(content)
    with pytest.raises(ValueError, match="X_train of .* is damaged"):
        dogfish_features.Bundle(data).array("X_train")


def test_pieces_start_anywhere(tmp_path):
    data = tmp_path / "d.npz"
    images = write_bundle(data)["X_train"]
    bundle = dogfish_features.Bundle(data)
    where = hdf5.slices(3, 9, 4)
    pieces = list(bundle.pieces("X_train", where))
    np.testing.assert_array_equal(np.concatenate(pieces), images[3:])
    assert [len(piece) for piece in pieces] == [4, 2]
