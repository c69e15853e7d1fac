"""Label noise, with a mask of the clean labels; labels are never changed in place."""

import pathlib
from typing import Any

import numpy as np

from data_prep.errors import one_line

RULES = ("published", "strict")


def pollute(
    labels: Any,
    rate: float,
    generator: np.random.Generator,
    rule: str = "published",
    classes: int = 10,
) -> tuple[np.ndarray, np.ndarray]:
    """Corrupt the labels of floor(rate * n) examples chosen at random.

    Args:
        labels: one per example, [n]: integers in [0, classes), or names of at most
            `classes` classes, each of which must occur.
        rate: share of examples chosen, in [0, 1).
        generator: source of randomness.
        rule: "published": a chosen label is sampled from all classes, so one in
            `classes` keeps its value although it counts as polluted (published
            hyper-cleaning tables use this rule). "strict": always another class.
        classes: number of classes; for names, the largest number allowed.

    Returns:
        The new labels, of the given type, and a boolean mask that is False for every
        chosen example.

    Raises:
        ValueError: if `rate` or `rule` is out of range, or the labels are not labels
            of `classes` classes.
    """
    if not 0 <= rate < 1:
        raise ValueError(
            f"the pollution rate must be at least 0 and below 1. Received: rate={rate}"
        )
    if rule not in RULES:
        raise ValueError(f"`rule` must be one of {RULES}. Received: rule={rule!r}")
    given = np.asarray(labels)
    if np.ma.is_masked(labels):
        raise ValueError("labels must not be masked. Take labels.compressed()")
    if given.dtype.kind in "SU" and not isinstance(labels, np.ndarray):
        given = np.asarray(labels, object)  # otherwise NaN in a list becomes "nan"
    if given.ndim != 1:
        raise ValueError(
            "there must be one label per example, [n]. Take labels.argmax(axis=1) of "
            "one-hot ones, labels[:, 0] of a column. Received: labels of shape "
            f"{given.shape}"
        )
    if given.dtype.kind in "OSU":
        return _polluted_names(given, rate, generator, rule, classes)
    numbers = _numbers(given, classes)
    if rule == "strict" and classes < 2:
        raise ValueError(
            "there must be two classes at least for a label to become another one. "
            f"Received: classes={classes}"
        )
    count = int(np.floor(rate * len(numbers)))
    chosen = generator.permutation(len(numbers))[:count]
    polluted, clean = numbers.copy(), np.ones(len(numbers), bool)
    clean[chosen] = False
    if rule == "published":
        polluted[chosen] = generator.integers(0, classes, count)
    else:
        shift = generator.integers(1, classes, count)
        polluted[chosen] = (numbers[chosen] + shift) % classes
    return polluted.astype(given.dtype), clean


def _polluted_names(
    given: np.ndarray,
    rate: float,
    generator: np.random.Generator,
    rule: str,
    classes: int,
) -> tuple[np.ndarray, np.ndarray]:
    """`pollute` for names of classes."""
    kinds = {type(name) for name in given.tolist()}
    if not any(all(issubclass(kind, text) for kind in kinds) for text in (str, bytes)):
        raise ValueError(
            "labels that are names must all be text. Replace what is missing. "
            f"Received: labels of the types {sorted(kind.__name__ for kind in kinds)}"
        )
    names, numbers = np.unique(given, return_inverse=True)
    if len(names) > classes:
        raise ValueError(
            f"there must be at most {classes} classes. Pass classes={len(names)} if "
            f"every name is a class. Received: labels of {len(names)} names"
        )
    polluted, clean = pollute(numbers, rate, generator, rule, len(names))
    return names[polluted], clean


