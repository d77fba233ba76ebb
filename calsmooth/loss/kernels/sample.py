"""The sampled tokens of `filtered`: their whole softmax, the tail's shape from it, and what puts their gradients right.

See `calsmooth.loss.tail` for what the sample is for. A hundred tokens' logits, in float32, are small beside the head;
five passes over them cost less than reading the head once.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from calsmooth.loss.kernels.configurations import VARYING, cdiv
from calsmooth.loss.kernels.gradient import EXTRA_ROWS, smoothing_rows
from calsmooth.loss.kernels.products import product
from calsmooth.loss.kernels.tiles import LOG2E, Operands, to_logits
from calsmooth.loss.kernels.walk import LOWEST
from calsmooth.loss.tail import LEAST_SHARE, sample_tokens


@dataclass(frozen=True)
class Sample:
    tokens: Tensor  # (s,) int64, a token may be there twice
    stands_for: Tensor  # scalar: how many tokens each of them does
    shape: Tensor  # (V,) float32: the tail's distribution q, of sum 1 (0 where no token has a tail)
    corrections: Tensor
    """(s + EXTRA_ROWS, V) in E's dtype: exact less replaced gradient by the logits, times 1 / eps, 0 where kept; then
    the smoothing prior's shares and the tail's, in two parts each. (0, V) where the head needs no gradient."""


@triton.jit
def sample_logits_kernel(
    logits,  # (s, V) products, becomes logits
    bias,
    targets,  # (s,) int32, below 0: none
    logsumexps,  # (s,); inf where there is no target, so that every probability is 0
    V,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(targets + row)
    offsets = tl.arange(0, BLOCK)
    m = tl.full((BLOCK,), LOWEST, tl.float32)
    s = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        columns = start + offsets
        z = tl.load(logits + row * V + columns, mask=columns < V, other=0.0)
        z = tl.reshape(to_logits(z[None, :], bias, columns, V, scale, softcap, HAS_BIAS, SCALED, CAPPED), columns.shape)
        if HAS_BIAS or SCALED or CAPPED:
            tl.store(logits + row * V + columns, z, mask=columns < V)
        z = tl.where(columns < V, z, float("-inf"))
        m_new = tl.maximum(m, z)
        s = s * tl.exp2((m - m_new) * LOG2E) + tl.exp2((z - m_new) * LOG2E)
        m = m_new
    top = tl.max(m, 0)
    lse = top + tl.log(tl.sum(s * tl.exp2((m - top) * LOG2E), 0))
    tl.store(logsumexps + row, tl.where(y >= 0, lse, float("inf")))


@triton.jit
def tail_probabilities(logits, lse, y, columns, V, eps):
    """p where it is part of the token's tail, else 0; and whether it is."""
    z = tl.load(logits + columns, mask=columns < V, other=float("-inf"))
    p = tl.exp(z - lse)
    tail = (p < eps) & (columns != y) & (columns < V)
    return tl.where(tail, p, 0.0), tail, z


@triton.jit(do_not_specialize=VARYING)
def shape_kernel(
    logits,  # (s, V)
    targets,
    logsumexps,
    out,  # (V,) sum of the tails
    sampled,  # s
    V,
    eps,
    BLOCK: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for row in range(sampled):
        y = tl.load(targets + row)
        lse = tl.load(logsumexps + row)
        p, _, _ = tail_probabilities(logits + tl.cast(row, tl.int64) * V, lse, y, columns, V, eps)
        total += tl.where(y >= 0, p, 0.0)  # an ignored token's logits may be NaN
    tl.store(out + columns, total, mask=columns < V)


@triton.jit
def corrections_kernel(
    logits,  # (s, V)
    targets,
    logsumexps,
    shape,  # (V,)
    prior,  # (V,) (PRIOR)
    out,  # (s, V)
    V,
    eps,
    least_share,
    mean_weight,
    z_loss,
    softcap,
    CAPPED: tl.constexpr,
    PRIOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(targets + row)
    lse = tl.load(logsumexps + row)
    offsets = tl.arange(0, BLOCK)
    read = tl.where(y >= 0, V, 0)
    mass = tl.zeros((BLOCK,), tl.float32)
    share = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, read, BLOCK):
        columns = start + offsets
        p, tail, _ = tail_probabilities(logits + row * V, lse, y, columns, V, eps)
        mass += p
        share += tl.where(tail, tl.load(shape + columns, mask=columns < V, other=0.0), 0.0)
    total_share = tl.sum(share, 0)
    height = tl.where(total_share > least_share, tl.sum(mass, 0) / tl.maximum(total_share, least_share), 0.0)
    softmax_weight = 1.0 + 2.0 * z_loss * lse
    for start in range(0, V, BLOCK):
        columns = start + offsets
        p, tail, z = tail_probabilities(logits + row * V, lse, y, columns, V, eps)
        exact = softmax_weight * p
        replaced = softmax_weight * height * tl.load(shape + columns, mask=columns < V, other=0.0)
        if CAPPED:
            smoothing = mean_weight + tl.zeros((BLOCK,), tl.float32)
            if PRIOR:
                smoothing *= tl.load(prior + columns, mask=columns < V, other=0.0)
            exact = (exact - smoothing) * (1.0 - (z / softcap) * (z / softcap))
            replaced -= smoothing
        correction = tl.where(tail & (y >= 0), exact - replaced, 0.0)
        tl.store(out + row * V + columns, (correction / eps).to(out.dtype.element_ty), mask=columns < V)


def take_sample(
    operands: Operands,
    targets: Tensor,  # (N,) int32, below 0: none
    eps: float,
    *,
    corrected: bool,
) -> Sample:
    E, C, bias, k = operands.E, operands.C, operands.bias, operands.semantics
    V, device = len(C), E.device
    tokens, stands_for = sample_tokens(targets >= 0, targets)
    own_targets = targets[tokens]
    logits = product(E[tokens], C.T)
    s = len(tokens)
    lse = torch.empty(s, dtype=torch.float32, device=device)
    block = 8192 if E.is_cuda else 32
    sample_logits_kernel[(s,)](
        logits,
        E if bias is None else bias,
        own_targets,
        lse,
        V,
        k.scale,
        k.softcap or 1.0,
        **k.constants(bias),
        BLOCK=block,
        num_warps=16,
    )
    shape = torch.empty(V, dtype=torch.float32, device=device)
    columns = 256 if E.is_cuda else 16
    shape_kernel[(cdiv(V, columns),)](logits, own_targets, lse, shape, s, V, eps, BLOCK=columns, num_warps=2)
    shape /= shape.sum().clamp(min=torch.finfo(torch.float32).tiny)
    if not corrected:
        return Sample(tokens, stands_for, shape, torch.empty(0, V, dtype=E.dtype, device=device))
    corrections = torch.empty(s + EXTRA_ROWS, V, dtype=E.dtype, device=device)
    corrections[s:] = smoothing_rows(operands)
    corrections[s + 2] = shape
    corrections[s + 3] = shape - corrections[s + 2].float()
    corrections_kernel[(s,)](
        logits,
        own_targets,
        lse,
        shape,
        shape if operands.prior is None else operands.prior,
        corrections,
        V,
        eps,
        LEAST_SHARE,
        operands.mean_weight,
        k.z_loss,
        k.softcap or 1.0,
        CAPPED=k.softcap is not None,
        PRIOR=operands.prior is not None,
        BLOCK=block,
        num_warps=16,
    )
    return Sample(tokens, stands_for, shape, corrections)
