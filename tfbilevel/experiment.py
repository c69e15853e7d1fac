"""What every experiment script needs around its problem: flags, files, resuming.

A run writes into one folder: `config.json` (every setting, versions, seed),
`metrics.csv` (one row per evaluation, with `seconds`), `summary.json` and pictures.
Files appear whole or not at all.
"""

import argparse
import contextlib
import csv
import dataclasses
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import keras
import numpy as np
import tensorflow as tf

from tfbilevel._version import __version__


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with exit status 2.

    Flags that every experiment has are there from the start: `--out`, `--resume`,
    `--seed`.
    """

    def __init__(self, **keywords: Any):
        super().__init__(
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **keywords,
        )
        self.add_argument("--out", type=pathlib.Path, required=True, help="folder")
        self.add_argument(
            "--resume", action="store_true", help="continue the run in --out"
        )
        self.add_argument("--seed", type=int, default=0, help="of everything random")

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (see --help)", file=sys.stderr)
        raise SystemExit(2)

    def refuse_meaningless(
        self, args: argparse.Namespace, published: Sequence[Any], chosen: str
    ) -> None:
        """An error for a flag that was given and that none of the settings knows.

        Args:
            args: the parsed flags, `None` where not given.
            published: dataclasses of settings, `None` where they have no such knob.
            chosen: what chose them, such as "--method rhg".
        """
        for field in dataclasses.fields(published[0]):
            unknown = all(getattr(one, field.name) is None for one in published)
            if getattr(args, field.name) is not None and unknown:
                self.error(
                    f"{flag(field.name)} means nothing to {chosen}: leave it out"
                )


def flag(name: str) -> str:
    """A setting's name as it is written on the command line."""
    return "--" + name.replace("_", "-")


def filled(args: argparse.Namespace, published: Any) -> argparse.Namespace:
    """The flags, with published settings where none was given.

    Settings that are `None` stay `None`, whatever the flag: they have no such knob.
    """
    made = argparse.Namespace(**vars(args))
    for name, value in dataclasses.asdict(published).items():
        if value is None or getattr(args, name) is None:
            setattr(made, name, value)
    return made


def settings(args: argparse.Namespace, *hidden: str) -> dict[str, Any]:
    """The flags that decide a run's results, by name."""
    hidden = ("out", "resume", *hidden)
    return {k: v for k, v in sorted(vars(args).items()) if k not in hidden}


