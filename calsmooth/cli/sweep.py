"""`calsmooth finetune` where its file holds lists: a run for every combination, and one table and picture of all."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calsmooth import console
from calsmooth.cli.options import Output
from calsmooth.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from calsmooth.cli.finetune import Outcome
    from calsmooth.finetune.config import FinetuneConfig
    from calsmooth.finetune.sweep import Grid, Row

COLUMNS = {"accuracy": "accuracy", "ECE": "ece", "NLL": "nll"}


def sweep(grid: "Grid", output: Output, run: "Callable[[FinetuneConfig, Path | None], Outcome]") -> None:
    """Run and compare every combination.

    run: one of them, fine-tuned and evaluated; its second argument is the folder of a finished run of which the same
    was measured before.
    """
    from rich.console import Group

    from calsmooth.cli.before_after import WORDS, what_to_measure
    from calsmooth.finetune.sweep import Row, run_sweep

    if grid[0][1].dry_run:
        lists = ", ".join(grid[0][0])
        raise UsageError(
            f"--dry-run shows one run, and the file holds lists ({lists}); give each one value by its flag"
        )
    measured_before: list[tuple[Any, Path]] = []  # what was measured of the model before, in which run's folder

    def run_child(config: "FinetuneConfig") -> Row:
        measuring = what_to_measure(config)
        alike = next((folder for other, folder in measured_before if other == measuring), None)
        outcome = run(config, alike)
        measured_before.append((measuring, outcome.result.folder))
        summary = outcome.result.summary
        console.say(outcome.shown[0])
        before, after = (
            {WORDS.get(task, task): metrics for task, metrics in outcome.evaluation[moment].items()} or None
            if outcome.evaluation
            else _held_out(summary, moment)
            for moment in ("before", "after")
        )
        return Row("", {}, final_loss=summary["final_loss"], seconds=summary["seconds"], measured=after, before=before)

    result = run_sweep(grid, run_child)
    console.say()
    output.show(
        Group(comparison(result.rows), *_best(result.rows)),
        result={"folder": str(result.folder), "runs": [row.to_dict() for row in result.rows]},
    )
    picture = result.folder / "sweep.png"
    console.say(f"Sweep: {result.folder}" + (f"\nPicture: {picture}" if picture.exists() else ""))


def _held_out(summary: Mapping[str, Any], moment: str) -> dict[str, dict[str, float]] | None:
    """Where no task is evaluated: the next-token predictions that were measured during training, if any."""
    found = summary.get("held_out", {}).get(moment)
    if found is None:
        return None
    return {"held-out tokens": {metric: found[f"eval_{metric}"] for metric in COLUMNS.values()}}


def comparison(rows: "list[Row]") -> "Table":
    """A line a run: what distinguishes it, its loss, and what was measured; above, the model before."""
    from rich.table import Table
    from rich.text import Text

    labels = list(dict.fromkeys(label for row in rows for label in row.measured or {}))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for key in rows[0].varied:
        table.add_column(key)
    table.add_column("final loss", justify="right")
    for label in labels:
        for i, heading in enumerate(COLUMNS):
            table.add_column(f"{label}\n{heading}" if i == 0 else f"\n{heading}", justify="right")
    before = next((row.before for row in rows if row.before), None)
    if before and all(row.before == before for row in rows if row.before):
        numbers = [_number(before.get(label, {}).get(key)) for label in labels for key in COLUMNS.values()]
        table.add_row("before", *[""] * len(rows[0].varied), *numbers, style="dim")
    for row in rows:
        varied = [Text(f"{v:g}" if isinstance(v, float) else str(v)) for v in row.varied.values()]
        if row.error:
            table.add_row(*varied, Text("failed", style="red"))
            continue
        metrics = [(row.measured or {}).get(label, {}).get(key) for label in labels for key in COLUMNS.values()]
        table.add_row(*varied, _number(row.final_loss), *map(_number, metrics))
    return table


def _best(rows: "list[Row]") -> list[str]:
    """In words, for each thing that was measured: which run is calibrated best, which is right most often."""
    lines = []
    for label in dict.fromkeys(label for row in rows for label in row.measured or {}):
        found = [(row.name, (row.measured or {})[label]) for row in rows if label in (row.measured or {})]
        calibrated = min(found, key=lambda x: x[1]["ece"])
        right = max(found, key=lambda x: x[1]["accuracy"])
        lines.append(
            f"{label}: lowest ECE {calibrated[1]['ece']:.3f} with {calibrated[0]}, highest accuracy "
            f"{right[1]['accuracy']:.3f} with {right[0]}."
        )
    return lines


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
