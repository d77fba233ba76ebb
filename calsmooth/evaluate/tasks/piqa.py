"""PIQA: 1,838 everyday goals and two ways to reach each (Bisk et al. 2020),
https://huggingface.co/datasets/baber/piqa (the original, ybisk/piqa, is a script that `datasets` no longer runs).
"""

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from calsmooth.data.readers import Row
from calsmooth.errors import CalsmoothError
from calsmooth.evaluate.questions import Question, make_question
from calsmooth.evaluate.rows import Hub, column, file_rows, split_files
from calsmooth.evaluate.task import Split, Task

LABELS = "-labels.lst"


class PIQA(Task):
    """Scored on the validation split, since the test split's answers aren't published."""

    name, title = "piqa", "PIQA"
    hub = Hub("baber/piqa", "142f6d7367fd9877f0fb3b5734ea6a545f54cdd1")
    scored, solved = Split("validation", ("valid.jsonl", "dev.jsonl")), Split("train", ("train.jsonl",))
    own_folders = ("physicaliqa-train-dev",)
    subject = "physical common sense"

    def question(self, row: Row, id: str) -> Question:
        if "label" not in row.columns and "goal" in row.columns:
            raise CalsmoothError(
                f"{row.where}: no column 'label', and no file with the labels beside it, such as valid{LABELS}"
            )
        goal, first, second, label = (
            column(row.where, row.columns, name) for name in ("goal", "sol1", "sol2", "label")
        )
        return make_question(row.where, id, self.subject, goal, [first, second], label)

    def local_rows(self, folder: Path, split: Split) -> Iterator[Row] | None:
        """In the hub's columns; or the authors', with the labels in a file beside: valid.jsonl, valid-labels.lst."""
        names = (*split.own_files, f"piqa_{split.name}.parquet")  # the latter is what the hub's repository calls it
        files = split_files(folder, split.name, self.hub.config, names, self.own_folders)
        labels = files[0].with_name(files[0].stem + LABELS) if files else None
        if labels is not None and labels.is_file():
            return _labelled(files[0], labels)
        return file_rows(files) if files else None


def _labelled(file: Path, labels: Path) -> Iterator[Row]:
    """The rows of a file, with the labels of another, one a line.

    Raises:
        CalsmoothError: one has more of them than the other, or a label isn't 0 or 1.
    """
    try:
        lines = labels.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CalsmoothError(f"{labels}: can't be read ({error})") from None
    lines = lines[:-1] if lines[-1] == "" else lines
    for number, (row, line) in enumerate(zip_longest(file_rows([file]), lines), 1):
        if row is None or line is None:
            rows = sum(1 for _ in file_rows([file]))
            raise CalsmoothError(f"{labels}: holds {len(lines)} labels, but {file} has {rows} rows")
        if line.strip() not in ("0", "1"):
            raise CalsmoothError(f"{labels}, line {number}: a label must be 0 or 1, got {line.strip()!r}")
        yield Row(row.columns | {"label": int(line)}, row.where)
