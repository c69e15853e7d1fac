"""Files cut anywhere, or with bytes overwritten: one error, and never a traceback.

Archives have checksums: what is read from them is right. HDF5 files here have none.
"""

import numpy as np
import pytest

from data_prep import classes, dogfish_features, hdf5

PLACES = 40


def damaged(content: bytes, seed: int = 0):
    """The file cut short at many places, and with a few bytes changed at others."""
    generator = np.random.default_rng(seed)
    for at in np.linspace(0, len(content) - 1, PLACES).astype(int):
        yield content[:at]
    for _ in range(4 * PLACES):
        changed = bytearray(content)
        at = int(generator.integers(len(content)))
        for place in range(at, min(at + 4, len(content))):
            changed[place] = int(generator.integers(256))
        yield bytes(changed)


def refused(path, content: bytes, read, right=None) -> int:
    """How many damaged versions are refused; any other error fails the test, and so
    does what is read and is not `right`."""
    count = 0
    for version in damaged(content):
        path.write_bytes(version)
        try:
            found = read()
            assert right is None or right(found)
        except ValueError as error:
            assert str(path) in str(error)
            count += 1
    return count


def test_classes(tmp_path):
    path = tmp_path / "classes.npz"
    labels = np.repeat(np.arange(3), 4)
    images = np.random.default_rng(0).integers(0, 255, (12, 4, 4, 1), np.uint8)
    parts = {
        split: classes.grouped(images, labels, [f"{split} {n}" for n in range(3)])
        for split in classes.SPLITS
    }
    classes.save(path, parts, "drawn")

    def right(found) -> bool:
        return all(
            np.array_equal(found[split].images, parts[split].images)
            and list(found[split].names) == list(parts[split].names)
            for split in classes.SPLITS
        )

    count = refused(path, path.read_bytes(), lambda: classes.load(path, "drawn"), right)
    assert count > PLACES


def test_image_bundles(tmp_path):
    path = tmp_path / "bundle.npz"
    generator = np.random.default_rng(0)
    arrays = {}
    for part in ("train", "test"):
        arrays[f"X_{part}"] = generator.uniform(-1, 1, (6, 4, 4, 3))
        arrays[f"Y_{part}"] = np.arange(6) % 2
    np.savez_compressed(path, **arrays)

    def read() -> dict:
        bundle = dogfish_features.Bundle(path)
        return {name: bundle.array(name) for name in arrays}

    def right(found: dict) -> bool:
        return all(np.array_equal(found[name], arrays[name]) for name in arrays)

    assert refused(path, path.read_bytes(), read, right) > PLACES


def test_a_bundle_of_words_is_refused(tmp_path):
    path = tmp_path / "bundle.npz"
    images, words = np.zeros((2, 4, 4, 3)), np.array(["dog", "fish"])
    np.savez(path, X_train=images, X_test=images, Y_train=words, Y_test=words)
    with pytest.raises(ValueError, match=r"Y_train of .* must be a plain array of num"):
        dogfish_features.Bundle(path)


def test_unfinished_work(tmp_path):
    path = tmp_path / "work.h5"
    partial = tmp_path / "work.h5.partial"
    shapes = {"a": ((4,), np.int64), "b": ((2, 3), np.float32)}

    def begin() -> hdf5.Writer:
        return hdf5.Writer(path, "kind", {"seed": 0}, shapes)

    writer = begin()
    writer.fill("a", [np.arange(2)])
    writer.close()
    assert refused(partial, partial.read_bytes(), lambda: begin().close()) > PLACES // 2


def test_finished_work(tmp_path):
    path = tmp_path / "work.h5"
    shapes = {"a": ((40,), np.int64), "b": ((20, 30), np.float32)}
    writer = hdf5.Writer(path, "kind", {"seed": 0}, shapes)
    writer.fill("a", [np.arange(40)])
    writer.fill("b", [np.ones((20, 30))])
    writer.finish()

    def read() -> None:
        hdf5.read_complete(path, "kind", "the tool", shapes)

    read()
    assert refused(path, path.read_bytes(), read) > PLACES
