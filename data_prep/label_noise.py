"""Label noise with the mask returned; labels are never changed in place."""

import pathlib

import numpy as np

RULES = ("published", "strict")


def pollute(
    labels: np.ndarray,
    rate: float,
    generator: np.random.Generator,
    rule: str = "published",
    classes: int = 10,
) -> tuple[np.ndarray, np.ndarray]:
    """Corrupt the labels of floor(rate * n) examples chosen at random.

    Args:
        labels: integers in [0, classes), [n].
        rate: share of examples chosen, in [0, 1).
        generator: source of randomness.
        rule: "published": a chosen label is redrawn from all classes, so one in
            `classes` keeps its value although it counts as polluted (hyper-cleaning
            tables depend on it). "strict": always another class.
        classes: number of classes.

    Returns:
        The new labels, and a boolean mask that is False at every chosen example.

    Raises:
        ValueError: if `rate` or `rule` is out of range.
    """
    if not 0 <= rate < 1:
        raise ValueError(
            f"the pollution rate must be at least 0 and below 1. Received: rate={rate}"
        )
    if rule not in RULES:
        raise ValueError(f"`rule` must be one of {RULES}. Received: rule={rule!r}")
    count = int(np.floor(rate * len(labels)))
    chosen = generator.permutation(len(labels))[:count]
    polluted, clean = labels.copy(), np.ones(len(labels), bool)
    clean[chosen] = False
    if rule == "published":
        polluted[chosen] = generator.integers(0, classes, count)
    else:
        shift = generator.integers(1, classes, count)
        polluted[chosen] = (labels[chosen] + shift) % classes
    return polluted, clean


def cleaning_scores(keep: np.ndarray, clean: np.ndarray) -> dict[str, float]:
    """Precision, recall and F1 of keeping the clean examples, in percent."""
    hits = float(np.sum(keep & clean))
    precision = hits / max(float(np.sum(keep)), 1e-8)
    recall = hits / max(float(np.sum(clean)), 1e-8)
    f1 = 2 * precision * recall / max(precision + recall, 1e-8)
    return {"precision": 100 * precision, "recall": 100 * recall, "f1": 100 * f1}


def load_kept(path: pathlib.Path, labels: np.ndarray) -> np.ndarray:
    """Which examples a file keeps.

    Args:
        path: an .npz with `labels` and `kept`, one entry per example, as cleaning runs
            and `benchmarks/cleanlab_baseline.py` write it.
        labels: the given labels of the examples meant, [n].

    Returns:
        A boolean mask, [n].

    Raises:
        FileNotFoundError: if the file is not there.
        ValueError: if it is another file, or of examples with other labels.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with path.open("rb") as opened, np.load(opened) as file:
            of, kept = file["labels"], file["kept"]
    except Exception as error:  # noqa: BLE001  (NumPy raises what zip and zlib find)
        raise ValueError(
            f"{path} is damaged, or has no arrays `labels` and `kept` ({error})"
        ) from None
    if not np.array_equal(of, labels) or kept.shape != labels.shape:
        raise ValueError(
            f"{path} is of other examples: its labels are not those of this run. Give "
            "the seed, the data set, its sizes and the pollution of the run it is from"
        )
    return kept.astype(bool)
