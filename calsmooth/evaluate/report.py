"""What a run says on the terminal: its table, and what the reader of the table should know."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from calsmooth.tables import metrics_table

if TYPE_CHECKING:
    from rich.table import Table

SUBJECTS_SHOWN = 10
"""A task with more subjects than these shows its total only, unless asked."""


def results_table(results: dict[str, Any], by_subject: bool = False) -> "Table":
    """Tasks, and their subjects where these are few or asked for."""

    def rows() -> Iterator[tuple[str, dict[str, Any]]]:
        for name, task in results["tasks"].items():
            yield name, task
            if "per_byte" in task:
                yield "  per byte", task["per_byte"]
            subjects = task.get("subjects", {})
            if by_subject or len(subjects) <= SUBJECTS_SHOWN:
                yield from ((f"  {subject}", summary) for subject, summary in subjects.items())

    return metrics_table(rows(), "task")


def remarks(results: dict[str, Any], by_subject: bool = False) -> list[str]:
    """How sure the numbers are, what was sampled or left out, and the notes of the run."""
    lines = []
    for name, task in results["tasks"].items():
        low, high = task["ece_interval"]
        lines.append(
            f"{name}: 95 % interval of ECE {low:.3f} to {high:.3f}; "
            f"perfect calibration would show {task['ece_if_calibrated']:.3f} at this n"
        )
        if task.get("prompt") in ("hendrycks", "lm-eval", "conversation"):
            lines.append(f"{name}: the choices hold {task['choice_mass']:.1%} of the model's probability")
        if "rows" in task:
            lines.append(f"{name}: n counts the tokens of {task['rows']:,} responses")
        if "questions_available" in task and task["n"] < task["questions_available"]:
            lines.append(f"{name}: a sample of {task['n']:,} of {task['questions_available']:,} questions (--limit)")
        hidden = len(task.get("subjects", {}))
        if hidden > SUBJECTS_SHOWN and not by_subject:
            lines.append(f"{name}: {hidden} subjects; --by-subject shows each, results.json has them")
    return lines + results["notes"]
