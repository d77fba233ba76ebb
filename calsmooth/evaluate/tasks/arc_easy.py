"""ARC-Easy: 2,376 grade-school science questions (Clark et al. 2018), https://huggingface.co/datasets/allenai/ai2_arc."""

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

SUBJECT = "science"


class ArcEasy(Task):
    """Scored on the test split, with the first rows of the train split as solved examples.

    A few questions have 3 or 5 choices, or name them 1 to 4; the choices are lettered by their place. The paper scores
    it with letters, but says neither the subject text nor the examples' source: ours are "science" and the train split.
    """

    name = "arc_easy"
    hub = ("allenai/ai2_arc", "ARC-Easy", "210d026faf9955653af8916fad021475a3f00453")

    def load(self, data_dir: Path | None, shots: int) -> TaskData:
        name = str(self.hub[1])
        otherwise = "run once with a network, or give --data-dir DIR with test.json and train.json (or .jsonl)"
        if data_dir is None:
            questions = self._parse(hub_rows(self.name, *self.hub, "test", otherwise))
            train = self._parse(hub_rows(self.name, *self.hub, "train", otherwise), shots) if shots else []
            return TaskData(questions, {SUBJECT: train}, f"{self.hub[0]} {name} at {self.hub[2][:10]}")
        folder = task_folder(data_dir, self.name)
        test, train_file = (
            find_file(folder, (f"{split}.json", f"{split}.jsonl", f"{name}-{split.title()}.jsonl"))
            for split in ("test", "train")
        )
        if test is None or (train_file is None and shots):
            missing = "test" if test is None else "train"
            raise UsageError(f"--data-dir {folder}: no {missing}.json or {missing}.jsonl there; expected {name}'s rows")
        examples = self._parse(json_rows(train_file), shots) if train_file is not None else []
        return TaskData(self._parse(json_rows(test)), {SUBJECT: examples}, str(folder))

    @staticmethod
    def _parse(rows: Iterable[Row], limit: int | None = None) -> list[Question]:
        questions: list[Question] = []
        for number, (where, row) in enumerate(rows):
            if limit is not None and number >= limit:
                break
            text, texts, labels = _question_and_choices(where, row)
            key = str(column(where, row, "answerKey")).strip()
            if key not in labels:
                raise CalsmoothError(f"{where}: 'answerKey' must be one of {', '.join(labels)}, got {key!r}")
            identity = str(row.get("id", number))
            questions.append(make_question(where, identity, SUBJECT, text, texts, labels.index(key)))
        return questions


def _question_and_choices(where: str, row: Any) -> tuple[Any, list[Any], list[str]]:
    """From the hub's columns, or from the original files, where the question is {stem, choices: [{text, label}]}."""
    question = column(where, row, "question")
    if isinstance(question, dict):
        listed = column(where, question, "choices")
        text = column(where, question, "stem")
        pairs = [(column(where, c, "text"), str(column(where, c, "label"))) for c in listed]
        return text, [p[0] for p in pairs], [p[1] for p in pairs]
    choices = column(where, row, "choices")
    texts, labels = column(where, choices, "text"), column(where, choices, "label")
    if not isinstance(texts, list) or not isinstance(labels, list) or len(texts) != len(labels):
        raise CalsmoothError(f"{where}: 'choices' must hold as many texts as labels, got {choices!r}")
    return question, texts, [str(label) for label in labels]
