"""Backups during `fit` that survive a kill."""

import os
import pathlib
from typing import Any

import keras

from tfbilevel._core.arguments import require_count
from tfbilevel._keras.replicas.strategies import is_chief


class Backup(keras.callbacks.BackupAndRestore):
    """A callback that saves at the end of every epoch, and resumes after a kill.

        first epoch after a kill = outer steps in the saved weights // steps_per_epoch

    `keras.callbacks.BackupAndRestore` overwrites the last good weights, and then writes
    the epoch to another file. A kill during the first write loses the run; a kill
    between the two repeats an epoch. This callback replaces the old weights by the new
    ones in one atomic step, and derives the epoch from them. A kill at any moment costs
    at most the current epoch, and the resumed fit ends with the same numbers as an
    uninterrupted one if its batches depend only on the outer step. Those of arrays do
    (in `fit` and in `tb.pair`); so do `tb.index_batches`.

    Of several workers (tf.distribute.MultiWorkerMirroredStrategy) the first one writes,
    and all of them read: the folder must be one that they share.

    Cost: one `save_weights` per epoch (both models, the states of the method and the
    optimizers). During a save the disk holds them twice.

    Assumes that all outer steps of the model come from this training, because epochs
    are counted by them. Called again with a finished training's folder, `fit` restores
    the final weights and does not train further.

    Args:
        folder: the folder of the backup. It is created if needed, and kept when
            training ends. Only one training may write to it at a time.
        steps_per_epoch: outer steps of one epoch, at least 1. `None`: as many as `fit`
            makes of the data, if it knows before the first epoch.

    Raises:
        ValueError: if `steps_per_epoch` is not an integer of at least 1; when `fit`
            starts, if it is needed and missing, or for weights of another model (raised
            by Keras).

    Example:
        >>> def model():
        ...     weights = tb.ExampleWeights(2)
        ...     network = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        ...     model = tb.BilevelModel(
        ...         weights, network,
        ...         lambda upper, lower, x: tf.reduce_mean((lower(x) - x) ** 2),
        ...         lambda upper, lower, x: upper.mean((lower(x) - 2.0)[:, 0] ** 2),
        ...     )
        ...     inner = tb.InnerSolver(keras.optimizers.SGD(0.1), steps=2)
        ...     model.compile(tb.Unroll(inner), "sgd", jit_compile=False)
        ...     return model
        >>> data = tf.data.Dataset.from_tensors(tf.constant([[1.0], [2.0]]))
        >>> batches = tb.pair(data, data)
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     backup = tb.Backup(folder)
        ...     _ = model().fit(batches, epochs=2, callbacks=[backup], verbose=0)
        ...     resumed = model()
        ...     _ = resumed.fit(batches, epochs=3, callbacks=[backup], verbose=0)
        >>> resumed.outer_step, len(resumed.history.epoch)  # 2 of them before
        (3, 1)
    """

    def __init__(self, folder: str | os.PathLike, steps_per_epoch: int | None = None):
        if steps_per_epoch is not None:
            require_count(steps_per_epoch, "steps_per_epoch")
        super().__init__(str(folder), save_freq="epoch", delete_checkpoint=False)
        self.folder, self.steps_per_epoch = pathlib.Path(folder), steps_per_epoch

    @property
    def _file(self) -> pathlib.Path:
        return self.folder / "latest.weights.h5"

    def _save_model(self) -> None:
        if not is_chief(self.model.distribute_strategy):
            return  # all workers have the same weights
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / "partial.weights.h5"
        self.model.save_weights(str(partial))
        os.replace(partial, self._file)

    def on_train_begin(self, logs: Any = None) -> None:
        if self._steps is None:
            raise ValueError(
                "`steps_per_epoch` must be given to tb.Backup if the length of the "
                "dataset is unknown, because epochs are counted in outer steps. Pass "
                "tb.Backup(folder, steps_per_epoch=...). "
                "Received: steps_per_epoch=None"
            )
        super().on_train_begin(logs)

    def on_train_end(self, logs: Any = None) -> None:
        super().on_train_end(logs)
        self.model._initial_epoch = None  # applies to this fit, not to the next one

    def restore(self) -> None:
        """Load the weights into the model if there are any."""
        self._load_model()

    @property
    def _steps(self) -> int | None:
        """The outer steps of one epoch; `None` if unknown."""
        return self.steps_per_epoch or (self.params or {}).get("steps")

    def _load_model(self) -> None:
        if self._file.exists():
            self.model.load_weights(str(self._file))
            if self._steps is not None:
                self.model._initial_epoch = self.model.outer_step // self._steps
