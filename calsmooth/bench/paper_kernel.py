"""The paper's own kernel, as a baseline: Algorithm 1 and the backward pass of section 5.2, with Table 3's switches.

Written from the paper and from the design that it takes over from cut-cross-entropy (Wijmans et al., 2025), to be
measured beside calsmooth's kernels on the same inputs; nothing in calsmooth trains with it.

Forward: one program per (block of tokens, block of vocabulary). It sums the block's logits A_nv over blocks of
features, and adds their log-sum-exp to LSE_n in global memory under a lock (unlocked: every block writes its own and
one reduction follows). The targets' logits come out of the same block, and for beta > 0 so does the sum of all logits.

Backward: A_nv is made again. The entries S = softmax - (1 - beta) onehot - beta / V go into dE and dC block by block,
under locks (no atomics), and the sums are kept in the gradients' own dtype: the paper's 1,162 MB are those gradients in
bfloat16 and leave no room for float32 sums.

- Filter: a block in which every |entry| is below 2^-12 is skipped. beta / V is far below that for any large vocabulary,
  so the smoothing gradient of every skipped block is lost with it: what is left of it is in the blocks that hold a
  target or a large probability. Runs with beta = 0 tell this from the softmax mass that the filter drops as well, runs
  in float32 tell both from the rounding of the sums.
- Sorting: the backward's blocks are made of entries in the order of their average logit, so that the few blocks that
  survive the filter hold most of what is large. It serves the filter and is off without it.
- Fused: the gradients are made in the forward call, and the backward only scales them. No softmax entry can be made
  before LSE is complete; the barrier is the boundary between the two kernels. No sorting, as in the paper's table (its
  0.09 MB have no room for an order).

Sums happen in whatever order programs take the locks: results differ from run to run in the last digits.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from calsmooth.loss.kernels.rows import scale_in_place
from calsmooth.loss.kernels.tiles import tanh

FILTER_EPS = 2.0**-12

LIFT = tl.constexpr(1024.0)
"""Entries are multiplied by this before they are rounded for the products, and the products divided by it: float16
would lose small ones. A power of two, hence exact."""

GROUP = tl.constexpr(16)
"""Blocks of tokens that go through the vocabulary together, so that their part of E stays in the cache."""


@dataclass(frozen=True)
class Switches:
    """Table 3's rows; the defaults are its first."""

    filtered: bool = True
    sorted: bool = True  # only with `filtered`, and not with `fused`
    fused: bool = False
    locked: bool = True  # the forward's update of LSE


@dataclass(frozen=True)
class Blocks:
    tokens: int
    vocabulary: int
    features: int
    warps: int
    stages: int


# Kernels --------------------------------------------------------------------------------------------------------------


