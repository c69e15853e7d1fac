"""Label noise and the small image sets."""

import numpy as np
import pytest

from data_prep import images, label_noise

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
