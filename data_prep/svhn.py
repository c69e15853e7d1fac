"""Converts SVHN's cropped digits from the published .mat files to one HDF5 file.

    python data_prep/svhn.py --data-dir DIR --out svhn.h5

DIR contains `train_32x32.mat` and `test_32x32.mat` (format 2), as published or saved
again as MATLAB 7.3. --seed selects 100 training digits of each class as validation
data: 72,257 / 1,000 / 26,032 images, uint8, 32 x 32 x 3, with integer labels (the
published label 10 is the digit 0). The HDF5 file stores the seed and the numbers of the
validation digits. A killed run continues when it is started again.
"""

import argparse
import pathlib
import sys
import zlib
from typing import Any, NamedTuple

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from data_prep import hdf5, idx
from data_prep.command_line import one_line_errors, positive, seed
from data_prep.errors import one_line
from data_prep.images import Part

KIND = "tfbilevel svhn 1"
TOOL = "python data_prep/svhn.py --data-dir DIR --out FILE"
COUNTS = {"train": 73_257, "test": 26_032}
PARTS = ("train", "validation", "test")
GREY = (0.2989, 0.5870, 0.1140)
PIECE = 2000


class Digits(NamedTuple):
    """A .mat file: images [32, 32, 3, n] uint8, labels [n] in 0, ..., 9."""

    images: np.ndarray
    labels: np.ndarray


def read_mat(path: pathlib.Path, count: int | None) -> Digits:
    """One published file, checked.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is not SVHN's, is truncated or has another number of digits.
    """
    import h5py
    import scipy.io

    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist. Download the cropped digits (format 2) from "
            "http://ufldl.stanford.edu/housenumbers and point --data-dir at them"
        )
    try:
        content: dict[str, Any] = (
            _read_mat_73(path) if h5py.is_hdf5(path) else scipy.io.loadmat(path)
        )
    except Exception as error:  # noqa: BLE001  (SciPy and zlib raise many kinds)
        raise ValueError(
            f"{path} cannot be read: it is cut short or not a MATLAB file "
            f"({one_line(error)}). Download it again"
        ) from None
    images, labels = content.get("X"), content.get("y")
    if (
        images is None
        or labels is None
        or images.ndim != 4
        or images.shape[:3] != (32, 32, 3)
        or images.dtype != np.uint8
        or labels.size != images.shape[3]
        or not np.isin(labels, np.arange(1, 11)).all()
    ):
        found = {k: getattr(v, "shape", v) for k, v in content.items() if k[0] != "_"}
        raise ValueError(
            f"{path} is not a file of cropped digits: it must hold X, uint8 "
            f"[32, 32, 3, n], and y, n labels from 1 to 10. Received: {found}"
        )
    if count is not None and labels.size != count:
        raise ValueError(
            f"{path} must hold {count} digits. Download it again, or pass --any-size "
            f"for a sample. Received: {labels.size}"
        )
    return Digits(images, (labels.ravel() % 10).astype(np.int64))


def _read_mat_73(path: pathlib.Path) -> dict[str, Any]:
    """A file saved by MATLAB as version 7.3, which is HDF5 with reversed axes.

    Raises:
        ValueError: if its arrays are in another file, which HDF5 would open, or larger
            than this file can contain, which would fill the memory.
    """
    import h5py

    found = {}
    with h5py.File(path) as file:
        for name in ("X", "y"):
            link = file.get(name, getlink=True)
            if link is not None and not isinstance(link, h5py.HardLink):
                raise ValueError(f"{name} is a link to somewhere else")
            entry = file.get(name)
            if not isinstance(entry, h5py.Dataset):
                continue
            if entry.external or entry.is_virtual:
                raise ValueError(f"{name} lies in another file")
            if entry.nbytes > idx.PACKED * path.stat().st_size:
                raise ValueError(f"{name} says {entry.shape}, and is not there")
            found[name] = entry[()].T
    return found


