"""Sweeps: lists in the YAML file where one value is expected, each combination a run of its own, compared at the end.

A sweep's folder holds a folder for each run, named after what distinguishes it (beta0.1-lr2e-05), sweep.yaml (what was
asked for), and when all are done sweep.json, sweep.csv, sweep.png and COMPLETED. With --resume, finished runs are taken
as they are, an interrupted one goes on at its checkpoint, and lists may have grown.
"""

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from calsmooth import console
from calsmooth.environment import started_processes
from calsmooth.errors import CalsmoothError, UsageError
from calsmooth.files import run_folder, write_json, write_text
from calsmooth.finetune.config import FinetuneConfig
from calsmooth.finetune.resume import COMPLETED, as_started
from calsmooth.finetune.stopping import StoppedError
from calsmooth.models import model_label
from calsmooth.plots import INK, draw_intervals, new_figure, run_styles, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOT_SWEPT = ("output", "resume", "dry_run")
MOST_TICKS = 8


@dataclass(frozen=True)
class Child:
    """One run of a sweep. varied: the settings that distinguish it, in the order of the file."""

    name: str
    varied: dict[str, Any]
    config: FinetuneConfig


@dataclass(frozen=True)
class Row:
    """What a run came to. measured, before: what was evaluated -> its metrics (accuracy, ece, ...), then and before."""

    name: str
    varied: dict[str, Any]
    final_loss: float | None = None
    seconds: float | None = None
    measured: Mapping[str, Mapping[str, Any]] | None = None
    before: Mapping[str, Mapping[str, Any]] | None = None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class SweepResult:
    folder: Path
    rows: list[Row]


Grid = Sequence[tuple[dict[str, Any], FinetuneConfig]]
"""What `calsmooth.config.load_grid` gives."""


def children(grid: Grid, folder: Path) -> list[Child]:
    """The runs of a sweep, each in its own folder below `folder`.

    Raises:
        UsageError: a key is swept that says where or how a run is started.
    """
    for key in grid[0][0]:
        if key in NOT_SWEPT:
            raise UsageError(f"'{key}' is a list; a sweep varies what is computed: give one value")
    named = [(_name(varied), varied, config) for varied, config in grid]
    return [Child(name, varied, replace(config, output=folder / name)) for name, varied, config in named]


def run_sweep(grid: Grid, run_child: Callable[[FinetuneConfig], Row]) -> SweepResult:
    """Run every combination, one after the other, and write their comparison.

    run_child: fine-tunes and evaluates one configuration; name and varied of its row are set here. A run that fails
    (its loss explodes, say) is noted, and the others go on.

    Raises:
        UsageError: the folder, a swept key or a setting isn't as it has to be, or several processes were started.
        CalsmoothError: every run failed.
        StoppedError: a run was asked to stop; the sweep goes on with --resume.
    """
    if (count := started_processes()) > 1:
        raise UsageError(f"a sweep runs in one process, and {count} were started; start its runs one by one")
    first = grid[0][1]
    children(grid, Path())  # before anything is written
    folder = _folder(first)
    runs = children(grid, folder)
    write_text(folder / "sweep.yaml", _as_asked(grid))
    rows = []
    for number, child in enumerate(runs, 1):
        console.say(f"\n[bold]Run {number} of {len(runs)}: {child.name}[/bold]")
        begun = (folder / child.name / "config.yaml").is_file()
        if begun:
            as_started(child.config, folder / child.name)  # also a finished run has to be the one that is asked for
        try:
            row = run_child(replace(child.config, resume=begun))
        except (UsageError, StoppedError):
            raise
        except CalsmoothError as error:
            console.warn(f"{child.name}: {error}")
            row = Row(child.name, child.varied, error=str(error))
        rows.append(replace(row, name=child.name, varied=child.varied))
    if all(row.error for row in rows):
        raise CalsmoothError(f"every run of the sweep in {folder} failed; the first: {rows[0].error}")
    _write(folder, rows)
    return SweepResult(folder, rows)


def _folder(config: FinetuneConfig) -> Path:
    """The sweep's folder: new, or with --resume the one that is there."""
    name = f"sweep-{model_label(config.model)}"
    if config.resume:
        folder = config.output or Path("runs") / name
        if folder.exists() and any(folder.iterdir()) and not (folder / "sweep.yaml").is_file():
            raise UsageError(f"--output {folder}: holds no sweep to resume (no sweep.yaml); give a sweep's folder")
        return folder
    return run_folder(config.output, name)


def _name(varied: Mapping[str, Any]) -> str:
    return "-".join(key + _plain(value) for key, value in varied.items())


def _plain(value: Any) -> str:
    """A value as a part of a folder's name."""
    if isinstance(value, tuple):
        return "+".join(map(_plain, value))
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return re.sub(r"[^\w.+-]+", "_", str(value)).strip("_.") or "none"


