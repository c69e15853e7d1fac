"""SVHN's .mat files, written here in the published format, to HDF5."""

import shutil

import h5py
import numpy as np
import pytest
import scipy.io

from data_prep import hdf5, svhn


def write_mat(path, count, seed):
    """Format 2: X uint8 [32, 32, 3, n], y [n, 1] with 10 for the digit 0."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (32, 32, 3, count)).astype(np.uint8)
    labels = np.resize(np.arange(1, 11), count).astype(np.uint8)[:, None]
    generator.shuffle(labels)
    scipy.io.savemat(path, {"X": images, "y": labels}, do_compression=True)
    return images, labels.ravel() % 10


@pytest.fixture
def folder(tmp_path):
    mat = tmp_path / "mat"
    mat.mkdir()
    write_mat(mat / "train_32x32.mat", 90, 0)
    write_mat(mat / "test_32x32.mat", 40, 1)
    return mat


def test_parts_are_the_files_images(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(svhn, "PIECE", 7)  # the last piece is a smaller one
    out = tmp_path / "svhn.h5"
    flags = ["--data-dir", str(folder), "--out", str(out), "--any-size"]
    counts = svhn.main([*flags, "--validation-per-class", "2", "--seed", "5"])
    assert counts == {"train": 70, "validation": 20, "test": 40}
    images, labels = write_mat(tmp_path / "again.mat", 90, 0)
    names = ("validation_indices", "train_images")
    arrays = hdf5.read_complete(out, svhn.KIND, svhn.TOOL, names)
    chosen, raw = (arrays[name] for name in names)
    assert raw.dtype == np.uint8
    with h5py.File(out) as file:
        assert file.attrs["seed"] == 5
    kept = np.setdiff1d(np.arange(90), chosen)
    np.testing.assert_array_equal(raw, np.moveaxis(images, 3, 0)[kept])
    parts = svhn.load(out, grey=False)
    for part, numbers in (("train", kept), ("validation", chosen)):
        np.testing.assert_array_equal(parts[part].labels, labels[numbers])
        np.testing.assert_allclose(
            parts[part].images, np.moveaxis(images, 3, 0)[numbers] / 255, rtol=1e-6
        )
    images, labels = write_mat(tmp_path / "again.mat", 40, 1)
    np.testing.assert_array_equal(parts["test"].labels, labels)
    pixels = np.moveaxis(images, 3, 0) / 255
    np.testing.assert_allclose(parts["test"].images, pixels, rtol=1e-6)
    assert np.bincount(parts["validation"].labels).tolist() == [2] * 10
    grey = svhn.load(out)["test"].images
    red, green, blue = np.moveaxis(svhn.load(out, grey=False)["test"].images, 3, 0)
    np.testing.assert_allclose(
        grey[..., 0], 0.2989 * red + 0.5870 * green + 0.1140 * blue, rtol=1e-5
    )


def test_validation_digits_are_random():
    labels = np.arange(200) % 10
    first, second = (svhn.draw_validation(labels, 5, seed) for seed in (0, 1))
    assert np.bincount(labels[first]).tolist() == [5] * 10
    assert set(first) != set(second) and max(first) > 100


def test_the_published_counts_are_asked_for(folder, tmp_path, capsys):
    assert svhn.COUNTS["train"] - 10 * 100 == 72_257
    with pytest.raises(SystemExit) as stop:
        svhn.main(["--data-dir", str(folder), "--out", str(tmp_path / "x.h5")])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "must hold 73257 digits" in error and error.count("\n") == 1
    assert not list(tmp_path.glob("x.h5*"))


@pytest.mark.parametrize("damage", ["missing", "cut", "foreign", "keys", "labels"])
def test_bad_files_are_one_line(damage, folder, tmp_path, capsys):
    path = folder / "train_32x32.mat"
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    elif damage == "foreign":
        path.write_text("<html>not found</html>")
    elif damage == "keys":
        scipy.io.savemat(path, {"images": np.zeros(3)})
    else:
        images = np.zeros((32, 32, 3, 5), np.uint8)
        scipy.io.savemat(path, {"X": images, "y": np.zeros((5, 1))})
    out = tmp_path / "x.h5"
    with pytest.raises(SystemExit) as stop:
        svhn.main(["--data-dir", str(folder), "--out", str(out), "--any-size"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "train_32x32.mat" in error and error.count("\n") == 1
    assert not list(tmp_path.glob("x.h5*"))


def test_a_file_that_is_there_is_not_written_over(folder, tmp_path, capsys):
    out = tmp_path / "x.h5"
    out.write_text("kept")
    flags = ["--any-size", "--validation-per-class", "2"]
    with pytest.raises(SystemExit) as stop:
        svhn.main(["--data-dir", str(folder), "--out", str(out), *flags])
    assert stop.value.code == 2 and out.read_text() == "kept"
    error = capsys.readouterr().err
    assert "exists already" in error and error.count("\n") == 1


def test_too_few_digits_of_a_class(folder, tmp_path, capsys):
    flags = ["--data-dir", str(folder), "--out", str(tmp_path / "x.h5"), "--any-size"]
    with pytest.raises(SystemExit):
        svhn.main([*flags, "--validation-per-class", "10"])
    assert "got 10 where there are 9 of the digit" in capsys.readouterr().err


def test_a_killed_preparation_resumes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(svhn, "PIECE", 10)
    whole = tmp_path / "whole.h5"
    svhn.prepare(folder, whole, 2, any_size=True)
    broken, slices, made = tmp_path / "broken.h5", [], hdf5.with_bar

    def dying(pieces, where, count):
        for number, piece in enumerate(made(pieces, where, count)):
            if number == 3:
                raise KeyboardInterrupt
            slices.append(number)
            yield piece

    with monkeypatch.context() as patch:
        patch.setattr(hdf5, "with_bar", dying)
        with pytest.raises(KeyboardInterrupt):
            svhn.prepare(folder, broken, 2, any_size=True)
    assert not broken.exists() and slices == [0, 1, 2]
    with pytest.raises(ValueError, match="unfinished work of another run"):
        svhn.prepare(folder, broken, 2, seed=1, any_size=True)
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    write_mat(other / "test_32x32.mat", 40, 2)  # as many, not the same
    with pytest.raises(ValueError, match="unfinished work of another run"):
        svhn.prepare(other, broken, 2, any_size=True)
    starts = []
    monkeypatch.setattr(
        hdf5, "slices", lambda *a, f=hdf5.slices: starts.append(a[0]) or f(*a)
    )
    svhn.prepare(folder, broken, 2, any_size=True)
    assert starts == [30, 0, 0]  # 30 training images were there already
    for part, one in svhn.load(whole).items():
        other = svhn.load(broken)[part]
        np.testing.assert_array_equal(one.images, other.images)
        np.testing.assert_array_equal(one.labels, other.labels)
    with pytest.raises(FileExistsError, match="exists already"):
        svhn.prepare(folder, whole, 2, any_size=True)


def test_what_is_not_a_prepared_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Make it with .*svhn\.py"):
        svhn.load(tmp_path / "none.h5")
    other = tmp_path / "text.h5"
    other.write_text("no")
    with pytest.raises(ValueError, match="not an HDF5 file"):
        svhn.load(other)
    writer = hdf5.Writer(tmp_path / "w.h5", "other", {}, {"a": ((2,), np.int64)})
    with pytest.raises(ValueError, match="a holds 0 of 2"):
        writer.finish()
    writer.fill("a", [np.array([1, 2])])
    writer.finish()
    with pytest.raises(ValueError, match="holds 'other', not"):
        svhn.load(tmp_path / "w.h5")


@pytest.mark.parametrize("way", ["link", "storage", "virtual", "absent"])
def test_a_matlab_73_file_reads_no_other_file_and_fills_no_memory(way, tmp_path):
    """Its pixels stand in another file, or nowhere."""
    other = tmp_path / "other"
    path = tmp_path / "train_32x32.mat"
    shape = (2, 3, 32, 32)
    if way == "storage":
        other.write_bytes(b"\x07" * 6144)
    else:
        with h5py.File(other, "w") as file:
            file["X"] = np.full(shape, 7, np.uint8)
    with h5py.File(path, "w") as file:
        file["y"] = np.ones((1, 2))
        if way == "link":
            file["X"] = h5py.ExternalLink(str(other), "/X")
        elif way == "storage":
            file.create_dataset("X", shape, "u1", external=[(str(other), 0, 6144)])
        elif way == "virtual":
            layout = h5py.VirtualLayout(shape, "u1")
            layout[:] = h5py.VirtualSource(other, "X", shape)
            file.create_virtual_dataset("X", layout)
        else:  # 3 terabytes
            file.create_dataset(
                "X", (10**9, *shape[1:]), "u1", chunks=(10**4, 3, 32, 32)
            )
    with pytest.raises(
        ValueError, match=r"train_32x32\.mat cannot be read.*\(X "
    ) as no:
        svhn.read_mat(path, None)
    assert "\n" not in str(no.value)
