"""The forward walk: log-sum-exp and everything else that one pass over the vocabulary gives, without storing logits.

One program per (block of tokens, part of the vocabulary); parts are interleaved tile by tile, so that all programs
move through the vocabulary together and the head streams through the cache once. Running maximum and sum live in
registers across the walk: no locks and no atomics, hence the same bits from run to run. `combine_kernel` then joins
the parts and makes the losses.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from calsmooth.loss.kernels.configurations import VARYING, cdiv
from calsmooth.loss.kernels.targets import loss_or_not
from calsmooth.loss.kernels.tiles import LOG2E, Operands, place, prior_weighted, product_tile, to_logits

GROUP = 64
"""Vocabulary entries whose common maximum the walk can write down, for `filtered`."""

LOWEST = tl.constexpr(-1e30)
"""Maximum of no logits at all; finite, so that differences of two of them are not NaN."""


@triton.jit(do_not_specialize=VARYING)
def walk_kernel(
    e,
    c,
    bias,
    only,  # (row blocks,) int32: blocks that hold 0 are left out (ONLY)
    maxima,  # (splits, N)
    sums,  # (splits, N) sum of exp(z - maximum)
    logit_sums,  # (splits, N) sum of z, each times its prior's share with PRIOR (LOGIT_SUM)
    group_maxima,  # (V / GROUP, N) bfloat16, rows padded to `stride_maxima` (GROUPS)
    top_tokens,  # (splits, N) int32 (STATISTICS)
    weighted_sums,  # (splits, N) sum of exp(z - maximum) (z - maximum) (STATISTICS)
    stored,  # (N, V) z * store_scale, rounded to integers (STORE)
    store_scale,
    prior,  # (V,) (PRIOR)
    stride_maxima,
    stride_stored,
    N,
    V,
    D,
    stride_e,
    stride_c,
    together,
    parts,
    scale,
    softcap,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    ONLY: tl.constexpr,
    LOGIT_SUM: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    STATISTICS: tl.constexpr,
    STORE: tl.constexpr,
    PRIOR: tl.constexpr,
):
    row_blocks = tl.cdiv(N, BLOCK_N)
    block, part = place(row_blocks, together, parts)
    row = block * BLOCK_N
    rows = row + tl.arange(0, BLOCK_N)
    steps = tl.where(block < row_blocks, tl.cdiv(tl.cdiv(V, BLOCK_V), parts), 0)
    if ONLY:
        steps = steps * tl.load(only + block, mask=block < row_blocks, other=0)

    m = tl.full((BLOCK_N,), LOWEST, tl.float32)
    s = tl.zeros((BLOCK_N,), tl.float32)
    z_sum = tl.zeros((BLOCK_N,), tl.float32)
    w = tl.zeros((BLOCK_N,), tl.float32)
    top = tl.zeros((BLOCK_N,), tl.int32)
    for step in range(steps):
        column = (step * parts + part) * BLOCK_V
        columns = column + tl.arange(0, BLOCK_V)
        z = product_tile(e, c, row, column, N, V, D, stride_e, stride_c, BLOCK_N, BLOCK_V, BLOCK_D, DESCRIPTORS)
        z = to_logits(z, bias, columns, V, scale, softcap, HAS_BIAS, SCALED, CAPPED)
        if LOGIT_SUM:
            z_sum += tl.sum(prior_weighted(z, prior, columns, V, PRIOR), 1)  # columns beyond V are still 0
        if column + BLOCK_V > V:
            z = tl.where(columns[None, :] < V, z, float("-inf"))
        if STORE:
            integers = tl.floor(z * store_scale + 0.5)
            if DESCRIPTORS:
                stored.store([row, column], integers.to(stored.dtype))
            else:
                where = stored + rows.to(tl.int64)[:, None] * stride_stored + columns[None, :]
                inside = (rows < N)[:, None] & (columns < V)[None, :]
                tl.store(where, integers.to(stored.dtype.element_ty), mask=inside)
        if GROUPS:
            group_max = tl.max(tl.reshape(z, (BLOCK_N, BLOCK_V // GROUP, GROUP)), 2)
            groups = column // GROUP + tl.arange(0, BLOCK_V // GROUP)
            where = group_maxima + groups.to(tl.int64)[None, :] * stride_maxima + rows[:, None]
            # Up to the stride, which is aligned: from N to it lies padding, which may hold anything.
            inside = (groups < tl.cdiv(V, GROUP))[None, :] & (rows < stride_maxima)[:, None]
            tl.store(where, group_max.to(tl.bfloat16), mask=inside)
            tile_max = tl.max(group_max, 1)
        else:
            tile_max = tl.max(z, 1)
        m_new = tl.maximum(m, tile_max)
        if STATISTICS:  # noqa: SIM108 (of two constants' branches one is compiled)
            # Probabilities that people will read: the top one's share is exp2(0), never above.
            exponents = (z - m_new[:, None]) * LOG2E
        else:
            # One multiply-add an entry. The rounded product is as good a reference as the maximum, to a rounding.
            exponents = z * LOG2E - (m_new * LOG2E)[:, None]
        p = tl.exp2(exponents)
        decay = tl.exp2((m - m_new) * LOG2E)
        if STATISTICS:
            first = tl.min(tl.where(z == tile_max[:, None], columns[None, :], V), 1)
            top = tl.where(tile_max > m, first, top)
            # exp(z - m) (z - m) is 0, not NaN, where z is -inf.
            w = decay * (w + s * (m - m_new)) + tl.sum(tl.where(p > 0.0, p * (z - m_new[:, None]), 0.0), 1)
        s = s * decay + tl.sum(p, 1)
        m = m_new

    mine = part.to(tl.int64) * N + rows
    inside = rows < N
    tl.store(maxima + mine, m, mask=inside)
    tl.store(sums + mine, s, mask=inside)
    if LOGIT_SUM:
        tl.store(logit_sums + mine, z_sum, mask=inside)
    if STATISTICS:
        tl.store(top_tokens + mine, top, mask=inside)
        tl.store(weighted_sums + mine, w, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def combine_kernel(
    maxima,  # (parts, N)
    sums,  # (parts, N)
    logit_sums,  # (parts, N)
    target_logits,  # (N,)
    targets,  # (N,) int32, -1: ignored, BAD: outside the vocabulary
    masses,  # (N,) (MASSES)
    losses,  # (N,)
    logsumexps,  # (N,)
    top_tokens,  # (parts, N)
    weighted_sums,  # (parts, N)
    top_token,  # (N,)
    top_logprob,  # (N,)
    entropy,  # (N,)
    N,
    parts,
    target_weight,  # 1 - beta
    mean_weight,
    z_loss,
    MASSES: tl.constexpr,
    LOGIT_SUM: tl.constexpr,
    STATISTICS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < N
    m = tl.full((BLOCK,), LOWEST, tl.float32)
    s = tl.zeros((BLOCK,), tl.float32)
    z_sum = tl.zeros((BLOCK,), tl.float32)
    w = tl.zeros((BLOCK,), tl.float32)
    top = tl.zeros((BLOCK,), tl.int32)
    for part in range(parts):
        mine = rows + tl.cast(part, tl.int64) * N
        m_part = tl.load(maxima + mine, mask=inside, other=0.0)
        s_part = tl.load(sums + mine, mask=inside, other=1.0)
        m_new = tl.maximum(m, m_part)
        old, new = tl.exp(m - m_new), tl.exp(m_part - m_new)
        if STATISTICS:
            w_part = tl.load(weighted_sums + mine, mask=inside, other=0.0)
            top_part = tl.load(top_tokens + mine, mask=inside, other=0)
            w = old * (w + s * (m - m_new)) + new * (w_part + s_part * (m_part - m_new))
            earlier = (m_part > m) | ((m_part == m) & (top_part < top))
            top = tl.where(earlier, top_part, top)
        if LOGIT_SUM:
            z_sum += tl.load(logit_sums + mine, mask=inside, other=0.0)
        s = s * old + s_part * new
        m = m_new
    lse = m + tl.log(s)
    z_target = tl.load(target_logits + rows, mask=inside, other=0.0)
    y = tl.load(targets + rows, mask=inside, other=-1)
    loss = lse
    if MASSES:
        loss *= tl.load(masses + rows, mask=inside, other=0.0)
    loss = loss - target_weight * z_target + z_loss * lse * lse
    if LOGIT_SUM:
        loss -= mean_weight * z_sum
    tl.store(losses + rows, loss_or_not(loss, y), mask=inside)
    tl.store(logsumexps + rows, lse, mask=inside)
    if STATISTICS:
        tl.store(top_token + rows, top, mask=inside)
        tl.store(top_logprob + rows, -tl.log(s), mask=inside)
        tl.store(entropy + rows, tl.log(s) - w / s, mask=inside)


@dataclass(frozen=True)
class Statistics:
    top_token: Tensor  # (N,) int32
    top_logprob: Tensor  # (N,)
    entropy: Tensor  # (N,)


@dataclass(frozen=True)
class Walked:
    losses: Tensor  # (N,), 0 where ignored
    logsumexp: Tensor  # (N,)
    target_logits: Tensor  # (N,), 0 where ignored
    statistics: Statistics | None


def maxima_and_sums(
    operands: Operands,
    *,
    only: Tensor | None = None,
    logit_sum: bool = False,
    group_maxima: Tensor | None = None,
    statistics: bool = False,
    stored: Tensor | None = None,
    store_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The walk kernel's partial results, (parts, N) each."""
    N, V, device = len(operands.E), len(operands.C), operands.E.device
    schedule = operands.schedule(V)
    parts = schedule.parts
    partial = [torch.empty(parts, N, dtype=torch.float32, device=device) for _ in range(2)]
    z_sum = torch.empty(parts, N, dtype=torch.float32, device=device) if logit_sum else None
    weighted = torch.empty(parts, N, dtype=torch.float32, device=device) if statistics else None
    top = torch.empty(parts, N, dtype=torch.int32, device=device) if statistics else None
    walk_kernel[(schedule.programs,)](
        only=_or(only, partial[0]),
        maxima=partial[0],
        sums=partial[1],
        logit_sums=_or(z_sum, partial[0]),
        group_maxima=_or(group_maxima, partial[0]),
        top_tokens=_or(top, partial[0]),
        weighted_sums=_or(weighted, partial[0]),
        stored=partial[0] if stored is None else operands.described(stored),
        store_scale=store_scale,
        stride_maxima=0 if group_maxima is None else group_maxima.stride(0),
        stride_stored=0 if stored is None else stored.stride(0),
        together=schedule.together,
        parts=parts,
        ONLY=only is not None,
        LOGIT_SUM=logit_sum,
        GROUPS=group_maxima is not None,
        GROUP=min(GROUP, operands.configuration.block_v),
        STATISTICS=statistics,
        STORE=stored is not None,
        **operands.arguments(),
    )
    return partial[0], partial[1], z_sum, top, weighted


