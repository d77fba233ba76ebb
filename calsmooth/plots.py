"""Figures that several rooms draw, and how every figure is saved. `prepare_*` computes, `plot_*` draws.

Every figure can be read by people who don't see red and green apart, and in grey print: colors differ in lightness,
and what a color says, a hatch, a marker or a line's style says as well. One color has one meaning in a figure.
"""

import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from calsmooth.files import write_bytes
from calsmooth.metrics import Array, Bins, expected_calibration_error, reliability_bins, wilson_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg", "pdf")
"""Every figure is saved as each: for a glance, for the web and for LaTeX."""
INK = "0.2"
"""Lines and words that belong to no run."""
RED = "#d55e00"
BLUE, ORANGE, PURPLE, GREEN = "#0072b2", "#e69f00", "#6d1f4f", "#009e73"
OVER, UNDER = ORANGE, BLUE
OVER_HATCH, UNDER_HATCH = "////", "\\\\\\\\"
ACCURACY = "0.8"
FEW = 10
"""A bin with fewer questions says little and is drawn faintly."""
PAGE_WIDTH = 7.0
"""Inches: what two columns of a paper have."""


@dataclass(frozen=True)
class RunStyle:
    """How one of several runs is drawn, with lines or with bars."""

    color: str
    marker: str
    line: Any
    hatch: str


RUN_STYLES = (
    RunStyle(BLUE, "o", "-", ""),
    RunStyle(ORANGE, "s", "--", "////"),
    RunStyle(PURPLE, "^", "-.", "...."),
    RunStyle(GREEN, "D", (0, (1, 1)), "xxxx"),
    RunStyle("#56b4e9", "v", (0, (5, 1)), "----"),
    RunStyle("#d55e00", "P", (0, (3, 1, 1, 1, 1, 1)), "||||"),
    RunStyle("#222222", "X", (0, (1, 3)), "oo"),
    RunStyle("#cc79a7", "*", (0, (7, 2, 1, 2)), "++++"),
)
"""One for each run of a comparison, in order: the colors are those of Okabe and Ito, but for two darker ones."""


def run_styles(number: int) -> list[RunStyle]:
    """Styles for `number` runs; used again from the start where there are more runs than styles."""
    return list(islice(cycle(RUN_STYLES), number))


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


def save_figure(figure: "Figure", path: Path, dpi: int = 200) -> list[Path]:
    """Write a figure in every one of `FORMATS`, each file whole or not at all.

    path: the files' common name, without a suffix.

    Raises:
        ValueError: the name has the suffix of one of the formats.
    """
    path = Path(path)
    if path.suffix.lstrip(".") in FORMATS:
        raise ValueError(f"expected a name without the suffix of a format, got {path.name}")
    # Not with_suffix(): a name such as "beta0.1" would lose its end.
    return [
        write_bytes(path.with_name(f"{path.name}.{format}"), figure_bytes(figure, format, dpi)) for format in FORMATS
    ]


def figure_bytes(figure: "Figure", format: str, dpi: int = 200) -> bytes:
    """A figure as the bytes of a png, svg or pdf file; the same figure gives the same bytes on any day."""
    import matplotlib

    buffer = io.BytesIO()
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(format)
    # Type 42 (TrueType) fonts: publishers refuse the default, Type 3.
    with matplotlib.rc_context({"svg.hashsalt": "calsmooth", "pdf.fonttype": 42, "hatch.linewidth": 0.7}):
        figure.savefig(buffer, format=format, dpi=dpi, metadata=undated)
    return buffer.getvalue()


