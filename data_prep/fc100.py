"""FC100 and CIFAR-FS: two few-shot splits of CIFAR-100, from tensorflow-datasets.

    python data_prep/fc100.py --data-dir FOLDER --out fc100.npz

FC100 (Oreshkin et al. 2018) keeps super-classes together: 60, 20 and 20 classes.
CIFAR-FS (Bertinetto et al. 2019) mixes them: 64, 16 and 20. Every class has 600 images,
from the training and the test file. A folder with the published pickles,
`FC100_{train,val,test}.pickle` or `CIFAR_FS_{train,val,test}.pickle`, is accepted too.
"""

import functools
import pathlib
import sys

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from data_prep import layouts
from data_prep.classes import (
    Classes,
    grouped,
    parser,
    prepare,
    require_apart,
    select,
)
from data_prep.images import load_named

# Super-classes; the other twelve are for training.
FC100 = {
    "validation": (
        "large_carnivores",
        "large_omnivores_and_herbivores",
        "non-insect_invertebrates",
        "small_mammals",
    ),
    "test": ("aquatic_mammals", "insects", "medium_mammals", "people"),
}
# Classes; the other 64 are for training.
CIFAR_FS = {
    "validation": (
        "beaver otter flatfish shark lamp television beetle butterfly sea camel cattle "
        "crab crocodile maple_tree motorcycle tractor"
    ).split(),
    "test": (
        "whale poppy rose sweet_pepper telephone bed table wardrobe leopard plain "
        "chimpanzee fox snail worm baby man woman bicycle pickup_truck rocket"
    ).split(),
}


def load(
    split: str, data_dir: pathlib.Path | None = None, download: bool | None = None
) -> dict[str, Classes]:
    """The three splits of "fc100" or "cifar_fs", uint8 32 x 32 x 3.

    Raises:
        FileNotFoundError: if CIFAR-100 is not prepared, or a pickle is missing.
        ValueError: if a pickle does not belong to the split.
    """
    layout = layouts.splits(
        {"fc100": "FC100", "cifar_fs": "CIFAR_FS"}[split] + "_{}.pickle"
    )
    if data_dir is not None and (data_dir / layout["train"][0]).exists():
        files = layouts.find(data_dir, [layout], split)
        return require_apart(
            {part: layouts.read(paths, part, split) for part, paths in files.items()}
        )
    names: dict[str, list[str]] = {}
    parts = []
    for file in ("train", "test"):
        data, names = load_named("cifar100", file, data_dir, download)
        parts.append(data)
    images, fine, coarse = (
        np.concatenate([part[key] for part in parts])
        for key in ("image", "label", "coarse_label")
    )
    classes = grouped(images, fine, names["label"])
    above = {
        names["label"][label]: names["coarse_label"][group]
        for label, group in zip(fine.tolist(), coarse.tolist(), strict=True)
    }
    return divide(classes, above, split)


def divide(classes: Classes, above: dict[str, str], split: str) -> dict[str, Classes]:
    """The splits, from all classes and the super-class of each class."""
    wanted = {"fc100": FC100, "cifar_fs": CIFAR_FS}[split]
    found: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for number, name in enumerate(classes.names):
        key = above[name] if split == "fc100" else name
        place = next((s for s, keys in wanted.items() if key in keys), "train")
        found[place].append(number)
    return require_apart({s: select(classes, some) for s, some in found.items()})


def main(argv: list[str] | None = None) -> dict[str, int]:
    flags = parser(__doc__, download=True)
    flags.add_argument("--split", choices=("fc100", "cifar-fs"), default="fc100")
    args = flags.parse_args(argv)
    split = args.split.replace("-", "_")
    read = functools.partial(load, split, args.data_dir, args.download)
    return prepare(__file__, args.out, args.split, read)


if __name__ == "__main__":
    main()