@triton.jit
def own_blocks(N, V, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """This program's block of tokens and block of vocabulary."""
    token_blocks = tl.cdiv(N, BLOCK_N)
    in_group = tl.program_id(0) % (GROUP * tl.cdiv(V, BLOCK_V))
    first = tl.program_id(0) // (GROUP * tl.cdiv(V, BLOCK_V)) * GROUP
    size = tl.minimum(token_blocks - first, GROUP)
    return first + in_group % size, in_group // size


@triton.jit
def logits_block(
    E,
    C,
    rows,  # (BLOCK_N,) tokens
    columns,  # (BLOCK_V,) vocabulary entries, in any order
    inside_n,
    inside_v,
    D,
    stride_e,
    stride_c,
    softcap,
    CAPPED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(BLOCK_N, BLOCK_V) float32 logits; 0 outside."""
    features = tl.arange(0, BLOCK_D)
    e_rows = E + rows.to(tl.int64)[:, None] * stride_e + features[None, :]
    c_rows = C + columns.to(tl.int64)[:, None] * stride_c + features[None, :]
    A = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for d in range(0, D, BLOCK_D):
        inside_d = (features < D - d)[None, :]
        e = tl.load(e_rows + d, mask=inside_n[:, None] & inside_d, other=0.0)
        c = tl.load(c_rows + d, mask=inside_v[:, None] & inside_d, other=0.0)
        A = tl.dot(e, c.T, A, input_precision="ieee")
    if CAPPED:
        A = softcap * tanh(A / softcap)
    return A


@triton.jit
def acquire(lock):
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass


@triton.jit
def release(lock):
    tl.debug_barrier()  # every thread's stores come before
    tl.atomic_xchg(lock, 0)


@triton.jit
def forward_kernel(
    E,
    C,
    targets,  # (N,) int32, -1: ignored
    lse,  # (N,), -inf at first (LOCKED); else (V / BLOCK_V, N)
    locks,  # (N / BLOCK_N,) int32, 0 at first (LOCKED)
    target_logits,  # (N,)
    logit_sums,  # (N,), 0 at first (SMOOTHED)
    entry_sums,  # (V,), 0 at first (AVERAGED)
    N,
    V,
    D,
    stride_e,
    stride_c,
    softcap,
    CAPPED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    AVERAGED: tl.constexpr,
    LOCKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token_block, vocabulary_block = own_blocks(N, V, BLOCK_N, BLOCK_V)
    rows = token_block * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = vocabulary_block * BLOCK_V + tl.arange(0, BLOCK_V)
    inside_n, inside_v = rows < N, columns < V
    A = logits_block(
        E, C, rows, columns, inside_n, inside_v, D, stride_e, stride_c, softcap, CAPPED, BLOCK_N, BLOCK_V, BLOCK_D
    )

    y = tl.load(targets + rows, mask=inside_n, other=-1)
    here = (y >= vocabulary_block * BLOCK_V) & (y < (vocabulary_block + 1) * BLOCK_V)
    if tl.max(here.to(tl.int32), 0) > 0:
        M = columns[None, :] == y[:, None]
        # No other block holds this target: nothing to add up.
        tl.store(target_logits + rows, tl.sum(tl.where(M, A, 0.0), 1), mask=here)
    if AVERAGED:
        tl.atomic_add(entry_sums + columns, tl.sum(A, 0), mask=inside_v, sem="relaxed")
    if SMOOTHED:
        tl.atomic_add(logit_sums + rows, tl.sum(A, 1), mask=inside_n, sem="relaxed")

    A = tl.where(inside_v[None, :], A, float("-inf"))
    largest = tl.max(A, 1)
    block_lse = largest + tl.log(tl.sum(tl.exp(A - largest[:, None]), 1))
    if LOCKED:
        acquire(locks + token_block)
        so_far = tl.load(lse + rows, mask=inside_n, other=0.0, cache_modifier=".cg")
        largest = tl.maximum(so_far, block_lse)
        joined = largest + tl.log(tl.exp(so_far - largest) + tl.exp(block_lse - largest))
        tl.store(lse + rows, joined, mask=inside_n)
        release(locks + token_block)
    else:
        tl.store(lse + vocabulary_block.to(tl.int64) * N + rows, block_lse, mask=inside_n)


@triton.jit
def add_under_lock(where, value, mask, lock):
    """where += value; read around the first-level cache, where another multiprocessor's sum wouldn't show."""
    acquire(lock)
    total = tl.load(where, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32) + value
    tl.store(where, total.to(where.dtype.element_ty), mask=mask)
    release(lock)


@triton.jit
def backward_kernel(
    E,
    C,
    targets,  # (N,) int32, -1: ignored
    lse,  # (N,)
    order,  # (V,) vocabulary entries as the blocks take them (SORTED)
    dE,  # (N, D), 0 at first (NEED_E)
    dC,  # (V, D), 0 at first (NEED_C)
    locks_e,  # (N / BLOCK_N, D / BLOCK_D) int32, 0 at first
    locks_c,  # (V / BLOCK_V, D / BLOCK_D)
    weight,  # () gradient of the result by each token's loss
    N,
    V,
    D,
    stride_e,
    stride_c,
    softcap,
    target_weight,  # 1 - beta
    mean_weight,  # beta / V
    eps,
    CAPPED: tl.constexpr,
    FILTERED: tl.constexpr,
    SORTED: tl.constexpr,
    NEED_E: tl.constexpr,
    NEED_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token_block, vocabulary_block = own_blocks(N, V, BLOCK_N, BLOCK_V)
    rows = token_block * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = vocabulary_block * BLOCK_V + tl.arange(0, BLOCK_V)
    inside_n, inside_v = rows < N, columns < V
    if SORTED:
        columns = tl.load(order + columns, mask=inside_v, other=0)
    A = logits_block(
        E, C, rows, columns, inside_n, inside_v, D, stride_e, stride_c, softcap, CAPPED, BLOCK_N, BLOCK_V, BLOCK_D
    )

    y = tl.load(targets + rows, mask=inside_n, other=-1)
    S = tl.exp(A - tl.load(lse + rows, mask=inside_n, other=0.0)[:, None]) - mean_weight
    S = tl.where(columns[None, :] == y[:, None], S - target_weight, S)
    S = tl.where((y >= 0)[:, None] & inside_v[None, :], S, 0.0)
    kept = True
    if FILTERED:
        kept = tl.max(tl.max(tl.abs(S), 1), 0) >= eps
    if kept:
        if CAPPED:
            S *= 1.0 - (A / softcap) * (A / softcap)
        G = (S * LIFT).to(E.dtype.element_ty)
        factor = tl.load(weight) / LIFT
        chunks = tl.cdiv(D, BLOCK_D)
        tokens = rows.to(tl.int64)[:, None]
        entries = columns.to(tl.int64)[:, None]
        if NEED_E:
            for chunk in range(0, chunks):
                features = chunk * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
                c = tl.load(C + entries * stride_c + features, mask=inside_v[:, None] & (features < D), other=0.0)
                value = tl.dot(G, c, input_precision="ieee") * factor
                mask = inside_n[:, None] & (features < D)
                add_under_lock(dE + tokens * D + features, value, mask, locks_e + token_block * chunks + chunk)
        if NEED_C:
            for chunk in range(0, chunks):
                features = chunk * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
                e = tl.load(E + tokens * stride_e + features, mask=inside_n[:, None] & (features < D), other=0.0)
                value = tl.dot(G.T, e, input_precision="ieee") * factor
                mask = inside_v[:, None] & (features < D)
                add_under_lock(dC + entries * D + features, value, mask, locks_c + vocabulary_block * chunks + chunk)


# Around them ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Problem:
    E: Tensor  # (N, D)
    C: Tensor  # (V, D)
    targets: Tensor  # (N,) int32, -1: ignored
    beta: float
    softcap: float | None
    switches: Switches

    def grid(self, blocks: Blocks) -> tuple[int]:
        return (triton.cdiv(len(self.E), blocks.tokens) * triton.cdiv(len(self.C), blocks.vocabulary),)

    def arguments(self, blocks: Blocks) -> dict[str, Any]:
        return {
            "E": self.E,
            "C": self.C,
            "targets": self.targets,
            "N": len(self.E),
            "V": len(self.C),
            "D": self.E.shape[1],
            "stride_e": self.E.stride(0),
            "stride_c": self.C.stride(0),
            "softcap": self.softcap or 1.0,
            "CAPPED": self.softcap is not None,
            "BLOCK_N": blocks.tokens,
            "BLOCK_V": blocks.vocabulary,
            "BLOCK_D": blocks.features,
            "num_warps": blocks.warps,
            "num_stages": blocks.stages,
        }


def choose_blocks(E: Tensor) -> Blocks:
    """Sizes at which no register spills where rows are aligned, the same for both passes."""
    if E.device.type != "cuda":
        return Blocks(16, 32, 16, warps=4, stages=1)  # interpreted, for the tests
    if E.dtype == torch.float32:
        return Blocks(64, 64, 32, warps=8, stages=3)
    # The others have 100 KB of shared memory.
    roomy = torch.cuda.get_device_capability(E.device) in ((8, 0), (9, 0), (10, 0))
    return Blocks(128, 128, 64 if roomy else 32, warps=8, stages=3)


def _forward(p: _Problem, averaged: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """(N,) losses, 0 where ignored; (N,) log-sum-exps; the entries in order of falling average logit, if asked for."""
    N, V, device = len(p.E), len(p.C), p.E.device
    blocks = choose_blocks(p.E)
    parts = 1 if p.switches.locked else triton.cdiv(V, blocks.vocabulary)
    lse = torch.full((parts, N), -torch.inf, device=device)
    target_logits = torch.zeros(N, device=device)
    logit_sums = torch.zeros(N, device=device) if p.beta != 0 else None
    entry_sums = torch.zeros(V, device=device) if averaged else None
    forward_kernel[p.grid(blocks)](
        lse=lse,
        locks=torch.zeros(triton.cdiv(N, blocks.tokens), dtype=torch.int32, device=device),
        target_logits=target_logits,
        logit_sums=lse if logit_sums is None else logit_sums,
        entry_sums=lse if entry_sums is None else entry_sums,
        SMOOTHED=logit_sums is not None,
        AVERAGED=averaged,
        LOCKED=p.switches.locked,
        **p.arguments(blocks),
    )
    total_lse = lse[0] if p.switches.locked else lse.logsumexp(0)
    losses = total_lse - (1.0 - p.beta) * target_logits
    if logit_sums is not None:
        losses -= p.beta / V * logit_sums
    order = None if entry_sums is None else entry_sums.argsort(descending=True)
    return torch.where(p.targets >= 0, losses, 0.0), total_lse, order


def _gradients(
    p: _Problem,
    lse: Tensor,  # (N,)
    order: Tensor | None,  # (V,)
    weight: Tensor,  # () float32
    need_E: bool,
    need_C: bool,
) -> tuple[Tensor | None, Tensor | None]:
    (N, D), V, device = p.E.shape, len(p.C), p.E.device
    blocks = choose_blocks(p.E)
    chunks = triton.cdiv(D, blocks.features)
    dE = torch.zeros(N, D, dtype=p.E.dtype, device=device) if need_E else None
    dC = torch.zeros(V, D, dtype=p.C.dtype, device=device) if need_C else None
    locks_e, locks_c = (
        torch.zeros(triton.cdiv(size, block), chunks, dtype=torch.int32, device=device)
        for size, block in ((N, blocks.tokens), (V, blocks.vocabulary))
    )
    backward_kernel[p.grid(blocks)](
        lse=lse,
        order=p.targets if order is None else order,
        dE=p.E if dE is None else dE,
        dC=p.C if dC is None else dC,
        locks_e=locks_e,
        locks_c=locks_c,
        weight=weight,
        target_weight=1.0 - p.beta,
        mean_weight=p.beta / V,
        eps=FILTER_EPS,
        FILTERED=p.switches.filtered,
        SORTED=order is not None,
        NEED_E=need_E,
        NEED_C=need_C,
        **p.arguments(blocks),
    )
    return dE, dC


class _PaperLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, E: Tensor, C: Tensor, targets: Tensor, beta: float, softcap: float | None, s: Switches
    ) -> Any:
        p = _Problem(E, C, targets, beta, softcap, s)
        losses, lse, order = _forward(p, averaged=s.sorted and s.filtered and not s.fused)
        share = 1.0 / _count(targets)
        if s.fused:
            # Not saved as tensors: they leave with the first backward, scaled in place.
            ctx.gradients = _gradients(p, lse, None, share, *ctx.needs_input_grad[:2])
        else:
            ctx.save_for_backward(E, C, targets, lse, share, order)
            ctx.options = beta, softcap, s
        return losses.sum() * share

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if hasattr(ctx, "gradients"):
            dE, dC = ctx.gradients
            del ctx.gradients
            nothing = grad.new_empty(0)
            scale_in_place(nothing if dE is None else dE, nothing if dC is None else dC, grad)
        else:
            E, C, targets, lse, share, order = ctx.saved_tensors
            p = _Problem(E, C, targets, *ctx.options)
            dE, dC = _gradients(p, lse, order, share * grad, *ctx.needs_input_grad[:2])
        return dE, dC, None, None, None, None


def _count(targets: Tensor) -> Tensor:
    return (targets >= 0).sum().clamp(min=1).float()


def paper_loss(
    hidden_states: Tensor,  # (N, D)
    lm_head_weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    *,
    beta: float,
    softcap: float | None = None,
    switches: Switches = Switches(),
    ignore_index: int = -100,
) -> Tensor:
    """Mean label-smoothed cross-entropy over the targets that aren't ignored, by the paper's kernel; float32.

    Args:
        hidden_states, lm_head_weight: bfloat16, float16 or float32, the same for both.
        targets: indices in [0, V), or `ignore_index`.
        beta: label smoothing, with torch's meaning (the paper's equation 15 has the opposite sign).
        softcap: t in z = t * tanh(z / t), None for none.
        switches: what the backward pass does; see the module's docstring.

    Differentiable once, with one backward pass, in hidden_states and lm_head_weight.
    """
    E, C = (x if x.stride(1) == 1 else x.contiguous() for x in (hidden_states, lm_head_weight))
    marked = torch.where(targets == ignore_index, -1, targets).int()
    if torch.is_grad_enabled() and (E.requires_grad or C.requires_grad):
        return _PaperLoss.apply(E, C, marked, beta, softcap, switches)
    losses, _, _ = _forward(_Problem(E, C, marked, beta, softcap, switches), averaged=False)
    return losses.sum() / _count(marked)
