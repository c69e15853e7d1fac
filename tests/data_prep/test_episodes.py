"""Few-shot tasks: what they hold, and that they can be drawn again."""

import numpy as np
import pytest

from data_prep.classes import Classes
from data_prep.episodes import episodes

SIZES = (6, 9, 7, 6, 8, 6, 6, 10, 6, 6)


def collection():
    """Ten classes; red is the class, green the image's place in it."""
    images = np.zeros((sum(SIZES), 2, 2, 3), np.uint8)
    starts = np.concatenate([[0], np.cumsum(SIZES)]).astype(np.int64)
    for number, size in enumerate(SIZES):
        images[starts[number] : starts[number + 1], :, :, 0] = number
        images[starts[number] : starts[number + 1], :, :, 1] = np.arange(size)[
            :, None, None
        ]
    return Classes(images, starts, tuple(f"class {n}" for n in range(len(SIZES))))


def decoded(part):
    """Class and place of every image, [tasks, images]."""
    pixels = np.round(part[0].numpy() * 255).astype(int)
    assert part[0].dtype == "float32" and pixels.shape[2:] == (2, 2, 3)
    return pixels[:, :, 0, 0, 0], pixels[:, :, 0, 0, 1]


@pytest.mark.parametrize("tasks", [3, 5])
def test_support_and_query_are_disjoint_and_labels_mean_classes(tasks):
    dataset = episodes(collection(), ways=3, shots=2, queries=4, tasks=tasks, seed=1)
    repeated = []
    for batch in dataset.take(6):
        (of, place), (query_of, query_place) = map(decoded, (batch.lower, batch.upper))
        labels, query_labels = batch.lower[1].numpy(), batch.upper[1].numpy()
        assert of.shape == (tasks, 6) and query_of.shape == (tasks, 12)
        for task in range(tasks):
            assert sorted(set(labels[task])) == [0, 1, 2]
            meaning = dict(zip(labels[task], of[task], strict=True))
            assert len(set(meaning.values())) == 3
            assert [meaning[n] for n in labels[task]] == of[task].tolist()
            assert [meaning[n] for n in query_labels[task]] == query_of[task].tolist()
            used = [*zip(of[task], place[task], strict=True)]
            used += zip(query_of[task], query_place[task], strict=True)
            assert len(set(used)) == 3 * (2 + 4)
            assert all(p < SIZES[c] for c, p in used)
        # Three tasks of three classes are apart; of five, the first three.
        seen = [set(of[task]) for task in range(3)]
        assert len(set.union(*seen)) == 9
        repeated += [of[t].tolist() == of[t - 3].tolist() for t in range(3, tasks)]
    assert not any(repeated)  # the next three are drawn anew


def test_meta_batches_depend_on_seed_and_number_alone():
    def draws(first, count, seed=4):
        dataset = episodes(collection(), 4, 1, 3, 2, seed, first)
        return [batch.upper[0].numpy() for batch in dataset.take(count)]

    whole = draws(0, 5)
    np.testing.assert_array_equal(whole[3:], draws(3, 2))
    assert any((a != b).any() for a, b in zip(whole, draws(0, 5, seed=5), strict=True))
    assert (whole[0] != whole[1]).any()


def test_every_class_and_image_is_drawn_equally_often():
    dataset = episodes(collection(), 2, 1, 1, 5, 0)
    classes, places = [], []
    for batch in dataset.take(400):
        of, place = decoded(batch.lower)
        classes += of.ravel().tolist()
        places += place[of == 7].tolist()
    counts = np.bincount(classes, minlength=10)
    assert counts.min() == counts.max() == 400  # five pairs are all ten classes
    counts = np.bincount(places, minlength=10)
    assert counts.min() > 15 and len(counts) == 10


@pytest.mark.parametrize(
    "numbers, message",
    [
        ((11, 1, 1, 1), "--ways must not exceed the 10 classes"),
        ((5, 5, 2, 1), "5 \\+ 2 where class 0 has 6 images"),
        ((5, 0, 2, 1), "must be at least 1"),
    ],
)
def test_more_than_there_is(numbers, message):
    with pytest.raises(ValueError, match=message):
        episodes(collection(), *numbers, seed=0)
