"""OpenBookQA: 500 elementary science questions (Mihaylov et al. 2018),
https://huggingface.co/datasets/allenai/openbookqa.
"""

from calsmooth.data.readers import Row
from calsmooth.errors import CalsmoothError
from calsmooth.evaluate.questions import Question, make_question
from calsmooth.evaluate.rows import Hub, column, keyed_question
from calsmooth.evaluate.task import Split, Task

LABELS = "ABCD"


class OpenBookQA(Task):
    """Scored on the test split, closed book: the facts that come with the data aren't shown.

    Many questions are the beginning of a sentence, so that in the cloze format nothing is put around them.
    """

    name, title = "openbookqa", "OpenBookQA"
    hub = Hub("allenai/openbookqa", "388097ea7776314e93a529163e0fea805b8a6454", "main")
    scored, solved = Split("test", ("test.jsonl", "test.tsv")), Split("train", ("train.jsonl", "train.tsv"))
    own_folders = ("Main", "Data/Main", "OpenBookQA-V1-*/Data/Main")
    subject = "science"

    def question(self, row: Row, id: str) -> Question:
        if "Question Stem" in row.columns:
            return self._from_table(row)
        text, choices, answer = keyed_question(row, "question_stem")
        return make_question(row.where, str(row.columns.get("id", id)), self.subject, text, choices, answer)

    def cloze_context(self, question: Question) -> str:
        return question.text

    def _from_table(self, row: Row) -> Question:
        """Of the authors' .tsv files: ID, Question Stem, Choices ("(A) ... (B) ... (C) ... (D) ..."), Answer Key."""
        number, text, listed, key = (
            str(column(row.where, row.columns, name)).strip()
            for name in ("ID", "Question Stem", "Choices", "Answer Key")
        )
        if key not in tuple(LABELS):
            raise CalsmoothError(f"{row.where}: 'Answer Key' must be one of {', '.join(LABELS)}, got {key!r}")
        choices, rest = [], f" {listed}"
        for label, following in zip(LABELS, [*LABELS[1:], None], strict=True):
            _, mark, rest = rest.partition(f" ({label}) ")
            if not mark:
                raise CalsmoothError(
                    f"{row.where}: 'Choices' must be '(A) ... (B) ... (C) ... (D) ...', got {listed!r}"
                )
            choices.append(rest if following is None else rest.partition(f" ({following}) ")[0])
        return make_question(row.where, number, self.subject, text, choices, LABELS.index(key))
