"""`evaluate --compare`: several finished runs side by side, from their folders alone; no model is needed.

Runs -> what they have in common -> comparison.json, a table like the paper's Table 1 (Markdown, CSV, LaTeX), bars like
its Figures 2, 3 and 7, reliability diagrams like its Figures 1, 8 and 9, and report.html with all of it.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calsmooth import intervals, metrics
from calsmooth.environment import versions
from calsmooth.errors import CalsmoothError, UsageError
from calsmooth.evaluate.comparison_report import write_files
from calsmooth.evaluate.tasks import RESPONSES
from calsmooth.files import read_json, run_folder, write_json
from calsmooth.records import (
    PREDICTIONS,
    TOKEN_PREDICTIONS,
    Prediction,
    read_predictions,
    read_token_predictions,
)

RESAMPLES = 1000
ALL_PAIRS = 6
"""Of more runs than these, not all pairs are compared."""
PER_BYTE = ", per byte"
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
    """Compare run folders, each given as FOLDER or NAME=FOLDER.

    Every pair of runs is compared on what both were asked; of more than `ALL_PAIRS` runs each with the first and with
    the one before it.

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
    pairs = _pairs(read, list(summaries), seed, notes)
    results = {
        "runs": [{"label": run.label, "folder": str(run.folder), **_about(run.results)} for run in read],
        "tasks": {task: {label: _plain(s) for label, s in by_run.items()} for task, by_run in summaries.items()},
        "differences": _to_the_first(pairs, read[0].label),
        "pairs": pairs,
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
            found[f"{task}{PER_BYTE}"] = per_byte
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


# --- differences -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """What a run predicted of a task. Of questions, or of the tokens of responses, whose `rows` (N,) are not None.

    place: of each question or token, by which two runs' are found to be the same. unnormalised: (N,) the confidence
    before the choices are renormalised, for tasks by letters.
    """

    place: Mapping[Hashable, int]
    confidence: metrics.Array
    correct: metrics.Array
    nll: metrics.Array
    brier: metrics.Array
    unnormalised: metrics.Array | None = None
    rows: NDArray[np.int64] | None = None


def pairs_of(labels: Sequence[str]) -> list[tuple[str, str]]:
    """(run, the one it is compared with): each with all before it; of many runs, with the first and the one before."""
    pairs = []
    for number, label in enumerate(labels):
        against = range(number) if len(labels) <= ALL_PAIRS else sorted({0, number - 1} - {-1, number})
        pairs += [(label, labels[other]) for other in against]
    return pairs


def _pairs(runs: Sequence[Run], tasks: Sequence[str], seed: int, notes: list[str]) -> dict[str, list[dict[str, Any]]]:
    """{task: [{run, against, metric: [difference, low, high], ...}]}, where two runs were asked the same.

    Cloze tasks come a second time, per byte. What both runs share, such as hard questions, drops out of the intervals.
    """
    answers = {run.label: _answers(run) for run in runs}
    bins = int(runs[0].results["config"]["bins"])
    compared: dict[str, list[dict[str, Any]]] = {}
    for task in tasks:
        for label, base in pairs_of([run.label for run in runs if task in answers[run.label]]):
            first, second = answers[base][task], answers[label][task]
            if first.place.keys() != second.place.keys():
                if not task.endswith(PER_BYTE):
                    what = "predicted different tokens" if first.rows is not None else "answered different questions"
                    notes.append(f"{task}: {label} and {base} {what}; no difference is given")
            elif len(first.confidence) > 1:
                compared.setdefault(task, []).append(
                    {"run": label, "against": base, **_paired(first, second, bins, seed)}
                )
    return compared


def _paired(first: Answers, second: Answers, bins: int, seed: int) -> dict[str, list[float]]:
    """Each metric's [difference, low, high], second - first. That of ECE is of the corrected values."""
    order = np.array([second.place[key] for key in first.place])
    q, z = second.confidence[order], second.correct[order]
    p, y = first.confidence, first.correct
    changes = {
        "accuracy": z - y,
        "overconfidence": (q - z) - (p - y),
        "nll": second.nll[order] - first.nll,
        "brier": second.brier[order] - first.brier,
    }
    columns = np.stack(list(changes.values()), axis=1)
    ends = intervals.mean_intervals(columns, clusters=first.rows, resamples=RESAMPLES, seed=seed).tolist()
    result = {name: [float(column.mean()), *pair] for (name, column), pair in zip(changes.items(), ends, strict=True)}
    if first.rows is None or len(np.unique(first.rows)) > 1:
        result["ece"] = list(metrics.infer_ece_difference((p, y), (q, z), bins, seed=seed, clusters=first.rows))
    if first.unnormalised is not None and second.unnormalised is not None:
        raw = (first.unnormalised, y), (second.unnormalised[order], z)
        result["ece_unnormalised"] = list(metrics.infer_ece_difference(*raw, bins, seed=seed))
    return result


def _answers(run: Run) -> dict[str, Answers]:
    """{task: what the run predicted}, of the tasks of which its folder has that."""
    found: dict[str, Answers] = {}
    questions, tokens = run.folder / PREDICTIONS, run.folder / TOKEN_PREDICTIONS
    if questions.is_file():
        by_task: dict[str, list[Prediction]] = {}
        for prediction in read_predictions(questions):
            by_task.setdefault(prediction.task, []).append(prediction)
        for task, predictions in by_task.items():
            letters = run.results["tasks"].get(task, {}).get("format") == "letter"
            found[task] = _of_questions(predictions, [p.logprobs for p in predictions], letters)
            per_byte = [p.logprobs_per_byte for p in predictions if p.logprobs_per_byte is not None]
            if len(per_byte) == len(predictions):
                found[f"{task}{PER_BYTE}"] = _of_questions(predictions, per_byte)
    if tokens.is_file() and RESPONSES in run.results["tasks"]:
        t = read_token_predictions(tokens)
        # The key is a hash of every token: where it is the same, so is the token at each place.
        key = run.results["tasks"][RESPONSES].get("key")
        place: dict[Hashable, int] = {(key, number): number for number in range(len(t.row))}
        found[RESPONSES] = Answers(place, t.confidence, t.correct, t.nll, t.brier, rows=t.row)
    return found


def _of_questions(
    predictions: Sequence[Prediction], scores: Sequence[Sequence[float]], letters: bool = False
) -> Answers:
    raw, gold = metrics.pad_choices(scores), np.array([p.gold for p in predictions])
    lp = metrics.log_softmax(raw)
    confidence, correct = metrics.top_choice(np.exp(lp), gold)
    return Answers(
        {(p.subject, p.id): number for number, p in enumerate(predictions)},
        confidence,
        correct,
        nll=metrics.negative_log_likelihoods(lp, gold),
        brier=metrics.brier_scores(np.exp(lp), gold),
        unnormalised=np.exp(raw.max(axis=1)) if letters else None,
    )


def _to_the_first(pairs: Mapping[str, Sequence[Mapping[str, Any]]], base: str) -> dict[str, dict[str, Any]]:
    """{task: {run's label: {metric: [difference, low, high]}}}: the pairs with the first run alone."""
    by_task = {
        task: {
            pair["run"]: {key: value for key, value in pair.items() if key not in ("run", "against")}
            for pair in of_task
            if pair["against"] == base
        }
        for task, of_task in pairs.items()
    }
    return {task: by_run for task, by_run in by_task.items() if by_run}


def _about(results: Mapping[str, Any]) -> dict[str, Any]:
    """What made a run."""
    keys = ("model", "model_description", "model_hash", "dtype", "device", "versions", "config")
    return {key: results[key] for key in keys if key in results}


def _plain(summary: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in summary.items() if key not in ASIDE}


def _tasks_of(run: Run) -> str:
    return f"{run.label} has {', '.join(run.results['tasks']) or 'none'}"
