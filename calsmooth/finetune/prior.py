"""What the loss smooths towards, where that isn't the uniform distribution."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from calsmooth.errors import UsageError
from calsmooth.finetune.checkpoints import brief

if TYPE_CHECKING:
    from calsmooth.finetune.plan import Plan

UNIFORM, UNIGRAM = "uniform", "unigram"

SUM_TOLERANCE = 1e-3
"""Of a file's probabilities; what they sum to is divided out."""


def smoothing_prior(plan: "Plan", vocabulary: int, device: torch.device) -> Tensor | None:
    """(vocabulary,) float32, or None for the uniform distribution.

    `unigram` is the frequency of each token among the targets that are trained on: a token that is never a target gets
    nothing of the smoothed probability.

    Raises:
        UsageError: the file doesn't hold one probability for each token.
    """
    choice = plan.config.smoothing_prior
    if choice == UNIFORM:
        return None
    if choice == UNIGRAM:
        return torch.from_numpy(_unigram(plan, vocabulary)).to(device, torch.float32)
    return torch.from_numpy(read_prior(Path(choice), vocabulary)).to(device, torch.float32)


def _unigram(plan: "Plan", vocabulary: int) -> np.ndarray:
    examples = plan.examples.examples
    trained_on = np.ones(len(examples), dtype=bool)
    trained_on[list(plan.held_out)] = False
    learned = examples.learned & np.repeat(trained_on, examples.lengths)
    counts = np.bincount(examples.tokens[learned], minlength=vocabulary)
    return counts / counts.sum()


def check_prior(choice: str, vocabulary: int | None) -> None:
    """Raises:
    UsageError: --smoothing-prior names a file that holds no distribution over the vocabulary.
    """
    if not choice:
        raise UsageError("--smoothing-prior is empty; expected uniform, unigram, or a .npy file")
    if choice not in (UNIFORM, UNIGRAM):
        read_prior(Path(choice), vocabulary)


def read_prior(path: Path, vocabulary: int | None = None) -> np.ndarray:
    """(vocabulary,) float64 from a .npy file, of sum 1; of any length where the vocabulary isn't known yet.

    Raises:
        UsageError: it can't be read, has another shape, or isn't a distribution.
    """
    try:
        values = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:  # numpy's own words advise to load it all the same
        raise UsageError(
            f"--smoothing-prior {path}: isn't a .npy file of numbers; expected uniform, unigram, or such a file of one "
            "probability for each token"
        ) from error
    except OSError as error:
        raise UsageError(
            f"--smoothing-prior {path}: can't be read as an array ({brief(error)}); expected uniform, unigram, or a "
            ".npy file of one probability for each token"
        ) from error
    length = "vocabulary" if vocabulary is None else vocabulary
    if not isinstance(values, np.ndarray) or values.ndim != 1 or values.dtype.kind not in "fiu":
        kind = f"{values.dtype} {values.shape}" if isinstance(values, np.ndarray) else "an archive"
        raise UsageError(f"--smoothing-prior {path}: holds {kind}; expected numbers of shape ({length},)")
    if vocabulary is not None and len(values) != vocabulary:
        raise UsageError(
            f"--smoothing-prior {path}: holds {len(values):,} probabilities; expected {vocabulary:,}, one for each "
            "token that the model's head knows"
        )
    values = values.astype(np.float64)
    if not np.isfinite(values).all() or (values < 0).any():
        raise UsageError(f"--smoothing-prior {path}: holds a negative number, NaN or infinity; expected probabilities")
    if not abs(values.sum() - 1.0) < SUM_TOLERANCE:
        raise UsageError(f"--smoothing-prior {path}: sums to {values.sum():.6g}; expected 1")
    return values / values.sum()