def walk(
    operands: Operands,
    targets: Tensor,  # (N,) int32, -1: ignored, BAD: outside the vocabulary
    target_logits: Tensor,  # (N,); with masses the sum of the targets' weighted logits
    *,
    masses: Tensor | None = None,  # (N,) of the target distributions; None for 1
    group_maxima: Tensor | None = None,
    statistics: bool = False,
    stored: Tensor | None = None,
    store_scale: float = 1.0,
) -> Walked:
    """One pass over the vocabulary; on request with group maxima, statistics, or the logits as scaled integers."""
    N, device = len(operands.E), operands.E.device
    k = operands.semantics
    maxima, sums, z_sum, top, weighted = maxima_and_sums(
        operands,
        logit_sum=k.beta > 0 and not operands.prior_is_rank_one,
        group_maxima=group_maxima,
        statistics=statistics,
        stored=stored,
        store_scale=store_scale,
    )
    losses, lse = (torch.empty(N, dtype=torch.float32, device=device) for _ in range(2))
    found = None
    if statistics:
        found = Statistics(
            torch.empty(N, dtype=torch.int32, device=device),
            torch.empty(N, dtype=torch.float32, device=device),
            torch.empty(N, dtype=torch.float32, device=device),
        )
    combine_kernel[(cdiv(N, 128),)](
        maxima,
        sums,
        _or(z_sum, sums),
        target_logits,
        targets,
        _or(masses, sums),
        losses,
        lse,
        _or(top, sums),
        _or(weighted, sums),
        losses if found is None else found.top_token,
        losses if found is None else found.top_logprob,
        losses if found is None else found.entropy,
        N,
        len(maxima),
        1.0 - k.beta if masses is None else 1.0,
        operands.mean_weight,
        k.z_loss,
        MASSES=masses is not None,
        LOGIT_SUM=z_sum is not None,
        STATISTICS=statistics,
        BLOCK=128,
    )
    if operands.prior_is_rank_one:
        losses = operands.less_mean_logits(losses, targets)
    return Walked(losses, lse, target_logits, found)


def _or(tensor: Tensor | None, unused: Tensor) -> Tensor:
    """A kernel's optional argument; `unused` stands in where its flag leaves it out."""
    return unused if tensor is None else tensor
