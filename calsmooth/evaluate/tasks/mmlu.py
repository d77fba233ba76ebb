"""MMLU: 14,042 questions over 57 subjects (Hendrycks et al. 2021), https://huggingface.co/datasets/cais/mmlu."""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from calsmooth.data.readers import Row
from calsmooth.errors import CalsmoothError
from calsmooth.evaluate.questions import LETTERS, Question, make_question
from calsmooth.evaluate.rows import Hub, column, headless_csv
from calsmooth.evaluate.task import Split, Task


class MMLU(Task):
    """Scored on the test split; a subject's solved examples are the first rows of its dev split, in file order."""

    name, title = "mmlu", "MMLU"
    hub = Hub("cais/mmlu", "c30699e8356da336a370243923dbaf21066bb9fe", "all")
    scored, solved = Split("test"), Split("dev")

    def question(self, row: Row, id: str) -> Question:
        subject, text, choices, answer = (
            column(row.where, row.columns, name) for name in ("subject", "question", "choices", "answer")
        )
        return make_question(row.where, id, str(subject), text, choices, answer)

    def cloze_header(self, subject: str) -> str:
        return f"The following are questions (with answers) about {subject.replace('_', ' ')}.\n\n"

    def cloze_context(self, question: Question) -> str:
        return f"Question: {question.text.strip()}\nAnswer:"

    def local_rows(self, folder: Path, split: Split) -> Iterator[Row] | None:
        """The authors' files, one a subject: DIR/test/anatomy_test.csv, DIR/dev/anatomy_dev.csv, ...; or the hub's.

        The authors' archive has them in data/.
        """
        places = (sorted((place / split.name).glob(f"*_{split.name}.csv")) for place in (folder, folder / "data"))
        files = next((files for files in places if files), [])
        if not files:
            return super().local_rows(folder, split)
        return (row for file in files for row in _rows(file, file.name.removesuffix(f"_{split.name}.csv")))

    def _questions(self, rows: Iterable[Row]) -> list[Question]:
        counted: Counter[str] = Counter()  # a question is known by its number within its subject, wherever it is from
        questions = []
        for row in rows:
            subject = str(row.columns.get("subject"))
            questions.append(self.question(row, f"{subject}/{counted[subject]}"))
            counted[subject] += 1
        return questions

    def _files(self) -> str:
        return (
            "the official CSV files (DIR/test/*_test.csv and DIR/dev/*_dev.csv, from "
            "https://people.eecs.berkeley.edu/~hendrycks/data.tar), or a copy of the repository cais/mmlu"
        )


def _rows(path: Path, subject: str) -> Iterator[Row]:
    """The hub's columns from an official file, which has no header: question, four choices, letter."""
    for number, (where, cells) in enumerate(headless_csv(path)):
        if len(cells) != 6:
            raise CalsmoothError(f"{where}: expected 6 columns (question, four choices, letter), got {len(cells)}")
        text, *choices, letter = cells
        if letter.strip() not in LETTERS[:4] or not letter.strip():
            header = "; remove the header row" if number == 0 else ""
            raise CalsmoothError(f"{where}: the answer must be A, B, C or D, got {letter!r}{header}")
        answer = LETTERS.index(letter.strip())
        yield Row({"subject": subject, "question": text, "choices": choices, "answer": answer}, where)
