"""Computes features of the dogfish images (or similar ones) with a frozen network.

    python data_prep/dogfish_features.py --data-file dogfish.npz --out dogfish.h5

The bundle is CodaLab's dataset_dog-fish_train-900_test-300.npz. It contains `X_train`
and `X_test`, images [n, height, width, channels] in [-1, 1], and `Y_train` and
`Y_test`, their classes. The features are the 2,048 outputs of Inception-v3 without its
top layer, averaged over the image. Images are read batch by batch, so the bundle
(several gigabytes) need not fit into memory. A killed run continues when it is started
again.
"""

import argparse
import contextlib
import os
import pathlib
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import keras
import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from data_prep import hdf5
from data_prep.command_line import one_line_errors, positive, seed

KIND = "tfbilevel image features 1"
TOOL = "python data_prep/dogfish_features.py --data-file FILE.npz --out FILE.h5"
PARTS = ("train", "test")


class Header(NamedTuple):
    """The shape and type of an array in an .npz file, known before it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype


class Bundle:
    """An .npz file of images, read a few at a time.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is truncated, or does not hold the four arrays.
    """

    def __init__(self, path: pathlib.Path):
        self.path = pathlib.Path(path)
        if not self.path.exists():
            raise FileNotFoundError(
                f"{path} does not exist. The dogfish bundle is on CodaLab: see "
                "docs/experiments.md"
            )
        wanted = {f"{kind}_{part}" for kind in "XY" for part in PARTS}
        try:
            with zipfile.ZipFile(self.path) as archive:
                found = {name.removesuffix(".npy") for name in archive.namelist()}
        except zipfile.BadZipFile as error:
            raise ValueError(
                f"{path} is cut short or not an .npz file ({error}). Download it again"
            ) from None
        if not wanted <= found:
            raise ValueError(
                f"{path} must hold X_train, Y_train, X_test and Y_test. Received: "
                f"{', '.join(sorted(found)) or 'nothing'}"
            )
        for part in PARTS:
            images, labels = self.header(f"X_{part}"), self.header(f"Y_{part}")
            if len(images.shape) != 4 or images.shape[0] != np.prod(labels.shape):
                raise ValueError(
                    f"X_{part} of {path} must be images [n, height, width, channels] "
                    f"and Y_{part} their n classes. Received: shapes {images.shape} "
                    f"and {labels.shape}"
                )

    def checksums(self) -> list[int]:
        """The checksums of all arrays, from the archive's directory."""
        with zipfile.ZipFile(self.path) as archive:
            return [archive.getinfo(f"{axis}_{part}.npy").CRC
                    for part in PARTS for axis in "XY"]  # fmt: skip

    def header(self, name: str) -> Header:
        with self._open(name) as file:
            return self._read_header(file, name)

    def array(self, name: str) -> np.ndarray:
        """A whole array."""
        return np.concatenate(list(self.pieces(name, [slice(0, None)])))

    def pieces(self, name: str, slices: Any) -> Iterator[np.ndarray]:
        """The entries of consecutive slices; entries before the first slice are read
        and dropped."""
        with self._open(name) as file:
            header = self._read_header(file, name)
            each = int(np.prod(header.shape[1:])) * header.dtype.itemsize
            at = 0
            for piece in slices:
                start, stop, _ = piece.indices(header.shape[0])
                while at < start:
                    at += len(self._read(file, each, name)) // each
                size = (stop - start) * each
                content = self._read(file, size, name)
                at = stop
                yield np.frombuffer(content, header.dtype).reshape(
                    stop - start, *header.shape[1:]
                )

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[Any]:
        with contextlib.ExitStack() as stack:
            with self._one_error(name):
                archive = stack.enter_context(zipfile.ZipFile(self.path))
                file = stack.enter_context(archive.open(f"{name}.npy"))
            yield file

    @contextlib.contextmanager
    def _one_error(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001  (zip, zlib and NumPy raise many)
            raise ValueError(
                f"{name} of {self.path} is damaged ({error}). Download it again"
            ) from None

    def _read(self, file: Any, size: int, name: str) -> bytes:
        with self._one_error(name):
            content = file.read(size)
        if len(content) < size:
            raise ValueError(f"{name} of {self.path} is cut short. Download it again")
        return content

    def _read_header(self, file: Any, name: str) -> Header:
        with self._one_error(name):
            version = np.lib.format.read_magic(file)
            read = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
            shape, fortran, dtype = read(file)
        if fortran or dtype.kind not in "fiub":
            raise ValueError(
                f"{name} of {self.path} must be a plain array of numbers in C order. "
                f"Received: {dtype}{', Fortran order' if fortran else ''}"
            )
        return Header(shape, dtype)


def build_extractor(
    weights: str, model: pathlib.Path | None, seed: int = 0
) -> keras.Model:
    """Inception-v3 as published, or a saved Keras model, from images to vectors.

    `seed` is used for the random weights of "none", which are the same in every call.

    Raises:
        ValueError: if a saved model does not map images to vectors.
    """
    if model is None:
        if weights == "none":
            keras.utils.set_random_seed(seed)
        chosen: Any = None if weights == "none" else weights
        try:
            return keras.applications.InceptionV3(
                include_top=False,
                weights=chosen,
                pooling="avg",
                input_shape=(299, 299, 3),
            )
        except Exception as error:  # noqa: BLE001  (Keras raises one when offline)
            raise OSError(
                f"Inception-v3 is not available with --weights {weights} ({error}). "
                "Pass a file with its weights, or none"
            ) from None
    if not model.exists():
        raise FileNotFoundError(f"--model {model} does not exist")
    extractor: Any = keras.saving.load_model(model, compile=False)
    require_extractor(extractor)
    return extractor


def require_extractor(extractor: Any) -> None:
    """Raise unless the model maps images to vectors."""
    shapes = (
        getattr(extractor, "input_shape", ()),
        getattr(extractor, "output_shape", ()),
    )
    if len(shapes[0]) != 4 or len(shapes[1]) != 2 or shapes[1][1] is None:
        raise ValueError(
            "a feature model must map images [n, height, width, channels] to vectors "
            f"[n, features]. Received: from {shapes[0]} to {shapes[1]}"
        )


def require_images(images: Header, extractor: keras.Model, path: pathlib.Path) -> None:
    """Raise unless the images have the input size of the model."""
    wanted = tuple(extractor.input_shape[1:])
    fits = zip(wanted, images.shape[1:], strict=True)
    if any(want is not None and want != got for want, got in fits):
        raise ValueError(
            f"the images of {path} must be {wanted} for this feature model. Resize "
            f"them or name another --model. Received: {images.shape[1:]}"
        )


def in_range(images: np.ndarray, low: float, high: float) -> np.ndarray:
    """The images as float32; raises if they leave [low, high]."""
    least, most = float(images.min()), float(images.max())
    slack = 1e-3 * (high - low)
    if not (low - slack <= least and most <= high + slack):
        raise ValueError(
            f"images must lie in [{low:g}, {high:g}], the range that the feature model "
            "was trained on (another: --range of dogfish_features.py). Scale them; "
            "Inception's is x / 127.5 - 1. "
            f"Received: values from {least:g} to {most:g}"
        )
    return images.astype(np.float32)


def prepare(
    data: pathlib.Path,
    out: pathlib.Path,
    weights: str = "imagenet",
    model: pathlib.Path | None = None,
    batch: int = 100,
    limits: tuple[float, float] = (-1.0, 1.0),
    seed: int = 0,
) -> dict[str, tuple[int, ...]]:
    """Write the features of both parts; returns their shapes."""
    bundle = Bundle(data)
    extractor = build_extractor(weights, model, seed)
    for part in PARTS:
        require_images(bundle.header(f"X_{part}"), extractor, data)
    width = int(extractor.output_shape[1])
    counts = {part: bundle.header(f"X_{part}").shape[0] for part in PARTS}
    shapes: dict[str, Any] = {}
    for part, count in counts.items():
        shapes[f"{part}_features"] = (count, width), np.float32
        shapes[f"{part}_labels"] = (count,), np.int64
    made_from = {
        "data": data.name,
        "bytes": data.stat().st_size,
        "checksums": bundle.checksums(),
        "weights": weights if model is None else model.name,
        "network": _checksum(model or pathlib.Path(weights)),
        **({"seed": seed} if model is None and weights == "none" else {}),
    }
    writer = hdf5.Writer(out, KIND, made_from, shapes)

    def features(part: str) -> Iterator[np.ndarray]:
        first = writer.filled(f"{part}_features")
        where = hdf5.slices(first, counts[part], batch)
        images = bundle.pieces(f"X_{part}", where)
        for some in hdf5.with_bar(images, where, counts[part]):
            yield np.asarray(extractor.predict_on_batch(in_range(some, *limits)))

    try:
        for part in PARTS:
            writer.fill(f"{part}_features", features(part))
            done = writer.filled(f"{part}_labels")
            labels = bundle.array(f"Y_{part}").ravel().astype(np.int64)
            writer.fill(f"{part}_labels", [labels[done:]])
        writer.finish()
    except BaseException:
        writer.close()
        raise
    return {part: (count, width) for part, count in counts.items()}


def _checksum(path: pathlib.Path) -> int | None:
    """The checksum of a file of weights or a model; `None` if it is not a file."""
    return zlib.crc32(path.read_bytes()) if path.is_file() else None


class Features(NamedTuple):
    """Features [n, width], float32, and classes [n] of one part."""

    features: np.ndarray
    labels: np.ndarray


def load(path: pathlib.Path) -> dict[str, Features]:
    """Both parts of a prepared file."""
    names = [f"{part}_{what}" for part in PARTS for what in ("features", "labels")]
    arrays = hdf5.read_complete(path, KIND, TOOL, names)
    return {
        part: Features(
            arrays[f"{part}_features"], arrays[f"{part}_labels"].astype(np.int32)
        )
        for part in PARTS
    }


class Pictures(NamedTuple):
    """Images [n, height, width, channels], their features [n, width], classes 0, 1."""

    images: np.ndarray
    features: np.ndarray
    labels: np.ndarray


def load_pictures(data: pathlib.Path, features: pathlib.Path) -> dict[str, Pictures]:
    """Both parts of an .npz file of images, with the features computed from them."""
    bundle, pictures = Bundle(data), {}
    for part, made in load(features).items():
        pixels = bundle.array(f"X_{part}").astype(np.float32)
        labels = bundle.array(f"Y_{part}").ravel().astype(np.int32)
        if len(pixels) != len(made.labels) or (labels != made.labels).any():
            raise ValueError(
                f"{features} was not made from {data}: their {part} classes differ. "
                f"Make it again with {TOOL}"
            )
        pictures[part] = Pictures(pixels, made.features, labels)
    return pictures


def require_same(
    path: pathlib.Path, images: np.ndarray, stored: np.ndarray, extractor: keras.Model
) -> None:
    """Raise unless the file's features of some images are those of this network."""
    made = extractor(images, training=False).numpy()
    if made.shape != stored.shape or not np.allclose(
        made, stored, rtol=1e-2, atol=1e-2 * np.abs(made).max()
    ):
        raise ValueError(
            f"{path} holds features of another network or other images. Make it again "
            f"with {TOOL}, with the --weights or --model given here"
        )


def write_bundle(
    path: pathlib.Path, parts: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> None:
    """Images and classes of both parts as an .npz of the published layout."""
    """Write images and classes of both parts as an .npz in the published layout."""
    arrays = {}
    for part, (pixels, labels) in parts.items():
        arrays[f"X_{part}"], arrays[f"Y_{part}"] = pixels, labels
    partial = path.with_name("partial.npz")
    np.savez_compressed(partial, **arrays)
    os.replace(partial, path)


def main(argv: list[str] | None = None) -> dict[str, tuple[int, ...]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--data-file",
        "--data",
        type=pathlib.Path,
        required=True,
        help=".npz file of images",
    )
    add("--out", type=pathlib.Path, required=True, help=".h5 file for the features")
    add(
        "--weights",
        default="imagenet",
        help="Inception-v3's weights: imagenet (downloaded), a file, or none (random)",
    )
    add("--model", type=pathlib.Path, help="another feature model, saved by Keras")
    add("--batch", type=positive(int), default=100)
    add("--range", type=float, nargs=2, default=(-1.0, 1.0), help="range of the pixels")
    add("--seed", type=seed, default=0, help="seed of the random weights")
    args = parser.parse_args(argv)
    with one_line_errors(__file__):
        shapes = prepare(
            args.data_file,
            args.out,
            args.weights,
            args.model,
            args.batch,
            args.range,
            args.seed,
        )
    print(f"{args.out}: train {shapes['train']}, test {shapes['test']}")
    return shapes


if __name__ == "__main__":
    main()
