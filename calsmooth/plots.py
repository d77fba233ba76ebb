"""Figures that several rooms draw, and how every figure is saved. `prepare_*` computes, `plot_*` draws."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from calsmooth.files import write_bytes
from calsmooth.metrics import Array, Bins, expected_calibration_error, reliability_bins

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, RED, GREEN = "#4878b0", "#c8504a", "#4f9a6b"
RUN_COLORS = (BLUE, RED, GREEN, "#d9902f", "#7d62a8", "#3a9fb3", "#b3568d", "#6b6b6b")
"""One for each run of a comparison, in order; used again from the start where there are more."""


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
    return write_bytes(path, figure_bytes(figure, Path(path).suffix.lstrip("."), dpi))


def figure_bytes(figure: "Figure", format: str, dpi: int = 150) -> bytes:
    """A figure as the bytes of a png, svg or pdf file; the same figure gives the same bytes on any day."""
    import matplotlib

    buffer = io.BytesIO()
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(format)
    with matplotlib.rc_context({"svg.hashsalt": "calsmooth"}):
        figure.savefig(buffer, format=format, dpi=dpi, metadata=undated)
    return buffer.getvalue()


# --- reliability: accuracy against confidence ------------------------------------------------------------------------


@dataclass(frozen=True)
class Reliability:
    """One panel of a reliability diagram: accuracy against confidence, bin by bin, and the totals.

    ece_interval: (low, high), 95 %, where it is known.
    """

    title: str
    bins: Bins
    n: int
    accuracy: float
    mean_confidence: float
    ece: float
    ece_interval: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain lists for JSON, enough to draw the panel again; null where a bin is empty."""
        return {
            "lower": self.bins.lower.tolist(),
            "upper": self.bins.upper.tolist(),
            "count": self.bins.count.tolist(),
            "accuracy": [None if np.isnan(a) else float(a) for a in self.bins.accuracy],
            "confidence": [None if np.isnan(c) else float(c) for c in self.bins.confidence],
        }


def prepare_reliability(
    confidence: ArrayLike,
    correct: ArrayLike,
    bins: int = 15,
    title: str = "",
    ece_interval: Sequence[float] | None = None,
) -> Reliability:
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
        ece_interval=_pair(ece_interval),
    )


def stored_reliability(summary: Mapping[str, Any], title: str = "") -> Reliability:
    """The panel of a task's summary in results.json, which holds it as `reliability`."""
    stored: Mapping[str, Any] = summary["reliability"]
    edges = {name: np.array(stored[name], dtype=np.float64) for name in ("lower", "upper", "accuracy", "confidence")}
    totals = {name: summary[name] for name in ("n", "accuracy", "mean_confidence", "ece")}
    return Reliability(
        title=title,
        bins=Bins(count=np.array(stored["count"], dtype=np.int64), **edges),
        ece_interval=_pair(summary.get("ece_interval")),
        **totals,
    )


def plot_reliability(panels: Sequence[Reliability | None], columns: int | None = None) -> "Figure":
    """Panels in rows of `columns` (all in one by default): accuracy bars with their gap to the confidence, and below
    each, where the predictions are. None leaves a place empty.

    A red gap is over-confidence, a green one under-confidence; on the diagonal there is none.
    """
    figure, places = _places(len(panels), columns or len(panels), width=4.0, height=5.3)
    drawn = [(place, panel) for place, panel in zip(places, panels, strict=True) if panel is not None]
    for (upper, lower), panel in drawn:
        _draw_reliability(upper, panel)
        _draw_share(lower, panel)
    for (upper, lower), empty in zip(places, panels, strict=True):
        if empty is None:
            upper.set_axis_off()
            lower.set_axis_off()
    first = drawn[0][0][0]
    handles, labels = first.get_legend_handles_labels()
    first.legend(handles, labels, loc="upper left", fontsize=8, frameon=False)
    return figure


def plot_reliability_together(tasks: Mapping[str, Sequence[Reliability]], columns: int = 3) -> "Figure":
    """Several runs in the same panel, one panel a task (as Figure 1 of the paper); a panel's title is its run's name.

    A dot is a bin, as large as its share of the questions; below the diagonal is over-confidence.
    """
    figure, places = _places(len(tasks), columns, width=4.6, height=5.6)
    for (upper, lower), (task, panels) in zip(places, tasks.items(), strict=True):
        for number, panel in enumerate(panels):
            color = RUN_COLORS[number % len(RUN_COLORS)]
            b = panel.bins
            filled = b.count > 0
            label = f"{panel.title}: ECE {_with_interval(panel)}"
            upper.plot(b.confidence[filled], b.accuracy[filled], color=color, linewidth=1.4, alpha=0.8, label=label)
            size = 12 + 240 * b.weights()[filled]
            dots: dict[str, Any] = {"s": size, "color": color, "alpha": 0.55, "linewidths": 0, "clip_on": False}
            upper.scatter(b.confidence[filled], b.accuracy[filled], **dots)
            lower.stairs(b.weights(), np.append(b.lower, b.upper[-1]), color=color, linewidth=1.4)
        upper.plot([0, 1], [0, 1], color="0.25", linewidth=1.2)
        for x, y, words in ((0.97, 0.04, "over-confident"), (0.03, 0.94, "under-confident")):
            upper.text(x, y, words, color="0.55", fontsize=8, ha="right" if x > 0.5 else "left")
        upper.set(xlim=(0, 1), ylim=(0, 1))
        upper.tick_params(labelbottom=False)
        # Above the panel: inside, it would lie on the lines of a good model.
        above: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.3, "frameon": False}
        upper.legend(title=task, title_fontsize=11, alignment="left", fontsize=8, **above)
        lower.set(xlim=(0, 1), ylim=(0, None), xlabel="confidence")
    return figure