def _as_asked(grid: Grid) -> str:
    """The sweep as a file for --config: lists where values vary."""
    settings = {key: value for key, value in grid[0][1].to_dict().items() if key not in NOT_SWEPT}
    for key in grid[0][0]:
        values = [config.to_dict()[key] for _, config in grid]
        settings[key] = [value for i, value in enumerate(values) if value not in values[:i]]
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def _write(folder: Path, rows: list[Row]) -> None:
    write_json(folder / "sweep.json", [row.to_dict() for row in rows])
    write_text(folder / "sweep.csv", _csv(rows))
    plot = prepare_sweep(rows)
    if plot is not None:
        save_figure(plot_sweep(plot), folder / "sweep")
    write_text(folder / COMPLETED, "")


def _csv(rows: list[Row]) -> str:
    """One line a run, a column for each varied setting and each metric (questions.ece)."""
    lines = []
    for row in rows:
        metrics = {
            f"{label}.{metric}": value
            for label, values in (row.measured or {}).items()
            for metric, value in values.items()
            if isinstance(value, int | float)
        }
        lines.append({"name": row.name, **row.varied, "final_loss": row.final_loss, "error": row.error, **metrics})
    columns = list(dict.fromkeys(column for line in lines for column in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


@dataclass(frozen=True)
class SweepPlot:
    """What a sweep's figure shows: metrics against one setting, a line for each combination of the others."""

    key: str
    lines: list[tuple[str, list[Row]]]  # (the other settings in words, its runs by rising `key`)
    measured: list[str]
    before: Mapping[str, Mapping[str, Any]]  # of the model that all runs began with; empty where they differ

    def values(self, rows: list[Row], label: str, metric: str) -> list[float]:
        return [float((row.measured or {})[label][metric]) for row in rows]

    def intervals(self, rows: list[Row], label: str, metric: str) -> tuple[list[float], list[float]]:
        """Lower and upper ends of the values' intervals, NaN where there is none; they may leave their value out."""
        none = (float("nan"), float("nan"))
        ends = [(row.measured or {})[label].get(f"{metric}_interval") or none for row in rows]
        return [float(low) for low, _ in ends], [float(high) for _, high in ends]


def prepare_sweep(rows: Sequence[Row]) -> SweepPlot | None:
    """ECE and accuracy against beta, or against the first number that varies; None where there is nothing to draw."""
    done = [row for row in rows if row.measured]
    if not done:
        return None
    shared = [label for label in done[0].measured or {} if all(label in (row.measured or {}) for row in done)]
    numbers = [key for key in done[0].varied if all(_is_number(row.varied[key]) for row in done)]
    numbers = [key for key in numbers if len({row.varied[key] for row in done}) > 1]
    if not shared or not numbers:
        return None
    key = "beta" if "beta" in numbers else numbers[0]
    lines: dict[str, list[Row]] = {}
    for row in sorted(done, key=lambda row: row.varied[key]):
        others = ", ".join(f"{k} {_plain(v)}" for k, v in row.varied.items() if k != key)
        lines.setdefault(others, []).append(row)
    order = [", ".join(f"{k} {_plain(v)}" for k, v in row.varied.items() if k != key) for row in rows]
    before = done[0].before or {}
    alike = all((row.before or {}) == before for row in done)
    return SweepPlot(key, sorted(lines.items(), key=lambda line: order.index(line[0])), shared, before if alike else {})


def plot_sweep(plot: SweepPlot) -> "Figure":
    """Two rows, ECE above accuracy; a column for each thing that was measured; bars are the metrics' intervals."""
    from matplotlib.lines import Line2D

    columns = len(plot.measured)
    figure, axes = new_figure(max(3.5 * columns, 4.5), 5.6, rows=2, columns=columns)
    with_interval = False
    for column, label in enumerate(plot.measured):
        for ax, metric, words in ((axes[column], "ece", "ECE"), (axes[columns + column], "accuracy", "accuracy")):
            for (others, rows), style in zip(plot.lines, run_styles(len(plot.lines)), strict=True):
                x = [row.varied[plot.key] for row in rows]
                look = {"color": style.color, "marker": style.marker, "linestyle": style.line}
                ax.plot(x, plot.values(rows, label, metric), markersize=4.5, label=others or "after", **look)
                low, high = plot.intervals(rows, label, metric)
                draw_intervals(ax, x, low, high, ecolor=style.color)
                with_interval = with_interval or bool(np.isfinite(low).any())
            if metric in plot.before.get(label, {}):
                ax.axhline(plot.before[label][metric], color=INK, linewidth=1.0, linestyle=":", label="before")
            if min(x) > 0 and max(x) >= 20 * min(x):
                ax.set_xscale("log")
            elif len(x) <= MOST_TICKS:
                ax.set_xticks(x, [f"{value:g}" for value in x])
            ax.margins(y=0.15)
            if column == 0:
                ax.set_ylabel(words)
        axes[column].set_ylim(bottom=0)
        axes[column].set_title(label, fontsize=10)
        axes[columns + column].set_xlabel("label smoothing beta" if plot.key == "beta" else plot.key)
    handles, labels = axes[0].get_legend_handles_labels()
    if with_interval:
        handles.append(Line2D([], [], color=INK, linewidth=0.9, marker="_"))
        labels.append("lines with caps: 95 % interval")
    beside = 2 if columns == 1 else 3
    figure.legend(handles, labels, loc="outside lower center", ncols=beside, fontsize=8, frameon=False)
    return figure


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
