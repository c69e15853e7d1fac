"""Tables of a CSV or Parquet file: one row per example, columns by name."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from tfbilevel._jobs.command_line.bad_input import BadInput, nearest
from tfbilevel._jobs.command_line.data import Data, Preparation, Source
from tfbilevel._jobs.default_networks import text_layer
from tfbilevel._jobs.optional_packages import optional_package

SUFFIXES = (".csv", ".parquet")
# A column of strings with more values than this is none of categories.
MOST_CATEGORIES = 50
# Words of a text column that stands beside other columns.
WORDS_BESIDE = 2000


@dataclasses.dataclass(frozen=True)
class Column:
    """A column that the network sees: `kind` is "number", "category" or "text"."""

    name: str
    kind: str

    @property
    def key(self) -> str:
        """Its name among the inputs of the saved model: Keras forbids slashes."""
        return self.name.replace("/", "_")


def read_tables(
    path: pathlib.Path,
    trusted: pathlib.Path | None,
    label: str,
    columns: Sequence[str] | None,
    text: str | None,
) -> Source:
    """The examples of one or two tables.

    Args:
        path: the table.
        trusted: the one with right labels.
        label: the column of labels.
        columns: those that the network sees; `None`: all that it can use, or `text`
            alone where that is given.
        text: the column of texts.

    Raises:
        BadInput: for files that are no tables, columns that are not there, and values
            that are missing.
        MissingPackageError: without pandas, or pyarrow for Parquet.
    """
    table = read_table(path)
    used, note = chosen_columns(table, path.name, label, columns, text)
    data = _data(table, path.name, label, used)
    other = None
    if trusted is not None:
        other_table = read_table(trusted)
        _require_same_columns(table, other_table, path.name, trusted.name, label, used)
        other = _data(other_table, trusted.name, label, used)

    def corrected(labels: np.ndarray) -> tuple[str, Any]:
        return "cleaned.csv", functools.partial(_write_corrected, path, label, labels)

    return Source(data, other, lambda: preparation(data.shown, used, note), corrected)


def read_table(path: pathlib.Path, as_text: bool = False) -> Any:
    """A pandas table.

    Args:
        path: the file.
        as_text: every cell of a CSV file as it stands there.
    """
    pandas = optional_package("pandas", f"Reading {path.name}")
    try:
        if path.suffix == ".parquet":
            optional_package("pyarrow", f"Reading {path.name}")
            table = pandas.read_parquet(path)
        elif as_text:
            table = pandas.read_csv(path, dtype=str, keep_default_na=False)
        else:
            table = pandas.read_csv(path, low_memory=False)
    except (ValueError, OSError) as error:  # pandas's and pyarrow's own are ValueErrors
        reason = str(error).strip().splitlines()[0]
        raise BadInput(f"{path} cannot be read as a table: {reason}") from error
    table.columns = [str(name) for name in table.columns]
    if not len(table):
        raise BadInput(f"{path} has no rows")
    return table


def chosen_columns(
    table: Any, source: str, label: str, columns: Sequence[str] | None, text: str | None
) -> tuple[list[Column], str]:
    """The columns that the network sees, and a sentence about those left out."""
    for name in [label, *(columns or []), *([text] if text else [])]:
        if name not in table.columns:
            raise BadInput(
                f"{source} has no column {name!r}. {nearest(name, table.columns)}"
            )
    if label in (columns or []) or label == text:
        raise BadInput(f"the column {label!r} is the label: it cannot be a feature too")
    names = list(columns or [])
    left = []
    if columns is None and text is None:
        for name in table.columns:
            if name != label:
                (names if _kind(table[name]) else left).append(name)
    used = []
    for name in names:
        if name == text:
            continue
        kind = _kind(table[name])
        if kind is None:
            raise BadInput(
                f"the column {name!r} of {source} holds neither numbers nor few "
                f"different strings, but {table[name].nunique():,} values of type "
                f"{table[name].dtype}. If it is text, give --text {name}; else leave "
                "it out of --columns"
            )
        used.append(Column(name, kind))
    used += [Column(text, "text")] if text else []
    if not used:
        remedy = f" Give --text {left[0]} if that is text." if left else ""
        raise BadInput(
            f"{source} has no column for the network beside the label {label!r}."
            + remedy
        )
    note = "Columns: " + ", ".join(f"{c.name} ({c.kind})" for c in used) + "."
    if left:
        note += (
            f" Left out, because of many different values: {', '.join(left)}; --text "
            "takes one of them as text."
        )
    return used, note


def _kind(column: Any) -> str | None:
    """ "number", "category", or None for what a network cannot take."""
    if column.dtype.kind in "biuf":
        return "number"
    values = column.dropna()
    if not all(isinstance(value, (str, bool)) for value in values.head(100)):
        return None
    different = values.nunique()
    few = different <= MOST_CATEGORIES and different <= max(2, len(values) / 2)
    return "category" if few else None


def _require_same_columns(
    table: Any, other: Any, source: str, other_source: str, label: str, used: list
) -> None:
    for name in [label, *(column.name for column in used)]:
        if name not in other.columns:
            raise BadInput(
                f"{other_source} has no column {name!r}, which {source} has. "
                f"{nearest(name, other.columns)}"
            )
    for column in used:
        numbers = other[column.name].dtype.kind in "biuf"
        empty = other[column.name].isna().all()
        if numbers != (column.kind == "number") and not empty:
            kinds = ("text", "numbers")
            raise BadInput(
                f"the column {column.name!r} holds {kinds[not numbers]} in {source} "
                f"but {kinds[numbers]} in {other_source}"
            )


def _data(table: Any, source: str, label: str, used: list[Column]) -> Data:
    missing = np.flatnonzero(table[label].isna())
    if len(missing):
        raise BadInput(
            f"the column {label!r} of {source} has no label in {_rows(missing)}. "
            "Remove these rows"
        )
    inputs = {}
    for column in used:
        values = table[column.name]
        if column.kind == "number":
            numbers = values.to_numpy(np.float32, na_value=np.nan)
            wrong = np.flatnonzero(~np.isfinite(numbers))
            if len(wrong):
                raise BadInput(
                    f"the column {column.name!r} of {source} has no finite number in "
                    f"{_rows(wrong)}. Fill them in, or choose other --columns"
                )
            inputs[column.key] = numbers[:, None]
        else:  # a missing string is a category of its own, and a text without words
            strings = values.astype(object).where(values.notna(), "").astype(str)
            inputs[column.key] = strings.to_numpy(object).astype(str)[:, None]
    shown = table[[column.name for column in used]]
    if [column.kind for column in used] == ["text"]:
        shown = inputs[used[0].key][:, 0]
    return Data(source, shown, inputs, np.asarray(table[label]))


def _rows(numbers: np.ndarray) -> str:
    first = f"row {numbers[0] + 1}"
    return (
        first if len(numbers) == 1 else f"{len(numbers):,} rows, the first is {first}"
    )


def preparation(shown: Any, used: list[Column], note: str) -> Preparation:
    """Layers for the columns: made from the noisy examples, saved with the model."""
    if [column.kind for column in used] == ["text"]:
        layer = text_layer(shown)
        raw = keras.Input((1,), name=used[0].key, dtype="string")
        model = keras.Model({used[0].key: raw}, layer(raw))
        return Preparation("text", model, note, layer.vocabulary_size())
    inputs, parts = {}, []
    for number, column in enumerate(used):
        values = shown[column.name]
        # Layers get names of their own: a column may be called like a layer.
        name = f"prepared_{number}"
        if column.kind == "number":
            raw = keras.Input((1,), name=column.key)
            layer = keras.layers.Normalization(name=name)
            layer.adapt(values.to_numpy(np.float32)[:, None])
        else:
            raw = keras.Input((1,), name=column.key, dtype="string")
            strings = values.astype(object).where(values.notna(), "").astype(str)
            if column.kind == "category":
                layer = keras.layers.StringLookup(
                    vocabulary=sorted(set(strings)), output_mode="one_hot", name=name
                )
            else:
                layer = keras.layers.TextVectorization(
                    max_tokens=WORDS_BESIDE, output_mode="tf_idf", name=name
                )
                layer.adapt(strings.to_numpy(object).astype(str), batch_size=1024)
        inputs[column.key] = raw
        prepared = layer(raw)
        if column.kind == "text":  # Keras takes it for [n, 1, words]
            prepared = keras.layers.Reshape((layer.vocabulary_size(),))(prepared)
        parts.append(prepared)
    joined = keras.layers.Concatenate(name="prepared")(parts) if parts[1:] else parts[0]
    return Preparation("tabular", keras.Model(inputs, joined), note)


def _write_corrected(
    source: pathlib.Path, label: str, labels: np.ndarray, path: Any
) -> None:
    """The input again, cell by cell, with other labels where they differ."""
    table = read_table(source, as_text=True)
    given = np.asarray(read_table(source)[label])
    as_written = dict(zip(given.tolist(), table[label].tolist(), strict=True))
    table[label] = [
        old if new == value else as_written.get(new, str(new))
        for old, new, value in zip(
            table[label].tolist(), labels.tolist(), given.tolist(), strict=True
        )
    ]
    table.to_csv(path, index=False)
