"""Rows from where users keep them: JSON Lines, JSON, CSV or parquet files, a folder, the Hugging Face hub."""

import csv
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calsmooth.errors import CalsmoothError, UsageError
from calsmooth.files import read_jsonl
from calsmooth.hub import prepare_hub
from calsmooth.models import BUILT_IN


@dataclass(frozen=True)
class Row:
    """One row's columns, and where it came from, for messages: 'train.jsonl, line 12'."""

    columns: dict[str, Any]
    where: str


def load_rows(
    source: str, *, split: str | None = None, revision: str | None = None, limit: int | None = None, seed: int = 0
) -> list[Row]:
    """All rows of a data set, or a random `limit` of them in their own order.

    Args:
        source: a .jsonl, .json, .csv or .parquet file; a folder or hub id that `datasets` can load, 'org/name' or
            'org/name:configuration'; or 'demo', the built-in instruction data.
        split: of a folder or hub data set; 'train' by default.
        revision: branch, tag or commit on the hub.

    Raises:
        UsageError: the source looks like a path and isn't there, or its type is unknown.
        CalsmoothError: it can't be read or fetched, holds no rows, or a row isn't a mapping of columns.
    """
    if source == BUILT_IN:
        from calsmooth.demo import TRAIN_FILE

        source = str(TRAIN_FILE)
    path = Path(source).expanduser()
    if path.is_file():
        rows = list(_reader(path)(path))
    elif source and (path.is_dir() or _looks_like_hub_id(source)):
        rows = list(_from_datasets(source, path, split or "train", revision))
    else:
        raise UsageError(f"--dataset {source}: no such file; give a file, a folder or a hub id such as org/name")
    if not rows:
        raise CalsmoothError(f"--dataset {source}: holds no rows")
    if limit is not None and limit < len(rows):
        rows = [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), limit))]
    return rows


def _looks_like_hub_id(source: str) -> bool:
    name = source.split(":", 1)[0]
    suffix = Path(name).suffix.lower()
    return not name.startswith((".", "/", "~")) and name.count("/") <= 1 and suffix not in _READERS and bool(name)


def _reader(path: Path) -> "Callable[[Path], Iterator[Row]]":
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UsageError(f"--dataset {path}: unknown file type; expected one of {', '.join(_READERS)}")
    return reader


def _from_jsonl(path: Path) -> Iterator[Row]:
    for number, value in read_jsonl(path):
        yield _row(value, f"{path}, line {number}")


def _from_json(path: Path) -> Iterator[Row]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CalsmoothError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, list):
        raise CalsmoothError(f"{path}: expected a list of rows, got a {type(value).__name__}")
    for number, row in enumerate(value, 1):
        yield _row(row, f"{path}, row {number}")


def _from_csv(path: Path) -> Iterator[Row]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:  # spreadsheets begin with a byte-order mark
            reader = csv.DictReader(file, strict=True)
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise CalsmoothError(f"{where}: expected {len(reader.fieldnames or [])} columns, as in the header")
                yield Row(dict(row), where)
    except csv.Error as error:
        raise CalsmoothError(f"{path}, line {reader.reader.line_num}: not readable as CSV ({error})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CalsmoothError(f"{path}: not readable as CSV ({error})") from None


def _from_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise CalsmoothError(f"{path}: not readable as parquet ({error})") from None
    for number, row in enumerate(table.to_pylist(), 1):
        yield _row(row, f"{path}, row {number}")


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _from_jsonl,
    ".ndjson": _from_jsonl,
    ".json": _from_json,
    ".csv": _from_csv,
    ".parquet": _from_parquet,
}


def _from_datasets(source: str, path: Path, split: str, revision: str | None) -> Iterator[Row]:
    online = path.is_dir() or prepare_hub()
    import datasets

    name, _, configuration = (str(path), "", "") if path.is_dir() else source.partition(":")
    try:
        rows = datasets.load_dataset(name, configuration or None, split=split, revision=revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        why = " ".join(str(error).split())[:200] if online else "the hub can't be reached and the cache doesn't hold it"
        raise CalsmoothError(
            f"--dataset {source}: could not be loaded: {why}; check the name, --split and the network, "
            "or give a local file"
        ) from error
    for number, row in enumerate(rows, 1):
        yield _row(row, f"{source} ({split}), row {number}")


def _row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise CalsmoothError(f"{where}: expected an object with named columns, got a {type(value).__name__}")
    return Row(value, where)
