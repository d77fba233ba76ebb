"""The files of a comparison: tables in Markdown, CSV and LaTeX, pictures, and report.html."""

import csv
import io
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calsmooth import page
from calsmooth.files import write_text
from calsmooth.models import model_description
from calsmooth.plots import (
    BarGroup,
    Reliability,
    plot_bars,
    plot_reliability,
    plot_reliability_together,
    prepare_frame,
    save_figure,
    stored_reliability,
)
from calsmooth.verdict import judge

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

Summaries = Mapping[str, Mapping[str, Any]]  # task -> run's label -> summary


@dataclass(frozen=True)
class Column:
    """A metric in the table. `better` is 1 where more is better, -1 where less is."""

    heading: str
    key: str
    better: int


COLUMNS = (
    Column("Acc.", "accuracy", 1),
    Column("ECE", "ece", -1),
    Column("RMS", "rms_ce", -1),
    Column("RMS*", "rms_ce_hendrycks_test", -1),
)
UNNORMALISED = Column("ECE raw", "ece_unnormalised", -1)
"""A column of its own where a task is asked by letters."""
LEGEND = (
    "ECE: bins of equal width. RMS: root mean square over adaptive bins. RMS*: what the original MMLU "
    "script calls RMS, to compare with published tables. Bold: the best of a column."
)
LEGEND_UNNORMALISED = " ECE raw: of the letters' probabilities before they are renormalised over the choices."
DIFFERENCES = {
    "ece": "ECE",
    "ece_unnormalised": "ECE raw",
    "overconfidence": "over-confidence",
    "accuracy": "accuracy",
    "nll": "NLL",
    "brier": "Brier",
}
"""The metrics of which differences are given, and the headings over them."""
ON_TERMINAL = 3
"""So many metrics of a task fit a terminal; the files have all."""
BARS = {
    "accuracy": "Accuracy",
    "ece": "ECE",
    "rms_ce": "RMS calibration error",
    "sce": "SCE",
    "ace": "ACE",
    "smooth_ece": "smooth ECE",
}
ABOUT = {"model": "model", "model_hash": "its hash", "dtype": "precision", "device": "device", "folder": "folder"}
"""What the page says of each run, and the heading over it."""
CSV_KEYS: tuple[str, ...] = (
    "n",
    "accuracy",
    "mean_confidence",
    "ece",
    "ece_if_calibrated",
    "ece_equal_mass",
    "smooth_ece",
    "mce",
)
CSV_KEYS += ("rms_ce", "rms_ce_hendrycks_test", "sce", "ace", "brier", "nll", "auroc", "choice_mass")
CSV_KEYS += ("overconfidence", "ece_corrected", "ece_p_value", "ece_unnormalised", "overconfidence_unnormalised")
CSV_INTERVALS = ("accuracy", "ece", "overconfidence", "brier", "nll", "ece_unnormalised", "overconfidence_unnormalised")


# --- the table like Table 1 ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    text: str
    best: bool = False


def prepare_cells(runs: Sequence[str], tasks: Summaries, columns: Sequence[Column] = COLUMNS) -> list[list[Cell]]:
    """A row a run, `columns` for each task: three digits, the best of a column marked, a dash where there is nothing.

    Equal to three digits is equally good; where all are, none is marked.
    """
    rows: list[list[Cell]] = [[] for _ in runs]
    for by_run in tasks.values():
        for column in columns:
            values = [by_run.get(run, {}).get(column.key) for run in runs]
            rounded = [None if value is None else round(value, 3) for value in values]
            known = [value for value in rounded if value is not None]
            best = (max if column.better > 0 else min)(known) if len(set(known)) > 1 else None
            for row, value in zip(rows, rounded, strict=True):
                row.append(Cell("-" if value is None else f"{value:.3f}", value is not None and value == best))
    return rows


