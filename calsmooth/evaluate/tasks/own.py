"""A user's own task: a YAML file that says where the questions are and which columns they have. No Python.

data: quiz.csv                  # .jsonl, .json, .csv, .tsv or .parquet, beside this file
question: prompt                # its columns
choices: [a, b, c, d]           # a column each, or one that holds a list
answer: correct
answer_as: letter
subject: European capitals
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calsmooth.config import Settings, load, setting
from calsmooth.data.readers import READERS, Row
from calsmooth.errors import CalsmoothError, UsageError
from calsmooth.evaluate.questions import LETTERS, Question, make_question
from calsmooth.evaluate.rows import column, file_rows
from calsmooth.evaluate.task import Task, TaskData, first_examples, hold_back

SUFFIXES = (".yaml", ".yml")
ANSWERS = {
    "index": "the index of the right choice, from 0",
    "number": "the number of the right choice, from 1",
    "letter": "the letter of the right choice",
    "text": "the text of the right choice",
}


@dataclass(frozen=True)
class TaskFile(Settings):
    """The keys of a task's YAML file. Paths are relative to it; columns are named as the data file names them."""

    data: Path | None = setting(None, "File of the questions: .jsonl, .json, .csv, .tsv or .parquet.")
    name: str | None = setting(None, "What results call the task.", shown_default="the YAML file's name")
    question: str = setting("question", "Column of the question.")
    choices: tuple[str, ...] = setting(("choices",), "Column that holds a list, or a column for each choice.")
    answer: str = setting("answer", "Column of the right answer.")
    answer_as: str = setting("index", "What the answer's column holds.", choices=tuple(ANSWERS), flags=("'answer_as'",))
    id: str | None = setting(None, "Column of a question's name.", shown_default="the row's number")
    subject: str | None = setting(None, "What all questions are about, in words.")
    subject_column: str | None = setting(None, "Column of each question's subject, in place of 'subject'.")
    description: str | None = setting(
        None,
        "Text before the first question; {subject} stands for its subject.",
        shown_default="letter: The following are multiple choice questions (with answers) about {subject}.",
    )
    format: str = setting(
        "letter", "How choices are scored unless --format says.", choices=("letter", "cloze"), flags=("'format'",)
    )
    context: str = setting(
        "Question: {question}\nAnswer:", "What stands before a choice in the cloze format; holds {question}."
    )
    shots: int | None = setting(
        None, "Solved examples.", shown_default="5 with 'shots_data', else 0", minimum=0, flags=("'shots'",)
    )
    shots_data: Path | None = setting(
        None, "File of the solved examples, in the same columns.", shown_default="the first rows of 'data'"
    )


def read_task(path: Path) -> "OwnTask":
    """The task that a YAML file describes; its data isn't read yet.

    Raises:
        UsageError: the file can't be read, or a key is unknown, missing or has a wrong value; file and key are named.
    """
    if not path.is_file():
        raise UsageError(f"--task {path}: no such file; give a task's name or an existing YAML file")
    try:
        settings = load(TaskFile, {}, path)
    except UsageError as error:
        message = str(error)
        raise UsageError(message if message.startswith(str(path)) else f"{path}: {message}") from None

    def beside(key: str, file: Path) -> Path:
        found = path.parent / file.expanduser()
        if not found.is_file():
            raise UsageError(f"{path}: '{key}': no file {found}; paths are relative to the YAML file")
        if found.suffix.lower() not in READERS:
            raise UsageError(f"{path}: '{key}': unknown file type {found.name}; expected {', '.join(READERS)}")
        return found

    if settings.data is None:
        raise UsageError(f"{path}: no key 'data'; it names the file of the questions")
    if settings.subject is not None and settings.subject_column is not None:
        raise UsageError(f"{path}: 'subject' and 'subject_column' exclude each other; leave one out")
    if "{question}" not in settings.context:
        raise UsageError(f"{path}: 'context' must hold {{question}}, got {settings.context!r}")
    shots_data = None if settings.shots_data is None else beside("shots_data", settings.shots_data)
    return OwnTask(path, dataclasses.replace(settings, data=beside("data", settings.data), shots_data=shots_data))


