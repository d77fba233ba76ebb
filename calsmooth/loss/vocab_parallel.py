"""The loss where the head is too large for one device: every process of a group holds some rows of it.

Each process walks over its own rows only. Two small all-reduces join the parts of a token's row: the maximum, then the
sum of exponentials, the target's logit and the sum of logits together, (3, N). In the backward each process makes the
gradient of its own rows alone, and the hidden states' gradient is summed over the group. No process ever holds more of
the logits than a chunk of its own columns. Any backend of torch.distributed does: gloo on CPUs, NCCL on GPUs, where
the parts are made by the Triton kernels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from calsmooth.errors import UsageError
from calsmooth.loss import chunked, fused
from calsmooth.loss.derivatives import once_differentiable
from calsmooth.loss.functional import prepare
from calsmooth.loss.problem import Problem, compute_dtype


def vocab_parallel_linear_cross_entropy(
    hidden_states: Tensor,  # (..., D), the same on every process of the group
    lm_head_shard: Tensor,  # (V_local, D), this process's rows of the head
    targets: Tensor,  # (...), indices into the whole vocabulary, the same on every process
    *,
    first: int,
    vocabulary: int,
    group: dist.ProcessGroup | None = None,
    bias_shard: Tensor | None = None,  # (V_local,)
    label_smoothing: float = 0.0,
    smoothing_prior_shard: Tensor | None = None,  # (V_local,)
    token_weights: Tensor | None = None,  # (...), the same on every process
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    divisor: float | Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    z_loss: float = 0.0,
    shift: bool | int = False,
) -> Tensor:
    """`linear_cross_entropy` over a vocabulary that is sharded by rows over a process group; exact.

    Args:
        first: index in the whole vocabulary of this shard's first row. Shards may differ in size, and be empty;
        together
            they must cover the vocabulary once.
        vocabulary: number of rows of the whole head.
        group: the process group; the default one if None.
        smoothing_prior_shard: this shard's part of the smoothing prior; its parts together sum to 1.

    Other arguments as in `linear_cross_entropy`.

    Returns:
        The same loss on every process. Its gradient by `hidden_states` is the whole one on every process (summed over
        the group), its gradients by `lm_head_shard` and `bias_shard` are this shard's.

    Raises:
        UsageError: as in `linear_cross_entropy`, or the shard lies outside the vocabulary.
    """
    rows = len(lm_head_shard)
    if not 0 <= first <= first + rows <= vocabulary:
        raise UsageError(f"a shard of {rows} rows from row {first} on doesn't lie in a vocabulary of {vocabulary}")
    problem, shape = prepare(
        hidden_states,
        lm_head_shard,
        targets,
        bias=bias_shard,
        label_smoothing=label_smoothing,
        smoothing_prior=smoothing_prior_shard,
        token_weights=token_weights,
        ignore_index=ignore_index,
        reduction=reduction,
        divisor=divisor,
        softcap=softcap,
        scale=scale,
        z_loss=z_loss,
        shift=shift,
        vocabulary=vocabulary,
    )
    p = problem
    shard = _Shard(p, first, vocabulary, group)
    with torch.autocast(hidden_states.device.type, enabled=False):
        losses = _Loss.apply(p.hidden_states, p.lm_head_weight, p.bias, p.targets, shard) * p.weights()
        return losses.view(shape) if reduction == "none" else losses.sum()


@dataclass(frozen=True)
class _Shard:
    problem: Problem
    first: int
    vocabulary: int
    group: dist.ProcessGroup | None

    @property
    def takes_kernels(self) -> bool:
        return len(self.problem.lm_head_weight) > 0 and fused.why_not(self.problem) is None

    @property
    def mean_weight(self) -> float:
        """What the smoothing term weighs a logit by, with a prior times the logit's share in it."""
        beta = self.problem.label_smoothing
        return beta / self.vocabulary if self.problem.smoothing_prior is None else beta

    def local_targets(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each target is one of this shard's rows, and which (0 where it isn't)."""
        local = targets.long() - self.first
        mine = (local >= 0) & (local < len(self.problem.lm_head_weight)) & (targets != self.problem.ignore_index)
        return mine, local.masked_fill(~mine, 0)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, E: Tensor, C: Tensor, bias: Tensor | None, y: Tensor, shard: _Shard) -> Tensor:
        p = shard.problem
        parts = _fused_parts if shard.takes_kernels else _chunked_parts
        top, total, z_target, z_sum = parts(E, C, bias, y, shard)

        top_of_all = top.clone()
        dist.all_reduce(top_of_all, dist.ReduceOp.MAX, group=shard.group)
        # A shard without rows, or with none that can be, has no part: its top is -inf, and so may be all of them.
        sums = torch.stack([torch.where(total > 0, total * (top - top_of_all).exp(), 0.0), z_target, z_sum])
        dist.all_reduce(sums, group=shard.group)
        total, z_target, z_sum = sums
        lse = top_of_all + total.log()

        beta = p.label_smoothing
        losses = lse - (1.0 - beta) * z_target + p.z_loss * lse * lse
        if beta > 0:  # else a logit of -inf would count for 0 times that
            losses -= shard.mean_weight * z_sum
        ctx.save_for_backward(E, C, bias, y, lse)
        ctx.shard = shard
        losses = losses.masked_fill((y < 0) | (y >= shard.vocabulary), float("nan"))
        return losses.masked_fill(y == p.ignore_index, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        E, C, bias, y, lse = ctx.saved_tensors
        shard, needed = ctx.shard, ctx.needs_input_grad[:3]
        weights = grad.to(lse.dtype).masked_fill(y == shard.problem.ignore_index, 0.0)
        gradients = _fused_gradients if shard.takes_kernels else _chunked_gradients
        dE, dC, dbias = gradients(E, C, bias, y, lse, weights, shard, needed)
        if dE is not None:
            dist.all_reduce(dE, group=shard.group)
            dE = dE.to(E.dtype)
        return dE, dC, dbias, None, None


def _fused_parts(E: Tensor, C: Tensor, bias: Tensor | None, y: Tensor, shard: _Shard) -> tuple[Tensor, ...]:
    from calsmooth.loss.kernels.targets import target_logits
    from calsmooth.loss.kernels.tiles import device_of
    from calsmooth.loss.kernels.walk import maxima_and_sums

    operands = _operands(E, C, bias, shard, storing=False)
    mine, local = shard.local_targets(y)
    smooth = shard.problem.label_smoothing > 0
    with device_of(E):
        maxima, sums, logit_sums, *_ = maxima_and_sums(operands, logit_sum=smooth)
        z_target = target_logits(operands, torch.where(mine, local, -1).int())
    top = maxima.amax(0)
    total = (sums * (maxima - top).exp()).sum(0)
    z_sum = torch.zeros_like(top) if logit_sums is None else logit_sums.sum(0)
    return top, total, z_target, z_sum


def _fused_gradients(
    E: Tensor,
    C: Tensor,
    bias: Tensor | None,
    y: Tensor,
    lse: Tensor,
    weights: Tensor,
    shard: _Shard,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    from calsmooth.loss.kernels.gradient import gradients
    from calsmooth.loss.kernels.lean import WIDE_BYTES
    from calsmooth.loss.kernels.targets import ELSEWHERE
    from calsmooth.loss.kernels.tiles import device_of

    mine, local = shard.local_targets(y)
    known = (y >= 0) & (y < shard.vocabulary) & (y != shard.problem.ignore_index)
    targets = torch.where(mine, local, torch.where(known, ELSEWHERE, -1)).int()
    weights = torch.where(known, weights, 0.0)
    operands = _operands(E, C, bias, shard, storing=True)
    with device_of(E):
        return gradients(operands, targets, lse, weights, C.dtype, needed, WIDE_BYTES, torch.float32)


def _operands(E: Tensor, C: Tensor, bias: Tensor | None, shard: _Shard, *, storing: bool) -> Any:
    from calsmooth.loss.kernels.tiles import Operands, Semantics

    p = shard.problem
    semantics = Semantics(p.label_smoothing, p.softcap, p.scale, p.z_loss, shard.vocabulary)
    prior = p.smoothing_prior
    return Operands.make(E.contiguous(), C.contiguous(), bias, semantics, storing=storing, prior=prior)


def _chunked_parts(E: Tensor, C: Tensor, bias: Tensor | None, y: Tensor, shard: _Shard) -> tuple[Tensor, ...]:
    dtype = compute_dtype(E)
    top, total, z_target, z_sum = (torch.empty(len(E), dtype=dtype, device=E.device) for _ in range(4))
    mine, local = shard.local_targets(y)
    for chunk, z, _ in _logits(E, C, bias, shard):
        z_target[chunk] = 0.0
        if z.shape[1]:
            z_target[chunk] = z.gather(1, local[chunk].unsqueeze(1)).squeeze(1).masked_fill(~mine[chunk], 0.0)
        prior = shard.problem.smoothing_prior
        z_sum[chunk] = z.sum(1) if prior is None else torch.where(prior > 0, z * prior, 0.0).sum(1)
        if z.shape[1] == 0:
            top[chunk], total[chunk] = float("-inf"), 0.0
            continue
        top[chunk] = z.amax(1)
        finite = top[chunk].clamp(min=torch.finfo(dtype).min)  # -inf less -inf isn't a number
        total[chunk] = z.sub_(finite.unsqueeze(1)).exp_().sum(1)
    return top, total, z_target, z_sum


def _chunked_gradients(
    E: Tensor,
    C: Tensor,
    bias: Tensor | None,
    y: Tensor,
    lse: Tensor,
    weights: Tensor,
    shard: _Shard,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    p, dtype = shard.problem, lse.dtype
    beta, softcap = p.label_smoothing, p.softcap
    known = (y >= 0) & (y < shard.vocabulary)
    weights = torch.where(known, weights, 0.0)
    dE, dC = (
        torch.zeros(t.shape, dtype=dtype, device=E.device) if n else None
        for t, n in zip((E, C), needed[:2], strict=False)
    )
    dbias = torch.zeros(len(C), dtype=dtype, device=E.device) if needed[2] else None
    mine, local = shard.local_targets(y)
    for chunk, z, _ in _logits(E, C, bias, shard):
        w = weights[chunk].unsqueeze(1)
        slope = p.scale if softcap is None else p.scale * (1.0 - (z / softcap) ** 2)
        g = (z - lse[chunk].unsqueeze(1)).exp_().mul_(w * (1.0 + 2.0 * p.z_loss * lse[chunk].unsqueeze(1)))
        if g.shape[1]:
            g.scatter_add_(1, local[chunk].unsqueeze(1), -(1.0 - beta) * w * mine[chunk].unsqueeze(1))
        shares = 1.0 if p.smoothing_prior is None else p.smoothing_prior
        g.sub_(w * shard.mean_weight * shares).mul_(slope)
        g.masked_fill_(w == 0.0, 0.0)
        if dE is not None:
            dE[chunk] = g @ C.to(dtype)
        if dC is not None:
            dC.addmm_(g.T, E[chunk].to(dtype).masked_fill(w == 0.0, 0.0))
        if dbias is not None:
            dbias += g.sum(0)
    return dE, None if dC is None else dC.to(C.dtype), dbias if bias is None or dbias is None else dbias.to(bias.dtype)


def _logits(E: Tensor, C: Tensor, bias: Tensor | None, shard: _Shard) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """This shard's logits, some tokens at a time."""
    return chunked.logits_by_chunks(E, C, bias, shard.problem.scale, shard.problem.softcap, copies=2)