def draw_intervals(ax: "Axes", place: ArrayLike, low: ArrayLike, high: ArrayLike, **how: Any) -> None:
    """Intervals as lines with caps, at `place` on the x axis, or with horizontal=True on the y axis.

    They are drawn where they are, whether the value beside them lies inside or not. NaN draws nothing. halo=True
    gives them a white rim, for dark grounds; what else is given goes to matplotlib's errorbar().
    """
    place, low, high = (np.atleast_1d(np.asarray(values, dtype=np.float64)) for values in (place, low, high))
    known = np.isfinite(low) & np.isfinite(high)
    place, middle, reach = place[known], ((low + high) / 2)[known], ((high - low) / 2)[known]
    style: dict[str, Any] = {"fmt": "none", "ecolor": INK, "elinewidth": 0.9, "capsize": 2}
    horizontal, halo = how.pop("horizontal", False), how.pop("halo", False)
    ends: dict[str, Any] = {"x": middle, "y": place, "xerr": reach} if horizontal else {}
    ends = ends or {"x": place, "y": middle, "yerr": reach}
    if halo:
        ax.errorbar(**ends, **style | {"ecolor": "white", "elinewidth": 2.4, "capthick": 2.4, "capsize": 2.8})
    ax.errorbar(**ends, **style | how)


# --- reliability: accuracy against confidence ------------------------------------------------------------------------


@dataclass(frozen=True)
class Reliability:
    """One panel of a reliability diagram: accuracy against confidence, bin by bin, and the totals.

    ece_interval: (low, high), 95 %, where it is known. unit: what `n` counts. rows: of how many texts the tokens are,
    where `n` counts tokens. design_effect: how many times larger the variance of the accuracy is than that of
    independent questions (Kish 1965), at least 1; the tokens of one response aren't independent.
    """

    title: str
    bins: Bins
    n: int
    accuracy: float
    mean_confidence: float
    ece: float
    ece_interval: tuple[float, float] | None = None
    unit: str = "questions"
    rows: int | None = None
    design_effect: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain lists for JSON, enough to draw the panel again; null where a bin is empty."""
        return {
            "lower": self.bins.lower.tolist(),
            "upper": self.bins.upper.tolist(),
            "count": self.bins.count.tolist(),
            "accuracy": [None if np.isnan(a) else float(a) for a in self.bins.accuracy],
            "confidence": [None if np.isnan(c) else float(c) for c in self.bins.confidence],
        }

    def accuracy_intervals(self) -> tuple[Array, Array]:
        """The 95 % Wilson interval of each bin's accuracy: (bins,), (bins,), NaN where a bin is empty."""
        return bin_intervals(self.bins, self.design_effect)

    def size(self) -> str:
        """How much was measured, with its unit."""
        of_rows = "" if self.rows is None else f" of {self.rows:,} rows"
        return f"n = {self.n:,} {self.unit}{of_rows}"


def bin_intervals(bins: Bins, design_effect: float = 1.0) -> tuple[Array, Array]:
    """(low, high), each (bins,): the 95 % Wilson interval of each bin's accuracy, NaN where a bin is empty."""
    return wilson_interval(bins.accuracy, bins.count / design_effect)


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
    of_tokens = {"unit": "tokens", "rows": summary["rows"]} if summary.get("rows") is not None else {}
    return Reliability(
        title=title,
        bins=Bins(count=np.array(stored["count"], dtype=np.int64), **edges),
        ece_interval=_pair(summary.get("ece_interval")),
        design_effect=_design_effect(summary) if of_tokens else 1.0,
        **totals,
        **of_tokens,
    )


def _design_effect(summary: Mapping[str, Any]) -> float:
    """From the accuracy's interval, which was drawn over whole responses, and the one that independence would give."""
    low, high = summary.get("accuracy_interval") or (0.0, 0.0)
    independent_low, independent_high = wilson_interval(summary["accuracy"], summary["n"])
    return max(1.0, float((high - low) / (independent_high - independent_low)) ** 2)


@dataclass(frozen=True)
class Frame:
    """The limits of the axes that all panels of a figure have in common: confidence from, to; the others from 0."""

    confidence: tuple[float, float]
    accuracy: float
    share: float


