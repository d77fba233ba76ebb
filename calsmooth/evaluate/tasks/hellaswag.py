"""HellaSwag: 10,042 everyday scenes to finish (Zellers et al. 2019), https://huggingface.co/datasets/Rowan/hellaswag."""

import re

from calsmooth.data.readers import Row
from calsmooth.errors import CalsmoothError
from calsmooth.evaluate.questions import Question, make_question
from calsmooth.evaluate.rows import Hub, column
from calsmooth.evaluate.task import Split, Task

SENTENCE_END = re.compile(r"[.!?][\"'\u201d\u2019)\]]*(?:\s+|$)")


class HellaSwag(Task):
    """Scored on the validation split, with the first rows of the train split as solved examples.

    The paper scores it with letters, but says neither the subject text nor the examples' source: ours are
    "common sense" and the train split.
    """

    name, title = "hellaswag", "HellaSwag"
    hub = Hub("Rowan/hellaswag", "218ec52e09a7e7462a5400043bb9a69a41d06b76")
    scored, solved = Split("validation", ("hellaswag_val.jsonl",)), Split("train", ("hellaswag_train.jsonl",))
    own_folders = ("data", "hellaswag*/data")
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

    def remark(self, row: Row) -> str | None:
        if "ctx_a" in row.columns:
            return None
        if _capitalised(row)[1]:
            return "have no 'ctx_b': what follows the last full stop of 'ctx' was taken for it"
        return "have no 'ctx_b', and 'ctx' doesn't tell where it would begin: 'ctx' was asked as it is"

    def cloze_context(self, question: Question) -> str:
        return question.text


def _scene(row: Row) -> str:
    """`ctx_a`, whole sentences, and `ctx_b`, the one to finish, capitalised; in WikiHow's half there is none."""
    if "ctx_a" in row.columns:
        return f"{row.columns['ctx_a']} {str(column(row.where, row.columns, 'ctx_b')).capitalize()}"
    return _capitalised(row)[0]


def _capitalised(row: Row) -> tuple[str, bool]:
    """The same of a row that has `ctx` alone, which is `ctx_a ctx_b`; False where it doesn't tell the two apart.

    In the published data `ctx_b` has small letters only, and `ctx_a` ends as sentences do.
    """
    ctx = str(column(row.where, row.columns, "ctx")).strip()
    if "[" in ctx or str(row.columns.get("source_id", "")).startswith("wikihow"):
        return ctx, True
    ends = [match.end() for match in SENTENCE_END.finditer(ctx)]
    beginning = ctx[ends[-1] :] if ends else ctx
    if not ends or beginning != beginning.lower():
        return ctx, False
    return ctx[: ends[-1]] + beginning.capitalize(), True


def _clean(text: str) -> str:
    """Without the bracketed marks that the WikiHow half carries, as lm-evaluation-harness reads it."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")
