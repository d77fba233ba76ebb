"""The exact loss on any device: a few tokens at a time, gradients made in the same pass.

For each chunk of tokens the logits are made (one product), turned in place into the gradient by the logits, and used
up at once for both gradients (two products): three products in all, as many as with full logits, and never more than
`CHUNK_BYTES` of logits. `mode="lean"` is this as well; `mode="filtered"` replaces what it must and saves nothing.
Without a softcap the smoothing term is rank one and needs no logits at all:

    sum_v z_v = scale * (E_i . csum + sum bias),  csum = sum_v C_v
    dE_i -= g_i * scale * (beta / V) * csum
    dC_v -= scale * (beta / V) * sum_i g_i E_i        the same row for every v

Products and sums are float32 (float64 for float64 inputs). Low-precision weights are widened a block of the
vocabulary at a time; on a GPU the matrix units take them as they are and accumulate in float32.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calsmooth.loss.problem import Problem

CHUNK_BYTES = 256 * 2**20
"""Size of one chunk of logits: large enough for the products to run at full speed, small beside a head's gradient."""

WIDEN_BYTES = 64 * 2**20
"""Size of one block of low-precision head rows widened to float32."""

ROW_BLOCK_BYTES = 2 * 2**20
"""Elementwise passes go a few rows at a time, so that the passes after the first find them in the cache."""


def why_not(problem: Problem) -> str | None:
    """It takes everything."""
    return None


def linear_cross_entropy(problem: Problem) -> Tensor:
    """The loss, reduced; float32 or float64. `problem.reduction == 'none'` gives (N,)."""
    p = problem
    # Ignored tokens would cost three products each. Finding them synchronises a GPU, which this path may.
    kept = (p.targets != p.ignore_index).nonzero().squeeze(1)
    hidden_states = p.hidden_states
    if kept.numel() < p.targets.numel():
        hidden_states = hidden_states[kept]
    options = _Options(
        p.label_smoothing,
        p.softcap,
        p.scale,
        p.z_loss,
        p.reduction,
        p.filter_eps if p.mode == "filtered" else None,
        p.head_gradient_dtype,
        torch.is_grad_enabled(),
    )
    kept_mass = torch.ones(len(kept), dtype=torch.float32, device=kept.device)
    loss = _Loss.apply(hidden_states, p.lm_head_weight, p.bias, p.targets[kept], kept_mass, options)
    if p.kept_mass is not None:
        p.kept_mass.fill_(1.0)[kept] = kept_mass
    if p.reduction == "none" and kept.numel() < p.targets.numel():
        return torch.zeros(p.targets.numel(), dtype=loss.dtype, device=loss.device).index_put((kept,), loss)
    return loss


@dataclass(frozen=True)
class _Options:
    beta: float
    softcap: float | None
    scale: float
    z_loss: float
    reduction: str
    filter_eps: float | None
    head_dtype: torch.dtype
    grad_enabled: bool


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, E: Tensor, C: Tensor, bias: Tensor | None, y: Tensor, kept_mass: Tensor, options: _Options
    ) -> Tensor:
        ctx.save_for_backward(E, C, bias, y)
        ctx.options = options
        ctx.gradients = None
        needed = ctx.needs_input_grad[:3]
        divisor = max(len(y), 1) if options.reduction == "mean" else 1
        if options.grad_enabled and any(needed) and options.reduction != "none":
            weight = torch.full((len(y),), 1.0 / divisor, dtype=compute_dtype(E), device=E.device)
            losses, *ctx.gradients = _walk(E, C, bias, y, options, weight, needed, kept_mass)
        else:
            losses, *_ = _walk(E, C, bias, y, options, None, (False, False, False), kept_mass)
        return losses if options.reduction == "none" else losses.sum() / divisor

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        E, C, bias, y = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            # Per-token gradients arrive only now; or the graph was kept and the gradients went out with the first
            # backward. Both walk the vocabulary again.
            if ctx.options.reduction == "none":
                weight = grad.to(compute_dtype(E))
            else:
                divisor = max(len(y), 1) if ctx.options.reduction == "mean" else 1
                weight = (grad / divisor).to(compute_dtype(E)).expand(len(y)).contiguous()
            _, *gradients = _walk(E, C, bias, y, ctx.options, weight, ctx.needs_input_grad[:3])
        elif not (grad.device.type == "cpu" and grad.item() == 1.0):
            for g in gradients:
                if g is not None:
                    g.mul_(grad)
        return (*gradients, None, None, None)