class OwnTask(Task):
    """The task of one YAML file."""

    def __init__(self, path: Path, settings: TaskFile) -> None:
        self.path = path
        self.settings = settings
        self.name = self.title = settings.name or path.stem
        self.format = settings.format
        self.shots = settings.shots if settings.shots is not None else 5 if settings.shots_data is not None else 0
        self.subject = None if settings.subject_column else settings.subject or ""

    def question(self, row: Row, id: str) -> Question:
        s = self.settings
        text = self._column(row, s.question, "question")
        choices, labels = self._choices(row)
        answer = self._answer(row, choices, labels)
        subject = (
            self.subject if s.subject_column is None else str(self._column(row, s.subject_column, "subject_column"))
        )
        own_id = id if s.id is None else str(self._column(row, s.id, "id"))
        return make_question(row.where, own_id, subject or "", text, choices, answer)

    def letter_header(self, subject: str, style: str) -> str:
        if self.settings.description is not None:
            return self.cloze_header(subject)
        if not subject:
            return "The following are multiple choice questions (with answers).\n\n"
        return super().letter_header(subject, style)

    def cloze_header(self, subject: str) -> str:
        description = self.settings.description
        return f"{description.replace('{subject}', subject.replace('_', ' ')).rstrip()}\n\n" if description else ""

    def cloze_context(self, question: Question) -> str:
        return self.settings.context.replace("{question}", question.text)

    def load(self, data_dir: Path | None, shots: int) -> TaskData:
        """From the files that the YAML file names; `data_dir` is for the tasks that come with calsmooth."""
        data, solved = self.settings.data, self.settings.shots_data
        assert data is not None
        questions = self._questions(file_rows([data]))
        if not questions:
            raise CalsmoothError(f"{data}: holds no rows")
        if shots == 0:
            return TaskData(questions, {}, str(self.path))
        if solved is not None:
            examples = first_examples(self._questions(file_rows([solved])), questions, shots, str(solved))
            return TaskData(questions, examples, str(self.path))
        each = "of each subject " if self.settings.subject_column is not None else ""
        return hold_back(self.name, questions, shots, str(self.path), f"{each}(no 'shots_data')")

    def _column(self, row: Row, name: str, key: str) -> Any:
        if name not in row.columns:
            there = ", ".join(map(str, row.columns)) or "none"
            raise CalsmoothError(f"{row.where}: no column '{name}' (key '{key}' of {self.path}); it has {there}")
        return row.columns[name]

    def _choices(self, row: Row) -> tuple[list[Any], list[str]]:
        """(texts, their labels): letters by their place, unless the column holds {text: [...], label: [...]}."""
        names = self.settings.choices
        if len(names) > 1:
            texts = [self._column(row, name, "choices") for name in names]
            while texts and texts[-1] in ("", None):  # a question with fewer choices leaves the last columns empty
                texts.pop()
            return texts, list(LETTERS[: len(texts)])
        value = self._column(row, names[0], "choices")
        if isinstance(value, Mapping):
            where = f"{row.where}: column '{names[0]}'"
            return column(where, value, "text"), [str(label) for label in column(where, value, "label")]
        if not isinstance(value, list):
            raise CalsmoothError(
                f"{row.where}: column '{names[0]}' (key 'choices' of {self.path}) must hold a list of choices, "
                f"got {value!r}; where each has its own column, name them all: choices: [a, b, c]"
            )
        return value, list(LETTERS[: len(value)])

    def _answer(self, row: Row, choices: list[Any], labels: list[str]) -> int:
        name, kind = self.settings.answer, self.settings.answer_as
        value = self._column(row, name, "answer")
        given = str(value).strip()
        allowed = {
            "index": [str(i) for i in range(len(choices))],
            "number": [str(i + 1) for i in range(len(choices))],
            "letter": labels,
            "text": [str(choice).strip() for choice in choices],
        }[kind]
        if isinstance(value, bool) or given not in allowed:
            raise CalsmoothError(
                f"{row.where}: column '{name}' must hold {ANSWERS[kind]} (key 'answer_as' of {self.path}), "
                f"one of {', '.join(allowed)}; got {value!r}"
            )
        return allowed.index(given)
