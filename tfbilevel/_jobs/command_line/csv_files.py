"""CSV files, written without pandas."""

import csv
import os
from collections.abc import Iterable, Mapping


def write_csv(path: str | os.PathLike, columns: Mapping[str, Iterable]) -> None:
    """Columns of one length, with their names in the first line."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