def prepare_frame(panels: Iterable[Reliability | None]) -> Frame:
    """From 0 to 1, or the part of it that holds all answers where that is less than 0.7 wide."""
    drawn = [panel for panel in panels if panel is not None]
    low = min(float(panel.bins.lower[panel.bins.count > 0].min()) for panel in drawn)
    high = max(float(panel.bins.upper[panel.bins.count > 0].max()) for panel in drawn)
    share = 1.05 * max(float(panel.bins.weights().max()) for panel in drawn)
    if high - low >= 0.7:
        return Frame((0.0, 1.0), 1.0, share)
    # The totals have their lines in the panels, too.
    totals = [value for panel in drawn for value in (panel.accuracy, panel.mean_confidence)]
    surest = max(float(np.nanmax(panel.accuracy_intervals()[1])) for panel in drawn)
    return Frame((min(low, *totals), max(high, *totals)), min(1.0, max(high, surest) + 0.02), share)


def plot_reliability(
    panels: Sequence[Reliability | None],
    columns: int | None = None,
    *,
    frame: Frame | None = None,
    legend: bool = True,
) -> "Figure":
    """Panels in rows of `columns` (all in one by default): accuracy bars with their gap to the confidence, and below
    each, where the predictions are. None leaves a place empty.

    Lines with caps are 95 % Wilson intervals of a bin's accuracy. Bins with fewer than `FEW` answers are faint.
    frame: the axes' limits, of these panels by default; legend: whether to explain the marks.
    """
    columns = min(columns or len(panels), len(panels))
    width = _panel_width(columns)
    figure, places = _places(len(panels), columns, width, upper=0.86 * width, above=0.42 if width >= 3 else 0.56)
    frame = frame or prepare_frame(panels)
    for (upper, lower), panel in zip(places, panels, strict=True):
        if panel is None:
            upper.set_axis_off()
            lower.set_axis_off()
        else:
            _draw_reliability(upper, panel, width)
            _draw_share(lower, panel)
            _limits(upper, lower, frame)
    if legend:
        _reliability_legend(figure, panels, columns)
    return figure


def plot_reliability_apart(panels: Sequence[Reliability]) -> "list[Figure]":
    """The same panels for a page: a figure that explains the marks, then one for each panel, all with equal axes."""
    from matplotlib.figure import Figure

    key = Figure(figsize=(3.75, 0.8), layout="constrained")
    _reliability_legend(key, panels, 1)
    frame = prepare_frame(panels)
    return [key, *(plot_reliability([panel], frame=frame, legend=False) for panel in panels)]


def plot_reliability_together(
    tasks: Mapping[str, Sequence[Reliability]], columns: int | None = None, frame: Frame | None = None
) -> "Figure":
    """Several runs in the same panel, one panel a task (as Figure 1 of the paper); a panel's title is its run's name.

    A mark is a bin, as large as its share of the answers, with its accuracy's 95 % Wilson interval; bins with fewer
    than `FEW` answers are hollow and not joined. Below the diagonal is over-confidence.
    """
    columns = min(columns or (2 if len(tasks) in (2, 4) else 3), len(tasks))
    runs = max(map(len, tasks.values()))
    width = 3.5
    figure, places = _places(len(tasks), columns, width, upper=0.86 * width, above=0.22 + 0.18 * runs)
    frame = frame or prepare_frame(panel for panels in tasks.values() for panel in panels)
    for (upper, lower), (task, panels) in zip(places, tasks.items(), strict=True):
        for panel, style in zip(panels, run_styles(len(panels)), strict=True):
            label = f"{panel.title}: ECE {_with_interval(panel)}"
            draw_run(upper, panel.bins, style, label, panel.design_effect)
            edges = np.append(panel.bins.lower, panel.bins.upper[-1])
            lower.stairs(panel.bins.weights(), edges, color=style.color, linestyle=style.line, linewidth=1.3)
        upper.plot([0, 1], [0, 1], color=INK, linewidth=1)
        _limits(upper, lower, frame)
        for x, y, words in ((0.97, 0.04, "over-confident"), (0.03, 0.93, "under-confident")):
            upper.text(
                x, y, words, color="0.45", fontsize=8, ha="right" if x > 0.5 else "left", transform=upper.transAxes
            )
        # Above the panel: inside, it would lie on the lines of a good model.
        above: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.3, "frameon": False}
        upper.legend(title=task, title_fontsize=10, alignment="left", fontsize=8, handlelength=3.2, **above)
        sizes = list(dict.fromkeys(panel.size() for panel in panels))
        lower.set_title("; ".join(sizes), loc="left", fontsize=8)
    marks = ["lines with caps: 95 % interval of a bin's accuracy", f"hollow: fewer than {FEW} answers"]
    figure.supxlabel(("; " if columns > 1 else "\n").join(marks), fontsize=8, color=INK)
    return figure


