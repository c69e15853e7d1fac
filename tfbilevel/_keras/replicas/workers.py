"""What several workers must do together before and after training."""

import contextlib
import zlib
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbilevel._keras.backup import Backup
from tfbilevel._keras.replicas.strategies import is_chief

# Callbacks of Keras that write the same files on every worker.
WRITERS = (
    keras.callbacks.ModelCheckpoint,
    keras.callbacks.BackupAndRestore,
    keras.callbacks.CSVLogger,
    keras.callbacks.TensorBoard,
)


def has_workers(strategy: Any) -> bool:
    """Whether the strategy's replicas are in several processes."""
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return False
    cluster = strategy.cluster_resolver.cluster_spec()
    return sum(cluster.num_tasks(job) for job in cluster.jobs) > 1


def callbacks_of_worker(strategy: Any, callbacks: Any) -> Any:
    """A worker's callbacks: files are written by the first one, and read by all.

    Waits for the other workers, so that files of an earlier training are complete.

    Args:
        strategy: a strategy with several workers.
        callbacks: those for `fit`.
    """
    of_all_workers(strategy, [0])
    wrapped = isinstance(callbacks, keras.callbacks.CallbackList)
    made = callbacks.callbacks if wrapped else keras.tree.flatten(callbacks or [])
    if not is_chief(strategy):
        made = [_OfFirstWorker(one) if _writes(one) else one for one in made]
    agreement = _BeginAlike(strategy)
    if not wrapped:
        return [*made, agreement]
    agreement.set_model(callbacks.model)
    callbacks.callbacks[:] = [*made, agreement]
    return callbacks


def _writes(callback: Any) -> bool:
    return isinstance(callback, WRITERS) and not isinstance(callback, Backup)


class _OfFirstWorker(keras.callbacks.Callback):
    """What a callback that writes files does on other workers: it restores, if it can.

    Args:
        callback: the callback, which is called on the first worker only.
    """

    def __init__(self, callback: keras.callbacks.Callback):
        super().__init__()
        self.callback = callback

    def set_params(self, params: Any) -> None:
        self.callback.set_params(params)

    def on_train_begin(self, logs: Any = None) -> None:
        if isinstance(self.callback, keras.callbacks.BackupAndRestore):
            # Not of the others: by this a TensorBoard opens a file.
            self.callback.set_model(self.model)
            self.callback.on_train_begin(logs)


class _BeginAlike(keras.callbacks.Callback):
    """Raises if workers have restored different weights.

    It must be after the callbacks that restore.
    """

    def __init__(self, strategy: Any):
        super().__init__()
        self.strategy = strategy

    def on_train_begin(self, logs: Any = None) -> None:
        digest = 0
        for variable in (*self.model.variables, *self.model.optimizer.variables):
            digest = zlib.crc32(np.asarray(variable.numpy()).tobytes(), digest)
        begun = of_all_workers(self.strategy, [self.model.outer_step, digest])
        if any(one != begun[0] for one in begun):
            raise ValueError(
                "All workers must begin with the same weights. Load the same file on "
                "every worker, and give callbacks that restore, such as tb.Backup, a "
                "folder that all workers share. "
                "Received: outer steps and checksums of weights, of each worker, "
                f"{begun}"
            )


def of_all_workers(strategy: Any, numbers: list[int]) -> list[list[int]]:
    """Each worker's numbers."""
    own = tf.constant([numbers], tf.int64)
    return strategy.gather(own, axis=0).numpy().tolist()


@contextlib.contextmanager
def while_all_are_there() -> Iterator[None]:
    """If another worker has ended, one line says so."""
    try:
        yield
    except tf.errors.UnavailableError as error:
        lines = str(error.message).split("}} ")[-1].splitlines()
        raise tf.errors.UnavailableError(
            None,
            None,
            "Another worker has ended or cannot be reached, and no step can be made "
            "without it. Start all workers again, this one too: with tb.Backup they "
            "go on after the last epoch that was saved. "
            f"Received: {' '.join(lines[:3])}",
        ) from None
