"""What a run shows to people: its table and remarks on the terminal, its pictures, and report.html."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from calsmooth import page
from calsmooth.files import write_text
from calsmooth.models import model_description, model_label
from calsmooth.plots import (
    Reliability,
    plot_reliability,
    save_figure,
    stored_reliability,
)
from calsmooth.tables import METRICS, ON_TERMINAL, SIGNIFICANT, Metric, ece_sentence, metric_text, metrics_table
from calsmooth.verdict import judge

if TYPE_CHECKING:
    from rich.table import Table

SUBJECTS_SHOWN = 10
"""A task with more subjects than these shows its total only, unless asked."""
OF_SUBJECTS = tuple(
    metric
    for metric in METRICS
    if metric in METRICS[:ON_TERMINAL] or metric.key in ("ece_if_calibrated", "ece_p_value")
)
"""The columns of their table: few questions make an ECE of their own, which stands beside it."""


def results_table(results: Mapping[str, Any], by_subject: bool = False) -> "Table":
    """Tasks, and their subjects where these are few or asked for."""

    def rows() -> Iterator[tuple[str, dict[str, Any]]]:
        for name, task in results["tasks"].items():
            yield name, task
            if "per_byte" in task:
                yield "  per byte", task["per_byte"]
            subjects = task.get("subjects", {})
            if by_subject or len(subjects) <= SUBJECTS_SHOWN:
                yield from ((f"  {subject}", summary) for subject, summary in subjects.items())

    return metrics_table(rows(), "task")


def remarks(results: Mapping[str, Any], by_subject: bool = False) -> list[str]:
    """How sure the numbers are, what was sampled or left out, and the notes of the run."""
    lines = []
    for name, task in results["tasks"].items():
        lines.append(f"{name}: {ece_sentence(task)}")
        if "per_byte" in task:
            lines.append(f"{name}, per byte: {ece_sentence(task['per_byte'])}")
        if "ece_unnormalised" in task:
            low, high = task["ece_unnormalised_interval"]
            lines.append(
                f"{name}: the letters' probabilities before they are renormalised have ECE "
                f"{task['ece_unnormalised']:.3f} (corrected {task['ece_corrected_unnormalised']:.3f}, {low:.3f} to "
                f"{high:.3f})"
            )
        if task.get("prompt") in ("hendrycks", "lm-eval", "conversation"):
            lines.append(f"{name}: the choices hold {task['choice_mass']:.1%} of the model's probability")
        if "rows" in task:
            lines.append(f"{name}: n counts the tokens of {task['rows']:,} responses")
        if "questions_available" in task and task["n"] < task["questions_available"]:
            lines.append(f"{name}: a sample of {task['n']:,} of {task['questions_available']:,} questions (--limit)")
        lines += [f"{name}: {line}" for line in _of_subjects(task.get("subjects", {}))]
        hidden = len(task.get("subjects", {}))
        if hidden > SUBJECTS_SHOWN and not by_subject:
            lines.append(f"{name}: {hidden} subjects; --by-subject shows each, results.json has them")
    return [*lines, *results["notes"]]


def _of_subjects(subjects: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How many subjects' ECE is more than noise."""
    p_values = [summary["ece_p_value"] for summary in subjects.values() if "ece_p_value" in summary]
    if not p_values:
        return []
    number = sum(p <= SIGNIFICANT for p in p_values)
    return [
        f"{number} of {len(p_values)} subjects differ from calibrated (p <= {SIGNIFICANT:g}); "
        f"{SIGNIFICANT * len(p_values):.2g} would by chance"
    ]


def panels(results: Mapping[str, Any]) -> list[Reliability]:
    """A reliability diagram a task; cloze tasks have a second one, per byte."""
    found = []
    for name, task in results["tasks"].items():
        of_bytes = task.get("per_byte", {})
        found.append(stored_reliability(task, f"{name}, summed" if of_bytes else name))
        if "reliability" in of_bytes:
            found.append(stored_reliability(of_bytes, f"{name}, per byte"))
    return found


def write_report(folder: Path, results: Mapping[str, Any]) -> None:
    """The figure of the reliability diagrams and report.html, all from what results.json holds."""
    drawn = panels(results)
    figure = plot_reliability(drawn, columns=in_a_row(len(drawn)))
    figure.suptitle(_name(results), fontsize=11)
    save_figure(figure, folder / "reliability")
    write_text(folder / "report.html", _page(results, drawn))


def _name(results: Mapping[str, Any]) -> str:
    """The model's short name; of a folder model/ that isn't where it was, so that its run can't be told, the path."""
    label = model_label(results["model"])
    return results["model"] if label == "model" else label


def in_a_row(number: int) -> int:
    """How many reliability diagrams stand side by side, so that the last row has few gaps."""
    return number if number < 4 else 2 if number == 4 else 3


def _page(results: Mapping[str, Any], drawn: Sequence[Reliability]) -> str:
    tasks, shown = results["tasks"], METRICS[:ON_TERMINAL]
    every = []
    for name, task in tasks.items():
        every.append((name, task))
        if "per_byte" in task:
            every.append((f"{name}, per byte", task["per_byte"]))
    subjects = [
        page.folded(
            f"{name}: {len(task['subjects'])} subjects", _metrics(task["subjects"].items(), "subject", OF_SUBJECTS)
        )
        for name, task in tasks.items()
        if "subjects" in task
    ]
    made = {
        "model": results["model"],
        **{
            key.replace("_", " "): results[key]
            for key in ("model_hash", "dtype", "device", "seconds")
            if key in results
        },
        **results["versions"],
        "platform": results.get("platform", ""),
    }
    settings = yaml.safe_dump(results["config"], sort_keys=False, allow_unicode=True)
    description = results.get("model_description") or model_description(results["model"])
    return page.page(
        f"Calibration of {_name(results)}",
        f"{description}; {', '.join(tasks)}; calsmooth {results['versions']['calsmooth']}",
        page.verdicts((panel.title, judge(panel).words()) for panel in drawn),
        page.section("Results", _metrics(every, "task", shown), page.bullets(remarks(results, by_subject=True))),
        page.section("Reliability", page.reliability(drawn)),
        page.section("All metrics", _transposed(every), *subjects),
        page.section(
            "How it was made",
            page.facts(made),
            page.folded("Settings, as a file for --config", page.verbatim(settings)),
            *(page.folded(f"{name}: what was asked", page.facts(_asked(task))) for name, task in tasks.items()),
        ),
    )


def _metrics(rows: Iterable[tuple[str, Mapping[str, Any]]], first: str, shown: Sequence[Metric]) -> str:
    headings = [first, "n", *(metric.heading for metric in shown)]
    return page.table(
        headings, [[name, f"{s['n']:,}", *(metric_text(s, metric) for metric in shown)] for name, s in rows]
    )


def _transposed(tasks: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """A row a metric: there are more of them than of tasks."""
    rows = [["n", *(f"{summary['n']:,}" for _, summary in tasks)]]
    measured = [metric for metric in METRICS if any(metric.key in summary for _, summary in tasks)]
    rows += [[m.words, *(metric_text(summary, m, interval=True) for _, summary in tasks)] for m in measured]
    return page.table(["", *(name for name, _ in tasks)], rows)


def _asked(task: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values of a task's summary that aren't metrics."""
    metric_keys = {metric.key for metric in METRICS} | {"n"}
    return {
        key.replace("_", " "): value
        for key, value in task.items()
        if key not in metric_keys and isinstance(value, str | int | bool | float)
    }
