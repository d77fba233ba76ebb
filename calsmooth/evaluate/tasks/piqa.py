"""PIQA: 1,838 everyday goals and two ways to reach each (Bisk et al. 2020),
https://huggingface.co/datasets/baber/piqa (the original, ybisk/piqa, is a script that `datasets` no longer runs).
"""

from calsmooth.data.readers import Row
from calsmooth.evaluate.questions import Question, make_question
from calsmooth.evaluate.rows import Hub, column
from calsmooth.evaluate.task import Split, Task


class PIQA(Task):
    """Scored on the validation split, since the test split's answers aren't published."""

    name, title = "piqa", "PIQA"
    hub = Hub("baber/piqa", "142f6d7367fd9877f0fb3b5734ea6a545f54cdd1")
    scored, solved = Split("validation", "piqa_validation.parquet"), Split("train", "piqa_train.parquet")
    subject = "physical common sense"

    def question(self, row: Row, id: str) -> Question:
        goal, first, second, label = (
            column(row.where, row.columns, name) for name in ("goal", "sol1", "sol2", "label")
        )
        return make_question(row.where, id, self.subject, goal, [first, second], label)