def _panel_width(columns: int) -> float:
    """Inches: two panels fill a page's width; more are narrower as long as their words have room."""
    return max(2.4, min(3.5, PAGE_WIDTH / columns))


def _places(
    number: int, columns: int, width: float, upper: float, above: float
) -> "tuple[Figure, list[tuple[Axes, Axes]]]":
    """A figure with `number` pairs of axes, a high one above a low one, in rows of `columns`.

    width: of a panel; upper: height of the high axes; above: of what stands over them; inches.
    """
    rows = -(-number // columns)
    low = 0.5
    figure, axes = new_figure(
        width * columns, (upper + low + above + 0.75) * rows + 0.5, 2 * rows, columns, height_ratios=[upper, low] * rows
    )
    pairs = [
        (axes[2 * row * columns + column], axes[(2 * row + 1) * columns + column])
        for row in range(rows)
        for column in range(columns)
    ]
    for high, share in pairs:
        for ax in (high, share):
            ax.tick_params(labelsize=8)
        high.tick_params(labelbottom=False)
        share.set_xlabel("confidence", fontsize=9)
    for high, share in pairs[::columns]:
        high.set_ylabel("accuracy", fontsize=9)
        share.set_ylabel("share", fontsize=9)
    for high, share in pairs[number:]:
        high.set_axis_off()
        share.set_axis_off()
    return figure, pairs[:number]


def _limits(upper: "Axes", lower: "Axes", frame: Frame) -> None:
    upper.set(xlim=frame.confidence, ylim=(0, frame.accuracy))
    lower.set(xlim=frame.confidence, ylim=(0, frame.share))


def _draw_reliability(ax: "Axes", panel: Reliability, width: float) -> None:
    b = panel.bins
    low, high = panel.accuracy_intervals()
    for shown, faint in ((b.count >= FEW, False), ((b.count > 0) & (b.count < FEW), True)):
        left, wide = b.lower[shown], (b.upper - b.lower)[shown]
        accuracy, confidence = b.accuracy[shown], b.confidence[shown]
        base = np.minimum(accuracy, confidence)
        over, under = np.maximum(confidence - accuracy, 0), np.maximum(accuracy - confidence, 0)
        alpha = 0.3 if faint else 1.0
        place: dict[str, Any] = {"width": wide, "align": "edge", "linewidth": 0.6, "alpha": alpha}
        ax.bar(left, base, color=ACCURACY, edgecolor="white", label="accuracy", **place)
        for gap, color, hatch, words in (
            (over, OVER, OVER_HATCH, "over-confident"),
            (under, UNDER, UNDER_HATCH, "under-confident"),
        ):
            # The hatch has the edge's color: white lines on the gap's own.
            ax.bar(left, gap, bottom=base, color=color, edgecolor="white", hatch=hatch, label=words, **place)
        ax.hlines(accuracy, left, left + wide, color=INK, linewidth=1.8, alpha=alpha)
        draw_intervals(ax, left + wide / 2, low[shown], high[shown], alpha=alpha, capsize=1.5)
    ax.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle="--")
    ece, accuracy_words = f"ECE {_with_interval(panel)}", f"accuracy {panel.accuracy:.3f}"
    totals = f"{ece}, {accuracy_words}" if width >= 3 else f"{ece}\n{accuracy_words}"
    title = textwrap.fill(panel.title, int(width * 14))
    ax.set_title(f"{title}\n{totals}".lstrip(), fontsize=9, loc="left")


