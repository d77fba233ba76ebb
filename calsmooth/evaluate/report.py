"""The table that a run prints."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

SUBJECTS_SHOWN = 10
"""A task with more subjects than these shows its total only, unless asked."""


def results_table(results: dict[str, Any], by_subject: bool = False) -> "Table":
    """Tasks, and their subjects where these are few or asked for, with the numbers that matter first."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("task")
    table.add_column("n", justify="right")
    for name in ("accuracy", "confidence", "ECE", "RMS", "Brier", "NLL"):
        table.add_column(name, justify="right")
    for name, task in results["tasks"].items():
        table.add_row(name, *_cells(task), style="bold")
        if "per_byte" in task:
            table.add_row("  per byte", *_cells(task["per_byte"]))
        subjects = task.get("subjects", {})
        if by_subject or len(subjects) <= SUBJECTS_SHOWN:
            for subject, summary in subjects.items():
                table.add_row(f"  {subject}", *_cells(summary))
    return table


def remarks(results: dict[str, Any], by_subject: bool = False) -> list[str]:
    """What the reader of the table should know: intervals, samples, subjects left out, the notes of the run."""
    lines = []
    for name, task in results["tasks"].items():
        low, high = task["ece_interval"]
        mass = task["choice_mass"]
        mass_text = "" if mass is None else f"; the choices hold {mass:.1%} of the probability"
        lines.append(f"{name}: 95 % interval of ECE {low:.3f} to {high:.3f}{mass_text}")
        if "questions_available" in task and task["n"] < task["questions_available"]:
            lines.append(f"{name}: a sample of {task['n']} of {task['questions_available']} questions (--limit)")
        hidden = len(task.get("subjects", {}))
        if hidden > SUBJECTS_SHOWN and not by_subject:
            lines.append(f"{name}: {hidden} subjects; --by-subject shows each, results.json has them")
    return lines + results["notes"]


def _cells(summary: dict[str, Any]) -> list[str]:
    numbers = [summary[key] for key in ("accuracy", "mean_confidence", "ece", "rms_ce", "brier", "nll")]
    return [f"{summary['n']:,}", *(f"{number:.3f}" for number in numbers)]
