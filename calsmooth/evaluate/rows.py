"""Rows of a task's splits: from the Hugging Face hub at a pinned revision, or from local files in the same columns."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calsmooth.data.readers import BadRow, Row, reader
from calsmooth.errors import CalsmoothError, UsageError
from calsmooth.hub import prepare_hub

SUFFIXES = ("jsonl", "json", "csv", "tsv", "parquet")


@dataclass(frozen=True)
class Hub:
    """Where a task's data is on the Hugging Face hub."""

    dataset: str
    revision: str
    config: str | None = None

    def __str__(self) -> str:
        return f"{self.dataset}{f' {self.config}' if self.config else ''} at {self.revision[:10]}"


def hub_rows(task: str, hub: Hub, split: str, otherwise: str) -> Iterator[Row]:
    """Rows of a split on the hub, or from its cache.

    otherwise: the end of the message for when it can't be had: what to give instead.

    Raises:
        CalsmoothError: neither the hub nor its cache has it.
    """
    online = prepare_hub()
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(hub.dataset, hub.config, split=split, revision=hub.revision)
    except (OSError, ValueError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        why = first if online else "the Hugging Face hub can't be reached and its cache doesn't hold it"
        raise CalsmoothError(f"--task {task}: can't load {hub.dataset}: {why}; {otherwise}") from error
    for number, row in enumerate(rows, 1):
        yield Row(dict(row), f"{hub.dataset} {split}, row {number}")


def task_folder(data_dir: Path, task: str) -> Path:
    """The task's folder: `data_dir`/`task` where there is one, else `data_dir` itself.

    Raises:
        UsageError: `data_dir` isn't a folder.
    """
    if data_dir.is_file():
        raise UsageError(f"--data-dir {data_dir}: is a file; give its folder, {data_dir.parent}")
    if not data_dir.is_dir():
        raise UsageError(f"--data-dir {data_dir}: no such folder; give one that holds the task's files")
    return data_dir / task if (data_dir / task).is_dir() else data_dir


def split_files(
    folder: Path, split: str, config: str | None, own_files: Sequence[str] = (), own_folders: Sequence[str] = ()
) -> list[Path]:
    """The files of a split, in order; none where the folder doesn't have it.

    A split is one file under its own name (validation.jsonl) or one of its publishers' (`own_files`), in the folder or
    where these lie in the publishers' archive (`own_folders`, patterns); or the parquet files of a copy of the hub's
    repository, in the folder itself, in data/ or in its configuration's.
    """
    names = [f"{split}.{suffix}" for suffix in SUFFIXES]
    unpacked = [place for pattern in own_folders for place in sorted(folder.glob(pattern)) if place.is_dir()]
    for place in (folder, *unpacked):
        single = next((place / name for name in (*names, *own_files) if (place / name).is_file()), None)
        if single is not None:
            return [single]
    places = [folder, *(folder / name for name in (config, "data") if name)]
    shards = (sorted(place.glob(f"{split}-*-of-*.parquet")) for place in places)
    return next((files for files in shards if files), [])


def file_rows(files: Sequence[Path]) -> Iterator[Row]:
    """Rows of files, one after the other.

    Raises:
        CalsmoothError: a file can't be read, isn't what its suffix says, or has a row that is none: a question that is
            left out changes what is measured.
    """
    for file in files:
        for row in reader(file)(file):
            if isinstance(row, BadRow):
                raise CalsmoothError(row.why)
            yield row


def headless_csv(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(where, cells) of a CSV file without a header, exactly as they stand: an option that reads None stays that word.

    Raises:
        CalsmoothError: the file can't be read, isn't UTF-8 or isn't CSV.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for number, cells in enumerate(csv.reader(file, strict=True), 1):
                if cells:
                    yield f"{path}, row {number}", cells
    except OSError as error:
        raise CalsmoothError(f"{path}: can't be read ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise CalsmoothError(f"{path}: not a UTF-8 CSV file ({error})") from None


def column(where: str, columns: Any, name: str) -> Any:
    """A field of a row, or of an object within one.

    Raises:
        CalsmoothError: there is none of that name; the message lists those that there are.
    """
    if not isinstance(columns, Mapping):
        raise CalsmoothError(f"{where}: expected an object with '{name}', got {columns!r}")
    if name not in columns:
        raise CalsmoothError(f"{where}: no column '{name}'; it has {', '.join(map(str, columns)) or 'none'}")
    return columns[name]


def keyed_question(row: Row, text_column: str) -> tuple[Any, list[Any], int]:
    """(question, choices, index of the right one) where choices carry labels and 'answerKey' is one of these.

    On the hub the question is a column of its own and 'choices' holds {text: [...], label: [...]}; in the files of
    ARC's, OpenBookQA's and CommonsenseQA's authors 'question' holds {stem, choices: [{text, label}, ...]}.

    Raises:
        CalsmoothError: a field is missing, or the key isn't one of the labels.
    """
    where, question = row.where, row.columns.get("question")
    if isinstance(question, dict) and text_column not in question:
        text, listed = column(where, question, "stem"), column(where, question, "choices")
        texts = [column(where, choice, "text") for choice in listed]
        labels = [column(where, choice, "label") for choice in listed]
    else:
        text, choices = column(where, row.columns, text_column), column(where, row.columns, "choices")
        texts, labels = column(where, choices, "text"), column(where, choices, "label")
        if not isinstance(texts, list) or not isinstance(labels, list) or len(texts) != len(labels):
            raise CalsmoothError(f"{where}: 'choices' must hold as many texts as labels, got {choices!r}")
    names = [str(label).strip() for label in labels]
    key = str(column(where, row.columns, "answerKey")).strip()
    if key not in names:
        raise CalsmoothError(f"{where}: 'answerKey' must be one of {', '.join(names)}, got {key!r}")
    return text, texts, names.index(key)
