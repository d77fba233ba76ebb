"""ARC: grade-school science (Clark et al. 2018), https://huggingface.co/datasets/allenai/ai2_arc.

2,376 easy questions, and 1,172 that a search and a co-occurrence baseline both got wrong.
"""

from calsmooth.data.readers import Row
from calsmooth.evaluate.questions import Question, make_question
from calsmooth.evaluate.rows import Hub, keyed_question
from calsmooth.evaluate.task import Split, Task

REVISION = "210d026faf9955653af8916fad021475a3f00453"


class _Arc(Task):
    """Scored on the test split, with the first rows of the train split as solved examples.

    A few questions have 3 or 5 choices, or name them 1 to 4; the choices are lettered by their place. The paper scores
    ARC-Easy with letters, but says neither the subject text nor the examples' source: ours are "science" and the train
    split.
    """

    subject = "science"

    def question(self, row: Row, id: str) -> Question:
        text, choices, answer = keyed_question(row, "question")
        return make_question(row.where, str(row.columns.get("id", id)), self.subject, text, choices, answer)


class ArcEasy(_Arc):
    name, title = "arc_easy", "ARC-Easy"
    hub = Hub("allenai/ai2_arc", REVISION, "ARC-Easy")
    scored, solved = Split("test", ("ARC-Easy-Test.jsonl",)), Split("train", ("ARC-Easy-Train.jsonl",))
    own_folders = ("ARC-Easy", "ARC-V1-Feb2018*/ARC-Easy")


class ArcChallenge(_Arc):
    name, title = "arc_challenge", "ARC-Challenge"
    hub = Hub("allenai/ai2_arc", REVISION, "ARC-Challenge")
    scored, solved = Split("test", ("ARC-Challenge-Test.jsonl",)), Split("train", ("ARC-Challenge-Train.jsonl",))
    own_folders = ("ARC-Challenge", "ARC-V1-Feb2018*/ARC-Challenge")
