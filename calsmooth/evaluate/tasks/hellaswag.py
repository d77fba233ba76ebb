"""HellaSwag: 10,042 everyday scenes to finish (Zellers et al. 2019), https://huggingface.co/datasets/Rowan/hellaswag."""

import re

from calsmooth.data.readers import Row
from calsmooth.errors import CalsmoothError
from calsmooth.evaluate.questions import Question, make_question
from calsmooth.evaluate.rows import Hub, column
from calsmooth.evaluate.task import Split, Task


class HellaSwag(Task):
    """Scored on the validation split, with the first rows of the train split as solved examples.

    The paper scores it with letters, but says neither the subject text nor the examples' source: ours are
    "common sense" and the train split.
    """

    name, title = "hellaswag", "HellaSwag"
    hub = Hub("Rowan/hellaswag", "218ec52e09a7e7462a5400043bb9a69a41d06b76")
    scored, solved = Split("validation", "hellaswag_val.jsonl"), Split("train", "hellaswag_train.jsonl")
    subject = "common sense"

    def question(self, row: Row, id: str) -> Question:
        activity, endings, label = (
            column(row.where, row.columns, name) for name in ("activity_label", "endings", "label")
        )
        if not str(label).strip().isdigit():
            raise CalsmoothError(f"{row.where}: 'label' must be the index of an ending, got {label!r}")
        if not isinstance(endings, list) or not all(isinstance(ending, str) for ending in endings):
            raise CalsmoothError(f"{row.where}: 'endings' must be a list of texts, got {endings!r}")
        text = _clean(f"{activity}: {_scene(row)}")
        return make_question(row.where, id, self.subject, text, [_clean(e) for e in endings], int(label))

    def cloze_context(self, question: Question) -> str:
        return question.text


def _scene(row: Row) -> str:
    if "ctx_a" in row.columns:
        return f"{row.columns['ctx_a']} {str(column(row.where, row.columns, 'ctx_b')).capitalize()}"
    return str(column(row.where, row.columns, "ctx"))


def _clean(text: str) -> str:
    """Without the bracketed marks that the WikiHow half carries, as lm-evaluation-harness reads it."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")
