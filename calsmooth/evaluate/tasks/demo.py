"""The built-in task: questions about the made-up world of calsmooth.demo, whose true answer probabilities are known."""

from pathlib import Path

from calsmooth.data.readers import Row
from calsmooth.demo import QUESTIONS_FILE
from calsmooth.evaluate.questions import Question, make_question
from calsmooth.evaluate.rows import column, file_rows
from calsmooth.evaluate.task import Task, TaskData


class Demo(Task):
    """Asked without examples, as a chat turn: what the built-in instruction data teaches a model to answer."""

    name, title = "demo", "demo"
    format = "cloze"
    shots = 0
    conversation = True

    def question(self, row: Row, id: str) -> Question:
        own_id, subject, text, choices, answer = (
            column(row.where, row.columns, name) for name in ("id", "subject", "question", "choices", "answer")
        )
        return make_question(row.where, str(own_id), str(subject), text, choices, answer)

    def load(self, data_dir: Path | None, shots: int) -> TaskData:
        """Always the package's own file; `data_dir` is for the tasks that aren't built in."""
        return TaskData(self._questions(file_rows([QUESTIONS_FILE])), {}, "built in")

    def cloze_context(self, question: Question) -> str:
        return question.text
