"""OpenBookQA: 500 elementary science questions (Mihaylov et al. 2018),
https://huggingface.co/datasets/allenai/openbookqa.
"""

from calsmooth.data.readers import Row
from calsmooth.evaluate.questions import Question, make_question
from calsmooth.evaluate.rows import Hub, keyed_question
from calsmooth.evaluate.task import Split, Task


class OpenBookQA(Task):
    """Scored on the test split, closed book: the facts that come with the data aren't shown.

    Many questions are the beginning of a sentence, so that in the cloze format nothing is put around them.
    """

    name, title = "openbookqa", "OpenBookQA"
    hub = Hub("allenai/openbookqa", "388097ea7776314e93a529163e0fea805b8a6454", "main")
    scored = Split("test")
    subject = "science"

    def question(self, row: Row, id: str) -> Question:
        text, choices, answer = keyed_question(row, "question_stem")
        return make_question(row.where, str(row.columns.get("id", id)), self.subject, text, choices, answer)

    def cloze_context(self, question: Question) -> str:
        return question.text
