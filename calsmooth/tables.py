"""The table of calibration metrics that several commands print: a row a task, subject, or moment (before, after)."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

_COLUMNS = {
    "accuracy": "accuracy",
    "confidence": "mean_confidence",
    "ECE": "ece",
    "RMS": "rms_ce",
    "Brier": "brier",
    "NLL": "nll",
}


def metrics_table(rows: Iterable[tuple[str, Mapping[str, Any]]], first: str = "") -> "Table":
    """(label, summary) rows under the headings that matter first; a summary is what `metrics.summarize` gives.

    Labels that begin with a space are parts of the row above and don't stand out.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first)
    table.add_column("n", justify="right")
    for heading in _COLUMNS:
        table.add_column(heading, justify="right")
    for label, summary in rows:
        numbers = (f"{summary[key]:.3f}" for key in _COLUMNS.values())
        table.add_row(Text(label), f"{summary['n']:,}", *numbers, style="" if label.startswith(" ") else "bold")
    return table
