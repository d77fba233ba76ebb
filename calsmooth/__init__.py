"""Calibrated language models: label-smoothed fine-tuning, calibration metrics, temperature scaling.

An implementation of "Calibrated Language Models and How to Find Them with Label Smoothing", and more.
Importing this package imports neither torch nor transformers; each name below brings what it needs when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "linear_cross_entropy": "calsmooth.loss",
    "linear_cross_entropy_reference": "calsmooth.loss",
}
__all__ = ["__version__", "linear_cross_entropy", "linear_cross_entropy_reference"]

if TYPE_CHECKING:
    from calsmooth.loss import linear_cross_entropy, linear_cross_entropy_reference


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'calsmooth' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
