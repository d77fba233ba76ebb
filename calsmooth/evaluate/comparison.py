"""`evaluate --compare`: several finished runs side by side, from their folders alone; no model is needed.

Runs -> what they have in common -> comparison.json, a table like the paper's Table 1 (Markdown, CSV, LaTeX), bars like
its Figures 2, 3 and 7, reliability diagrams like its Figures 1, 8 and 9, and report.html with all of it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calsmooth import metrics
from calsmooth.environment import versions
from calsmooth.errors import CalsmoothError, UsageError
from calsmooth.evaluate.comparison_report import write_files
from calsmooth.files import read_json, run_folder, write_json
from calsmooth.records import read_predictions

RESAMPLES = 1000
SETTINGS = ("format", "prompt", "chat_template", "template", "shots", "n", "rows")
"""What must be the same of a task for its numbers to be comparable."""
ASIDE = ("reliability", "subjects", "per_byte")


@dataclass(frozen=True)
class Run:
    """A finished evaluation: the name it goes by in tables, its folder and its results.json."""

    label: str
    folder: Path
    results: dict[str, Any]


@dataclass(frozen=True)
class CompareResult:
    """`results` is what comparison.json holds; `folder` has it, the tables, the pictures and report.html."""

    results: dict[str, Any]
    folder: Path


def compare(runs: Sequence[str], output: Path | None = None, seed: int = 0) -> CompareResult:
    """Compare run folders, each given as FOLDER or NAME=FOLDER. The first one is what differences are against.

    Raises:
        UsageError: fewer than two runs, two of the same name, or a folder that isn't a run's.
        CalsmoothError: a run's files are bad, or the runs have no task in common.
    """
    read = read_runs(runs)
    names = list(dict.fromkeys(name for run in read for name in run.results["tasks"]))
    if not any(sum(name in run.results["tasks"] for run in read) > 1 for name in names):
        raise CalsmoothError(f"the runs have no task in common: {'; '.join(map(_tasks_of, read))}")
    summaries = _summaries(read, names)
    notes = list(_unlike(read, names))
    differences = _differences(read, names, seed, notes)
    results = {
        "runs": [{"label": run.label, "folder": str(run.folder), **_about(run.results)} for run in read],
        "tasks": {task: {label: _plain(s) for label, s in by_run.items()} for task, by_run in summaries.items()},
        "differences": differences,
        "notes": notes,
        "seed": seed,
        "versions": versions(),
    }
    folder = run_folder(output, "compare")
    write_json(folder / "comparison.json", results)
    write_files(folder, results, summaries)
    return CompareResult(results, folder)


def read_runs(given: Sequence[str]) -> list[Run]:
    """The runs behind the arguments of --compare, under names that differ."""
    if len(given) < 2:
        raise UsageError(f"--compare: expected two or more run folders, got {len(given)}")
    found = []
    for argument in given:
        label, folder = _name_and_folder(argument)
        results = read_json(folder / "results.json")
        if not isinstance(results, dict) or not {"tasks", "config"} <= results.keys():
            raise CalsmoothError(f"{folder / 'results.json'}: not the results of calsmooth evaluate (no 'tasks')")
        found.append(Run(label or folder.resolve().name.removeprefix("evaluate-"), folder, results))
    for run in found:
        if sum(other.label == run.label for other in found) > 1:
            raise UsageError(f"--compare: two runs are called {run.label}; name them, as in before={run.folder}")
    return found


def _name_and_folder(argument: str) -> tuple[str, Path]:
    """Of FOLDER ("" for the name) or NAME=FOLDER, where both may have "=" in them: the first reading that exists."""
    splits = [i for i, character in enumerate(argument) if character == "="]
    for name, path in [("", argument), *((argument[:i], argument[i + 1 :]) for i in splits)]:
        folder = Path(path).parent if Path(path).name == "results.json" else Path(path)
        if (folder / "results.json").is_file():
            return name.strip(), folder
    raise UsageError(f"{argument}: no results.json there; give the folder of an evaluation, or NAME=FOLDER")


def _summaries(runs: Sequence[Run], tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """{task: {run's label: summary}}; cloze tasks appear a second time, per byte."""
    found: dict[str, dict[str, Any]] = {}
    for task in tasks:
        present = {run.label: run.results["tasks"][task] for run in runs if task in run.results["tasks"]}
        found[task] = present
        per_byte = {label: summary["per_byte"] for label, summary in present.items() if "per_byte" in summary}
        if per_byte:
            found[f"{task}, per byte"] = per_byte
    return found


def _unlike(runs: Sequence[Run], tasks: Sequence[str]) -> Iterator[str]:
    """What keeps numbers of the same task from being comparable."""
    bins = [(run.label, run.results["config"]["bins"]) for run in runs]
    if len({number for _, number in bins}) > 1:
        each = ", ".join(f"{label}: {number}" for label, number in bins)
        yield f"the runs differ in bins ({each}), so that their ECE, MCE, SCE and ACE don't compare like with like"
    for task in tasks:
        present = [(run.label, run.results["tasks"][task]) for run in runs if task in run.results["tasks"]]
        unlike = [key for key in SETTINGS if len({str(summary.get(key)) for _, summary in present}) > 1]
        for key in unlike:
            each = ", ".join(f"{label}: {summary.get(key)}" for label, summary in present)
            yield f"{task}: the runs differ in {key} ({each}), so that their numbers don't compare like with like"
        # Every model has a chat template of its own; other prompts are the same to the letter.
        chat = any(summary.get("chat_template") for _, summary in present)
        if not unlike and not chat and len({summary["key"] for _, summary in present if "key" in summary}) > 1:
            yield f"{task}: the runs were not asked the same questions in the same words (their task keys differ)"


def _differences(runs: Sequence[Run], tasks: Sequence[str], seed: int, notes: list[str]) -> dict[str, Any]:
    """{task: {run's label: {metric: [difference, low, high]}}} to the first run, where the questions are the same.

    The interval is a bootstrap over questions, drawn for both runs together: what they share, such as hard questions,
    drops out.
    """
    answers = {run.label: _answers(run) for run in runs}
    base = runs[0]
    found: dict[str, dict[str, Any]] = {}
    for task in tasks:
        if task not in answers[base.label]:
            continue
        found[task] = {}
        for run in runs[1:]:
            if task not in answers[run.label]:
                continue
            one, other = answers[base.label][task], answers[run.label][task]
            shared = sorted(one.keys() & other.keys())
            if not len(one) == len(other) == len(shared):
                notes.append(
                    f"{task}: {run.label} and {base.label} answered different questions; no difference is given"
                )
                continue
            arrays = np.array([(*one[key], *other[key]) for key in shared]).T
            bins = int(base.results["config"]["bins"])
            found[task][run.label] = _paired(arrays, bins, seed)
    return {task: by_run for task, by_run in found.items() if by_run}


def _answers(run: Run) -> dict[str, dict[tuple[str, str], tuple[float, float]]]:
    """{task: {question: (confidence, correct)}} of the run's predictions.jsonl, where there is one."""
    path = run.folder / "predictions.jsonl"
    found: dict[str, dict[tuple[str, str], tuple[float, float]]] = {}
    if path.is_file():
        predictions = read_predictions(path)
        confidence, correct = metrics.top_of([p.logprobs for p in predictions], [p.gold for p in predictions])
        for p, c, y in zip(predictions, confidence.tolist(), correct.tolist(), strict=True):
            found.setdefault(p.task, {})[p.subject, p.id] = (c, y)
    return found


def _paired(arrays: metrics.Array, bins: int, seed: int) -> dict[str, list[float]]:
    def change(p: metrics.Array, y: metrics.Array, q: metrics.Array, z: metrics.Array) -> tuple[float, float]:
        ece = metrics.expected_calibration_error(q, z, bins) - metrics.expected_calibration_error(p, y, bins)
        return float(z.mean() - y.mean()), ece

    interval = metrics.bootstrap_interval(change, *arrays, resamples=RESAMPLES, seed=seed).T
    seen = change(*arrays)
    return {name: [seen[i], *interval[i].tolist()] for i, name in enumerate(("accuracy", "ece"))}


def _about(results: Mapping[str, Any]) -> dict[str, Any]:
    """What made a run."""
    keys = ("model", "model_description", "model_hash", "dtype", "device", "versions", "config")
    return {key: results[key] for key in keys if key in results}


def _plain(summary: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in summary.items() if key not in ASIDE}


def _tasks_of(run: Run) -> str:
    return f"{run.label} has {', '.join(run.results['tasks']) or 'none'}"