def _numbers(given: np.ndarray, classes: int) -> np.ndarray:
    """Integer labels as int64, in which no sum of two labels overflows."""
    if given.dtype.kind not in "biuf" or not np.isfinite(given).all():
        raise ValueError(
            "labels must be integers or names of classes. Replace missing ones. "
            f"Received: labels of type {given.dtype}"
            + (" with NaN or infinity" if given.dtype.kind == "f" else "")
        )
    numbers = given.astype(np.int64)
    if (numbers != given).any():
        raise ValueError(
            "labels must be whole numbers. Received: labels such as "
            f"{given[numbers != given][0]}"
        )
    if numbers.size and not 0 <= numbers.min() <= numbers.max() < classes:
        raise ValueError(
            f"labels must lie in 0, ..., {classes - 1}. Number the classes from 0, or "
            "pass another `classes`. Received: labels from "
            f"{numbers.min()} to {numbers.max()}"
        )
    if (np.arange(classes).astype(given.dtype) != np.arange(classes)).any():
        raise ValueError(
            f"labels of {classes} classes do not fit into {given.dtype}. Convert them "
            "with labels.astype(int)"
        )
    return numbers


def mask_of(values: Any, name: str) -> np.ndarray:
    """A boolean mask of examples, [n], from values True and False, or 1 and 0.

    Args:
        values: [n] or [n, 1]; an array, a list, or a pandas object (whose index is
            ignored: entries are matched by position).
        name: the name used in errors.

    Raises:
        ValueError: for anything else, such as scores, ranks, text, NaN, -1 and +1.
    """
    found = np.asarray(values)
    if np.ma.is_masked(values):
        raise ValueError(f"{name} must be a mask of which nothing is masked itself")
    if found.ndim == 2 and found.shape[1] == 1:
        found = found[:, 0]
    if (
        found.dtype == object
        and found.ndim
        and all(isinstance(v, (bool, np.bool_)) for v in found)
    ):
        found = found.astype(bool)
    plain = found.ndim == 1 and found.dtype.kind in "biuf"
    if not plain or not np.isin(found, (0, 1)).all():
        seen = np.unique(found)[:3].tolist() if found.dtype.kind in "biuf" else []
        raise ValueError(
            f"{name} must be a mask: one True or False, or 1 or 0, per example. "
            "Compare scores with a threshold first. Received: shape "
            f"{found.shape}, type {found.dtype}, values such as {seen}"
        )
    return found.astype(bool)


def cleaning_scores(keep: Any, clean: Any) -> dict[str, float]:
    """Precision, recall and F1 of keeping the clean examples, in percent.

    Args:
        keep: a mask of the examples kept, see `mask_of`.
        clean: a mask of the examples whose labels are right.

    Raises:
        ValueError: if one of them is not a mask, or their lengths differ.
    """
    keep, clean = mask_of(keep, "`keep`"), mask_of(clean, "`clean`")
    if keep.shape != clean.shape:
        raise ValueError(
            "`keep` and `clean` must be of the same examples. Received: "
            f"{len(keep)} and {len(clean)} of them"
        )
    hits = float(np.sum(keep & clean))
    precision = hits / max(float(np.sum(keep)), 1e-8)
    recall = hits / max(float(np.sum(clean)), 1e-8)
    f1 = 2 * precision * recall / max(precision + recall, 1e-8)
    return {"precision": 100 * precision, "recall": 100 * recall, "f1": 100 * f1}


def load_kept(path: pathlib.Path, labels: np.ndarray) -> np.ndarray:
    """The mask of the examples that a file keeps.

    Args:
        path: an .npz with `labels` and `kept`, one entry per example, as written by
            cleaning runs and `benchmarks/cleanlab_baseline.py`.
        labels: the given labels of the expected examples, [n].

    Returns:
        A boolean mask, [n].

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is a different file, has other labels, or `kept` is not a
            mask.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with path.open("rb") as opened, np.load(opened) as file:
            of, kept = file["labels"], file["kept"]
    except Exception as error:  # noqa: BLE001  (NumPy raises what zip and zlib find)
        raise ValueError(
            f"{path} is damaged, or has no arrays `labels` and `kept` "
            f"({one_line(error)})"
        ) from None
    kept = mask_of(kept, f"`kept` in {path}")
    if not np.array_equal(of, labels) or kept.shape != labels.shape:
        raise ValueError(
            f"{path} is of other examples: its labels are not those of this run. Give "
            "the seed, the data set, its sizes and the pollution of the run it is from"
        )
    return kept
