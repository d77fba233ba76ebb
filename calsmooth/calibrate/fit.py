"""What every recalibration is, once fitted: a map from a question's log-probabilities to calibrated ones."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from calsmooth.metrics import Array


@dataclass(frozen=True)
class Fit:
    """A fitted recalibration.

    apply: (N, K) log-probabilities that sum to 1 over a question's choices, -inf where a question lacks a choice, to
        calibrated ones of the same kind.
    parameters: plain values that say what was fitted, enough to apply it elsewhere.
    note: what the reader should know, such as that the fit was held at a bound.
    """

    apply: Callable[[Array], Array]
    parameters: dict[str, Any] = field(default_factory=dict)
    note: str | None = None