def _places(number: int, columns: int, width: float, height: float) -> "tuple[Figure, list[tuple[Axes, Axes]]]":
    """A figure with `number` pairs of axes, a high one above a low one, in rows of `columns`."""
    columns = min(columns, number)
    rows = -(-number // columns)
    figure, axes = new_figure(width * columns + 0.3, height * rows, 2 * rows, columns, height_ratios=[4, 1] * rows)
    pairs = [
        (axes[2 * row * columns + column], axes[(2 * row + 1) * columns + column])
        for row in range(rows)
        for column in range(columns)
    ]
    for upper, lower in pairs[::columns]:
        upper.set_ylabel("accuracy")
        lower.set_ylabel("share")
    for upper, lower in pairs[number:]:
        upper.set_axis_off()
        lower.set_axis_off()
    return figure, pairs[:number]


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
    ax.set_title(
        f"{panel.title}\nECE {_with_interval(panel)}\naccuracy {panel.accuracy:.3f}, n = {panel.n:,}".lstrip(),
        fontsize=10,
    )


def _draw_share(ax: "Axes", panel: Reliability) -> None:
    b = panel.bins
    ax.bar(b.lower, b.weights(), width=b.upper - b.lower, align="edge", color="0.7", edgecolor="white", linewidth=0.6)
    top = b.weights().max() * 1.15
    ax.vlines(panel.accuracy, 0, top, color=BLUE, linewidth=1.6, label="accuracy")
    ax.vlines(panel.mean_confidence, 0, top, color=RED, linewidth=1.6, linestyle="--", label="mean confidence")
    ax.set(xlim=(0, 1), ylim=(0, top), xlabel="confidence")
    ax.legend(fontsize=7, frameon=False, loc="best")


def _with_interval(panel: Reliability) -> str:
    if panel.ece_interval is None:
        return f"{panel.ece:.3f}"
    low, high = panel.ece_interval
    return f"{panel.ece:.3f} ({low:.3f} to {high:.3f})"


def _pair(interval: Sequence[float] | None) -> tuple[float, float] | None:
    return None if interval is None else (float(interval[0]), float(interval[1]))


# --- bars: metrics of several runs -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class BarGroup:
    """One metric of several runs on several tasks, in percent. Where a task lacks the metric there is NaN.

    values: (runs, tasks). low, high: the same, ends of the 95 % interval; NaN where there is none.
    """

    metric: str
    values: Array
    low: Array
    high: Array


def plot_bars(groups: Sequence[BarGroup], runs: Sequence[str], tasks: Sequence[str]) -> "Figure":
    """A panel a metric, a group of bars a task, a bar a run (as Figures 2, 3 and 7 of the paper)."""
    width = max(3.4, 0.9 + len(tasks) * (0.28 * len(runs) + 0.3))
    columns = min(len(groups), 3, max(1, int(18 / width)))
    rows = -(-len(groups) // columns)
    figure, axes = new_figure(width * columns, 3.0 * rows + 0.3 * (1 + (len(runs) - 1) // 4), rows, columns)
    for ax in axes[len(groups) :]:
        ax.set_axis_off()
    place = np.arange(len(tasks))
    bar = 0.8 / len(runs)
    for ax, group in zip(axes, groups, strict=False):
        for number, run in enumerate(runs):
            left = place + (number - (len(runs) - 1) / 2) * bar
            value = group.values[number]
            color = RUN_COLORS[number % len(RUN_COLORS)]
            ax.bar(left, value, bar * 0.92, color=color, alpha=0.85, label=run)
            sure = np.isfinite(group.low[number])
            if sure.any():
                # A percentile interval of ECE, which noise can only raise, may lie wholly above the value.
                reach = np.maximum([value - group.low[number], group.high[number] - value], 0)
                ax.errorbar(left[sure], value[sure], reach[:, sure], fmt="none", ecolor="0.25", elinewidth=1, capsize=2)
        ax.set_xticks(place, tasks, fontsize=9)
        ax.set_xlim(-0.6, len(tasks) - 0.4)
        ax.grid(False, axis="x")
        ax.set_title(group.metric, fontsize=10)
        ax.set_ylim(0, None)
    axes[0].set_ylabel("percent")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(runs), 4), fontsize=9, frameon=False)
    return figure
