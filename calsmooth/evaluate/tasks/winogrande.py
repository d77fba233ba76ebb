"""WinoGrande: 1,267 sentences with a blank and two names for it (Sakaguchi et al. 2020),
https://huggingface.co/datasets/allenai/winogrande.
"""

from calsmooth.data.readers import Row
from calsmooth.errors import CalsmoothError
from calsmooth.evaluate.questions import Question, make_question
from calsmooth.evaluate.rows import Hub, column
from calsmooth.evaluate.task import Split, Task

BLANK = "_"


class WinoGrande(Task):
    """Scored on the validation split, since the test split's answers aren't published; examples from `train` of xl.

    The cloze format is partial evaluation (Trinh and Le 2018), as in lm-evaluation-harness: each option fills the
    blank, and what is scored is the same for both, the rest of the sentence.
    """

    name, title = "winogrande", "WinoGrande"
    hub = Hub("allenai/winogrande", "01e74176c63542e6b0bcb004dcdea22d94fb67b5", "winogrande_xl")
    scored, solved = Split("validation", ("dev.jsonl",)), Split("train", ("train_xl.jsonl",))
    own_folders = ("winogrande_1.*",)
    subject = "common sense"

    def question(self, row: Row, id: str) -> Question:
        sentence, first, second, answer = (
            column(row.where, row.columns, name) for name in ("sentence", "option1", "option2", "answer")
        )
        if str(answer) not in ("1", "2"):
            raise CalsmoothError(f"{row.where}: 'answer' must be 1 or 2, got {answer!r}")
        if not isinstance(sentence, str) or not sentence.partition(BLANK)[2].strip():
            raise CalsmoothError(f"{row.where}: 'sentence' must have a '{BLANK}' and go on after it, got {sentence!r}")
        return make_question(row.where, id, self.subject, sentence, [first, second], int(answer) - 1)

    def cloze_context(self, question: Question) -> str:
        return question.text.partition(BLANK)[0]

    def cloze_answers(self, question: Question) -> list[tuple[str, str]]:
        rest = question.text.partition(BLANK)[2].strip()
        return [(option, rest) for option in question.choices]
