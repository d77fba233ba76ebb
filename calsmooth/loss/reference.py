"""The definition: full logits, torch's own cross-entropy. Slow and large on purpose; everything else must equal it."""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy_reference(
    hidden_states: Tensor,  # (..., D)
    lm_head_weight: Tensor,  # (V, D)
    targets: Tensor,  # (...)
    *,
    bias: Tensor | None = None,  # (V,)
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float | None = None,
    scale: float = 1.0,
    z_loss: float = 0.0,
    shift: bool = False,
) -> Tensor:
    """What `linear_cross_entropy` computes, said in the plainest way.

        a_v = hidden_states . lm_head_weight_v + bias_v
        z_v = softcap * tanh(scale * a_v / softcap)      (scale * a_v without a softcap)
        loss = logsumexp(z) - (1 - beta) * z_target - beta / V * sum_v z_v + z_loss * logsumexp(z)^2

    with beta = label_smoothing: `torch.nn.functional.cross_entropy(z, targets, label_smoothing=beta)` on logits that
    are never rounded below float32. The paper's equation 15 is the negative of this, its equation 23 (the MAP view)
    the same up to the factor 1 + beta. A mean over no targets at all is 0 here and NaN in torch. The z-loss (PaLM,
    section 5) keeps the softmax's normaliser near 1. With `shift`, the label of (..., i) is targets[..., i + 1].
    """
    if shift:
        targets = next_token_labels(targets, ignore_index)
    compute = torch.promote_types(hidden_states.dtype, torch.float32)
    logits = hidden_states.to(compute) @ lm_head_weight.to(compute).T
    if bias is not None:
        logits = logits + bias.to(compute)
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(
        logits.flatten(0, -2),
        targets.flatten(),
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction="none",
    )
    if z_loss:
        kept = (targets != ignore_index).flatten()
        losses = losses + torch.where(kept, z_loss * logits.flatten(0, -2).logsumexp(-1) ** 2, 0.0)
    if reduction == "none":
        return losses.view(targets.shape)
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (targets != ignore_index).sum().clamp(min=1)


def next_token_labels(
    targets: Tensor,  # (..., T)
    ignore_index: int,
) -> Tensor:
    """Each position's label is the next position's token; the last has none."""
    return F.pad(targets[..., 1:], (0, 1), value=ignore_index)
