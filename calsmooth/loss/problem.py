"""One call's inputs and options, checked, flattened, and passed whole to the implementation that takes it."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    hidden_states: Tensor  # (N, D)
    lm_head_weight: Tensor  # (V, D); same dtype, or float32 where only its products are cast
    targets: Tensor  # (N,), shifted already
    bias: Tensor | None  # (V,)
    label_smoothing: float
    ignore_index: int
    reduction: str
    softcap: float | None
    scale: float
    z_loss: float
    mode: str
    filter_eps: float
    head_gradient_dtype: torch.dtype
    kept_mass: Tensor | None  # (N,) float32, to be written
