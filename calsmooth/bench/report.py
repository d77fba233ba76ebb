"""What a measurement leaves behind: rows, a table like the paper's Tables 2 and 3 (also Markdown), CSV, a picture."""

import csv
import io
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from calsmooth.plots import BLUE, RUN_STYLES, RunStyle, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from calsmooth.bench.inputs import Statistics

ROOFLINE = "roofline"

MARKERS = "os^DvPX*<>dhp"
"""Of the lines, in order. Their number and that of the run styles have no common divisor, so that color and marker
together repeat only after all combinations."""


@dataclass(frozen=True)
class Row:
    """One method on one problem. Times are medians in ms, bytes are peaks above the inputs, errors are relative.

    total_ms is forward and backward together, no_grad_ms the loss alone as in evaluation. grad_error is the larger of
    ||g - g64|| / ||g64|| for the gradients of hidden states and head, g64 in float64 on the same inputs. None: not
    measured, or the method failed (`error` says how).
    """

    preset: str
    method: str
    mode: str
    label: str  # method, mode and what else tells it from the other rows of the same problem
    beta: float | None
    tokens: int
    vocab: int
    hidden: int
    softcap: float | None
    dtype: str
    device: str
    frozen: str
    repeats: int = 0
    forward_ms: float | None = None
    backward_ms: float | None = None
    total_ms: float | None = None
    total_ms_spread: float | None = None  # half the interquartile range
    no_grad_ms: float | None = None
    forward_peak_bytes: int | None = None
    peak_bytes: int | None = None
    no_grad_peak_bytes: int | None = None
    grad_error: float | None = None
    grad_error_hidden: float | None = None
    grad_error_head: float | None = None
    grad_error_tokens: int | None = None
    loss_error: float | None = None
    filter_eps: float | None = None
    kept_mass: float | None = None  # probability that the filtered mode keeps, mean over tokens
    note: str | None = None
    error: str | None = None


def describe_statistics(statistics: "Statistics") -> str:
    """The inputs' softmax in one line."""
    s = statistics
    return (
        f"inputs: top-1 probability {s.top1:.3f}, entropy {s.entropy:.2f} nats, loss {s.nll:.2f}; a token has "
        f"{s.entries_above_eps:.0f} entries >= 2^-12 with {s.mass_above_eps:.3f} of the mass, "
        f"and {s.active_tiles:.2f} of 128 x 256 tiles hold one (first {s.tokens} tokens)"
    )


def describe_problem(row: Row) -> str:
    frozen = f", {row.frozen} frozen" if row.frozen != "none" else ""
    return f"{_shape_words(row)}, {row.tokens:,} tokens, {row.dtype}{frozen}"


