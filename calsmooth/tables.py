"""The calibration metrics by name, and the table of them that several commands print."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Metric:
    """A field of `metrics.summarize`, its heading in a table and its name in words."""

    key: str
    heading: str
    words: str


METRICS = (
    Metric("accuracy", "accuracy", "accuracy"),
    Metric("mean_confidence", "confidence", "mean confidence"),
    Metric("ece", "ECE", "ECE, bins of equal width"),
    Metric("rms_ce", "RMS", "RMS calibration error, adaptive bins"),
    Metric("brier", "Brier", "Brier score"),
    Metric("nll", "NLL", "negative log-likelihood, nats"),
    Metric("ece_if_calibrated", "floor", "ECE that perfect calibration would show"),
    Metric("ece_equal_mass", "ECE mass", "ECE, bins of equal mass"),
    Metric("smooth_ece", "smECE", "smooth ECE, no bins"),
    Metric("mce", "MCE", "maximum calibration error"),
    Metric("sce", "SCE", "static calibration error, class-wise"),
    Metric("ace", "ACE", "adaptive calibration error, class-wise"),
    Metric("auroc", "AUROC", "AUROC of confidence"),
    Metric("choice_mass", "mass", "probability of all choices together"),
    Metric("rms_ce_hendrycks_test", "RMS*", "RMS as the original MMLU script computes it"),
)
ON_TERMINAL = 6
"""The first so many are shown on a terminal."""


def metric_text(summary: Mapping[str, Any], metric: Metric, interval: bool = False) -> str:
    """Three digits, with `interval` the 95 % one where there is one; a dash where the summary lacks the metric."""
    value = summary.get(metric.key)
    if value is None:
        return "-"
    ends = summary.get(f"{metric.key}_interval") if interval else None
    return f"{value:.3f}" + (f" ({ends[0]:.3f} to {ends[1]:.3f})" if ends else "")


def metrics_table(rows: Iterable[tuple[str, Mapping[str, Any]]], first: str = "") -> "Table":
    """(label, summary) rows under the headings that matter first; a summary is what `metrics.summarize` gives.

    Labels that begin with a space are parts of the row above and don't stand out.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first)
    table.add_column("n", justify="right")
    shown = METRICS[:ON_TERMINAL]
    for metric in shown:
        table.add_column(metric.heading, justify="right")
    for label, summary in rows:
        numbers = (metric_text(summary, metric) for metric in shown)
        table.add_row(Text(label), f"{summary['n']:,}", *numbers, style="" if label.startswith(" ") else "bold")
    return table
