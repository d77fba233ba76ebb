"""The built-in task: questions about the made-up world of calsmooth.demo, whose true answer probabilities are known."""

from pathlib import Path

from calsmooth.demo import QUESTIONS_FILE
from calsmooth.evaluate.questions import Task, TaskData, column, json_rows, make_question


class Demo(Task):
    """Asked without examples, as a chat turn: what the built-in instruction data teaches a model to answer."""

    name = "demo"
    format = "cloze"
    shots = 0
    conversation = True

    def load(self, data_dir: Path | None, shots: int) -> TaskData:
        """Always the package's own file; `data_dir` is for the tasks that aren't built in."""
        questions = []
        for where, row in json_rows(QUESTIONS_FILE):
            identity, subject, text, choices, answer = (
                column(where, row, name) for name in ("id", "subject", "question", "choices", "answer")
            )
            questions.append(make_question(where, str(identity), str(subject), text, choices, answer))
        return TaskData(questions, {}, "built in")
