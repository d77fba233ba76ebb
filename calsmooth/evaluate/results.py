"""What one task's scores come to."""

from dataclasses import dataclass, field
from typing import Any

from calsmooth.plots import Reliability
from calsmooth.records import Prediction, TokenPredictions

RESAMPLES = 1000
"""Of the bootstrap intervals."""


@dataclass
class TaskResult:
    """One task's part of results.json, its predictions (of questions, or of tokens) and its panel of the picture."""

    summary: dict[str, Any]
    panel: Reliability
    predictions: list[Prediction] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tokens: TokenPredictions | None = None


def memory_note(name: str, halvings: int) -> list[str]:
    return [f"{name}: the batch was halved {halvings} times, because memory ran out"] if halvings else []
