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
    Metric("overconfidence", "over", "over-confidence: mean confidence - accuracy"),
    Metric("ece_corrected", "ECE corr.", "ECE, corrected for what sampling adds"),
    Metric("ece_if_calibrated", "floor", "ECE that perfect calibration would show at this n"),
    Metric("ece_p_value", "p", "share of samples of a calibrated model with at least this ECE"),
    Metric("ece_unnormalised", "ECE raw", "ECE of the letters' probabilities as the model gave them, not renormalised"),
    Metric("overconfidence_unnormalised", "over raw", "over-confidence of those"),
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
SIGNIFICANT = 0.05
"""A model whose ECE a calibrated one reaches in a larger share of samples can't be told from that."""


def metric_text(summary: Mapping[str, Any], metric: Metric, interval: bool = False) -> str:
    """Three digits, with `interval` the 95 % one where there is one; a dash where the summary lacks the metric."""
    value = summary.get(metric.key)
    if value is None:
        return "-"
    # The interval that is called ECE's is that of the true one, which the corrected value estimates.
    key = {"ece": "", "ece_corrected": "ece"}.get(metric.key, metric.key)
    ends = summary.get(f"{key}_interval") if interval else None
    return f"{value:.3f}" + (f" ({ends[0]:.3f} to {ends[1]:.3f})" if ends else "")


def ece_sentence(summary: Mapping[str, Any]) -> str:
    """How large a task's calibration error is, how sure that is, and what a calibrated model would show.

    summary: of `metrics.summarize` with intervals.
    """
    low, high = summary["ece_interval"]
    p = summary["ece_p_value"]
    share = (f"{p:.0%}" if p >= 0.01 else f"at most {p:.1%}").replace("%", " %")
    return (
        f"ECE {summary['ece']:.3f}, corrected for sampling {summary['ece_corrected']:.3f} (95 % interval {low:.3f} to "
        f"{high:.3f}); a calibrated model shows {summary['ece_if_calibrated']:.3f} on average at this n, and at least "
        f"as much as here in {share} of samples"
    )


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
