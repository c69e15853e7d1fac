"""What all commands do with their input: find its kind, read it, prepare it."""

import argparse
import pathlib

import keras
import numpy as np
import tensorflow as tf

from tfbilevel._jobs.command_line import array_files, picture_folders, tables
from tfbilevel._jobs.command_line.bad_input import BadInput
from tfbilevel._jobs.command_line.data import Data, Preparation, Source
from tfbilevel._jobs.labels import Classes, classes_of
from tfbilevel._jobs.networks import gives_probabilities

BATCH = 512


def read_source(options: argparse.Namespace, second: str | None) -> Source:
    """The examples that the command line names.

    Args:
        options: with `data`, `label`, `columns`, `text`, `image_size`.
        second: the other file or folder, of trusted or validation examples.

    Raises:
        BadInput: for what is not there, of no known kind, or of two kinds.
    """
    path = _there(options.data)
    other = _there(second) if second else None
    kind = _kind(path)
    if other is not None and _kind(other) != kind:
        raise BadInput(
            f"{path} is {_kind(path)} but {other} is {_kind(other)}: they must be alike"
        )
    if kind != TABLE and (options.columns or options.text):
        raise BadInput(f"--columns and --text are for tables, but {path} is {kind}")
    if kind == FOLDER:
        return picture_folders.read_folders(path, other, options.image_size)
    if kind == ARRAYS:
        return array_files.read_arrays(path, other, options.label or "y")
    if not options.label:
        raise BadInput(f"--label must name the column of labels of {path}")
    columns = options.columns.split(",") if options.columns else None
    return tables.read_tables(path, other, options.label, columns, options.text)


FOLDER, ARRAYS, TABLE = "a folder of pictures", "a file of arrays", "a table"


def _there(name: str) -> pathlib.Path:
    path = pathlib.Path(name)
    if not path.exists():
        raise BadInput(f"there is no file or folder {name}")
    return path


def _kind(path: pathlib.Path) -> str:
    if path.is_dir():
        return FOLDER
    if path.suffix == ".npz":
        return ARRAYS
    if path.suffix in tables.SUFFIXES:
        return TABLE
    raise BadInput(
        f"{path} must be a .csv, .parquet or .npz file, or a folder of pictures"
    )


def known_classes(data: Data, other: Data | None, must_be_complete: bool) -> Classes:
    """The classes of both, which must have labels of one kind.

    Args:
        data: the examples.
        other: trusted or validation ones.
        must_be_complete: whether `other` must have every class.

    Raises:
        BadInput: for labels of two kinds, one class only, a class without any example.
    """
    both = [data] if other is None else [data, other]
    names = tuple(f"the labels of {each.source}" for each in both)
    try:
        classes = classes_of(*(each.labels for each in both), arguments=names)
        counts = [
            np.bincount(classes.indices(each.labels, name), minlength=len(classes))
            for each, name in zip(both, names, strict=True)
        ]
    except ValueError as error:
        raise BadInput(str(error).replace("`", "")) from error
    if other is not None and must_be_complete and not counts[1].all():
        lacking = [repr(v) for v in classes.values[counts[1] == 0].tolist()]
        raise BadInput(
            f"{other.source} has no example of class {', '.join(lacking[:10])}, which "
            f"{data.source} has. Add some, or remove the class"
        )
    return classes


def features(preparation: Preparation, data: Data) -> np.ndarray:
    """What the network sees, [n, ...]."""
    parts = []
    for start in range(0, len(data), BATCH):
        batch = tf.nest.map_structure(
            lambda array, start=start: tf.constant(array[start : start + BATCH]),
            data.inputs,
        )
        # Eagerly: tracing takes longer than these few calls.
        parts.append(np.asarray(preparation.model(batch, training=False)))
    return np.concatenate(parts)


def with_preparation(
    preparation: Preparation, network: keras.Model, x: np.ndarray
) -> keras.Model:
    """Raw examples -> probabilities of the classes, as one model to save."""
    prepared = preparation.model
    outputs = network(prepared.output)
    if not gives_probabilities(network, x[:BATCH]):
        outputs = keras.layers.Softmax(name="probabilities")(outputs)
    return keras.Model(prepared.input, outputs)