def result_table(rows: list[Row]) -> Table:
    """The rows of one problem, fastest first within each label smoothing, the roofline on top."""
    first = rows[0]
    repeats = max(row.repeats for row in rows)
    rounds = f"medians of {repeats} rounds" if repeats > 1 else "a single round"
    table = Table(
        title=describe_problem(first),
        caption=f"ms of forward, backward, both, and of the loss alone (eval), {rounds}; peak: memory above the "
        "inputs, gradients included; error: gradients against float64",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("method", overflow="fold")
    for heading in ("beta", "fwd", "bwd", "total ms", "eval", "peak MB", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in sorted(rows, key=_order):
        if row.error is not None:
            table.add_row(f"{row.label}: [red]{_escape(row.error)}[/red]", _beta(row), *["-"] * 6)
            continue
        style = "dim" if row.method == ROOFLINE else "bold" if row.method == "calsmooth" else None
        spread = f" ±{_spread(row.total_ms_spread)}" if row.total_ms_spread is not None and row.repeats > 1 else ""
        kept = f", keeps {row.kept_mass:.3f} of the mass" if row.kept_mass is not None else ""
        table.add_row(
            row.label + kept,
            _beta(row),
            _ms(row.forward_ms),
            _ms(row.backward_ms),
            _ms(row.total_ms) + spread,
            _ms(row.no_grad_ms),
            "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.0f}",
            "-" if row.grad_error is None else f"{row.grad_error:.1e}",
            style=style,
        )
    return table


def markdown(rows: list[Row], statistics: "Statistics") -> str:
    """One problem as a Markdown table with the columns of the paper's Tables 2 and 3, fastest first."""

    def megabytes(value: int | None) -> str:
        return "-" if value is None else f"{value / 1e6:,.0f}"

    lines = [
        f"### {describe_problem(rows[0])}",
        "",
        describe_statistics(statistics),
        "",
        "| method | beta | fwd ms | fwd MB | bwd ms | fwd+bwd ms | fwd+bwd MB | eval ms | gradient error | kept mass |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(rows, key=_order):
        cells = [row.label, _beta(row)]
        if row.error is not None:
            cells += [row.error, *["-"] * 7]
        else:
            cells += [_ms(row.forward_ms), megabytes(row.forward_peak_bytes), _ms(row.backward_ms), _ms(row.total_ms)]
            cells += [megabytes(row.peak_bytes), _ms(row.no_grad_ms)]
            cells += ["-" if row.grad_error is None else f"{row.grad_error:.1e}"]
            cells += ["-" if row.kept_mass is None else f"{row.kept_mass:.3f}"]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def csv_text(rows: list[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=[f.name for f in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


@dataclass(frozen=True)
class Panel:
    """One line of the picture: the methods on one shape, against tokens or vocabulary where there are several."""

    title: str
    x_label: str
    x: list[int]
    milliseconds: dict[str, list[float | None]]  # method -> a value for each x
    megabytes: dict[str, list[float | None]]


def prepare_panels(rows: list[Row]) -> list[Panel]:
    """Group rows into panels: over the vocabulary in a sweep of it at one number of tokens, else over tokens."""
    over_vocab = len({row.tokens for row in rows}) == 1 and _several_vocabularies(rows)
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        own = (row.tokens,) if over_vocab else (row.vocab, row.preset)
        groups.setdefault((row.hidden, row.softcap, row.dtype, *own), []).append(row)
    several_betas = len({row.beta for row in rows if row.beta is not None and row.method != ROOFLINE}) > 1
    panels = []
    for group in groups.values():
        first = group[0]
        x = sorted({row.vocab if over_vocab else row.tokens for row in group})
        if over_vocab:
            title, x_label = (
                f"{first.tokens:,} tokens, D = {first.hidden}{_softcap_words(first)}",
                "vocabulary size |V|",
            )
        else:
            title, x_label = _shape_words(first) + (f", {x[0]:,} tokens" if len(x) == 1 else ""), "tokens"
        labels = list(dict.fromkeys(_series(row, several_betas) for row in group))
        ms: dict[str, list[float | None]] = {label: [None] * len(x) for label in labels}
        mb: dict[str, list[float | None]] = {label: [None] * len(x) for label in labels}
        for row in group:
            at = x.index(row.vocab if over_vocab else row.tokens)
            ms[_series(row, several_betas)][at] = row.total_ms
            mb[_series(row, several_betas)][at] = None if row.peak_bytes is None else row.peak_bytes / 1e6
        panels.append(Panel(f"{title}, {first.dtype}", x_label, x, ms, mb))
    return panels


def plot_rows(rows: list[Row]) -> "Figure":
    """Time (left) and peak memory (right): bars for a single size, curves over several."""
    panels = prepare_panels(rows)
    curves = any(len(panel.x) > 1 for panel in panels)
    heights = [3.6 if len(panel.x) > 1 else 1.1 + 0.28 * len(panel.milliseconds) for panel in panels]
    figure, axes = new_figure(
        width=12,
        height=sum(heights) + (0.8 if curves else 0.0),
        rows=len(panels),
        columns=2,
        height_ratios=heights,
    )
    figure.set_layout_engine("constrained", h_pad=0.08)
    labels = list(dict.fromkeys(label for panel in panels for label in panel.milliseconds))
    for panel, left, right in zip(panels, axes[::2], axes[1::2], strict=True):
        if len(panel.x) > 1:
            _draw_curves(left, panel, panel.milliseconds, labels, "loss and gradients, ms")
            _draw_curves(right, panel, panel.megabytes, labels, "peak memory above the inputs, MB")
        else:
            order = _slowest_first(panel)
            _draw_bars(left, panel.milliseconds, order, "loss and gradients, ms")
            _draw_bars(right, panel.megabytes, order, "peak memory above the inputs, MB")
            right.set_yticklabels([])
        left.set_title(panel.title, fontsize=10, loc="left")
    if curves:
        handles = {line.get_label(): line for ax in axes for line in ax.get_lines()}
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8, frameon=False
        )  # fmt: skip
    return figure


def _slowest_first(panel: Panel) -> list[str]:
    times = {label: ys[0] for label, ys in panel.milliseconds.items()}
    return sorted(times, key=lambda label: (times[label] is None, times[label] or 0.0), reverse=True)


def _draw_curves(ax: "Axes", panel: Panel, values: dict[str, list[float | None]], labels: list[str], what: str) -> None:
    for label, ys in values.items():
        points = [(x, y) for x, y in zip(panel.x, ys, strict=True) if y is not None]
        if not points:
            continue
        xs, heights = zip(*points, strict=True)
        if label.startswith(ROOFLINE):
            ax.plot(xs, heights, color="0.4", linestyle="--", linewidth=1.2, label=label)
        else:
            ours = label.startswith("calsmooth")
            style = _style(label, labels)
            ax.plot(
                xs,
                heights,
                color=style.color,
                marker=style.marker,
                linestyle=style.line,
                linewidth=2.6 if ours else 1.2,
                markersize=6,
                # Hollow marks show what lies under them.
                markerfacecolor=style.color if ours else "none",
                label=label,
            )
    from matplotlib.ticker import LogLocator, NullLocator

    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xticks(panel.x, [f"{x:,}" for x in panel.x], rotation=30 if len(panel.x) > 5 else 0)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter("{x:,g}")
    ax.set_xlabel(panel.x_label)
    ax.set_ylabel(what)


def _draw_bars(ax: "Axes", values: dict[str, list[float | None]], order: list[str], what: str) -> None:
    """From the bottom up in the order given."""
    for position, label in enumerate(order):
        value = values[label][0]
        if value is None:
            ax.text(0, position, " not measured", va="center", fontsize=8, color="0.4")
            continue
        # The names stand beside the bars: colors have nothing to tell apart but ours from the others'.
        ours, roofline = label.startswith("calsmooth"), label.startswith(ROOFLINE)
        ax.barh(
            position,
            value,
            color="white" if roofline else BLUE if ours else "0.72",
            edgecolor="0.4" if roofline else "white",
            hatch="//" if ours else None,
            height=0.7,
        )
        ax.text(value, position, f" {value:,.0f}" if value >= 100 else f" {value:.3g}", va="center", fontsize=8)
    ax.set_yticks(range(len(order)), order, fontsize=9)
    ax.set_ylim(-0.6, len(order) - 0.4)
    ax.margins(x=0.12)
    ax.grid(False, axis="y")
    ax.set_xlabel(what)


def _style(label: str, labels: list[str]) -> RunStyle:
    """Thick full lines for ours, thin broken ones for the others; the same in every panel."""
    number = [other for other in labels if not other.startswith(ROOFLINE)].index(label)
    style = RUN_STYLES[number % len(RUN_STYLES)]
    line = "-" if label.startswith("calsmooth") else (0, (4, 1.5))
    return RunStyle(style.color, MARKERS[number % len(MARKERS)], line, style.hatch)


def _several_vocabularies(rows: list[Row]) -> bool:
    """Whether the rows are a sweep over the vocabulary: they differ in nothing else, and aren't several models."""
    models = {row.preset for row in rows if row.preset}
    return len({row.vocab for row in rows}) > 1 and len({(row.hidden, row.softcap) for row in rows}) == 1 >= len(models)


def _shape_words(row: Row) -> str:
    name = f"{row.preset}: " if row.preset else ""
    return f"{name}|V| = {row.vocab:,}, D = {row.hidden}{_softcap_words(row)}"


def _softcap_words(row: Row) -> str:
    return f", softcap {row.softcap:g}" if row.softcap is not None else ""


def _series(row: Row, several_betas: bool) -> str:
    shows_beta = several_betas and row.beta is not None
    return f"{row.label}, beta = {row.beta:g}" if shows_beta else row.label


def _order(row: Row) -> tuple:
    beta = -1.0 if row.beta is None else -row.beta
    return (row.method != ROOFLINE, beta, row.error is not None, row.total_ms or 0.0)


def _beta(row: Row) -> str:
    return "" if row.beta is None else f"{row.beta:g}"


def _ms(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _spread(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1g}"


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
