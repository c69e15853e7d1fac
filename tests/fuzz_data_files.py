"""Damaged and foreign data files: none may execute, hang or leave anything behind.

    python tests/fuzz_data_files.py --count 2000

Every file is made from a seed of its own number: a right file of one of the published
forms, cut short, changed at some places, of another kind than its name says, or made to
call something. Each is given to the readers of `data_prep`, under a limit of time and
of memory. Allowed are what the right file holds, or one line that says what is wrong. A
changed file of a kind without checksums (CHECKED has the others) may also be read as
what it says now: "other values". Prints the answers by kind of file; exit status 1 if
one was not allowed.
"""

import argparse
import collections
import contextlib
import gzip
import io
import os
import pathlib
import pickle
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator

import h5py
import numpy as np
import scipy.io
import tensorflow as tf

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from data_prep import classes, idx, label_noise, layouts, svhn, tiered_imagenet

SECONDS = 10  # for one file; reading a right one takes milliseconds
BYTES = 2 * 2**30  # of memory, for one file, beyond what the process has
CHECKED = ("npz", "classes", "kept", "idx.gz", "image")  # by zip, gzip or PNG
FEW = np.array([0, 1, 0, 1])


class Call:
    """Pickled, a call that leaves a mark."""

    def __init__(self, function: Callable, *arguments: object):
        self.called = function, arguments

    def __reduce__(self) -> tuple:
        return self.called


class Corpus:
    """Right files of every kind, as bytes, and what reads them.

    Args:
        folder: where files are put to be read.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder, self.mark = folder, folder.parent / "called"
        generator = np.random.default_rng(0)
        self.images = generator.integers(0, 256, (4, 6, 6, 3), np.uint8)
        self.png = [tf.io.encode_png(image).numpy() for image in self.images]
        self.right = {
            "pickle": self._pickle,
            "png pickle": self._png_pickle,
            "npz": self._npz,
            "classes": self._classes,
            "kept": self._kept,
            "mat 5": self._mat,
            "mat 7.3": self._mat_73,
            "idx": self._idx,
            "idx.gz": lambda g: gzip.compress(self._idx(g)),
            "csv": lambda g: b"filename,label\na.png,cat\nb.png,dog\n",
            "image": lambda g: self.png[0],
        }

    def _pickle(self, generator: np.random.Generator) -> bytes:
        content = {"data": self.images, "labels": FEW.tolist()}
        return pickle.dumps(content, int(generator.integers(6)))

    def _png_pickle(self, generator: np.random.Generator) -> bytes:
        files = [np.frombuffer(one, np.uint8) for one in self.png]
        return pickle.dumps(files, int(generator.integers(6)))

    def _npz(self, generator: np.random.Generator) -> bytes:
        return _saved(images=self.images, labels=FEW)

    def _classes(self, generator: np.random.Generator) -> bytes:
        parts = {
            split: classes.grouped(self.images, FEW, [f"{split} {n}" for n in range(2)])
            for split in classes.SPLITS
        }
        path = self.folder.parent / "classes.npz"
        classes.save(path, parts, "few")
        content = path.read_bytes()
        path.unlink()
        return content

    def _kept(self, generator: np.random.Generator) -> bytes:
        return _saved(labels=FEW, kept=FEW.astype(bool))

    def _digits(self) -> tuple[np.ndarray, np.ndarray]:
        pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3, 6), np.uint8)
        return pixels, np.arange(1, 7)

    def _mat(self, generator: np.random.Generator) -> bytes:
        pixels, labels = self._digits()
        file = io.BytesIO()
        scipy.io.savemat(file, {"X": pixels, "y": labels[:, None].astype(np.uint8)})
        return file.getvalue()

    def _mat_73(self, generator: np.random.Generator) -> bytes:
        pixels, labels = self._digits()
        file = io.BytesIO()
        with h5py.File(file, "w", userblock_size=512) as made:
            made["X"], made["y"] = pixels.T, labels[None].astype(float)
        return file.getvalue()

    def _idx(self, generator: np.random.Generator) -> bytes:
        head = np.array([2051, 3, 28, 28], ">i4").tobytes()
        return head + bytes(i % 251 for i in range(3 * 28 * 28))

    def readers(self, kind: str) -> list[tuple[str, Callable[[pathlib.Path], object]]]:
        """Names of files, and what reads such a file."""
        labels = self.folder / "labels.pkl"
        every: dict[str, list] = {
            "pickle": [("a.pkl", lambda p: layouts.read([p], "train", "few"))],
            "png pickle": [
                ("a.pkl", lambda p: tiered_imagenet.read(p, labels)),
                ("a.pkl", lambda p: layouts.read([p, labels], "train", "few")),
                ("labels_a.pkl", lambda p: tiered_imagenet.read(labels, p)),
            ],
            "npz": [("a.npz", lambda p: layouts.read([p], "train", "few"))],
            "classes": [("a.npz", lambda p: classes.load(p, "few"))],
            "kept": [("a.npz", lambda p: label_noise.load_kept(p, FEW))],
            "mat 5": [("a.mat", lambda p: svhn.read_mat(p, None))],
            "idx": [("a", lambda p: idx.read(p, 3)), ("a", lambda p: idx.read(p, 1))],
            "csv": [("a.csv", lambda p: layouts.read([p, p.parent], "train", "few"))],
            "image": [("a.png", self._by_name)],
        }
        twin = {"mat 7.3": "mat 5", "idx.gz": "idx"}
        return every[twin.get(kind, kind)]

    def _by_name(self, path: pathlib.Path) -> object:
        table = path.with_name("table.csv")
        table.write_text("filename,label\na.png,cat\nb.png,dog\n")
        return layouts.read([table, path.parent], "train", "few")

    def attack(self, generator: np.random.Generator) -> bytes:
        """A pickle, or an .npz of objects, that calls something."""
        function = [
            (os.mkdir, str(self.mark)),
            (os.system, f"touch {self.mark}"),
            (exec, f"open({str(self.mark)!r}, 'w').close()"),
            (np.memmap, str(self.mark), "u1", "w+", 0, (4,)),
            (pathlib.Path.touch, self.mark),
        ]
        call = Call(*function[generator.integers(len(function))])
        content = [
            call,
            {"data": call, "labels": [0]},
            {"data": self.images, "labels": [call]},
            np.array([call], object),
        ][generator.integers(4)]
        if generator.random() < 0.3:
            return _saved(images=np.array([call], object), labels=FEW)
        return pickle.dumps(content, int(generator.integers(2, 6)))

    def files(self, number: int) -> Iterator[tuple[str, str, bytes, Callable, bytes]]:
        """Of a number: kind, file name, content, reader and the right content, one for
        each reader."""
        generator = np.random.default_rng(number)
        kinds = list(self.right)
        kind = kinds[generator.integers(len(kinds))]
        right = content = self.right[kind](generator)
        way = generator.integers(10)
        if way < 3:  # cut short
            content, damage = content[: generator.integers(len(content))], "cut"
        elif way < 6:  # some bytes changed
            changed, damage = bytearray(content), "changed"
            for _ in range(int(generator.integers(1, 9))):
                changed[generator.integers(len(changed))] = generator.integers(256)
            content = bytes(changed)
        elif way < 7:  # a piece said twice, or left out
            a, b = np.sort(generator.integers(len(content), size=2))
            content, damage = content[:b] + content[a:], "spliced"
        elif way < 8:  # another kind than its name says
            other = kinds[generator.integers(len(kinds))]
            content, damage = self.right[other](generator), "foreign"
        elif way < 9:
            content, damage = self.attack(generator), "calls"
        else:
            content, damage = generator.bytes(int(generator.integers(300))), "noise"
        for name, read in self.readers(kind):
            yield f"{kind}, {damage}", name, content, read, right


def _saved(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


class TooLong(BaseException):
    """Reading a file took longer than SECONDS."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    memory = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(
        resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, memory[1])
    )
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, memory)
        signal.signal(signal.SIGALRM, before)


