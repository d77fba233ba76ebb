"""MMLU: 14,042 questions over 57 subjects (Hendrycks et al. 2021), https://huggingface.co/datasets/cais/mmlu."""

from collections.abc import Iterable
from pathlib import Path

from calsmooth.errors import CalsmoothError, UsageError
from calsmooth.evaluate.questions import (
    LETTERS,
    Question,
    Row,
    Task,
    TaskData,
    column,
    csv_rows,
    hub_rows,
    make_question,
    task_folder,
)

HUB = ("cais/mmlu", "all", "c30699e8356da336a370243923dbaf21066bb9fe")
OTHERWISE = (
    "run once with a network, or give --data-dir DIR with the official CSV files (DIR/test/*_test.csv and "
    "DIR/dev/*_dev.csv, from https://people.eecs.berkeley.edu/~hendrycks/data.tar)"
)


class MMLU(Task):
    """Scored on the test split; a subject's solved examples are the first rows of its dev split, in file order."""

    name = "mmlu"

    def load(self, data_dir: Path | None, shots: int) -> TaskData:
        if data_dir is None:
            source = f"{HUB[0]} at {HUB[2][:10]}"
            splits = [self._from_hub(hub_rows(self.name, *HUB, split, OTHERWISE), split) for split in ("test", "dev")]
        else:
            folder = task_folder(data_dir, self.name)
            source = str(folder)
            splits = [self._from_folder(folder, split) for split in ("test", "dev")]
        questions, dev = splits
        examples: dict[str, list[Question]] = {}
        for question in dev:
            examples.setdefault(question.subject, []).append(question)
        for subject in dict.fromkeys(question.subject for question in questions):
            if shots and not examples.get(subject):
                raise CalsmoothError(f"{source}: no solved examples (dev split) for '{subject}'; give --shots 0")
        return TaskData(questions, examples, source)

    def cloze_header(self, subject: str) -> str:
        return f"The following are questions (with answers) about {subject.replace('_', ' ')}.\n\n"

    @staticmethod
    def _from_hub(rows: Iterable[Row], split: str) -> list[Question]:
        questions = []
        for number, (where, row) in enumerate(rows):
            question, choices, answer = (column(where, row, name) for name in ("question", "choices", "answer"))
            subject = column(where, row, "subject")
            questions.append(make_question(where, f"{split}/{number}", subject, question, choices, answer))
        return questions

    @staticmethod
    def _from_folder(folder: Path, split: str) -> list[Question]:
        files = sorted((folder / split).glob(f"*_{split}.csv"))
        if not files:
            raise UsageError(
                f"--data-dir {folder}: no {split}/*_{split}.csv there; expected MMLU's official CSV files in "
                f"{folder / 'dev'} and {folder / 'test'}"
            )
        questions = []
        for path in files:
            subject = path.name.removesuffix(f"_{split}.csv")
            for number, (where, row) in enumerate(csv_rows(path)):
                if len(row) != 6:
                    raise CalsmoothError(
                        f"{where}: expected 6 columns (question, four choices, letter), got {len(row)}"
                    )
                text, *choices, letter = row
                if letter.strip() not in LETTERS[:4] or not letter.strip():
                    header = "; remove the header row" if number == 0 else ""
                    raise CalsmoothError(f"{where}: the answer must be A, B, C or D, got {letter!r}{header}")
                answer = LETTERS.index(letter.strip())
                questions.append(make_question(where, f"{subject}/{number}", subject, text, choices, answer))
        return questions