def checksum(digits: Digits) -> int:
    """The checksum of all pixels and labels."""
    images = np.ascontiguousarray(digits.images.T)  # no copy, as MATLAB is column-major
    return zlib.crc32(digits.labels.tobytes(), zlib.crc32(images.data))


def draw_validation(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """The sorted numbers of the validation digits, `per_class` of each class."""
    generator = np.random.default_rng(seed)
    chosen = []
    for digit in range(10):
        own = np.flatnonzero(labels == digit)
        if len(own) < per_class:
            raise ValueError(
                f"--validation-per-class must not exceed the digits of a class, got "
                f"{per_class} where there are {len(own)} of the digit {digit}"
            )
        chosen.append(generator.choice(own, per_class, replace=False))
    return np.sort(np.concatenate(chosen))


def prepare(
    mat_dir: pathlib.Path,
    out: pathlib.Path,
    validation_per_class: int = 100,
    seed: int = 0,
    any_size: bool = False,
) -> dict[str, int]:
    """Write the HDF5 file; returns the number of images of each part."""
    train, test = (
        read_mat(mat_dir / f"{name}_32x32.mat", None if any_size else COUNTS[name])
        for name in ("train", "test")
    )
    validation = draw_validation(train.labels, validation_per_class, seed)
    kept = np.setdiff1d(np.arange(len(train.labels)), validation)
    sources = {
        "train": (train, kept),
        "validation": (train, validation),
        "test": (test, np.arange(len(test.labels))),
    }
    counts = {part: len(numbers) for part, (_, numbers) in sources.items()}
    shapes: dict[str, Any] = {"validation_indices": (validation.shape, np.int64)}
    for part, count in counts.items():
        shapes[f"{part}_images"] = (count, 32, 32, 3), np.uint8
        shapes[f"{part}_labels"] = (count,), np.int64
    made_from = {
        "seed": seed,
        "validation_per_class": validation_per_class,
        **counts,
        "checksums": [checksum(part) for part in (train, test)],
    }
    writer = hdf5.Writer(out, KIND, made_from, shapes)
    try:
        for part, ((images, labels), order) in sources.items():
            name = f"{part}_images"
            where = hdf5.slices(writer.filled(name), counts[part], PIECE)
            pieces = (
                images[..., order[piece]].transpose(3, 0, 1, 2) for piece in where
            )
            writer.fill(name, hdf5.with_bar(pieces, where, counts[part]))
            done = writer.filled(f"{part}_labels")
            writer.fill(f"{part}_labels", [labels[order[done:]]])
        done = writer.filled("validation_indices")
        writer.fill("validation_indices", [validation[done:]])
        writer.finish(seed=seed)
    except BaseException:
        writer.close()
        raise
    return counts


def load(path: pathlib.Path, grey: bool = True) -> dict[str, Part]:
    """The three parts, images in [0, 1], float32, with one channel if `grey`."""
    names = [f"{part}_{what}" for part in PARTS for what in ("images", "labels")]
    arrays = hdf5.read_complete(path, KIND, TOOL, names)
    parts = {}
    for part in PARTS:
        images = arrays.pop(f"{part}_images").astype(np.float32) / 255
        if grey:
            images = images @ np.array(GREY, np.float32)[:, None]
        parts[part] = Part(images, arrays[f"{part}_labels"].astype(np.int32))
    return parts


def main(argv: list[str] | None = None) -> dict[str, int]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data-dir", "--mat-dir", type=pathlib.Path, required=True, help="of both .mat"
    )
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--validation-per-class", type=positive(int), default=100)
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument(
        "--any-size", action="store_true", help="accept files with fewer digits"
    )
    args = parser.parse_args(argv)
    with one_line_errors(__file__):
        counts = prepare(
            args.data_dir, args.out, args.validation_per_class, args.seed, args.any_size
        )
    sizes = ", ".join(f"{part} {count:,}" for part, count in counts.items())
    print(f"{args.out}: {sizes} images, 32 x 32 x 3, uint8")
    return counts


if __name__ == "__main__":
    main()
