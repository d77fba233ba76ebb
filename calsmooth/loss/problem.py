"""One call's inputs and options, checked, flattened, and passed whole to the implementation that takes it.

The loss of token i, in the terms that every implementation computes:

    L_i = mass_i logsumexp(z_i) - sum_k target_weight_ik z_{i, target_ik} - beta sum_v smoothing_v z_iv
          + z_loss logsumexp(z_i)^2

    smoothing_v      = class_weight_v prior_v                                    1 / V each without either
    target_weight_ik = (1 - beta) class_weight_{target_ik} probability_ik        1 - beta for one target a token
    mass_i           = sum_k target_weight_ik + beta sum_v smoothing_v           1 without class weights

so dL_i/dz_iv = (mass_i + 2 z_loss logsumexp(z_i)) p_iv - target weights at the targets - beta smoothing_v. The result
is sum_i weight_i L_i, or the products one by one.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    hidden_states: Tensor  # (N, D)
    lm_head_weight: Tensor  # (V, D); same dtype, or float32 where only its products are cast
    targets: Tensor  # (N,), or (N, K) with target_probabilities; shifted already
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
    smoothing_prior: Tensor | None = None  # (V,), compute dtype, sums to 1
    class_weights: Tensor | None = None  # (V,), compute dtype
    token_weights: Tensor | None = None  # (N,), compute dtype
    target_probabilities: Tensor | None = None  # (N, K), compute dtype
    divisor: float | Tensor | None = None  # of the sum
    return_logsumexp: bool = False

    def is_target(self) -> Tensor:
        """Shaped like targets: whether it names a class."""
        return self.targets != self.ignore_index

    def has_target(self) -> Tensor:
        """(N,): the tokens that aren't ignored."""
        named = self.is_target()
        return named if named.dim() == 1 else named.any(1)

    def smoothing(self) -> Tensor | None:
        """(V,) the smoothed share of each class; None where it is 1 / V for all."""
        prior, weights = self.smoothing_prior, self.class_weights
        if weights is None:
            return prior
        return weights / len(weights) if prior is None else weights * prior

    def target_weights(self) -> Tensor | None:
        """Shaped like targets; 0 where ignored. None where each is 1 - beta."""
        if self.class_weights is None and self.target_probabilities is None:
            return None
        named = self.is_target()
        weights = named.to(compute_dtype(self.hidden_states)) * (1.0 - self.label_smoothing)
        if self.target_probabilities is not None:
            weights = weights * self.target_probabilities
        if self.class_weights is not None:
            # On a GPU a target outside the vocabulary isn't known yet; it must not read outside it.
            places = self.targets.long().masked_fill(~named, 0).clamp(0, len(self.class_weights) - 1)
            weights = weights * self.class_weights[places]
        return weights

    def masses(self, target_weights: Tensor | None) -> Tensor | None:
        """(N,) sum of each token's target distribution; None where it is 1."""
        if target_weights is None:
            return None
        own = target_weights if target_weights.dim() == 1 else target_weights.sum(1)
        smoothing = self.smoothing()
        return own + self.label_smoothing * (1.0 if smoothing is None else smoothing.sum())

    def weights(self) -> Tensor:
        """(N,), compute dtype: each token's share of the result; 0 where ignored.

        A mean is torch's: over the tokens that aren't ignored, weighted by their token weights and, with one target a
        token, by its class weight; where all of that is 0, so is the mean.
        """
        weights = self.has_target().to(compute_dtype(self.hidden_states))
        if self.token_weights is not None:
            weights = torch.where(weights > 0, self.token_weights, 0.0)
        if self.reduction == "mean":
            shares = weights
            if self.class_weights is not None and self.targets.dim() == 1:
                places = self.targets.long().clamp(0, len(self.class_weights) - 1)
                shares = weights * self.class_weights[places]
            total = shares.sum()
            weights = weights / torch.where(total == 0, math.inf, total)
        return weights if self.divisor is None else weights / self.divisor


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
