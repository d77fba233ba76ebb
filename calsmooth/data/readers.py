"""Rows of one file, one after another: JSON Lines, JSON, CSV, TSV or parquet.

A line that can't be read stands as a `BadRow` among the others, so that the caller may skip and count it. A file that
can't be read at all is an error.
"""

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calsmooth.errors import CalsmoothError, UsageError

ROWS_AT_ONCE = 1024
"""Of a parquet file, of which more than a part may not fit into memory."""


@dataclass(frozen=True)
class Row:
    """One row's columns, and where it came from, for messages: 'train.jsonl, line 12'."""

    columns: dict[str, Any]
    where: str


@dataclass(frozen=True)
class BadRow:
    """What stands where a row should: in one line, where that is and why it is none."""

    why: str


def reader(path: Path) -> "Callable[[Path], Iterator[Row | BadRow]]":
    """The function that reads this type of file, told from its suffix.

    Raises:
        UsageError: no known type.
    """
    found = READERS.get(path.suffix.lower())
    if found is None:
        raise UsageError(f"--dataset {path}: unknown file type; expected one of {', '.join(READERS)}")
    return found


def as_row(value: Any, where: str) -> Row | BadRow:
    if not isinstance(value, dict):
        return BadRow(f"{where}: expected an object with named columns, got a {type(value).__name__}")
    return Row(value, where)


def _from_jsonl(path: Path) -> Iterator[Row | BadRow]:
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}, line {number}"
                try:
                    # Some editors begin a file with a byte-order mark.
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                    if not text.strip():
                        continue
                    value = json.loads(text)
                except UnicodeDecodeError as error:
                    yield BadRow(f"{where}: not UTF-8 text ({error.reason} at byte {error.start + 1} of the line)")
                except (ValueError, RecursionError) as error:
                    yield BadRow(f"{where}: not valid JSON ({error})")
                else:
                    yield as_row(value, where)
    except OSError as error:
        raise CalsmoothError(f"{path}: can't be read ({error.strerror})") from None


def _from_json(path: Path) -> Iterator[Row | BadRow]:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise CalsmoothError(f"{path}: not readable as JSON ({error}){_json_lines_hint(error)}") from None
    if not isinstance(value, list):
        raise CalsmoothError(f"{path}: expected a list of rows, got a {type(value).__name__}")
    for number, row in enumerate(value, 1):
        yield as_row(row, f"{path}, row {number}")


def _json_lines_hint(error: Exception) -> str:
    # What the parser says where a second object follows the first.
    return "; rows one a line are a .jsonl file's" if str(error).startswith("Extra data: line 2 ") else ""


def _from_csv(path: Path, separator: str = ",", name: str = "CSV") -> Iterator[Row | BadRow]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:  # spreadsheets begin with a byte-order mark
            table = csv.DictReader(file, delimiter=separator, strict=True)
            for row in table:
                where = f"{path}, line {table.line_num}"
                if None in row or None in row.values():
                    yield BadRow(f"{where}: expected {len(table.fieldnames or [])} columns, as in the header")
                else:
                    yield Row(dict(row), where)
    except csv.Error as error:
        raise CalsmoothError(f"{path}, line {table.reader.line_num}: not readable as {name} ({error})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CalsmoothError(f"{path}: not readable as {name} ({error})") from None


def _from_tsv(path: Path) -> Iterator[Row | BadRow]:
    """As spreadsheets write it: what begins with a quotation mark is quoted."""
    return _from_csv(path, "\t", "TSV")


def _from_parquet(path: Path) -> Iterator[Row | BadRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(ROWS_AT_ONCE):
            for row in batch.to_pylist():
                number += 1
                yield as_row(row, f"{path}, row {number}")
    except (OSError, pyarrow.ArrowException) as error:
        raise CalsmoothError(f"{path}: not readable as parquet ({error})") from None


READERS: dict[str, Callable[[Path], Iterator[Row | BadRow]]] = {
    ".jsonl": _from_jsonl,
    ".ndjson": _from_jsonl,
    ".json": _from_json,
    ".csv": _from_csv,
    ".tsv": _from_tsv,
    ".parquet": _from_parquet,
}