def _draw_share(ax: "Axes", panel: Reliability) -> None:
    b = panel.bins
    ax.stairs(b.weights(), np.append(b.lower, b.upper[-1]), color="0.4", linewidth=1.2, zorder=3)
    over = panel.mean_confidence > panel.accuracy
    ax.axvspan(
        *sorted((panel.accuracy, panel.mean_confidence)),
        facecolor=OVER if over else UNDER,
        edgecolor="white",
        hatch=OVER_HATCH if over else UNDER_HATCH,
        linewidth=0,
    )
    ax.axvline(panel.accuracy, color=INK, linewidth=1.6)
    ax.axvline(panel.mean_confidence, color=INK, linewidth=1.6, linestyle=":")
    ax.set_title(panel.size(), loc="left", fontsize=8)


def draw_run(ax: "Axes", bins: Bins, style: RunStyle, label: str, design_effect: float = 1.0) -> None:
    """One run's accuracy against confidence: a mark a bin, as large as its share, with its 95 % Wilson interval.

    Bins with fewer than `FEW` answers are hollow and not joined to the others.
    """
    low, high = bin_intervals(bins, design_effect)
    many, few = bins.count >= FEW, (bins.count > 0) & (bins.count < FEW)
    x, y = bins.confidence, bins.accuracy
    look: dict[str, Any] = {"color": style.color, "marker": style.marker, "linestyle": style.line}
    ax.plot(x[many], y[many], linewidth=1.3, markersize=3.5, label=label, **look)
    size = 10 + 200 * bins.weights()
    marks: dict[str, Any] = {"marker": style.marker, "clip_on": False}
    ax.scatter(x[many], y[many], s=size[many], c=style.color, alpha=0.5, linewidths=0, **marks)
    hollow: dict[str, Any] = {"facecolors": "none", "edgecolors": style.color, "linewidths": 0.8, "alpha": 0.5}
    ax.scatter(x[few], y[few], s=12, **hollow, **marks)
    for shown, alpha in ((many, 0.8), (few, 0.25)):
        draw_intervals(ax, x[shown], low[shown], high[shown], ecolor=style.color, alpha=alpha, capsize=1.5)