def same(one: object, other: object) -> bool:
    """Whether two answers hold the same arrays, names and numbers."""
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return (
            isinstance(one, np.ndarray)
            and isinstance(other, np.ndarray)
            and one.dtype == other.dtype
            and np.array_equal(one, other)
        )
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and same([*one.values()], [*other.values()])
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def answer(
    corpus: Corpus, kind: str, name: str, content: bytes, read: Callable, right: bytes
) -> str:
    """What a reader said of a file of a kind, whose right version is `right`; what
    begins with "BAD" is not allowed."""
    folder = corpus.folder
    for path in folder.iterdir():
        path.unlink()
    (folder / "a.png").write_bytes(corpus.png[0])
    (folder / "b.png").write_bytes(corpus.png[1])
    (folder / "labels.pkl").write_bytes(
        pickle.dumps({"label_specific": FEW, "label_specific_str": ["cat", "dog"]})
    )
    path = folder / name
    path.write_bytes(content)
    opened = _open_files()
    try:
        with limited():
            found = read(path)
        # Out of the limits, and of what is compared: the right file's own answer.
        path.write_bytes(right)
        said = "read" if same(found, read(path)) else "other values"
        if said != "read" and kind.split(", ")[0] in CHECKED:
            said = f"BAD read as {str(found)[:100]!r}"
    except (ValueError, FileNotFoundError) as error:
        said = "one line"
        if not str(error) or not str(error).isprintable() or len(str(error)) > 1000:
            said = f"BAD {error!r:.500}"
    except TooLong:
        said = "BAD too long"
    except BaseException as error:  # noqa: BLE001  (what must not come through)
        said = f"BAD {type(error).__name__}: {str(error)[:200]!r}"
    left = {p.name for p in folder.iterdir()} - {"table.csv"}
    if left != {"a.png", "b.png", "labels.pkl", name}:
        said = f"BAD left {left}"
    if corpus.mark.exists():
        corpus.mark.rmdir() if corpus.mark.is_dir() else corpus.mark.unlink()
        said = "BAD executed"
    if _open_files() > opened:
        said = "BAD left a file open"
    return said


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def run(numbers: range) -> tuple[collections.Counter, list[str]]:
    """Counts of (kind and damage, answer), and what was not allowed."""
    counts, bad = collections.Counter(), []
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = pathlib.Path(temporary) / "files"
        folder.mkdir()
        corpus = Corpus(folder)
        for number in numbers:
            for kind, name, content, read, right in corpus.files(number):
                said = answer(corpus, kind, name, content, read, right)
                counts[kind, said.split(" ")[0] if said[:3] == "BAD" else said] += 1
                if said.startswith("BAD"):
                    bad.append(f"{number} ({kind}): {said}")
    return counts, bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000, help="of files")
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    args = parser.parse_args()
    begun = time.perf_counter()
    counts, bad = run(range(args.first, args.first + args.count))
    for (kind, said), count in sorted(counts.items()):
        print(f"{kind:22}{said:13}{count:6}")
    print(
        f"{sum(counts.values())} readings of {args.count} files, {len(bad)} not allowed"
    )
    print("\n".join(bad[:50]))
    print(f"{time.perf_counter() - begun:.0f} seconds", file=sys.stderr)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
