"""CommonsenseQA: 1,221 questions about everyday concepts (Talmor et al. 2019),
https://huggingface.co/datasets/tau/commonsense_qa.
"""

from calsmooth.data.readers import Row
from calsmooth.evaluate.questions import Question, make_question
from calsmooth.evaluate.rows import Hub, keyed_question
from calsmooth.evaluate.task import Split, Task


class CommonsenseQA(Task):
    """Scored on the validation split, since the test split's answers aren't published.

    lm-evaluation-harness asks it with letters too, but in its own words: no header, and "Question: " before each.
    """

    name, title = "commonsense_qa", "CommonsenseQA"
    hub = Hub("tau/commonsense_qa", "94630fe30dad47192a8546eb75f094926d47e155")
    scored, solved = Split("validation", ("dev_rand_split.jsonl",)), Split("train", ("train_rand_split.jsonl",))
    subject = "common sense"

    def question(self, row: Row, id: str) -> Question:
        text, choices, answer = keyed_question(row, "question")
        return make_question(row.where, str(row.columns.get("id", id)), self.subject, text, choices, answer)

    def letter_header(self, subject: str, style: str) -> str:
        return "" if style == "lm-eval" else super().letter_header(subject, style)

    def letter_text(self, question: Question, style: str) -> str:
        text = super().letter_text(question, style)
        return f"Question: {text}" if style == "lm-eval" else text
