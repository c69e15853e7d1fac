"""`tfbilevel clean` as a user runs it: from an empty folder to the report.

    python benchmarks/command_line.py --out runs/bench-command-line --screenshot

Three inputs from real data, 40 percent of whose labels are wrong (another class, each
as likely): a CSV file of 10,000 FashionMNIST images, averaged to 49 columns of numbers,
with a column of strings; a folder of 2,000 FashionMNIST images as PNG files; a CSV file
of 5,000 texts of 20 Newsgroups. 200 trusted examples go with the first two, 500 with
the texts. The command runs as a process of its own, with its default settings, and its
seconds are those of the whole process. TFDS_DATA_DIR is the folder of
tensorflow-datasets, SCIKIT_LEARN_DATA that of scikit-learn.

Writes command_line.json: of each input the seconds, the share of given and of corrected
labels that are right, and the accuracy on held-out trusted examples that the command
measured. With --screenshot also pictures of the three reports, by headless Chromium.
"""

import argparse
import csv
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data_prep import images, label_noise  # noqa: E402

BLOCK = 4  # pixels a side that are averaged to one column


class Labels(NamedTuple):
    """Class names of all examples; the first `trusted` ones are right in `given`."""

    right: np.ndarray
    given: np.ndarray
    trusted: int


class Made(NamedTuple):
    """An input.

    Attributes:
        arguments: of the command.
        labels: those of its examples.
        corrected: folder of results -> (numbers of examples, their labels now).
    """

    arguments: list[str]
    labels: Labels
    corrected: Callable[[pathlib.Path], tuple[np.ndarray, np.ndarray]]


def labels_of(right: np.ndarray, trusted: int, wrong: float, seed: int) -> Labels:
    generator = np.random.default_rng(seed)
    count = len(np.unique(right))
    noisy, _ = label_noise.pollute(right[trusted:], wrong, generator, "strict", count)
    return Labels(right, np.concatenate([right[:trusted], noisy]), trusted)


