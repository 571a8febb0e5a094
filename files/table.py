"""Rows of csv files."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from files.writing import identity

T = TypeVar("T")


def check_row(row: dict) -> dict[str, str]:
    """A row as csv.DictReader gives it; raises ValueError if it has more or fewer fields than there are columns."""
    columns = len(row) - (None in row)
    fields = columns - sum(value is None for value in row.values()) + len(row.get(None, ()))
    if fields != columns:
        raise ValueError(f"{fields} fields, expected {columns}; a prompt with a comma is written in quotes,"
                         ' "so, as here"')
    return row


def read_table(path: Path, needed: tuple[str, ...], read: Callable[[dict], T]) -> list[T]:
    """What `read` makes of each row of a csv file in UTF-8, which must have the `needed` columns. Raises OSError, or
    ValueError naming file and row."""
    rows, columns = [], []
    identity(path)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            columns = list(reader.fieldnames or [])
            for row in reader if set(needed) <= set(columns) else ():
                rows.append(read(row))
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a readable csv file, expected text in UTF-8") from None
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{path}, row {len(rows) + 1}: {error}") from None
    if not rows:
        raise ValueError(f"{path}: columns {columns}, expected {' and '.join(needed)}, and at least one row")
    return rows
