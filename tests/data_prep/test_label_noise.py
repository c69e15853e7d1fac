"""Labels and masks that are not what they should be: right, or one clear line."""

import numpy as np
import pytest

from data_prep import label_noise

RULES = label_noise.RULES


def polluted(labels, rule="strict", classes=3, rate=0.5):
    before = np.array(labels)
    generator = np.random.default_rng(0)
    noisy, clean = label_noise.pollute(labels, rate, generator, rule, classes)
    assert np.array_equal(np.asarray(labels), before)  # nothing in place
    return noisy, clean


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "dtype", ["int8", "uint8", "int16", "uint32", "int64", "float32"]
)
def test_every_type_of_number_has_the_noise_of_int64(rule, dtype):
    labels = np.arange(120) % 100
    wanted, mask = polluted(labels, rule, 100)
    noisy, clean = polluted(labels.astype(dtype), rule, 100)  # 99 + 99 is beyond int8
    assert noisy.dtype == dtype
    assert np.array_equal(noisy, wanted) and np.array_equal(clean, mask)
    if rule == "strict":
        assert np.array_equal(noisy != labels, ~clean)


@pytest.mark.parametrize(
    "labels",
    [
        np.array(list("abcabcabc")),
        np.array(list("abcabcabc"), object),
        list("abcabcabc"),
        np.array(list("abcabcabc"), "S1"),
        np.array([np.str_(c) for c in "abcabcabc"], object),
        [["cat", "dog", "a longer name"][i % 3] for i in range(9)],
    ],
    ids=["text", "objects", "list", "bytes", "numpy objects", "words"],
)
@pytest.mark.parametrize("rule", RULES)
def test_names_get_the_noise_of_their_numbers(labels, rule):
    names, numbers = np.unique(np.asarray(labels), return_inverse=True)
    wanted, mask = polluted(numbers, rule)
    noisy, clean = polluted(labels, rule)
    assert np.array_equal(noisy, names[wanted]) and np.array_equal(clean, mask)
    assert set(noisy) <= set(np.asarray(labels))
    assert (~clean).sum() == 4


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (np.arange(9) % 3 + 1, "0, ..., 2.*from 1 to 3"),
        (np.array([0, 1, -1]), "from -1 to 1"),
        (np.eye(3, dtype=int)[[0, 1, 2, 0]], r"argmax.*shape \(4, 3\)"),
        (np.zeros((4, 1), int), r"labels\[:, 0\].*shape \(4, 1\)"),
        (np.array([0.0, np.nan, 1.0]), "with NaN"),
        (np.array([0.0, 1.5, 1.0]), "whole numbers.*1.5"),
        (np.array(["a", None, "b"], object), "must all be text.*NoneType"),
        (np.array(["a", 1.0], object), "must all be text.*float"),
        (np.array([b"a", "b"], object), "must all be text.*bytes"),
        (list("abcd"), "at most 3 classes.*4 names"),
        (np.array([1 + 0j]), "must be integers or names"),
        (np.array(["2020-01-01"], "datetime64[D]"), "must be integers or names"),
        (np.array([True, False]), "do not fit into bool"),
    ],
    ids=str,
)
def test_what_are_no_labels_is_one_line(labels, said):
    with pytest.raises(ValueError, match=said) as caught:
        polluted(labels)
    assert "\n" not in str(caught.value) and "label" in str(caught.value)


def test_more_classes_than_the_type_holds():
    with pytest.raises(ValueError, match="300 classes do not fit into uint8"):
        polluted(np.zeros(4, np.uint8), classes=300)
    with pytest.raises(ValueError, match="two classes at least"):
        polluted(np.zeros(4, int), classes=1)


def test_missing_entries_of_lists_and_masked_arrays():
    with pytest.raises(ValueError, match="must all be text.*float"):
        polluted(["a", float("nan"), "b"])
    with pytest.raises(ValueError, match="must not be masked"):
        polluted(np.ma.array([0, 1, 2], mask=[0, 1, 0]))
    with pytest.raises(ValueError, match="nothing is masked"):
        label_noise.mask_of(np.ma.array([0, 1], mask=[0, 1]), "`keep`")
    with pytest.raises(ValueError, match="must be a mask"):
        label_noise.mask_of(None, "`keep`")


class Column:
    """Like a pandas column: with an index, by which `&` would put entries together."""

    def __init__(self, values):
        self.values, self.index = values, list(range(len(values)))[::-1]

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.values, dtype)

    def __and__(self, other):
        raise AssertionError("aligned by the index")


KEEP, CLEAN = [True, True, True, False, False], [True, True, False, True, False]


@pytest.mark.parametrize(
    "form",
    [
        np.array,
        list,
        lambda v: np.array(v, float),
        lambda v: np.array(v, np.uint8),
        lambda v: np.array(v)[:, None],
        lambda v: np.array(v, object),
        lambda v: [int(one) for one in v],
        Column,
    ],
    ids=["array", "list", "floats", "bytes", "column", "objects", "ints", "pandas"],
)
def test_scores_of_masks_in_every_form(form):
    scores = label_noise.cleaning_scores(form(KEEP), form(CLEAN))
    assert scores == pytest.approx(
        dict.fromkeys(("precision", "recall", "f1"), 200 / 3)
    )


NO_MASKS = {
    "scores": np.linspace(0.02, 0.98, 8),
    "text": np.array(["True", "False"] * 4),
    "ranks": np.arange(8)[::-1],
    "NaN": np.array([1, np.nan] * 4),
    "signs": np.array([-1, 1] * 4),
    "percent": np.array([0, 100] * 4),
    "row numbers": np.array([0, 1, 5]),
    "missing": np.array([True, None] * 4, object),
    "one-hot": np.eye(8)[:, :2],
}


@pytest.mark.parametrize("values", NO_MASKS.values(), ids=NO_MASKS.keys())
def test_what_is_no_mask_is_refused(values, tmp_path):
    for keep, clean in ((values, np.ones(8, bool)), (np.ones(8, bool), values)):
        with pytest.raises(ValueError, match="must be a mask|same examples") as caught:
            label_noise.cleaning_scores(keep, clean)
        assert "\n" not in str(caught.value)
    if values.dtype == object or values.shape != (8,):
        return
    path = tmp_path / "kept.npz"
    np.savez(path, labels=np.arange(8) % 3, kept=values)
    with pytest.raises(ValueError, match="`kept` in .* must be a mask"):
        label_noise.load_kept(path, np.arange(8) % 3)


@pytest.mark.parametrize("dtype", [bool, int, "float32", "uint8"])
def test_masks_in_files_keep_what_they_say(tmp_path, dtype):
    path = tmp_path / "kept.npz"
    np.savez(path, labels=np.arange(5) % 3, kept=np.array(KEEP, dtype))
    assert label_noise.load_kept(path, np.arange(5) % 3).tolist() == KEEP


def test_masks_of_other_lengths():
    with pytest.raises(ValueError, match="same examples.*3 and 4"):
        label_noise.cleaning_scores(np.ones(3), np.ones(4))


def test_a_column_of_kept_examples_is_read_and_their_numbers_are_not(tmp_path):
    path, labels = tmp_path / "k.npz", np.array([0, 1, 1, 2])
    np.savez(path, labels=labels, kept=np.array([[True], [False], [True], [True]]))
    assert label_noise.load_kept(path, labels).tolist() == [True, False, True, True]
    np.savez(path, labels=labels, kept=np.array([0, 2, 3]))
    with pytest.raises(ValueError, match="must be a mask"):
        label_noise.load_kept(path, labels)
