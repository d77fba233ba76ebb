"""calibrate: predictions -> two disjoint parts -> temperature from one, before and after on the other."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calsmooth import metrics
from calsmooth.calibrate.config import CalibrateConfig
from calsmooth.calibrate.temperature import fit_temperature
from calsmooth.environment import versions
from calsmooth.errors import CalsmoothError, UsageError
from calsmooth.files import run_folder, write_json
from calsmooth.plots import plot_reliability, prepare_reliability, save_figure
from calsmooth.records import Prediction, read_predictions

SMALLEST_PART = 10
"""Questions below which neither a fit nor a report means anything."""
RESAMPLES = 1000


@dataclass(frozen=True)
class CalibrateResult:
    """`results` is what calibration.json holds; `folder` has it and reliability.png and .svg."""

    results: dict[str, Any]
    folder: Path


def run(config: CalibrateConfig, folder: Path | None = None) -> CalibrateResult:
    """Fit a temperature and write the run folder (`folder` where it is given, which exists). Prints nothing.

    Raises:
        UsageError: no predictions file was named, or it doesn't exist.
        CalsmoothError: the file is bad, names a question twice, or holds too few.
    """
    if config.predictions is None:
        raise UsageError("PREDICTIONS: name the predictions.jsonl of an evaluation")
    if not config.predictions.is_file():
        raise UsageError(f"{config.predictions}: no such file; give the predictions.jsonl of an evaluation")
    predictions = read_predictions(config.predictions)
    fit_part, report_part = split(predictions, config.fit_fraction, config.seed, str(config.predictions))
    folder = folder or run_folder(config.output, f"calibrate-{config.predictions.resolve().parent.name}")

    logits = metrics.log_softmax(metrics.pad_choices([p.logprobs for p in fit_part]))
    fit = fit_temperature(logits, [p.gold for p in fit_part])

    def summary(part: Sequence[Prediction], temperature: float, resamples: int = 0) -> dict[str, Any]:
        logprobs, gold = [p.logprobs for p in part], [p.gold for p in part]
        return metrics.summarize(
            logprobs, gold, bins=config.bins, temperature=temperature, resamples=resamples, seed=config.seed
        )

    results: dict[str, Any] = {
        "temperature": fit.temperature,
        "n_fit": len(fit_part),
        "n_report": len(report_part),
        "before": summary(report_part, 1.0, RESAMPLES),
        "after": summary(report_part, fit.temperature, RESAMPLES),
        "fit": {"nll_before": summary(fit_part, 1.0)["nll"], "nll_after": fit.nll},
        "notes": [fit.note] if fit.note else [],
    }
    tasks = {name: [p for p in report_part if p.task == name] for name in dict.fromkeys(p.task for p in report_part)}
    if len(tasks) > 1:
        results["tasks"] = {
            name: {"before": summary(part, 1.0), "after": summary(part, fit.temperature)}
            for name, part in tasks.items()
        }
        results["notes"].append(f"one temperature for all of {', '.join(tasks)}")
    results |= {"config": config.to_dict(), "versions": versions()}
    write_json(folder / "calibration.json", results)

    gold = [p.gold for p in report_part]
    panels = []
    for title, temperature in (("before", 1.0), (f"after, T = {fit.temperature:.3g}", fit.temperature)):
        scaled = metrics.pad_choices([p.logprobs for p in report_part]) / temperature
        panels.append(prepare_reliability(*metrics.top_of(scaled, gold), bins=config.bins, title=title))
    figure = plot_reliability(panels)
    for suffix in ("png", "svg"):
        save_figure(figure, folder / f"reliability.{suffix}")
    return CalibrateResult(results, folder)


def split(
    predictions: Sequence[Prediction], fraction: float, seed: int, source: str = "predictions"
) -> tuple[list[Prediction], list[Prediction]]:
    """(part to fit on, part to report on): disjoint, and alike in their shares of each task and subject.

    Every stratum is shuffled and the strata are laid end to end; of that line, evenly spaced questions make the first
    part. So each stratum's share is right to within one question, and the total to within rounding.

    Raises:
        CalsmoothError: a question occurs twice, or a part has fewer than 10 questions.
    """
    twice = [key for key, n in Counter((p.task, p.subject, p.id) for p in predictions).items() if n > 1]
    if twice:
        raise CalsmoothError(
            f"{source}: question '{twice[0][2]}' of {twice[0][0]} occurs twice, so that the fit and the report would "
            f"overlap; give the predictions of one run"
        )
    strata: dict[tuple[str, str], list[Prediction]] = {}
    for prediction in predictions:
        strata.setdefault((prediction.task, prediction.subject), []).append(prediction)
    generator = np.random.default_rng(seed)
    line = [strata[key][i] for key in sorted(strata) for i in generator.permutation(len(strata[key]))]
    fit_part: list[Prediction] = []
    report_part: list[Prediction] = []
    for position, prediction in enumerate(line):
        first = math.floor((position + 1) * fraction + 0.5) > math.floor(position * fraction + 0.5)
        (fit_part if first else report_part).append(prediction)
    if min(len(fit_part), len(report_part)) < SMALLEST_PART:
        raise CalsmoothError(
            f"{source}: {len(predictions)} predictions make parts of {len(fit_part)} and {len(report_part)}; fitting "
            f"and reporting need at least {SMALLEST_PART} each: evaluate more questions or change --fit-fraction"
        )
    return fit_part, report_part