def _reliability_legend(figure: "Figure", panels: Sequence[Reliability | None], columns: int) -> None:
    """What the marks of `plot_reliability` mean, as far as they occur in these panels, below all of them."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    bins = [panel.bins for panel in panels if panel is not None]
    drawn = [(b.confidence - b.accuracy)[b.count > 0] for b in bins]
    gap: dict[str, Any] = {"edgecolor": "white", "linewidth": 0}
    # A tuple's parts are drawn over one another.
    bar_with_interval = (Patch(facecolor=ACCURACY, **gap), Line2D([], [], color=INK, marker="|", linestyle=""))
    handles: dict[str, Any] = {"accuracy in a bin, 95 % interval": bar_with_interval}
    if any((gaps > 0).any() for gaps in drawn):
        handles["over-confident"] = Patch(facecolor=OVER, hatch=OVER_HATCH, **gap)
    if any((gaps < 0).any() for gaps in drawn):
        handles["under-confident"] = Patch(facecolor=UNDER, hatch=UNDER_HATCH, **gap)
    handles["perfect calibration"] = Line2D([], [], color=INK, linewidth=1, linestyle="--")
    if any(((b.count > 0) & (b.count < FEW)).any() for b in bins):
        handles[f"faint: fewer than {FEW} answers"] = Patch(facecolor=ACCURACY, alpha=0.3, **gap)
    handles["accuracy of all"] = Line2D([], [], color=INK, linewidth=1.6)
    handles["mean confidence of all"] = Line2D([], [], color=INK, linewidth=1.6, linestyle=":")
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols={1: 2, 2: 3}.get(columns, 4),
        fontsize=6.6 if columns == 1 else 7.5,
        frameon=False,
        columnspacing=0.8 if columns == 1 else 1.0,
        handlelength=1.6,
        handletextpad=0.6,
    )


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
    """One metric of several runs on several tasks. Where a task lacks the metric there is NaN.

    values: (runs, tasks), in the unit of the tables. low, high: the same, ends of the 95 % interval; NaN where there is
    none; a value may lie outside of its interval. axis: groups of the same name get equal axes.
    """

    metric: str
    values: Array
    low: Array
    high: Array
    axis: str = ""


def plot_bars(
    groups: Sequence[BarGroup],
    runs: Sequence[str],
    tasks: Sequence[str],
    columns: int = 3,
    limits_of: Sequence[BarGroup] | None = None,
) -> "Figure":
    """A panel a metric, a group of bars a task, a bar a run (as Figures 2, 3 and 7 of the paper), lying down.

    limits_of: more groups that the axes should have room for, where these are drawn one by one.
    """
    from matplotlib.lines import Line2D

    columns = min(len(groups), columns)
    rows = -(-len(groups) // columns)
    names = [textwrap.fill(task, 14) for task in tasks]
    lines = max(name.count("\n") + 1 for name in names)
    height = 0.75 + len(tasks) * max(0.15 * len(runs) + 0.14, 0.16 * lines + 0.06)
    entries = len(runs) + 1
    longest = max(map(len, [*runs, "95 % interval"]))
    legend_columns = max(1, min(entries, int((2.2 * columns + 1.0) / (0.5 + 0.07 * longest))))
    legend = 0.15 + 0.18 * -(-entries // legend_columns)
    figure, axes = new_figure(2.2 * columns + 1.0, height * rows + legend, rows, columns)
    for ax in axes[len(groups) :]:
        ax.set_axis_off()
    place = np.arange(len(tasks))
    bar = 0.84 / len(runs)
    for number, (ax, group) in enumerate(zip(axes, groups, strict=False)):
        for run, style in enumerate(run_styles(len(runs))):
            at = place + (run - (len(runs) - 1) / 2) * bar
            ax.barh(
                at,
                group.values[run],
                bar * 0.9,
                color=style.color,
                edgecolor="white",
                linewidth=0.4,
                hatch=style.hatch,
                label=runs[run],
            )
            draw_intervals(ax, at, group.low[run], group.high[run], horizontal=True, halo=True)
            for y in at[~np.isfinite(group.values[run])]:
                ax.annotate(
                    "not measured", (0, y), xytext=(3, 0), textcoords="offset points", fontsize=7, color="0.45",
                    va="center",
                )  # fmt: skip
        ax.set_yticks(place, names if number % columns == 0 else [""] * len(tasks), fontsize=9)
        ax.set_ylim(len(tasks) - 0.5, -0.5)
        ax.grid(False, axis="y")
        ax.tick_params(axis="x", labelsize=8)
        ax.set_xlim(0, _highest(other for other in limits_of or groups if other.axis == group.axis))
        sure = np.isfinite(group.low).any()
        ax.set_title(group.metric + ("" if sure else " (no interval)"), fontsize=9, loc="left")
    handles, labels = axes[0].get_legend_handles_labels()
    if any(np.isfinite(group.low).any() for group in groups):
        handles.append(Line2D([], [], color=INK, linewidth=0.9, marker="|"))
        labels.append("95 % interval")
    figure.legend(handles, labels, loc="outside lower center", ncols=legend_columns, fontsize=8, frameon=False)
    return figure


def _highest(groups: Iterable[BarGroup]) -> float:
    """A little more than the highest value or end of an interval, of groups that share their axis."""
    ends = np.concatenate([np.ravel((group.values, group.high)) for group in groups])
    return 1.06 * max(float(np.nanmax(ends)), 1e-3)
