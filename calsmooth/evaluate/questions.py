"""A multiple-choice question, what a task loads, and the reading of rows: every bad row is named by file and line."""

import csv
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calsmooth.errors import CalsmoothError, UsageError
from calsmooth.files import read_json, read_jsonl
from calsmooth.hub import prepare_hub

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Question:
    """`answer` is the index of the right choice. Questions of a `subject` share their solved examples."""

    id: str
    subject: str
    text: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class TaskData:
    """What a task loads: the questions to score and, for each subject, the solved examples in the order of use."""

    questions: list[Question]
    examples: Mapping[str, Sequence[Question]]
    source: str
    notes: list[str] = field(default_factory=list)


class Task:
    """Base of the multiple-choice tasks: a subclass says where its questions are and how they read."""

    name: str
    format = "letter"
    """What `--format` overrides: letter (the choices are listed) or cloze (each choice is a continuation)."""
    shots = 5
    conversation = False
    """Whether the cloze format is a chat turn, rendered as finetune renders its data."""

    def load(self, data_dir: Path | None, shots: int) -> TaskData:
        """The task's questions, from `data_dir` or, without one, from the hub (through its cache).

        Raises:
            UsageError: `data_dir` doesn't hold this task's files.
            CalsmoothError: a row is bad (file and row are named), or the hub can't be reached and nothing is cached.
        """
        raise NotImplementedError

    def cloze_header(self, subject: str) -> str:
        """What stands before the first solved example in the cloze format."""
        return ""

    def cloze_context(self, question: Question) -> str:
        """What stands before the choice in the cloze format; a space and the choice follow."""
        return f"Question: {question.text.strip()}\nAnswer:"


Row = tuple[str, Any]
"""(where it stands, for messages; its content)."""


def make_question(where: str, id: str, subject: str, text: Any, choices: Any, answer: Any) -> Question:
    """A validated question.

    Raises:
        CalsmoothError: the question or a choice is missing or isn't text, there are fewer than 2 or more than 26
            choices, or the answer isn't the index of one.
    """
    if not isinstance(text, str) or not text.strip():
        raise CalsmoothError(f"{where}: the question must be text that isn't empty, got {text!r}")
    if not isinstance(choices, list | tuple) or not 2 <= len(choices) <= len(LETTERS):
        raise CalsmoothError(f"{where}: expected a list of 2 to {len(LETTERS)} choices, got {choices!r}")
    for choice in choices:
        if not isinstance(choice, str) or not choice.strip():
            raise CalsmoothError(f"{where}: every choice must be text that isn't empty, got {choice!r}")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise CalsmoothError(f"{where}: the answer must be an index from 0 to {len(choices) - 1}, got {answer!r}")
    return Question(id, subject, text, tuple(choices), answer)


def column(where: str, row: Any, name: str) -> Any:
    """A row's field.

    Raises:
        CalsmoothError: the row isn't an object or doesn't have it; the message lists what it has.
    """
    if not isinstance(row, Mapping):
        raise CalsmoothError(f"{where}: expected an object with named columns, got {row!r}")
    if name not in row:
        raise CalsmoothError(f"{where}: no column '{name}'; it has {', '.join(map(str, row)) or 'none'}")
    return row[name]


def task_folder(data_dir: Path, task: str) -> Path:
    """The task's folder: `data_dir`/`task` where there is one, else `data_dir` itself.

    Raises:
        UsageError: `data_dir` isn't a folder.
    """
    if not data_dir.is_dir():
        raise UsageError(f"--data-dir {data_dir}: no such folder; give one that holds the task's files")
    return data_dir / task if (data_dir / task).is_dir() else data_dir


def find_file(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of `names` that is a file in the folder."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def json_rows(path: Path) -> Iterator[Row]:
    """Rows of a JSON list or a JSON Lines file.

    Raises:
        CalsmoothError: the file can't be read or isn't what its suffix says.
    """
    if path.suffix == ".jsonl":
        for line, value in read_jsonl(path):
            yield f"{path}, line {line}", value
        return
    content = read_json(path)
    if not isinstance(content, list):
        raise CalsmoothError(f"{path}: expected a list of objects, got a {type(content).__name__}")
    for number, value in enumerate(content, 1):
        yield f"{path}, row {number}", value


def csv_rows(path: Path) -> Iterator[Row]:
    """Rows of a CSV file as lists of text, exactly as they stand: an option that reads None or NA stays that word.

    Raises:
        CalsmoothError: the file can't be read, isn't UTF-8 or isn't CSV.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.reader(file, strict=True), 1):
                if row:
                    yield f"{path}, row {number}", row
    except OSError as error:
        raise CalsmoothError(f"{path}: can't be read ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise CalsmoothError(f"{path}: not a UTF-8 CSV file ({error})") from None


def hub_rows(task: str, dataset: str, config: str | None, revision: str, split: str, otherwise: str) -> Iterator[Row]:
    """Rows of a split of a data set on the Hugging Face hub, at a pinned revision.

    otherwise: the end of the message for when it can't be had: what to give to --data-dir.

    Raises:
        CalsmoothError: neither the hub nor its cache has it.
    """
    online = prepare_hub()
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(dataset, config, split=split, revision=revision)
    except (OSError, ValueError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        why = first if online else "the Hugging Face hub can't be reached and its cache doesn't hold it"
        raise CalsmoothError(f"--task {task}: can't load {dataset}: {why}; {otherwise}") from error
    for number, row in enumerate(rows, 1):
        yield f"{dataset} {split}, row {number}", row


def sample(questions: list[Question], limit: int | None, seed: int) -> list[Question]:
    """At most `limit` questions, spread evenly over the subjects, in their original order.

    Subjects give one question each in turn until the limit is reached, so that their counts differ by at most one
    unless a subject runs out. The seed draws the order of the subjects and of the questions within each.
    """
    if limit is None or limit >= len(questions):
        return questions
    by_subject: dict[str, list[int]] = defaultdict(list)
    for index, question in enumerate(questions):
        by_subject[question.subject].append(index)
    generator = random.Random(seed)
    hands = list(by_subject.values())
    generator.shuffle(hands)
    for indices in hands:
        generator.shuffle(indices)
    chosen: list[int] = []
    turn = 0
    while len(chosen) < limit:
        chosen += [indices[turn] for indices in hands if turn < len(indices)][: limit - len(chosen)]
        turn += 1
    return [questions[i] for i in sorted(chosen)]
