"""calibrate: predictions -> disjoint parts -> a fit on one, before and after on the other, and a verdict -> files.

Cloze predictions are calibrated twice, by the sum of their tokens' log-probabilities and by that per byte: two ways to
read a confidence off the same texts, of which the first is too sure of long endings and the second not sure enough.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from calsmooth import metrics
from calsmooth.calibrate.binning import fit_histogram, fit_isotonic
from calsmooth.calibrate.config import FIT_FRACTION, CalibrateConfig
from calsmooth.calibrate.fit import Fit
from calsmooth.calibrate.interval import TemperatureInterval, temperature_interval
from calsmooth.calibrate.report import write_report
from calsmooth.calibrate.sources import load_predictions
from calsmooth.calibrate.split import SMALLEST_PART, Part, folds, split
from calsmooth.calibrate.temperature import fit_temperature
from calsmooth.calibrate.vector import fit_vector
from calsmooth.calibrate.verdict import (
    Difference,
    difference_to_uniform,
    differences,
    interval_text,
    judge_method,
    judge_temperature,
    tasks_made_worse,
    temperature_text,
)
from calsmooth.environment import versions
from calsmooth.errors import UsageError
from calsmooth.files import run_folder, write_json
from calsmooth.metrics import Array
from calsmooth.plots import Reliability, prepare_reliability

RESAMPLES = 1000
SUM, PER_BYTE = "sum", "per_byte"


@dataclass(frozen=True)
class CalibrateResult:
    """`results` is what calibration.json holds; `folder` has it, the figure and report.html."""

    results: dict[str, Any]
    folder: Path


def run(config: CalibrateConfig, folder: Path | None = None) -> CalibrateResult:
    """Fit, report and write the run folder (`folder` where it is given, which exists). Prints nothing.

    Raises:
        UsageError: no predictions were named, or they don't exist; a temperature of cloze texts is to be baked.
        CalsmoothError: a file is bad, names a question twice, or holds too few; a method's package is missing.
    """
    if config.predictions is None:
        raise UsageError("PREDICTIONS: name the predictions.jsonl of an evaluation")
    predictions = load_predictions(config.predictions)
    if config.bake is not None and any(p.logprobs_per_byte for p in predictions):
        raise UsageError(
            "--bake: these are cloze predictions, whose temperature divides whole texts' log-probabilities, which no "
            "change of the model's weights does; evaluate with --format letter, or leave --bake out"
        )
    source = str(config.predictions)
    if config.folds is not None:
        parts = folds(predictions, config.folds, config.seed, source)
    else:
        parts = [split(predictions, config.fit_fraction or FIT_FRACTION, config.seed, source)]

    whole, panels = _recalibrate(parts, config)
    results: dict[str, Any] = {"method": config.method, **whole}
    per_byte = [(_per_byte(fit_part), _per_byte(report_part)) for fit_part, report_part in parts]
    scored = sum(len(report_part) for _, report_part in per_byte)
    if min(scored, *(len(fit_part) for fit_part, _ in per_byte)) >= SMALLEST_PART and all(r for _, r in per_byte):
        results[PER_BYTE], more = _recalibrate(per_byte, config, mass=False)
        results["notes"] += [f"per byte: {note}" for note in results[PER_BYTE].pop("notes")]
        panels = [replace(p, title=f"summed, {p.title}") for p in panels]
        panels += [replace(p, title=f"per byte, {p.title}") for p in more]
        if config.method == "vector":
            results["notes"].append("vector learns from a choice's place, which means nothing in cloze questions")
    elif any(p.logprobs_per_byte for p in predictions):
        results["notes"].append("too few questions have scores per byte to calibrate these as well")
    tasks = list(dict.fromkeys(p.task for p in predictions))
    if len(tasks) > 1:
        shown = ", ".join(tasks) if len(tasks) <= 5 else f"{len(tasks)} tasks"
        results["notes"].append(f"one {_noun(config.method)} for all of {shown}")
    results |= {"config": config.to_dict(), "versions": versions()}

    folder = folder or run_folder(config.output, f"calibrate-{_name(config.predictions)}")
    write_json(folder / "calibration.json", results)
    write_report(folder, results, panels)
    return CalibrateResult(results, folder)


def _recalibrate(
    parts: Sequence[tuple[Part, Part]], config: CalibrateConfig, mass: bool = True
) -> tuple[dict[str, Any], list[Reliability]]:
    """Fit on each pair's first part, apply to its second; what that gave, and its two panels.

    With several pairs the second parts are judged together, and the parameters are those of a last fit on everything.
    mass: whether the scores are probabilities, so that the mass of the choices means something.
    """
    fitter = _fitter(config)
    width = max(len(p.logprobs) for pair in parts for part in pair for p in part)
    fits = [fitter(*_arrays(fit_part, width)) for fit_part, _ in parts]
    report = [p for _, part in parts for p in part]
    before, gold = _arrays(report, width)
    after = np.concatenate([fit.apply(_arrays(part, width)[0]) for fit, (_, part) in zip(fits, parts, strict=True)])
    fitted_on = parts[0][0] if len(parts) == 1 else report
    final = fits[0] if len(parts) == 1 else fitter(*_arrays(fitted_on, width))

    interval = temperature_interval(*_arrays(fitted_on, width)) if config.method == "temperature" else None
    changes = differences(before, after, gold, config.bins, config.seed)
    if interval is not None:
        temperature = final.parameters["temperature"]
        verdict = judge_temperature(temperature, interval, final.note, len(fitted_on), changes["nll"], len(report))
    else:
        to_uniform = difference_to_uniform(after, gold, config.seed)
        verdict = judge_method(config.method, changes["nll"], to_uniform, len(report))

    moments = {"before": before, "after": after}
    stated = metrics.pad_choices([p.logprobs for p in report])

    def summary(lp: Array, rows: Any = slice(None), resamples: int = 0) -> dict[str, Any]:
        found = metrics.summarize(lp[rows], gold[rows], bins=config.bins, resamples=resamples, seed=config.seed)
        return found | {"choice_mass": metrics.choice_mass(stated[rows]) if mass else None}

    results: dict[str, Any] = {
        "verdict": verdict.to_dict(),
        **final.parameters,
        **(_interval_fields(interval) if interval is not None else {}),
        "n_fit": len(fitted_on),
        "n_report": len(report),
        **{moment: summary(lp, resamples=RESAMPLES) for moment, lp in moments.items()},
        "differences": _plain(changes),
        "fit": _fit_quality(final, *_arrays(fitted_on, width)),
        "notes": list(dict.fromkeys(fit.note for fit in [*fits, final] if fit.note)),
    }
    if len(parts) > 1:
        results["folds"] = [
            {"n_fit": len(f), "n_report": len(r), **fit.parameters} for fit, (f, r) in zip(fits, parts, strict=True)
        ]
    task = np.array([p.task for p in report])
    names = list(dict.fromkeys(task.tolist()))
    if len(names) > 1:
        results["tasks"] = {
            name: {moment: summary(lp, np.flatnonzero(task == name)) for moment, lp in moments.items()}
            for name in names
        }
        for name in names:
            of_task = task == name
            if of_task.sum() >= SMALLEST_PART:
                of_task_changes = differences(before[of_task], after[of_task], gold[of_task], config.bins, config.seed)
                results["tasks"][name]["differences"] = _plain(of_task_changes)
        worse = tasks_made_worse(task, before, after, gold)
        if worse:
            results["notes"].append(f"NLL clearly rises on {', '.join(worse)}")
    titles = {"before": "before", "after": f"after, {_label(config.method, final, interval)}"}
    panels = [
        prepare_reliability(
            *metrics.top_choice(np.exp(lp), gold),
            bins=config.bins,
            title=titles[moment],
            ece_interval=results[moment]["ece_interval"],
        )
        for moment, lp in moments.items()
    ]
    return results, panels


def _fitter(config: CalibrateConfig) -> Callable[[Array, Array], Fit]:
    def temperature(logits: Array, labels: Array) -> Fit:
        found = fit_temperature(logits, labels)
        parameters = {"temperature": found.temperature}
        return Fit(lambda lp: metrics.log_softmax(lp, found.temperature), parameters, found.note)

    return {
        "temperature": temperature,
        "vector": fit_vector,
        "isotonic": fit_isotonic,
        "histogram": lambda logits, labels: fit_histogram(logits, labels, config.bins),
    }[config.method]


def _arrays(part: Part, width: int) -> tuple[Array, Array]:
    """((N, width) log-probabilities over the choices, -inf where a question lacks one; (N,) right choices)."""
    padded = metrics.pad_choices([p.logprobs for p in part])
    missing = np.full((len(part), width - padded.shape[1]), -np.inf)
    return metrics.log_softmax(np.hstack([padded, missing])), np.array([p.gold for p in part])


def _fit_quality(fit: Fit, logprobs: Array, gold: Array) -> dict[str, Any]:
    """The negative log-likelihood that was fitted, on the very questions: how far it went, no measure of how good."""
    return {
        "bounded": fit.note is not None,
        "nll_before": metrics.negative_log_likelihood(logprobs, gold),
        "nll_after": metrics.negative_log_likelihood(fit.apply(logprobs), gold),
    }


def _per_byte(part: Part) -> Part:
    """The same questions, scored by the byte; those that aren't cloze left out."""
    return [replace(p, logprobs=p.logprobs_per_byte) for p in part if p.logprobs_per_byte is not None]


def _label(method: str, fit: Fit, interval: TemperatureInterval | None) -> str:
    if interval is None:
        return method
    return f"T = {temperature_text(fit.parameters['temperature'])} ({interval_text(interval.low, interval.high)})"


def _interval_fields(interval: TemperatureInterval) -> dict[str, Any]:
    """The interval for JSON, which has no infinity: null stands for it."""
    ends = [end if np.isfinite(end) else None for end in (interval.low, interval.high)]
    test = {"likelihood_ratio": interval.likelihood_ratio, "critical": interval.critical}
    return {"temperature_interval": ends, "against_uniform": test}


def _plain(changes: Mapping[str, Difference]) -> dict[str, list[float]]:
    return {name: list(difference) for name, difference in changes.items()}


def _noun(method: str) -> str:
    return "temperature" if method == "temperature" else "fit"


def _name(predictions: Path) -> str:
    """The run's name: that of the folder in which the predictions lie."""
    path = predictions.resolve()
    return path.name if path.is_dir() else path.parent.name
