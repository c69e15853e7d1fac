"""Omniglot's characters as classes, 28 x 28, read through tensorflow-datasets.

    python data_prep/omniglot.py --data-dir FOLDER --out omniglot.npz

1,623 characters with 20 drawings each, bright strokes on a dark ground. `--split
vinyals` is the published split with 1,028 / 172 / 423 characters: five alphabets of the
background set for validation, the last 423 characters of the evaluation set for
testing. `--split sorted`: all characters sorted by name, the first 1,200 for training
(the last 100 of these for validation) and 423 for testing. Rotations are added as
separate classes when tasks are sampled. A folder with the unpacked `images_background`
and `images_evaluation` is accepted too.
"""

import functools
import pathlib
import sys

import numpy as np
import tensorflow as tf

if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from data_prep.classes import (
    Classes,
    grouped,
    joined,
    parser,
    prepare,
    require_apart,
    select,
)
from data_prep.images import load_named

SIDE = 28
FOLDERS = {"train": "images_background", "test": "images_evaluation"}
RULES = ("vinyals", "sorted")
VALIDATION = ("Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)")
TEST_COUNT, SORTED_VALIDATION = 423, 100


def load(
    data_dir: pathlib.Path | None = None,
    rule: str = "vinyals",
    download: bool | None = None,
) -> dict[str, Classes]:
    """The three splits, uint8 [n, 28, 28, 1].

    Raises:
        FileNotFoundError: if the prepared dataset is missing.
        ValueError: for an unknown rule.
    """
    if rule not in RULES:
        raise ValueError(f"`rule` must be one of {RULES}. Received: rule={rule!r}")
    background, evaluation = (
        characters(file, data_dir, download) for file in ("train", "test")
    )
    return divide(background, evaluation, rule)


def characters(
    file: str, data_dir: pathlib.Path | None, download: bool | None = None
) -> Classes:
    """One of the two published sets: names are alphabet/number, sorted."""
    if data_dir is not None and (data_dir / FOLDERS["train"]).is_dir():
        return drawings(data_dir / FOLDERS[file])
    data, names = load_named("omniglot", file, data_dir, download)
    numbers = data["alphabet"].astype(int) * 1000 + data["alphabet_char_id"]
    labels = {
        int(number): f"{names['alphabet'][number // 1000]}/{number % 1000:02d}"
        for number in np.unique(numbers)
    }
    made = grouped(shrunk(data["image"]), numbers, labels)
    return select(made, np.argsort(made.names).tolist())


def drawings(folder: pathlib.Path) -> Classes:
    """The drawings in an unpacked folder, alphabet/character01/0001_01.png."""
    files = sorted(folder.glob("*/character*/*.png"))
    if not files:
        raise FileNotFoundError(
            f"{folder} has no alphabet/character01/0001_01.png. Unpack the published "
            "images_background.zip and images_evaluation.zip beside each other"
        )
    names = [f"{p.parts[-3]}/{p.parts[-2].removeprefix('character')}" for p in files]
    known, labels = np.unique(names, return_inverse=True)
    images = []
    for path in files:
        try:
            image = tf.io.decode_png(path.read_bytes(), channels=1).numpy()
        except tf.errors.InvalidArgumentError:
            raise ValueError(f"{path} is not a PNG file, or damaged") from None
        if image.shape != (105, 105, 1):
            raise ValueError(f"{path} must be 105 x 105. Received: {image.shape[:2]}")
        images.append(image)
    return grouped(shrunk(np.stack(images)), labels, known.tolist())


def shrunk(images: np.ndarray) -> np.ndarray:
    """Converts 105 x 105, dark on light, to 28 x 28, light on dark, in batches."""
    parts = []
    for start in range(0, len(images), 1000):
        grey = tf.cast(images[start : start + 1000, :, :, :1], tf.float32)
        small = tf.image.resize(grey, [SIDE, SIDE], "area")
        parts.append(tf.cast(tf.round(255 - small), tf.uint8).numpy())
    return np.concatenate(parts)


def divide(background: Classes, evaluation: Classes, rule: str) -> dict[str, Classes]:
    """The splits, from the two published sets, each of which is sorted by name."""
    least = {"background": SORTED_VALIDATION + 1, "evaluation": TEST_COUNT + 1}
    found = {"background": background.names, "evaluation": evaluation.names}
    for file, count in least.items():
        if len(found[file]) < count:
            raise ValueError(
                f"the {file} set of Omniglot is not whole: its characters must be at "
                f"least {count}. Received: {len(found[file])}"
            )
    if rule == "sorted":
        every = joined([background, evaluation])
        order = np.argsort(every.names).tolist()
        train, test = order[:-TEST_COUNT], order[-TEST_COUNT:]
        cut = len(train) - SORTED_VALIDATION
        places = {"train": train[:cut], "validation": train[cut:], "test": test}
        splits = {split: select(every, some) for split, some in places.items()}
        return require_apart(splits)
    held = [
        number
        for number, name in enumerate(background.names)
        if name.rpartition("/")[0] in VALIDATION
    ]
    rest = sorted(set(range(len(background.names))) - set(held))
    last = len(evaluation.names) - TEST_COUNT
    return require_apart(
        {
            "train": joined(
                [select(background, rest), select(evaluation, range(last))]
            ),
            "validation": select(background, held),
            "test": select(evaluation, range(last, len(evaluation.names))),
        }
    )


def main(argv: list[str] | None = None) -> dict[str, int]:
    flags = parser(__doc__, download=True)
    flags.add_argument("--split", choices=RULES, default="vinyals")
    args = flags.parse_args(argv)
    read = functools.partial(load, args.data_dir, args.split, args.download)
    return prepare(__file__, args.out, "omniglot", read)


if __name__ == "__main__":
    main()