@contextlib.contextmanager
def one_line_errors(script: str) -> Iterator[None]:
    """What goes wrong before any work is done: one line, exit status 2.

    Args:
        script: the script's `__file__`.
    """
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        print(f"{pathlib.Path(script).name}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def positive(kind: type) -> Callable[[str], Any]:
    """An argparse type: a finite number of this kind, above zero."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not (math.isfinite(value) and value > 0):
            raise argparse.ArgumentTypeError(f"must be above zero, got {text}")
        return value

    parse.__name__ = f"positive {kind.__name__}"
    return parse


class Run:
    """One run's folder.

    Args:
        out: the folder; it must be new or empty, or hold the run to resume.
        config: every setting, JSON-serialisable.
        resume: continue: `config` must equal the stored one.

    Raises:
        ValueError: if the folder is in use, there is nothing to resume, or the
            settings differ from the run's.
    """

    def __init__(self, out: pathlib.Path, config: Mapping[str, Any], resume: bool):
        self.out = pathlib.Path(out)
        self._metrics = self.out / "metrics.csv"
        settings = json.loads(json.dumps(dict(config), default=str))
        stored = self.out / "config.json"
        if resume:
            if not stored.exists():
                raise ValueError(
                    "--resume needs a folder with a run in it. Start without "
                    f"--resume. Received: --out {self.out}"
                )
            before = json.loads(stored.read_text())["settings"]
            changed = sorted(
                key
                for key in {*before, *settings}
                if before.get(key) != settings.get(key)
            )
            if changed:
                raise ValueError(
                    "--resume needs the settings of the run it continues. Repeat "
                    "its flags or start in a new folder. Received: other "
                    f"{', '.join(changed)}"
                )
        else:
            if self.out.exists() and any(self.out.iterdir()):
                raise ValueError(
                    "--out must be a new or empty folder. Name another one or pass "
                    f"--resume. Received: --out {self.out}"
                )
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(stored, {"settings": settings, "versions": _versions()})

    def rows(self) -> list[dict[str, str]]:
        """The rows of `metrics.csv` so far."""
        if not self._metrics.exists():
            return []
        with self._metrics.open(newline="") as file:
            return list(csv.DictReader(file))

    def column(self, name: str) -> list[float]:
        """One column of `metrics.csv` as numbers."""
        return [float(row[name]) for row in self.rows()]

    def log(self, values: Mapping[str, Any]) -> None:
        """Append a row; the first one decides the columns."""
        columns, new = list(values), True
        if self._metrics.exists():
            new = False
            with self._metrics.open(newline="") as file:
                columns = next(csv.reader(file))
        with self._metrics.open("a", newline="") as file:
            # An unknown column is an error before anything is written.
            writer = csv.DictWriter(file, fieldnames=columns)
            if new:
                writer.writeheader()
            writer.writerow(values)

    def rewind(self, step: int) -> float:
        """Drop the rows after `step` and return the seconds of the last one kept."""
        kept = [row for row in self.rows() if int(row["step"]) <= step]
        if self._metrics.exists():
            partial = self._metrics.with_suffix(".partial")
            with partial.open("w", newline="") as file:
                if kept:
                    writer = csv.DictWriter(file, fieldnames=list(kept[0]))
                    writer.writeheader()
                    writer.writerows(kept)
            if kept:
                os.replace(partial, self._metrics)
            else:
                partial.unlink()
                self._metrics.unlink()
        return float(kept[-1]["seconds"]) if kept else 0.0

    def summarise(self, values: Mapping[str, Any]) -> None:
        """Write `summary.json`."""
        write_json(self.out / "summary.json", values)

    def summary(self) -> dict[str, Any] | None:
        """What `summarise` wrote; `None` if the run is not complete."""
        path = self.out / "summary.json"
        return json.loads(path.read_text()) if path.exists() else None


class Evaluate(keras.callbacks.Callback):
    """Measures a model before training, every so many outer steps and at the end.

    A row of the run holds `step`, `seconds`, the training metrics (means over the
    steps since the last row; not known at step 0) and what the function returns.
    `seconds` are those of outer steps over all sittings, with their data and with
    TensorFlow's tracing in the first one; evaluations and backups take none.
    On a terminal a bar shows how far training is.

    Args:
        run: where rows go.
        function: () -> dict of what to log.
        every: outer steps between rows.
        steps: outer steps in all, `None` if only the seconds end training.
        limit: seconds after which training stops, `None` for no limit.
    """

    def __init__(
        self,
        run: Run,
        function: Callable[[], Mapping],
        every: int,
        steps: int | None = None,
        limit: float | None = None,
    ):
        super().__init__()
        self.run, self.function, self.every, self.limit = run, function, every, limit
        self.steps = steps
        self.seconds: float | None = None
        self._begun = 0.0
        self._logged = -1
        self._first: dict | None = None
        self._bar = keras.utils.Progbar(steps or math.ceil(limit or 1))

    def on_train_begin(self, logs: Any = None) -> None:
        self.seconds = None

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self.seconds is None:
            # Not at the start of training: a backup is restored there.
            self._logged = self.model.outer_step
            self.seconds = self.run.rewind(self._logged)
            if not self.run.rows():
                self._first = {"step": self._logged, "seconds": 0.0, **self.function()}
        self._begun = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        assert self.seconds is not None
        self.seconds += time.perf_counter() - self._begun
        step = self.model.outer_step
        over = self.limit is not None and self.seconds >= self.limit
        if over:
            self.model.stop_training = True
        if (
            over
            or step // self.every > self._logged // self.every
            or step == self.steps
        ):
            self._log(step, logs or {})
        if sys.stdout.isatty():
            done = int(self.seconds) if self.steps is None else step
            self._bar.update(min(done, self._bar.target))

    def _log(self, step: int, logs: Mapping) -> None:
        self._logged = step
        training = {name: float(value) for name, value in logs.items()}
        self.model.reset_metrics()
        row = {"step": step, "seconds": round(self.seconds or 0.0, 4)}
        row |= training | dict(self.function())
        if self._first is not None:
            # Only now are the names of the training metrics known.
            self.run.log(dict.fromkeys(row, float("nan")) | self._first)
            self._first = None
        self.run.log(row)


class Backup(keras.callbacks.BackupAndRestore):
    """`BackupAndRestore` at epochs that survives a kill at any moment.

    Keras writes the weights over the last good ones and then the epoch into another
    file: a kill between or during the two loses the run or repeats an epoch. Here
    the weights replace the old ones in one step, and the epoch is taken from them.

    Args:
        folder: where the backup lives until training ends.
        steps_per_epoch: outer steps of one epoch.
    """

    def __init__(self, folder: pathlib.Path, steps_per_epoch: int):
        super().__init__(str(folder), save_freq="epoch", delete_checkpoint=False)
        self.folder, self.steps_per_epoch = pathlib.Path(folder), steps_per_epoch

    @property
    def _file(self) -> pathlib.Path:
        return self.folder / "latest.weights.h5"

    def _save_model(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / "partial.weights.h5"
        self.model.save_weights(str(partial))
        os.replace(partial, self._file)

    def _load_model(self) -> None:
        if self._file.exists():
            self.model.load_weights(str(self._file))
            self.model._initial_epoch = self.model.outer_step // self.steps_per_epoch


def index_batches(count: int, size: int, seed: int, first: int = 0) -> tf.data.Dataset:
    """Batches of `size` indices below `count` without end, from the `first` one on.

    One random permutation after the other, each cut into batches; what is left of one
    is dropped. Batch n depends on the arguments and n alone, so that a resumed run goes
    on where it was.
    """
    per_permutation = count // size
    permutations, rest = divmod(first, per_permutation)

    def batches(number: tf.Tensor) -> tf.data.Dataset:
        key = tf.stack([tf.constant(seed, tf.int64), number])
        order = tf.random.experimental.stateless_shuffle(tf.range(count), key)
        order = order[: per_permutation * size]
        return tf.data.Dataset.from_tensor_slices(tf.reshape(order, [-1, size]))

    return tf.data.Dataset.counter(permutations).flat_map(batches).skip(rest)


def cross_entropy(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """Cross-entropy of integer labels, one value per example.

    Twice differentiated, TensorFlow's fused operation makes a tiny matrix product for
    every example; this form makes none.
    """
    targets = tf.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return -tf.reduce_sum(targets * tf.nn.log_softmax(logits), axis=-1)


def draw_images(
    path: pathlib.Path,
    images: np.ndarray,
    captions: Sequence[str],
    title: str,
    red: Sequence[bool] = (),
    columns: int = 8,
) -> None:
    """A page of images, each with a caption, some of them in red.

    Args:
        path: the picture to write.
        images: [n, height, width] or [n, height, width, channels], in [0, 1].
        captions: what to write above each.
        title: what to write above all.
        red: whether each caption is red; none by default.
        columns: images in a row.
    """
    # Only scripts draw; the library does not ask for matplotlib.
    import matplotlib.pyplot as plt

    rows = math.ceil(len(images) / columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(1.13 * columns, 1.4 * rows + 0.5), squeeze=False
    )
    for axes in grid.flat:
        axes.axis("off")
    for place, image in enumerate(images):
        axes = grid.flat[place]
        axes.imshow(np.squeeze(image), cmap="gray", vmin=0, vmax=1)
        colour = "tab:red" if red and red[place] else "black"
        axes.set_title(captions[place], fontsize=7, color=colour)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    """Write JSON so that the file is either whole or as before."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(dict(values), indent=2, default=float) + "\n")
    os.replace(partial, path)


def _versions() -> dict[str, str]:
    names = ("tensorflow", "keras", "numpy")
    return {
        "tfbilevel": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
    }
