"""What a recalibration shows to people: its rows and remarks on the terminal, its picture, and report.html."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from calsmooth import page
from calsmooth.calibrate.verdict import Difference, difference_text, interval_text
from calsmooth.files import write_text
from calsmooth.plots import Reliability, plot_reliability, save_figure
from calsmooth.tables import METRICS, ON_TERMINAL, ece_sentence, metric_text
from calsmooth.verdict import judge

TASKS_SHOWN = 10
"""More tasks than these are left to calibration.json and report.html."""


def verdicts(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(scores, sentence): whether to apply the fit; one for summed and one for per-byte scores of cloze questions."""
    scores = {"Verdict": results}
    if "per_byte" in results:
        scores = {"Summed": results, "Per byte": results["per_byte"]}
    return [(words, of_scores["verdict"]["sentence"]) for words, of_scores in scores.items()]


def what_was_fitted(results: Mapping[str, Any]) -> str:
    """The fit, and which questions it saw and which it is judged on."""
    if results["method"] != "temperature":
        fitted = f"Method {results['method']}"
    else:
        fitted = f"Temperature {_temperature(results)}"
        if "per_byte" in results:
            fitted += f"; of scores per byte, {_temperature(results['per_byte'])}"
    if "folds" in results:
        number = len(results["folds"])
        return (
            f"{fitted}, fitted on all {results['n_fit']:,} questions; below, each is judged by a fit on the other "
            f"{number - 1} of {number} folds."
        )
    return f"{fitted}, fitted on {results['n_fit']:,} questions; below, the other {results['n_report']:,}."


def _temperature(results: Mapping[str, Any]) -> str:
    return f"{results['temperature']:.4g} (95 % interval {interval_text(*results['temperature_interval'])})"


def rows(results: Mapping[str, Any], most_tasks: int = TASKS_SHOWN) -> Iterator[tuple[str, dict[str, Any]]]:
    """(label, summary) before and after; of cloze scores summed and per byte; of single tasks where these are few."""
    scores = {"": results}
    if "per_byte" in results:
        scores = {"summed, ": results, "per byte, ": results["per_byte"]}
    for words, of_scores in scores.items():
        yield f"{words}before", of_scores["before"]
        yield f"{words}after", of_scores["after"]
        tasks = of_scores.get("tasks", {})
        if len(tasks) <= most_tasks:
            for name, task in tasks.items():
                yield f"  {name} before", task["before"]
                yield f"  {name} after", task["after"]


def remarks(results: Mapping[str, Any], most_tasks: int = TASKS_SHOWN) -> list[str]:
    """How sure the numbers are, and the notes of the run."""
    scores = {"": results}
    if "per_byte" in results:
        scores = {"summed: ": results, "per byte: ": results["per_byte"]}
    lines = [
        *(f"{words}{_changes(of_scores)}" for words, of_scores in scores.items()),
        *(
            f"{words}{moment}: {ece_sentence(of_scores[moment])}"
            for words, of_scores in scores.items()
            for moment in ("before", "after")
        ),
    ]
    if len(results.get("tasks", {})) > most_tasks:
        lines.append(f"{len(results['tasks'])} tasks; calibration.json and report.html have each")
    return [*lines, *results["notes"]]


def _changes(results: Mapping[str, Any]) -> str:
    headings = {metric.key: metric.heading for metric in METRICS}
    shown = (
        f"{headings[name]} {difference_text(Difference(*difference))}"
        for name, difference in results["differences"].items()
    )
    return f"after - before, with 95 % intervals: {', '.join(shown)}"


def write_report(folder: Path, results: Mapping[str, Any], panels: Sequence[Reliability]) -> None:
    """The figure of the reliability diagrams and report.html. `panels`: before and after, for each kind of score."""
    figure = plot_reliability(panels, columns=2)
    figure.suptitle(f"{_name(results)}: recalibrated", fontsize=11)
    save_figure(figure, folder / "reliability")
    everything = len(results.get("tasks", {}))
    shown = METRICS[:ON_TERMINAL]
    main = page.table(
        ["", "n", *(metric.heading for metric in shown)],
        [
            [label.strip(), f"{summary['n']:,}", *(metric_text(summary, metric) for metric in shown)]
            for label, summary in rows(results, everything)
        ],
    )
    moments = list(rows(results, most_tasks=-1))
    every = page.table(
        ["", *(label for label, _ in moments)],
        [
            [m.words, *(metric_text(summary, m, interval=True) for _, summary in moments)]
            for m in METRICS
            if any(m.key in summary for _, summary in moments)
        ],
    )
    settings = yaml.safe_dump(results["config"], sort_keys=False, allow_unicode=True)
    levels = [(panel.title, judge(panel).words()) for panel in panels]
    html = page.page(
        f"Recalibration of {_name(results)}",
        str(results["config"]["predictions"]),
        page.verdicts([(words, sentence.removesuffix(".")) for words, sentence in verdicts(results)] + levels),
        page.section(
            "Before and after",
            page.paragraph(what_was_fitted(results)),
            main,
            page.bullets(remarks(results, everything)),
        ),
        page.section("Reliability", page.reliability(panels)),
        page.section("All metrics", every),
        page.section(
            "How it was made",
            page.facts(results["versions"]),
            page.folded("Settings, as a file for --config", page.verbatim(settings)),
        ),
    )
    write_text(folder / "report.html", html)


def _name(results: Mapping[str, Any]) -> str:
    """The run whose predictions were recalibrated: the folder in which they lie."""
    path = Path(str(results["config"]["predictions"])).resolve()
    folder = path if path.is_dir() else path.parent
    return folder.name.removeprefix("evaluate-")
