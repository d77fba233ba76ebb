"""`calsmooth finetune` where its file holds lists: a run for every combination, and one table and picture of all."""

from collections.abc import Callable
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


def sweep(grid: "Grid", output: Output, run: "Callable[[FinetuneConfig], Outcome]") -> None:
    """Run and compare every combination. run: one of them, fine-tuned and evaluated."""
    from rich.console import Group

    from calsmooth.finetune.sweep import Row, run_sweep

    if grid[0][1].dry_run:
        lists = ", ".join(grid[0][0])
        raise UsageError(
            f"--dry-run shows one run, and the file holds lists ({lists}); give each one value by its flag"
        )
    reference: dict[str, Any] = {}  # the model before, the same for every run

    def run_child(config: "FinetuneConfig") -> Row:
        outcome = run(config)
        reference.update(outcome.evaluation.get("before", {}))
        console.say(Group(*outcome.shown))
        summary = outcome.result.summary
        measured = outcome.evaluation.get("after")
        return Row("", {}, final_loss=summary["final_loss"], seconds=summary["seconds"], measured=measured)

    result = run_sweep(grid, run_child)
    console.say()
    output.show(
        Group(comparison(result.rows, reference), *_best(result.rows)),
        result={"folder": str(result.folder), "runs": [row.to_dict() for row in result.rows]},
    )
    picture = result.folder / "sweep.png"
    console.say(f"Sweep: {result.folder}" + (f"\nPicture: {picture}" if picture.exists() else ""))


def comparison(rows: "list[Row]", reference: dict[str, Any]) -> "Table":
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
    if reference:
        before = [_number(reference.get(label, {}).get(key)) for label in labels for key in COLUMNS.values()]
        table.add_row("before", *[""] * len(rows[0].varied), *before, style="dim")
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
