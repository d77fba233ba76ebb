"""Figures that several rooms draw, and how every figure is saved. `prepare_*` computes, `plot_*` draws."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from calsmooth.files import write_bytes
from calsmooth.metrics import Bins, expected_calibration_error, reliability_bins

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, RED, GREEN = "#4878b0", "#c8504a", "#4f9a6b"


def new_figure(
    width: float = 6.0,
    height: float = 4.0,
    rows: int = 1,
    columns: int = 1,
    height_ratios: Sequence[float] | None = None,
) -> "tuple[Figure, list]":
    """A figure with `rows` x `columns` axes (flat list), made without pyplot: no global state, no display needed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, height_ratios=height_ratios).ravel().tolist()
    for ax in axes:
        ax.grid(True, color="0.9", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure: "Figure", path: Path, dpi: int = 150) -> Path:
    """Write a figure whole or not at all; the format follows the path's suffix (.png, .svg, .pdf)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=Path(path).suffix.lstrip("."), dpi=dpi)
    return write_bytes(path, buffer.getvalue())


@dataclass(frozen=True)
class Reliability:
    """One panel of a reliability diagram: accuracy against confidence, bin by bin, and the totals."""

    title: str
    bins: Bins
    n: int
    accuracy: float
    mean_confidence: float
    ece: float

    def to_dict(self) -> dict[str, Any]:
        """Plain lists for JSON, enough to draw the panel again; null where a bin is empty."""
        return {
            "lower": self.bins.lower.tolist(),
            "upper": self.bins.upper.tolist(),
            "count": self.bins.count.tolist(),
            "accuracy": [None if np.isnan(a) else float(a) for a in self.bins.accuracy],
            "confidence": [None if np.isnan(c) else float(c) for c in self.bins.confidence],
        }


def prepare_reliability(confidence: ArrayLike, correct: ArrayLike, bins: int = 15, title: str = "") -> Reliability:
    """The numbers of a reliability diagram (Figures 1, 8 and 9 of the paper), in bins of equal width.

    confidence, correct: (N,), the top choice's probability and whether it was right.
    """
    p, y = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    return Reliability(
        title=title,
        bins=reliability_bins(p, y, bins),
        n=len(p),
        accuracy=float(y.mean()),
        mean_confidence=float(p.mean()),
        ece=expected_calibration_error(p, y, bins),
    )


def plot_reliability(panels: Sequence[Reliability]) -> "Figure":
    """Panels side by side: accuracy bars with their gap to the confidence, and below, where the predictions are.

    A red gap is over-confidence, a green one under-confidence; on the diagonal there is none.
    """
    figure, axes = new_figure(4.0 * len(panels) + 0.3, 5.3, rows=2, columns=len(panels), height_ratios=[4, 1])
    for column, panel in enumerate(panels):
        _draw_reliability(axes[column], panel)
        _draw_share(axes[len(panels) + column], panel)
        if column == 0:
            axes[0].set_ylabel("accuracy")
            axes[len(panels)].set_ylabel("share")
    handles, labels = axes[0].get_legend_handles_labels()
    axes[0].legend(handles, labels, loc="upper left", fontsize=8, frameon=False)
    return figure


def _draw_reliability(ax: "Axes", panel: Reliability) -> None:
    b = panel.bins
    filled = b.count > 0
    left, width = b.lower[filled], (b.upper - b.lower)[filled]
    accuracy, confidence = b.accuracy[filled], b.confidence[filled]
    low = np.minimum(accuracy, confidence)
    over, under = np.maximum(confidence - accuracy, 0), np.maximum(accuracy - confidence, 0)
    place: dict[str, Any] = {"width": width, "align": "edge", "linewidth": 0.6}
    ax.bar(left, low, color=BLUE, edgecolor="white", alpha=0.75, **place)
    gap: dict[str, Any] = {"bottom": low, "alpha": 0.4, "hatch": "////", **place}
    ax.bar(left, over, color=RED, edgecolor=RED, label="over-confident", **gap)
    ax.bar(left, under, color=GREEN, edgecolor=GREEN, label="under-confident", **gap)
    ax.hlines(accuracy, left, left + width, color=BLUE, linewidth=2.2, label="accuracy")
    ax.plot([0, 1], [0, 1], color="0.25", linewidth=1.2, linestyle="--", label="calibrated")
    ax.set(xlim=(0, 1), ylim=(0, 1))
    ax.tick_params(labelbottom=False)
    heading = f"ECE {panel.ece:.3f}, accuracy {panel.accuracy:.3f}, n = {panel.n:,}"
    ax.set_title(f"{panel.title}\n{heading}" if panel.title else heading, fontsize=10)


def _draw_share(ax: "Axes", panel: Reliability) -> None:
    b = panel.bins
    ax.bar(b.lower, b.weights(), width=b.upper - b.lower, align="edge", color="0.7", edgecolor="white", linewidth=0.6)
    top = b.weights().max() * 1.15
    ax.vlines(panel.accuracy, 0, top, color=BLUE, linewidth=1.6, label="accuracy")
    ax.vlines(panel.mean_confidence, 0, top, color=RED, linewidth=1.6, linestyle="--", label="mean confidence")
    ax.set(xlim=(0, 1), ylim=(0, top), xlabel="confidence")
    ax.legend(fontsize=7, frameon=False, loc="best")