def columns_of(tasks: Summaries) -> tuple[Column, ...]:
    """The columns of a table of these tasks: one more where some are asked by letters."""
    by_letters = any(UNNORMALISED.key in summary for by_run in tasks.values() for summary in by_run.values())
    return (*COLUMNS, UNNORMALISED) if by_letters else COLUMNS


def legend_of(columns: Sequence[Column]) -> str:
    return LEGEND + (LEGEND_UNNORMALISED if UNNORMALISED in columns else "")


def rich_tables(runs: Sequence[str], tasks: Summaries) -> "list[Table]":
    """For the terminal: as many tasks side by side as its width holds, one such table after the other."""
    from rich.table import Table
    from rich.text import Text

    columns = COLUMNS[:ON_TERMINAL]
    first, width, gap = max(map(len, ["run", *runs])), 7 * len(columns), 2
    side_by_side = max(1, (shutil.get_terminal_size().columns - first) // (width + gap))
    names = list(tasks)
    shown = []
    for start in range(0, len(names), side_by_side):
        part = {name: tasks[name] for name in names[start : start + side_by_side]}
        table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold")
        table.add_column("\nrun", no_wrap=True)
        for name in part:
            headings = "".join(f"{column.heading:>7}" for column in columns)
            table.add_column(Text(f"{name:^{width}}\n{headings}"), no_wrap=True)
        for run, row in zip(runs, prepare_cells(runs, part, columns), strict=True):
            cells = [Text(f"{cell.text:>7}", style="bold" if cell.best else "") for cell in row]
            of_task = [cells[i : i + len(columns)] for i in range(0, len(cells), len(columns))]
            table.add_row(Text(run), *(Text.assemble(*group) for group in of_task))
        shown.append(table)
    return shown


def markdown(runs: Sequence[str], tasks: Summaries) -> str:
    columns = columns_of(tasks)
    headings = ["run", *(f"{task} {c.heading}" for task in tasks for c in columns)]
    lines = [_md_row(headings), _md_row(["---"] + ["---:"] * (len(headings) - 1))]
    for run, row in zip(runs, prepare_cells(runs, tasks, columns), strict=True):
        cells = [f"**{cell.text}**" if cell.best else cell.text for cell in row]
        lines.append(_md_row([run.replace("|", "\\|"), *cells]))
    return "\n".join([*lines, "", legend_of(columns).replace("*", "\\*"), ""]).replace("RMS* |", "RMS\\* |")


def _md_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def latex(runs: Sequence[str], tasks: Summaries) -> str:
    """A booktabs table, to be \\input in a table environment."""
    columns = columns_of(tasks)
    size = len(columns)
    groups = " & ".join(rf"\multicolumn{{{size}}}{{c}}{{{_tex(task)}}}" for task in tasks)
    rules = " ".join(rf"\cmidrule(lr){{{2 + size * i}-{1 + size * (i + 1)}}}" for i in range(len(tasks)))
    arrows = [rf"{_tex(c.heading)} $\{'up' if c.better > 0 else 'down'}arrow$" for c in columns]
    lines = [
        f"% {legend_of(columns)}",
        r"% \usepackage{booktabs}",
        rf"\begin{{tabular}}{{l{'r' * (size * len(tasks))}}}",
        r"\toprule",
        rf" & {groups} \\",
        rules,
        " & ".join(["Model", *arrows * len(tasks)]) + r" \\",
        r"\midrule",
    ]
    for run, row in zip(runs, prepare_cells(runs, tasks, columns), strict=True):
        cells = [rf"\textbf{{{cell.text}}}" if cell.best else cell.text.replace("-", "--") for cell in row]
        lines.append(" & ".join([_tex(run), *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _tex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)


def csv_text(runs: Sequence[str], tasks: Summaries) -> str:
    """A line a run and task, every metric in full precision, intervals as _low and _high."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    bounds = [f"{key}_{end}" for key in CSV_INTERVALS for end in ("low", "high")]
    writer.writerow(["run", "task", *CSV_KEYS, *bounds])
    for task, by_run in tasks.items():
        for run in runs:
            if run in by_run:
                summary = by_run[run]
                ends = [x for key in CSV_INTERVALS for x in summary.get(f"{key}_interval") or (None, None)]
                writer.writerow([run, task, *(summary.get(key) for key in CSV_KEYS), *ends])
    return buffer.getvalue()


# --- pictures --------------------------------------------------------------------------------------------------------


def prepare_bars(runs: Sequence[str], tasks: Summaries) -> list[BarGroup]:
    """Each metric of `BARS`, as in the tables; metrics that no run has are left out."""
    groups = []
    for key, words in BARS.items():

        def grid(pick: Any) -> Any:
            return np.array([[pick(by_run.get(run, {})) for by_run in tasks.values()] for run in runs])

        def value(summary: Mapping[str, Any], key: str = key) -> float:
            found = summary.get(key)
            return float("nan") if found is None else found

        def end(which: int, key: str = key) -> Any:
            return lambda summary: (summary.get(f"{key}_interval") or (float("nan"),) * 2)[which]

        values = grid(value)
        if np.isfinite(values).any():
            # Of all errors the same axis: theirs are different ways to measure one thing.
            axis = key if key == "accuracy" else "error"
            groups.append(BarGroup(words, values, grid(end(0)), grid(end(1)), axis))
    return groups


def reliability_panels(runs: Sequence[str], tasks: Summaries) -> dict[str, dict[str, Reliability]]:
    """Task -> run's label -> its panel, titled with the label; tasks and runs without one are left out."""
    panels = {
        task: {run: stored_reliability(by_run[run], run) for run in runs if "reliability" in by_run.get(run, {})}
        for task, by_run in tasks.items()
    }
    return {task: by_run for task, by_run in panels.items() if by_run}


def figures(runs: Sequence[str], tasks: Summaries) -> "dict[str, Figure]":
    """The figures by their file's name."""
    panels = reliability_panels(runs, tasks)
    grid = [
        None if run not in by_run else replace(by_run[run], title=f"{task}: {run}")
        for task, by_run in panels.items()
        for run in runs
    ]
    return {
        "comparison": plot_bars(prepare_bars(runs, tasks), runs, list(tasks)),
        "reliability-together": plot_reliability_together({t: list(p.values()) for t, p in panels.items()}),
        "reliability": plot_reliability(grid, columns=len(runs)),
    }


# --- the files -------------------------------------------------------------------------------------------------------


def write_files(folder: Path, results: Mapping[str, Any], tasks: Summaries) -> None:
    """Everything but comparison.json, whose content `results` is. `tasks` has what that leaves out: the bins."""
    runs = [run["label"] for run in results["runs"]]
    write_text(folder / "table.md", markdown(runs, tasks))
    write_text(folder / "table.csv", csv_text(runs, tasks))
    write_text(folder / "table.tex", latex(runs, tasks))
    for name, figure in figures(runs, tasks).items():
        save_figure(figure, folder / name)
    write_text(folder / "report.html", _page(results, tasks))


def difference_lines(results: Mapping[str, Any]) -> list[str]:
    """How one run differs from another, in words: those with the first run first."""
    base = results["runs"][0]["label"]
    every = [(task, pair) for task, pairs in results["pairs"].items() for pair in pairs]
    ordered = sorted(every, key=lambda one: one[1]["against"] != base)
    return [
        f"{task}: {pair['run']} against {pair['against']}: "
        + ", ".join(f"{words} {_change(pair[key])}" for key, words in DIFFERENCES.items() if key in pair)
        for task, pair in ordered
    ]


def _change(difference: Sequence[float]) -> str:
    value, low, high = difference
    return f"{value:+.3f} ({low:+.3f} to {high:+.3f})"


def _differences(results: Mapping[str, Any]) -> str:
    """A table a task, a row a pair of runs."""
    pieces = []
    for task, pairs in results["pairs"].items():
        keys = [key for key in DIFFERENCES if any(key in pair for pair in pairs)]
        rows = [
            [pair["run"], pair["against"], *(_change(pair[key]) if key in pair else "-" for key in keys)]
            for pair in pairs
        ]
        clear = [
            (r, c + 2)
            for r, pair in enumerate(pairs)
            for c, key in enumerate(keys)
            if key in pair and not pair[key][1] <= 0 <= pair[key][2]
        ]
        headings = ["run", "against", *(DIFFERENCES[key] for key in keys)]
        pieces.append(page.table(headings, rows, left=2, bold=clear, groups=[(task, len(headings))]))
    return "\n".join(pieces)


def _page(results: Mapping[str, Any], tasks: Summaries) -> str:
    runs = [run["label"] for run in results["runs"]]
    columns = columns_of(tasks)
    rows = prepare_cells(runs, tasks, columns)
    bold = [(r, c + 1) for r, row in enumerate(rows) for c, cell in enumerate(row) if cell.best]
    main = page.table(
        ["run", *(c.heading for _ in tasks for c in columns)],
        [[run, *(cell.text for cell in row)] for run, row in zip(runs, rows, strict=True)],
        bold=bold,
        groups=[("", 1), *((task, len(columns)) for task in tasks)],
        caption=legend_of(columns),
    )
    panels = reliability_panels(runs, tasks)
    flat = [replace(panel, title=f"{task}: {run}") for task, by_run in panels.items() for run, panel in by_run.items()]
    meant = [
        (run["label"], run.get("model_description") or model_description(run.get("model", "-")))
        for run in results["runs"]
    ]
    pieces = [
        page.facts(dict(meant)),
        page.verdicts(
            (task, "; ".join(f"{run} {_is(judge(panel).short())}" for run, panel in by_run.items()))
            for task, by_run in panels.items()
        ),
        page.paragraph("Points are hundredths: mean confidence minus accuracy, in parentheses its 95 % interval."),
    ]
    pieces += [page.section("Results", main, page.bullets(results["notes"]))]
    if results["pairs"]:
        told = (
            "Of the run less the one that it is compared with, on the same questions or tokens, with 95 % intervals; "
            "bold where the interval leaves 0 out. Differences of ECE are those of the values corrected for sampling, "
            "which otherwise hides what separates a calibrated model from another."
        )
        pieces.append(page.section("Differences", page.paragraph(told), _differences(results)))
    pieces += [
        page.section("Metrics", page.pictures(_bars(runs, tasks))),
        page.section(
            "Reliability",
            page.pictures(_together(panels)),
            page.folded("A diagram for each task and run", page.reliability(flat)),
        ),
        page.section("Runs", page.table(["run", *ABOUT.values()], _about(results["runs"]), left=1 + len(ABOUT))),
    ]
    return page.page("Calibration compared", ", ".join(runs), *pieces)


def _is(words: str) -> str:
    return words if words.startswith("can't") else f"is {words}"


def _bars(runs: Sequence[str], tasks: Summaries) -> "list[tuple[Figure, str]]":
    """A figure a metric, narrow enough for a phone, with the axes that they have in the figure of all."""
    groups = prepare_bars(runs, tasks)
    return [
        (plot_bars([group], runs, list(tasks), limits_of=groups), f"bars: {group.metric} by task and run")
        for group in groups
    ]


def _together(panels: Mapping[str, Mapping[str, Reliability]]) -> "list[tuple[Figure, str]]":
    frame = prepare_frame(panel for by_run in panels.values() for panel in by_run.values())
    return [
        (
            plot_reliability_together({task: list(by_run.values())}, frame=frame),
            f"reliability diagram of {task}: accuracy against confidence, all runs together",
        )
        for task, by_run in panels.items()
    ]


def _about(runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    return [[run["label"], *(str(run.get(key, "-")) for key in ABOUT)] for run in runs]
