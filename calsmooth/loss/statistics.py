"""What calibration wants to know of each token, in one walk over the vocabulary and without the logits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from calsmooth.loss import fused
from calsmooth.loss.chunked import logits_by_chunks
from calsmooth.loss.functional import prepare
from calsmooth.loss.problem import Problem, compute_dtype


@dataclass(frozen=True)
class TokenStatistics:
    """All shaped like the targets, in nats, without gradients; float32 (float64 for float64 inputs)."""

    logsumexp: Tensor
    target_logprob: Tensor  # log-probability of the target, at most 0; NaN where ignored or outside the vocabulary
    top_token: Tensor  # int64, the most probable token (the lowest index among equals)
    top_logprob: Tensor  # its log-probability, at most 0: exp() is the model's confidence
    entropy: Tensor  # of the predicted distribution


@torch.no_grad()
def token_statistics(
    hidden_states: Tensor,  # (..., D)
    lm_head_weight: Tensor,  # (V, D)
    targets: Tensor,  # (...), int64 or int32
    *,
    bias: Tensor | None = None,  # (V,)
    ignore_index: int = -100,
    softcap: float | None = None,
    scale: float = 1.0,
    shift: bool = False,
) -> TokenStatistics:
    """Log-probability of the target, most probable token, its probability and the entropy, token by token.

    Of softmax(softcap(scale * (hidden_states @ lm_head_weight.T + bias))); arguments and errors as in
    `linear_cross_entropy`. Ignored positions get everything but `target_logprob`. Peak memory above the inputs is a
    chunk of logits, on a GPU with bfloat16 or float16 inputs a few numbers a token.
    """
    problem, shape = prepare(
        hidden_states, lm_head_weight, targets,
        bias=bias, ignore_index=ignore_index, softcap=softcap, scale=scale, shift=shift, reduction="none",
    )  # fmt: skip
    with torch.autocast(hidden_states.device.type, enabled=False):
        logsumexp, z_target, top_token, top_logprob, entropy = (
            _fused(problem) if fused.why_not(problem) is None else _chunked(problem)
        )
    targets, V = problem.targets, len(problem.lm_head_weight)
    # The target's logit comes from a sum of its own: where it is the top one, it is as probable as that.
    target_logprob = torch.where(top_token == targets, top_logprob, torch.minimum(z_target - logsumexp, top_logprob))
    target_logprob = target_logprob.masked_fill((targets < 0) | (targets >= V), float("nan"))
    return TokenStatistics(
        logsumexp.view(shape),
        target_logprob.view(shape),
        top_token.long().view(shape),
        top_logprob.view(shape),
        entropy.view(shape),
    )


def _fused(p: Problem) -> tuple[Tensor, ...]:
    from calsmooth.loss.kernels.targets import marked_targets, target_logits
    from calsmooth.loss.kernels.tiles import Operands, Semantics, device_of
    from calsmooth.loss.kernels.walk import walk

    E, C = p.hidden_states.contiguous(), p.lm_head_weight.contiguous()
    operands = Operands.make(E, C, p.bias, Semantics(0.0, p.softcap, p.scale, 0.0), storing=False)
    with device_of(E):
        targets = marked_targets(p.targets, p.ignore_index, len(C))
        walked = walk(operands, targets, target_logits(operands, targets), statistics=True)
    found = walked.statistics
    assert found is not None
    return walked.logsumexp, walked.target_logits, found.top_token, found.top_logprob, found.entropy


def _chunked(p: Problem) -> tuple[Tensor, ...]:
    E, C = p.hidden_states, p.lm_head_weight
    N, dtype = len(E), compute_dtype(E)
    z_target, lse, top_logprob, entropy = (torch.empty(N, dtype=dtype, device=E.device) for _ in range(4))
    top_token = torch.empty(N, dtype=torch.int64, device=E.device)
    targets = p.targets.long().masked_fill(p.targets == p.ignore_index, 0).unsqueeze(1)
    for chunk, z, _ in logits_by_chunks(E, C, p.bias, p.scale, p.softcap, copies=2):
        z_target[chunk] = z.gather(1, targets[chunk]).squeeze(1)
        top, top_token[chunk] = z.max(1)
        z -= top.unsqueeze(1)
        exponentials = z.exp()
        total = exponentials.sum(1)
        lse[chunk] = top + total.log()
        top_logprob[chunk] = -total.log()
        # exp(z) z is 0, not NaN, where z is -inf.
        entropy[chunk] = total.log() - exponentials.mul_(z.clamp_(min=torch.finfo(dtype).min)).sum(1) / total
    return lse, z_target, top_token, top_logprob, entropy
