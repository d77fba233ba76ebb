"""One call's inputs and options, checked, flattened, and passed whole to the implementation that takes it."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Problem:
    hidden_states: Tensor  # (N, D)
    lm_head_weight: Tensor  # (V, D), same dtype
    targets: Tensor  # (N,)
    bias: Tensor | None  # (V,)
    label_smoothing: float
    ignore_index: int
    reduction: str
    softcap: float | None
    scale: float
