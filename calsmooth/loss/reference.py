"""The definition: full logits and one line a step. Slow and large on purpose; everything else must equal it."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy_reference(
    hidden_states: Tensor,  # (..., D)
    lm_head_weight: Tensor,  # (V, D)
    targets: Tensor,  # (...), or (..., K) with target_probabilities
    *,
    bias: Tensor | None = None,  # (V,)
    label_smoothing: float = 0.0,
    smoothing_prior: Tensor | None = None,  # (V,)
    class_weights: Tensor | None = None,  # (V,)
    token_weights: Tensor | None = None,  # (...)
    target_probabilities: Tensor | None = None,  # (..., K)
    ignore_index: int = -100,
    reduction: str = "mean",
    divisor: float | Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    z_loss: float = 0.0,
    shift: bool | int = False,
) -> Tensor:
    """What `linear_cross_entropy` computes, said in the plainest way.

        a_v = hidden_states . lm_head_weight_v + bias_v
        z_v = softcap * tanh(scale * a_v / softcap)      (scale * a_v without a softcap)
        t_v = class_weight_v ((1 - beta) [v = target] + beta prior_v)
        loss = - sum_v t_v log softmax(z)_v + z_loss logsumexp(z)^2

    with beta = label_smoothing, and prior_v = 1 / V and class_weight_v = 1 unless given:
    `torch.nn.functional.cross_entropy(z, targets, weight=class_weights, label_smoothing=beta)` on logits that are
    never rounded below float32. With target_probabilities, [v = target] is sum_k probability_k [v = target_k]. The
    paper's equation 15 is the negative of this, its equation 23 (the MAP view) the same up to the factor 1 + beta. A
    mean is weighted by the token weights and, as torch's, by the targets' class weights; over no targets at all it is
    0 here and NaN in torch. The z-loss (PaLM, section 5) keeps the softmax's normaliser near 1. With `shift`, the
    label of (..., i) is targets[..., i + shift].
    """
    if shift:
        targets = shifted(targets, int(shift), ignore_index, -1 if target_probabilities is None else -2)
        if target_probabilities is not None:
            target_probabilities = shifted(target_probabilities, int(shift), 0.0, -2)
        if token_weights is not None:
            token_weights = shifted(token_weights, int(shift), 0.0, -1)
    compute = torch.promote_types(hidden_states.dtype, torch.float32)
    logits = hidden_states.to(compute) @ lm_head_weight.to(compute).T
    if bias is not None:
        logits = logits + bias.to(compute)
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    shape, logits = logits.shape[:-1], logits.flatten(0, -2)
    N, V = logits.shape

    K = 1 if target_probabilities is None else targets.shape[-1]
    ids = targets.reshape(N, K).long()
    named = ids != ignore_index
    probabilities = named.to(compute)
    if target_probabilities is not None:
        probabilities = probabilities * target_probabilities.reshape(N, K).to(compute)
    prior = logits.new_full((V,), 1.0 / max(V, 1))
    if smoothing_prior is not None:
        prior = normalized(smoothing_prior.to(compute))
    distribution = (label_smoothing * prior).expand(N, V)
    distribution = distribution.scatter_add(1, ids.masked_fill(~named, 0), (1.0 - label_smoothing) * probabilities)
    if class_weights is not None:
        distribution = distribution * class_weights.to(compute)
    # A class that can't be (logit -inf) and isn't asked for adds nothing.
    losses = -torch.where(distribution == 0, 0.0, distribution * logits.log_softmax(-1)).sum(-1)
    if z_loss:
        losses = losses + z_loss * logits.logsumexp(-1) ** 2
    weights = named.any(1).to(compute)
    if token_weights is not None:
        weights = weights * token_weights.reshape(N).to(compute)
    losses = torch.where(named.any(1), losses * weights, 0.0)
    if isinstance(divisor, Tensor):
        divisor = divisor.reshape(())
    if reduction == "none":
        return (losses if divisor is None else losses / divisor).view(shape)
    if reduction == "sum":
        return losses.sum() if divisor is None else losses.sum() / divisor
    if class_weights is not None and target_probabilities is None:
        weights = weights * class_weights.to(compute)[ids.masked_fill(~named, 0).squeeze(1)]
    total = weights.sum()
    return losses.sum() / torch.where(total == 0, math.inf, total)


def normalized(prior: Tensor) -> Tensor:
    """Of sum 1 to the last digit: low-precision probabilities sum to a little more or less."""
    return prior / prior.sum()


def shifted(
    x: Tensor,  # (..., T) or (..., T, K)
    steps: int,
    fill: float,
    dim: int,  # -1 or -2: T's
) -> Tensor:
    """Each position gets what stands `steps` positions later; the last ones, where nothing does, get `fill`."""
    T = x.shape[dim]
    steps = min(steps, T)
    later = x.narrow(dim, steps, T - steps)
    return F.pad(later, (0, 0) * (-dim - 1) + (0, steps), value=fill)
