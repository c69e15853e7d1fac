"""cleanlab 2 as a baseline for detecting wrong labels.

    .venv-bench/bin/python benchmarks/cleanlab_baseline.py predictions.npz
    .venv-bench/bin/python benchmarks/cleanlab_baseline.py predictions.npz \\
        --out kept.npz

The file has three arrays: `labels` (n given labels, some wrong), `probabilities`
(n x classes, from a model that was not trained on these labels) and `clean` (n, 1 if
the label is the original one). Prints one JSON line with precision, recall and F1 in
percent and the seconds that cleanlab took. A label counts as kept if cleanlab, with
default settings, does not flag it. The positive class is clean, as for the published
F1. `--out` writes the kept labels, on which
`experiments/data_hyper_cleaning.py --method kept+val --kept kept.npz` trains.
"""

import argparse
import json
import pathlib
import sys
import time
import zipfile

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from data_prep import label_noise  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, help=".npz with labels and kept")
    arguments = parser.parse_args(argv)
    try:
        with np.load(arguments.file) as arrays:
            labels = arrays["labels"].astype("int64").reshape(-1)
            probabilities = arrays["probabilities"].astype("float64")
            clean = arrays["clean"].astype(bool).reshape(-1)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        parser.error(
            f"{arguments.file} must be an .npz with the arrays labels, probabilities "
            f"and clean ({error})"
        )
    if probabilities.ndim != 2 or not len(labels) == len(clean) == len(probabilities):
        parser.error(
            "labels and clean must have one entry per row of probabilities. Received "
            f"shapes {labels.shape}, {clean.shape}, {probabilities.shape}"
        )
    kept, seconds, version = find(labels, probabilities)
    if arguments.out is not None:
        np.savez_compressed(arguments.out, labels=labels, kept=kept)
    summary = {"kept": int(kept.sum()), "seconds": seconds, "cleanlab": version}
    print(json.dumps(label_noise.cleaning_scores(kept, clean) | summary))
    return 0


def find(
    labels: np.ndarray, probabilities: np.ndarray
) -> tuple[np.ndarray, float, str]:
    """The labels that cleanlab keeps, the seconds it took, and its version."""
    try:
        import cleanlab
        from cleanlab.filter import find_label_issues
    except ImportError:
        raise SystemExit(
            "error: cleanlab is not installed here. Run this with "
            ".venv-bench/bin/python, which `make bench-env` creates."
        ) from None
    # A model's float32 rows sum to one only approximately; cleanlab checks the sums.
    probabilities = probabilities / probabilities.sum(axis=1, keepdims=True)
    start = time.perf_counter()
    flagged = find_label_issues(labels=labels, pred_probs=probabilities)
    seconds = time.perf_counter() - start
    return ~np.asarray(flagged, bool), seconds, cleanlab.__version__


if __name__ == "__main__":
    sys.exit(main())
