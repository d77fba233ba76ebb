"""Targets as the kernels take them: marked where they are ignored or can't be, and their logits and rows.

On a GPU nobody may wait for a look at the targets. One that is outside the vocabulary is marked, so that nothing is
read or written outside the head, and makes its token's loss NaN, and so the sum.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from calsmooth.loss.kernels.configurations import VARYING, cdiv
from calsmooth.loss.kernels.rows import feature_block
from calsmooth.loss.kernels.tiles import Operands, to_logits

BAD = tl.constexpr(-2)
"""Outside the vocabulary, and not the index to be ignored."""

ELSEWHERE = 2**30
"""A token with a target that is no column of this head."""


@triton.jit
def loss_or_not(loss, target):
    """The loss of a token with a target, 0 of an ignored one, NaN of one whose target can't be."""
    return tl.where(target >= 0, loss, tl.where(target == BAD, float("nan"), 0.0))


@triton.jit(do_not_specialize=(*VARYING, "ignore_index"))
def mark_kernel(targets, marked, ignore_index, V, size, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(targets + places, mask=places < size, other=0).to(tl.int64)
    inside = (y >= 0) & (y < V)
    y = tl.where(y == ignore_index, -1, tl.where(inside, y, BAD))
    tl.store(marked + places, y.to(tl.int32), mask=places < size)


def marked_targets(
    targets: Tensor,  # (N,) or (N, K), int64 or int32
    ignore_index: int,
    V: int,
) -> Tensor:
    """Of the same shape, int32, -1 where ignored, BAD where outside [0, V)."""
    targets = targets.contiguous()
    marked = torch.empty(targets.shape, dtype=torch.int32, device=targets.device)
    size = targets.numel()
    if size:
        mark_kernel[(cdiv(size, 1024),)](targets, marked, ignore_index, V, size, BLOCK=1024)
    return marked


def row_targets(marked: Tensor) -> Tensor:
    """(N,) of (N, K) marked targets: BAD if one of them is, -1 if all are ignored, else ELSEWHERE."""
    some = torch.where((marked >= 0).any(1), ELSEWHERE, -1)
    return torch.where((marked == BAD.value).any(1), BAD.value, some).int()


@triton.jit(do_not_specialize=VARYING)
def target_logits_kernel(
    E,
    C,
    bias,
    targets,
    out,
    per_token,
    V,
    D,
    stride_e,
    stride_c,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    n = place // per_token
    y = tl.load(targets + place).to(tl.int64)
    total = tl.zeros((BLOCK_D,), tl.float32)
    if y >= 0:
        for d in range(0, D, BLOCK_D):
            features = d + tl.arange(0, BLOCK_D)
            a = tl.load(E + n * stride_e + features, mask=features < D, other=0.0).to(tl.float32)
            b = tl.load(C + y * stride_c + features, mask=features < D, other=0.0).to(tl.float32)
            total += a * b
    column = tl.maximum(y, 0).to(tl.int32) + tl.arange(0, 1)
    z = tl.sum(total, 0) + tl.zeros((1, 1), tl.float32)
    z = to_logits(z, bias, column, V, scale, softcap, HAS_BIAS, SCALED, CAPPED)
    tl.store(out + place + tl.arange(0, 1)[None, :], tl.where(y >= 0, z, 0.0))


def target_logits(
    operands: Operands,
    targets: Tensor,  # (N,) or (N, K) int32, below 0 for none
) -> Tensor:
    """Shaped like targets, float32: each one's own logit, 0 where there is none."""
    E, C = operands.E, operands.C
    out = torch.empty(targets.shape, dtype=torch.float32, device=E.device)
    target_logits_kernel[(targets.numel(),)](
        E,
        C,
        operands.bias if operands.bias is not None else E,
        targets,
        out,
        1 if targets.dim() == 1 else targets.shape[1],
        len(C),
        E.shape[1],
        E.stride(0),
        C.stride(0),
        operands.semantics.scale,
        operands.semantics.softcap or 1.0,
        **operands.semantics.constants(operands.bias),
        BLOCK_D=feature_block(E.shape[1]),
        num_warps=4,
    )
    return out


@triton.jit(do_not_specialize=VARYING)
def add_target_rows_kernel(
    sorted_targets,  # (N K,) ascending; V where there is none
    order,  # (N K,) place of each sorted target
    scales,  # (N K,) by place
    E,
    dC,
    N,  # places
    per_token,
    V,
    D,
    stride_e,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    first = tl.program_id(0)
    y = tl.load(sorted_targets + first).to(tl.int64)
    before = tl.load(sorted_targets + first - 1, mask=first > 0, other=-1).to(tl.int64)
    if (y < V) & (y != before):
        features = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = features < D
        row = dC + y * D + features
        total = tl.load(row, mask=inside, other=0.0).to(tl.float32)
        start = first
        more = 1
        while more > 0:
            sorted_places = start + tl.arange(0, BLOCK_N)
            mine = tl.load(sorted_targets + sorted_places, mask=sorted_places < N, other=V).to(tl.int64) == y
            places = tl.load(order + sorted_places, mask=mine, other=0).to(tl.int64)
            scale = tl.load(scales + places, mask=mine, other=0.0)
            tokens = places // per_token
            mask = mine[:, None] & (scale != 0.0)[:, None] & inside[None, :]
            x = tl.load(E + tokens[:, None] * stride_e + features[None, :], mask=mask, other=0.0).to(tl.float32)
            total += tl.sum(x * scale[:, None], 0)
            more = (tl.sum(mine.to(tl.int32), 0) == BLOCK_N).to(tl.int32)
            start += BLOCK_N
        tl.store(row, total.to(dC.dtype.element_ty), mask=inside)


def add_target_rows(
    dC: Tensor,  # (V, D), contiguous, added to
    E: Tensor,  # (N, D)
    targets: Tensor,  # (N,) or (N, K) int32; those that are no row of dC add nothing
    scales: Tensor,  # shaped like targets, float32
) -> None:
    """dC[target] += scale E_token, in the targets' order: one program adds up all that go to one row."""
    V, D = dC.shape
    flat = targets.flatten()
    sorted_targets, order = torch.sort(torch.where((flat < 0) | (flat >= V), V, flat), stable=True)
    block = feature_block(D, 512)
    add_target_rows_kernel[(len(flat), cdiv(D, block))](
        sorted_targets,
        order,
        scales,
        E,
        dC,
        len(flat),
        1 if targets.dim() == 1 else targets.shape[1],
        V,
        D,
        E.stride(0),
        BLOCK_N=8,
        BLOCK_D=block,
        num_warps=4,
    )


@triton.jit(do_not_specialize=VARYING)
def add_head_rows_kernel(
    hidden,  # (N, D), added to
    C,
    targets,  # (N, K)
    scales,  # (N, K)
    per_token,
    D,
    stride_c,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    features = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = features < D
    total = tl.load(hidden + n * D + features, mask=inside, other=0.0)
    for k in range(per_token):
        y = tl.load(targets + n * per_token + k).to(tl.int64)
        scale = tl.load(scales + n * per_token + k)
        read = tl.where(y >= 0, D, 0)
        row = tl.load(C + tl.maximum(y, 0) * stride_c + features, mask=features < read, other=0.0).to(tl.float32)
        total += scale * row
    tl.store(hidden + n * D + features, total, mask=inside)


def add_head_rows(
    hidden: Tensor,  # (N, D) float32, contiguous, added to
    C: Tensor,  # (V, D)
    targets: Tensor,  # (N, K) int32, below 0 for none
    scales: Tensor,  # (N, K) float32
) -> None:
    """hidden_n += sum_k scale_nk C[target_nk]."""
    N, D = hidden.shape
    block = feature_block(D)
    add_head_rows_kernel[(N, cdiv(D, block))](
        hidden, C, targets, scales.contiguous(), targets.shape[1], D, C.stride(0), BLOCK_D=block, num_warps=4
    )