def _walk(
    E: Tensor,  # (N, D)
    C: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    y: Tensor,  # (N,)
    options: _Options,
    weight: Tensor | None,  # (N,) gradient of the result by each token's loss; None: losses only
    needed: tuple[bool, bool, bool],
    kept_mass: Tensor | None = None,  # (N,), written where filtered
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(N,) losses and the gradients of sum_i weight_i * loss_i by E, C and bias, where needed."""
    C = C.to(E.dtype)
    N, V, dtype = len(E), len(C), compute_dtype(E)
    beta, scale, softcap = options.beta, options.scale, options.softcap
    need_E, need_C, need_bias = needed
    losses = torch.empty(N, dtype=dtype, device=E.device)
    dE = torch.empty_like(E) if need_E else None
    dbias = torch.zeros(V, dtype=dtype, device=E.device) if need_bias else None
    rank_one = beta > 0 and softcap is None
    csum = _column_sum(C) if rank_one else None
    bias_sum = bias.sum(dtype=dtype) if bias is not None and rank_one else 0.0

    rows = max(1, CHUNK_BYTES // (V * dtype.itemsize * (1 if softcap is None else 2)))
    # A sum over several chunks must not be rounded to low precision after each.
    dC_sum = (
        torch.empty(V, C.shape[1], dtype=options.head_dtype if rows >= N else dtype, device=C.device)
        if need_C
        else None
    )
    if dC_sum is not None:
        if rank_one and weight is not None:
            dC_sum[:] = (-scale * beta / V) * (weight @ E.to(dtype))
        else:
            dC_sum.zero_()

    buffer = torch.empty(min(rows, N), V, dtype=dtype, device=E.device)
    for start in range(0, N, rows):
        chunk = slice(start, min(start + rows, N))
        e, t = E[chunk], y[chunk].long().unsqueeze(1)
        z = slope = buffer[: len(e)]
        for block, c in blocks(C, dtype):
            matmul(e, c.T, out=z[:, block])
        if bias is not None:
            z += bias
        if scale != 1.0:
            z *= scale
        if softcap is not None:
            z.div_(softcap).tanh_()
            slope = 1.0 - z * z
            z *= softcap

        z_target = z.gather(1, t).squeeze(1)
        if csum is not None:
            z_mean = (e.to(dtype) @ csum + bias_sum) * (scale / V)
        else:
            z_mean = z.mean(1) if beta > 0 else torch.zeros_like(z_target)
        z_max, z_sum = _exponentiate(z)
        lse = z_max + z_sum.log()
        losses[chunk] = lse - (1.0 - beta) * z_target - beta * z_mean + options.z_loss * lse * lse

        # z holds exp(z - max) from here on.
        dropped = None
        if options.filter_eps is not None:
            dropped = z < (options.filter_eps * z_sum).unsqueeze(1)
            dropped.scatter_(1, t, False)
            dropped_sum = (z * dropped).sum(1)
            if kept_mass is not None:
                kept_mass[chunk] = 1.0 - dropped_sum / z_sum
        if weight is None:
            continue

        # Scale it to weight * softmax and take the target's share off.
        w = weight[chunk].unsqueeze(1)
        if dropped is not None:
            # What is dropped still pushes its entries down, all alike.
            torch.where(dropped, (dropped_sum / dropped.sum(1).clamp(min=1)).unsqueeze(1), z, out=z)
        z *= w * ((1.0 + 2.0 * options.z_loss * lse) / z_sum).unsqueeze(1)
        z.scatter_add_(1, t, -(1.0 - beta) * w)
        if softcap is not None:
            if dropped is not None:
                # As the sparse implementation does: the softcap's slope is 1 where the softmax was dropped.
                slope.masked_fill_(dropped, 1.0)
            z.sub_(w * (beta / V)).mul_(slope)
        if dbias is not None:
            dbias += z.sum(0)
        scaled_e = e if scale == 1.0 else e * scale
        de = w * (-scale * beta / V) * csum if csum is not None else torch.zeros(1, 1, dtype=dtype, device=E.device)
        de = de.expand(len(e), E.shape[1]).clone()
        for block, c in blocks(C, dtype):
            g = z[:, block].to(c.dtype)
            if need_E:
                de.add_(matmul(g, c), alpha=scale)
            if dC_sum is not None:
                _accumulate(dC_sum[block], g.T, scaled_e.to(g.dtype))
        if dE is not None:
            dE[chunk] = de
    if dbias is not None:
        if rank_one and weight is not None:
            dbias -= beta / V * weight.sum()
        dbias = (dbias * scale).to(C.dtype if bias is None else bias.dtype)
    return losses, dE, None if dC_sum is None else dC_sum.to(options.head_dtype), dbias


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _exponentiate(z: Tensor) -> tuple[Tensor, Tensor]:
    """z becomes exp(z - max z) row by row; returns the maxima and the sums, (n,) each."""
    n, V = z.shape
    z_max, z_sum = z.new_empty(n), z.new_empty(n)
    rows = n if z.is_cuda else max(1, ROW_BLOCK_BYTES // (V * z.element_size()))
    for start in range(0, n, rows):
        block = slice(start, start + rows)
        z_max[block] = z[block].amax(1)
        z[block] -= z_max[block].unsqueeze(1)
        z_sum[block] = z[block].exp_().sum(1)
    return z_max, z_sum


def _column_sum(C: Tensor) -> Tensor:
    """(D,) sum over the vocabulary, in the compute dtype."""
    return C.sum(0, dtype=compute_dtype(C))


def blocks(C: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of head rows in a dtype that this device multiplies well: the whole head unless it must be widened."""
    V, D = C.shape
    if C.dtype == dtype or C.is_cuda:
        yield slice(0, V), C
        return
    rows = max(1, WIDEN_BYTES // (D * dtype.itemsize))
    for start in range(0, V, rows):
        block = slice(start, min(start + rows, V))
        yield block, C[block].to(dtype)


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b, accumulated and returned in the compute dtype."""
    dtype = compute_dtype(b)
    if a.dtype == b.dtype == dtype:
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
    product = torch.mm(a, b, out_dtype=dtype) if a.is_cuda else torch.mm(a.to(dtype), b.to(dtype))
    return product if out is None else out.copy_(product)


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, summed in total's own dtype."""
    if total.dtype == a.dtype == b.dtype:
        total.addmm_(a, b)
    else:
        total.add_(matmul(a, b))
