"""What a multiple-choice task is: where its questions are, how a row becomes one, and how it is put into words.

A task is a subclass that says little more than that (see `tasks/`); loading, solved examples and the usual wording are
here.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from calsmooth.data.readers import Row
from calsmooth.errors import CalsmoothError, UsageError
from calsmooth.evaluate.questions import Question
from calsmooth.evaluate.rows import Hub, file_rows, hub_rows, split_files, task_folder


@dataclass(frozen=True)
class TaskData:
    """What a task loads: the questions to score and, for each subject, the solved examples in the order of use."""

    questions: list[Question]
    examples: Mapping[str, Sequence[Question]]
    source: str
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Split:
    """A split by its name on the hub; `own_files` are what the data's publishers call its file, if otherwise."""

    name: str
    own_files: tuple[str, ...] = ()


class Task:
    """Base of the multiple-choice tasks.

    name, title: on the command line, and in messages. hub: its data set. scored, solved: the splits of the questions
    and of the solved examples (None: it has none, and the first rows of the scored split are held back).
    own_folders: where the publishers' files lie once their archive is unpacked or their repository cloned, as patterns.
    subject: of all its questions; None where each row says its own.
    format: what --format overrides: letter (the choices are listed) or cloze (each choice continues the context).
    shots: what --shots overrides. conversation: whether the cloze format is a chat turn even without --chat-template.
    """

    name: str
    title: str
    hub: Hub
    scored = Split("validation")
    solved: Split | None = Split("train")
    own_folders: tuple[str, ...] = ()
    subject: str | None = None
    format = "letter"
    shots = 5
    conversation = False

    # What a subclass says.

    def question(self, row: Row, id: str) -> Question:
        """The question in a row; `id` is its number, for rows without an identity of their own.

        Raises:
            CalsmoothError: the row is bad; the message names it and the column.
        """
        raise NotImplementedError

    def remark(self, row: Row) -> str | None:
        """What isn't as it should be in a row that becomes a question all the same, to be counted in a note: what
        "3 of 9 questions" do or have.
        """
        return None

    def letter_header(self, subject: str, style: str) -> str:
        """What stands before the first solved example in the letter format.

        The original MMLU script (`hendrycks`) puts a space before each word of the subject, and its template one more.
        """
        about = subject.replace("_", " ")
        about = f" {about}" if style == "hendrycks" else about
        return f"The following are multiple choice questions (with answers) about {about}.\n\n"

    def letter_text(self, question: Question, style: str) -> str:
        """What stands before the list of choices in the letter format."""
        return question.text if style == "hendrycks" else question.text.strip()

    def cloze_header(self, subject: str) -> str:
        """What stands before the first solved example in the cloze format."""
        return ""

    def cloze_context(self, question: Question) -> str:
        """What stands before every choice in the cloze format."""
        return f"Question: {question.text}\nAnswer:"

    def cloze_answers(self, question: Question) -> list[tuple[str, str]]:
        """For each choice: what follows the context as given, and the text that is scored, a space before it."""
        return [("", choice) for choice in question.choices]

    # What all have in common.

    def load(self, data_dir: Path | None, shots: int) -> TaskData:
        """The task's questions, from `data_dir` or, without one, from the hub (through its cache).

        Raises:
            UsageError: `data_dir` doesn't hold this task's files.
            CalsmoothError: a row is bad (file and row are named), or the hub can't be reached and nothing is cached.
        """
        if data_dir is None:
            source = str(self.hub)
            rows = hub_rows(self.name, self.hub, self.scored.name, self._otherwise())
            solved = hub_rows(self.name, self.hub, self.solved.name, self._otherwise()) if self.solved else None
        else:
            folder = task_folder(data_dir, self.name)
            source, found = str(folder), self.local_rows(folder, self.scored)
            if found is None:
                split = f"{self.scored.name} split of {self.title}"
                raise UsageError(f"--data-dir {folder}: no {split} there; expected {self._files()}")
            rows, solved = found, self.local_rows(folder, self.solved) if self.solved else None
        remarks: Counter[str] = Counter()
        questions = self._questions(self._remarked(rows, remarks))
        notes = [f"{self.name}: {n:,} of {len(questions):,} questions {remark}" for remark, n in remarks.items()]
        if shots == 0:
            return TaskData(questions, {}, source, notes)
        if solved is not None:
            # A split with one subject needn't be read to its end.
            read = self._questions(islice(solved, shots) if self.subject is not None else solved)
            return TaskData(questions, first_examples(read, questions, shots, source), source, notes)
        each = "" if self.subject is not None else " of each subject"
        why = f"{source} has no {self.solved.name} split" if self.solved else "it has no other split"
        data = hold_back(self.name, questions, shots, source, f"of the {self.scored.name} split{each} ({why})")
        return replace(data, notes=[*data.notes, *notes])

    def local_rows(self, folder: Path, split: Split) -> Iterator[Row] | None:
        """Rows of a split in a folder, in the hub's columns or its publishers'; None where it doesn't have it."""
        files = split_files(folder, split.name, self.hub.config, split.own_files, self.own_folders)
        return file_rows(files) if files else None

    def _remarked(self, rows: Iterable[Row], remarks: Counter[str]) -> Iterator[Row]:
        """The rows; what is to be remarked on them is counted as they are read."""
        for row in rows:
            yield row
            # Behind the row: one that makes no question has stopped it all by now.
            if (remark := self.remark(row)) is not None:
                remarks[remark] += 1

    def _questions(self, rows: Iterable[Row]) -> list[Question]:
        return [self.question(row, str(number)) for number, row in enumerate(rows)]

    def _files(self) -> str:
        own = f"its authors' {' or '.join(self.scored.own_files)}, " if self.scored.own_files else ""
        names = f"{self.scored.name}.jsonl, .json, .csv, .tsv or .parquet with the columns of {self.hub.dataset}"
        return f"{own}{names}, or a copy of that repository"

    def _otherwise(self) -> str:
        examples = f" (and {self.solved.name} for the solved examples)" if self.solved else ""
        return f"run once with a network, or give --data-dir DIR with {self._files()}{examples}"