def sample(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Random rows; those that come first, the trusted ones, have every class."""
    rows = np.random.default_rng(seed).permutation(len(labels))[:count]
    _, firsts = np.unique(labels[rows], return_index=True)
    rest = np.setdiff1d(np.arange(len(rows)), firsts)
    return rows[np.concatenate([firsts, rest])]


def fashion(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Some images, and the names of their classes."""
    data, names = images.load_named("fashion_mnist", "train")
    rows = sample(data["label"], count, seed)
    # A folder's name must have no slash.
    names = np.array([name.replace("/", " or ") for name in names["label"]])
    return data["image"][rows][..., 0], names[data["label"][rows]]


def write_table(path: pathlib.Path, columns: Mapping[str, Iterable]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def write_tables(
    folder: pathlib.Path, columns: Mapping[str, Any], label: str, labels: Labels
) -> Callable[[pathlib.Path], tuple[np.ndarray, np.ndarray]]:
    """trusted.csv and data.csv; returns how the corrected labels are read."""
    trusted = labels.trusted
    for name, rows in ("trusted", slice(trusted)), ("data", slice(trusted, None)):
        part = {k: v[rows] for k, v in columns.items()} | {label: labels.given[rows]}
        write_table(folder / f"{name}.csv", part)

    def corrected(results: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
        found = read_column(results / "cleaned.csv", label)
        return np.arange(trusted, trusted + len(found)), found

    return corrected


def read_column(path: pathlib.Path, name: str) -> np.ndarray:
    with open(path, newline="", encoding="utf-8") as file:
        return np.array([row[name] for row in csv.DictReader(file)])


def table(folder: pathlib.Path, count: int, trusted: int, wrong: float, seed: int):
    """Images as rows of numbers, beside a column of three strings."""
    pixels, right = fashion(count + trusted, seed)
    side = pixels.shape[1] // BLOCK
    blocks = pixels.reshape(-1, side, BLOCK, side, BLOCK).mean(axis=(2, 4))
    means = pixels.mean(axis=(1, 2))
    shade = np.digitize(means, np.quantile(means, [1 / 3, 2 / 3]))
    rows = blocks.reshape(len(blocks), -1).round(1)
    columns = {f"grey_{i // side}_{i % side}": rows[:, i] for i in range(side**2)}
    columns["shade"] = np.array(["dark", "middle", "bright"])[shade]
    labels = labels_of(right, trusted, wrong, seed)
    corrected = write_tables(folder, columns, "kind", labels)
    options = ["data.csv", "--label", "kind", "--trusted", "trusted.csv"]
    return Made(options, labels, corrected)


def pictures(folder: pathlib.Path, count: int, trusted: int, wrong: float, seed: int):
    """PNG files in folders named like the given labels."""
    from PIL import Image

    pixels, right = fashion(count + trusted, seed)
    labels = labels_of(right, trusted, wrong, seed)
    for number, (picture, label) in enumerate(zip(pixels, labels.given, strict=True)):
        place = folder / ("trusted" if number < trusted else "data") / label
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(place / f"{number:05d}.png")

    def corrected(results: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
        files = read_column(results / "cleaned.csv", "file")
        numbers = [int(pathlib.Path(file).stem) for file in files]
        return np.array(numbers), read_column(results / "cleaned.csv", "label")

    return Made(["data", "--trusted", "trusted"], labels, corrected)


def texts(folder: pathlib.Path, count: int, trusted: int, wrong: float, seed: int):
    """Articles with the names of their newsgroups."""
    from sklearn.datasets import fetch_20newsgroups

    data: Any = fetch_20newsgroups(
        subset="train", data_home=os.environ["SCIKIT_LEARN_DATA"],
        download_if_missing=False,
    )  # fmt: skip
    rows = sample(data.target, count + trusted, seed)
    names = np.array(data.target_names)[data.target[rows]]
    labels = labels_of(names, trusted, wrong, seed)
    columns = {"article": [data.data[row] for row in rows]}
    corrected = write_tables(folder, columns, "group", labels)
    options = ["--label", "group", "--text", "article", "--trusted", "trusted.csv"]
    return Made(["data.csv", *options], labels, corrected)


# Its maker, and how many doubtful and trusted examples it has.
INPUTS = {
    "table": (table, 10_000, 200),
    "pictures": (pictures, 2_000, 200),
    "texts": (texts, 5_000, 500),
}


def measured(folder: pathlib.Path, made: Made, epochs: int | None) -> dict[str, Any]:
    """Runs the command in a folder that has the input and nothing else."""
    command = ["-m", "tfbilevel", "clean", *made.arguments, "--out", "report"]
    command += [] if epochs is None else ["--epochs", str(epochs)]
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    seconds = time.perf_counter() - start
    summary = json.loads((folder / "report" / "summary.json").read_text())
    numbers, now = made.corrected(folder / "report")
    right, given, trusted = made.labels
    return {
        "command": summary["command"],
        "examples": len(now),
        "trusted": trusted,
        "seconds": seconds,
        "right_before": float(np.mean(given[numbers] == right[numbers])),
        "right_after": float(np.mean(now == right[numbers])),
        "issues": summary["issues"],
        "accuracy": summary["accuracy"],
        "noise_model": summary["noise_model"],
        "versions": summary["versions"],
    }


def screenshot(page: pathlib.Path, picture: pathlib.Path, height: int) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        raise SystemExit("error: no Chromium: on Debian `apt-get install chromium`")
    subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--virtual-time-budget=5000",
            f"--user-data-dir={picture.parent / 'profile'}",
            f"--window-size=1100,{height}",
            f"--screenshot={picture}",
            page.resolve().as_uri(),
        ],
        check=True,
        stderr=subprocess.DEVNULL,
    )
    shutil.rmtree(picture.parent / "profile", ignore_errors=True)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--inputs", default=",".join(INPUTS), help="A,B of them")
    parser.add_argument("--share", type=float, default=1.0, help="of all sizes")
    parser.add_argument("--epochs", type=int, help="for a quick look; else the default")
    parser.add_argument("--wrong", type=float, default=0.4, help="share of the labels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--screenshot", action="store_true")
    parser.add_argument("--height", type=int, default=3600, help="of a picture")
    args = parser.parse_args(argv)
    out = args.out.resolve()
    results = {}
    for name in args.inputs.split(","):
        make, *sizes = INPUTS[name]
        folder = out / name
        folder.mkdir(parents=True)  # a folder that is there is an error
        count, trusted = (max(20, round(args.share * size)) for size in sizes)
        made = make(folder, count, trusted, args.wrong, args.seed)
        results[name] = found = measured(folder, made, args.epochs)
        print(
            f"{name:10}{found['examples']:8,} examples{found['seconds']:8.0f} s"
            f"{100 * found['right_before']:8.1f} percent of labels right before,"
            f"{100 * found['right_after']:6.1f} after",
            flush=True,
        )
        if args.screenshot:
            page = folder / "report" / "report.html"
            screenshot(page, out / f"{name}.png", args.height)
        (out / "command_line.json").write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
