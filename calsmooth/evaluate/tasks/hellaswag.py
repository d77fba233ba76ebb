"""HellaSwag: 10,042 everyday scenes to finish (Zellers et al. 2019), https://huggingface.co/datasets/Rowan/hellaswag."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from calsmooth.errors import CalsmoothError, UsageError
from calsmooth.evaluate.questions import (
    Question,
    Row,
    Task,
    TaskData,
    column,
    find_file,
    hub_rows,
    json_rows,
    make_question,
    task_folder,
)

HUB = ("Rowan/hellaswag", None, "218ec52e09a7e7462a5400043bb9a69a41d06b76")
SUBJECT = "common sense"
OTHERWISE = "run once with a network, or give --data-dir DIR with validation.jsonl (and train.jsonl for the examples)"
VALIDATION = ("validation.jsonl", "validation.json", "hellaswag_val.jsonl")
TRAIN = ("train.jsonl", "train.json", "hellaswag_train.jsonl")


class HellaSwag(Task):
    """Scored on the validation split, with the first rows of the train split as solved examples.

    The paper scores it with letters, but says neither the subject text nor the examples' source: ours are
    "common sense" and the train split.
    """

    name = "hellaswag"

    def load(self, data_dir: Path | None, shots: int) -> TaskData:
        if data_dir is None:
            questions = self._parse(hub_rows(self.name, *HUB, "validation", OTHERWISE))
            train = self._parse(hub_rows(self.name, *HUB, "train", OTHERWISE), shots) if shots else []
            return TaskData(questions, {SUBJECT: train}, f"{HUB[0]} at {HUB[2][:10]}")
        folder = task_folder(data_dir, self.name)
        path = find_file(folder, VALIDATION)
        if path is None:
            raise UsageError(f"--data-dir {folder}: no {' or '.join(VALIDATION)} there; expected HellaSwag's rows")
        questions = self._parse(json_rows(path))
        train_path = find_file(folder, TRAIN)
        if train_path is not None:
            return TaskData(questions, {SUBJECT: self._parse(json_rows(train_path), shots)}, str(folder))
        if len(questions) <= shots:
            raise CalsmoothError(
                f"{path}: {len(questions)} rows are too few for {shots} solved examples and a question"
            )
        note = f"no train split in {folder}: the first {shots} validation rows are the solved examples, not scored"
        return TaskData(questions[shots:], {SUBJECT: questions[:shots]}, str(folder), [note] if shots else [])

    def cloze_context(self, question: Question) -> str:
        return question.text

    @staticmethod
    def _parse(rows: Iterable[Row], limit: int | None = None) -> list[Question]:
        questions: list[Question] = []
        for number, (where, row) in enumerate(rows):
            if limit is not None and number >= limit:
                break
            label, endings = str(column(where, row, "label")).strip(), column(where, row, "endings")
            if not label.isdigit():
                raise CalsmoothError(f"{where}: 'label' must be the index of an ending, got {label!r}")
            if not isinstance(endings, list) or not all(isinstance(e, str) for e in endings):
                raise CalsmoothError(f"{where}: 'endings' must be a list of texts, got {endings!r}")
            text = _clean(f"{column(where, row, 'activity_label')}: {_context(where, row)}")
            choices = [_clean(ending) for ending in endings]
            questions.append(make_question(where, str(number), SUBJECT, text, choices, int(label)))
        return questions


def _context(where: str, row: Any) -> str:
    if "ctx_a" in row:
        return f"{row['ctx_a']} {str(column(where, row, 'ctx_b')).capitalize()}"
    return str(column(where, row, "ctx"))


def _clean(text: str) -> str:
    """Without the bracketed marks that the WikiHow half carries, as lm-evaluation-harness reads it."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")