def by_subject(questions: Iterable[Question]) -> dict[str, list[Question]]:
    """Questions by their subject, both in their original order."""
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.subject, []).append(question)
    return groups


def hold_back(name: str, questions: list[Question], shots: int, source: str, where: str) -> TaskData:
    """The data of a task without solved examples of its own: the first `shots` questions of each subject are these.

    where: ends the note that says so: of what they are the first rows, and why they are taken.

    Raises:
        CalsmoothError: a subject has no questions left.
    """
    groups = by_subject(questions)
    for subject, group in groups.items():
        if len(group) <= shots:
            of = f" of '{subject}'" if subject else ""
            raise CalsmoothError(
                f"{source}: {len(group)} rows{of} are too few for {shots} solved examples and a question; "
                "give fewer --shots"
            )
    examples = {subject: group[:shots] for subject, group in groups.items()}
    held = {id(question) for group in examples.values() for question in group}
    rows = "row" if shots == 1 else f"{shots} rows"
    note = f"{name}: held back as solved examples, not scored: the first {rows} {where}"
    return TaskData([q for q in questions if id(q) not in held], examples, source, [note])


def first_examples(
    solved: Iterable[Question], questions: Iterable[Question], shots: int, source: str
) -> dict[str, list[Question]]:
    """The first `shots` solved questions of each subject that is asked about.

    Raises:
        CalsmoothError: a subject has none.
    """
    examples = by_subject(solved)
    for subject in dict.fromkeys(question.subject for question in questions):
        if not examples.get(subject):
            raise CalsmoothError(f"{source}: no solved examples for '{subject}'; give --shots 0")
    return {subject: group[:shots] for subject, group in examples.items()}
