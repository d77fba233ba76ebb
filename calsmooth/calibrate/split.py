"""Which questions a recalibration is fitted on and which it is reported on: never the same."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from calsmooth.errors import CalsmoothError
from calsmooth.records import Prediction

SMALLEST_PART = 10
"""Questions below which neither a fit nor a report means anything."""

Part = list[Prediction]


def split(
    predictions: Sequence[Prediction], fraction: float, seed: int, source: str = "predictions"
) -> tuple[Part, Part]:
    """(part to fit on, part to report on): disjoint, and alike in their shares of each task and subject.

    Of the questions laid out by `_line`, evenly spaced ones make the first part. So each stratum's share is right to
    within one question, and the total to within rounding.

    Raises:
        CalsmoothError: a question occurs twice, or a part has fewer than 10 questions.
    """
    fit_part: Part = []
    report_part: Part = []
    for position, prediction in enumerate(_line(predictions, seed, source)):
        first = math.floor((position + 1) * fraction + 0.5) > math.floor(position * fraction + 0.5)
        (fit_part if first else report_part).append(prediction)
    if min(len(fit_part), len(report_part)) < SMALLEST_PART:
        raise CalsmoothError(
            f"{source}: {len(predictions)} predictions make parts of {len(fit_part)} and {len(report_part)}; fitting "
            f"and reporting need at least {SMALLEST_PART} each: evaluate more questions, or change --fit-fraction or "
            f"use --folds"
        )
    return fit_part, report_part


def folds(
    predictions: Sequence[Prediction], number: int, seed: int, source: str = "predictions"
) -> list[tuple[Part, Part]]:
    """`number` pairs as `split` gives them, whose second parts together are all questions, each once.

    Raises:
        CalsmoothError: a question occurs twice, or there are fewer than 10 questions to fit on, or fewer than folds.
    """
    line = _line(predictions, seed, source)
    smallest_fit = len(line) - math.ceil(len(line) / number)
    if smallest_fit < SMALLEST_PART or len(line) < number:
        raise CalsmoothError(
            f"{source}: {len(line)} predictions in {number} folds leave {smallest_fit} to fit on; expected at least "
            f"{SMALLEST_PART}, and a question for each fold: evaluate more questions"
        )
    return [([p for i, p in enumerate(line) if i % number != fold], line[fold::number]) for fold in range(number)]


def _line(predictions: Sequence[Prediction], seed: int, source: str) -> Part:
    """All questions, each stratum (task and subject) shuffled and the strata laid end to end."""
    twice = [key for key, n in Counter((p.task, p.subject, p.id) for p in predictions).items() if n > 1]
    if twice:
        raise CalsmoothError(
            f"{source}: question '{twice[0][2]}' of {twice[0][0]} occurs twice, so that the fit and the report would "
            f"overlap; give the predictions of one run"
        )
    strata: dict[tuple[str, str], Part] = {}
    for prediction in predictions:
        strata.setdefault((prediction.task, prediction.subject), []).append(prediction)
    generator = np.random.default_rng(seed)
    return [strata[key][i] for key in sorted(strata) for i in generator.permutation(len(strata[key]))]
