"""`mode="filtered"`: softmax entries below `filter_eps` are replaced by a tail of one shape; smoothing is not touched.

One product in all instead of three. Of a real model's softmax about one entry in two thousand reaches 2^-12, so

 1. a sample of tokens tells the tail's shape q, and gets its own gradients put right (`sample`; why: `loss.tail`);
 2. the forward walk (exact, as everywhere) also writes each token's maximum logit over every group of 64 entries;
 3. with the log-sum-exp known, the (group, token) pairs that can hold an entry to keep are listed, about 3 % of them;
 4. only those are multiplied again, tokens gathered by group, and the entries to keep are appended to one list, each
    with its column, token and logit; the targets' entries are always kept;
 5. the list is sorted by column, and by token: every later sum has a fixed order, so results are the same bits from
    run to run although the list was filled in any order;
 6. in the backward dE is a gather over each token's entries, dC one over each column's, each with two rank-one terms,
    the smoothing's and the tail's, and dC with the sample's corrections besides:

        dE_i = sum_kept c_iv C_v - g_i beta (sum_v s_v C_v) + w_i d_i (sum_v q_v C_v)
        dC_v = sum_kept c_iv E_i - s_v (sum_i g_i beta E_i) + q_v (sum_i w_i d_i E_i) + corrections

        d_i  = (1 - kept mass) / (1 - sum of q over the kept entries),      w_i = g_i (1 + 2 z_loss lse_i)
        c_iv = w_i p_iv - g_i (1 - beta) [v = y_i] - w_i d_i q_v            (without a softcap; with one:)
        c_iv = (w_i p_iv - g_i (1 - beta) [v = y_i] - g_i beta s_v) (1 - (z/t)^2) + g_i beta s_v - w_i d_i q_v

s is the smoothing prior, 1 / V each without one. The gradient by a token's logits sums to 0 as it must.

With a softcap the slope 1 - (z/t)^2 is taken as 1 for the entries that are left out, except by the corrections.

Nothing is dropped silently: the probability mass that each token's kept entries hold is returned. A list that
overflows, or tokens that would have most of their mass replaced, make the backward exact (`gradient`) instead.
Whether they did is known only on the device: the backward waits for that one number, with its own work already
launched, so that the device doesn't idle. No other mode waits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from calsmooth.errors import UsageError
from calsmooth.loss.derivatives import once_differentiable
from calsmooth.loss.kernels.configurations import VARYING, cdiv
from calsmooth.loss.kernels.gradient import EXTRA_ROWS, gradients
from calsmooth.loss.kernels.lean import LEAN_BYTES
from calsmooth.loss.kernels.listing import Entries, capacity, group_size, kept_sums, list_entries, segment_sum
from calsmooth.loss.kernels.products import product, write_product
from calsmooth.loss.kernels.rows import SumBeside, feature_block, row_sum, scale_rows
from calsmooth.loss.kernels.sample import Sample, take_sample
from calsmooth.loss.kernels.targets import marked_targets, target_logits
from calsmooth.loss.kernels.tiles import Operands, Semantics, on_its_device, padded_matrix
from calsmooth.loss.kernels.walk import walk
from calsmooth.loss.tail import LEAST_SHARE, MOST_REPLACED, SAMPLE

STRIP = 2**14
"""Rows of a float16 head whose corrections are made at a time, in float32."""


@triton.jit(do_not_specialize=VARYING)
def coefficients_kernel(
    tokens,  # (size,) int32; N where there is no entry
    columns_by_token,
    token_places,
    logits,  # (size,)
    targets,
    logsumexps,
    weights,  # (N,) scale g
    heights,  # (N,) d
    shape,  # (V,) q
    prior,  # (V,) (PRIOR)
    coefficients,  # (size,) written: what the entry adds to the gradients, beside the rank-one terms
    by_token,  # (size,) written: the same by token
    size,
    N,
    target_weight,
    mean_weight,
    z_loss,
    softcap,
    CAPPED: tl.constexpr,
    PRIOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    own = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(token_places + own, mask=own < size, other=0)
    token = tl.load(tokens + place, mask=own < size, other=N)
    entry = token < N
    column = tl.load(columns_by_token + own, mask=entry, other=0)
    z = tl.load(logits + place, mask=entry, other=0.0)
    y = tl.load(targets + token, mask=entry, other=-1)
    lse = tl.load(logsumexps + token, mask=entry, other=0.0)
    g = tl.load(weights + token, mask=entry, other=0.0)
    w = g * (1.0 + 2.0 * z_loss * lse)
    x = w * tl.exp(z - lse) - tl.where(column == y, g * target_weight, 0.0)
    if CAPPED:
        smoothing = g * mean_weight
        if PRIOR:
            smoothing *= tl.load(prior + column, mask=entry, other=0.0)
        x = (x - smoothing) * (1.0 - (z / softcap) * (z / softcap)) + smoothing
    d = tl.load(heights + token, mask=entry, other=0.0)
    x -= w * d * tl.load(shape + column, mask=entry, other=0.0)
    tl.store(coefficients + place, x, mask=entry)
    tl.store(by_token + own, x, mask=entry)


@triton.jit(do_not_specialize=VARYING)
def gather_rows_kernel(
    X,
    starts,  # (R + 1,)
    indices,
    coefficients,
    bases,  # (2, D) (BASES)
    scales,  # (2, R) (BASES)
    out,  # (R, D), written (BASES) or added to
    R,
    D,
    stride_x,
    BASES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out_r = sum_j coefficient_j X[index_j] over r's entries, plus both bases times their scales or what was there."""
    features = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = features < D
    if BASES:
        base = tl.load(bases + features, mask=inside, other=0.0)
        other_base = tl.load(bases + D + features, mask=inside, other=0.0)
    for i in range(ROWS):
        r = tl.program_id(0) * ROWS + i
        start = tl.load(starts + r, mask=r < R, other=0)
        stop = tl.load(starts + r + 1, mask=r < R, other=0)
        # A row that is only added to and gets nothing stays as it is.
        if (stop > start) | (BASES & (r < R)):
            row = out + tl.cast(r, tl.int64) * D + features
            if BASES:
                total = tl.load(scales + r) * base + tl.load(scales + tl.cast(R, tl.int64) + r) * other_base
            else:
                total = tl.load(row, mask=inside, other=0.0).to(tl.float32)
            for first in range(start, stop, BLOCK_K):
                places = first + tl.arange(0, BLOCK_K)
                mine = places < stop
                index = tl.load(indices + places, mask=mine, other=0).to(tl.int64)
                coefficient = tl.load(coefficients + places, mask=mine, other=0.0)
                rows = X + index[:, None] * stride_x + features[None, :]
                x = tl.load(rows, mask=mine[:, None] & inside[None, :], other=0.0).to(tl.float32)
                total += tl.sum(x * coefficient[:, None], 0)
            tl.store(row, total.to(out.dtype.element_ty), mask=inside)


def gather_rows(
    out: Tensor,  # (R, D), contiguous
    X: Tensor,
    starts: Tensor,  # (R + 1,)
    indices: Tensor,
    coefficients: Tensor,
    bases: Tensor | None = None,  # (2, D) float32, contiguous; None where out is added to
    scales: Tensor | None = None,  # (2, R) float32, contiguous
) -> None:
    R, D = out.shape
    # One warp a program: the sum over entries stays within each thread.
    block, rows = feature_block(D, 256), 4 if R > 2**16 else 1
    gather_rows_kernel[(cdiv(R, rows), cdiv(D, block))](
        X,
        starts,
        indices,
        coefficients,
        coefficients if bases is None else bases,
        coefficients if scales is None else scales,
        out,
        R,
        D,
        X.stride(0),
        BASES=bases is not None,
        ROWS=rows,
        BLOCK_K=16,
        BLOCK_D=block,
        num_warps=1,
    )


def tail_heights(kept_mass: Tensor, kept_share: Tensor) -> Tensor:
    """(N,) d: what the tail's shape is scaled by, so that the tail holds the mass that was replaced."""
    left = 1.0 - kept_share
    return torch.where(left > LEAST_SHARE, (1.0 - kept_mass).clamp(min=0.0) / left.clamp(min=LEAST_SHARE), 0.0)


def gather_gradients(
    operands: Operands,
    targets: Tensor,  # (N,) int32, below 0: none
    logsumexp: Tensor,
    weights: Tensor,  # (N,) float32, 0 where ignored
    heights: Tensor,  # (N,)
    entries: Entries,
    sample: Sample,
    head_sums: Tensor,  # (2, D): C's rows weighted by the smoothing prior (1 each without one), and by the tail's shape
    eps: float,
    head_dtype: torch.dtype,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    E, C, bias, k = operands.E, operands.C, operands.bias, operands.semantics
    (N, D), V, device, shape = E.shape, len(C), E.device, sample.shape
    need_E, need_C, need_bias = needed
    weights = weights * k.scale
    has_target = targets >= 0
    tails = torch.where(has_target, weights * (1.0 + 2.0 * k.z_loss * logsumexp) * heights, 0.0)
    token_scales = torch.stack([weights * -operands.mean_weight, tails])  # an ignored token's log-sum-exp may be NaN
    size = len(entries.tokens)
    coefficients, by_token = (torch.empty(size, dtype=torch.float32, device=device) for _ in range(2))
    coefficients_kernel[(cdiv(size, 1024),)](
        entries.tokens,
        entries.token_columns,
        entries.token_places,
        entries.logits,
        targets,
        logsumexp,
        weights,
        heights,
        shape,
        shape if operands.prior is None else operands.prior,
        coefficients,
        by_token,
        size,
        N,
        1.0 - k.beta,
        operands.mean_weight,
        k.z_loss,
        k.softcap or 1.0,
        CAPPED=k.softcap is not None,
        PRIOR=operands.prior is not None,
        BLOCK=1024,
    )
    dE = dC = dbias = None
    if need_E:
        dE = torch.empty(N, D, dtype=E.dtype, device=device)
        columns, starts = entries.token_columns, entries.token_starts
        gather_rows(dE, C, starts, columns, by_token, head_sums, token_scales)
    if need_C:
        dC = torch.empty(V, D, dtype=head_dtype, device=device)
        _write_rank_one_and_corrections(dC, operands, weights, row_sum(E, token_scales), sample, eps)
        gather_rows(dC, E, entries.column_starts, entries.tokens, coefficients)
    if need_bias and bias is not None:
        even, tail = token_scales.sum(1)
        dbias = segment_sum(entries.column_starts, coefficients) + tail * shape
        dbias += even if operands.prior is None else even * operands.prior
        sampled = sample.corrections[: len(sample.tokens)].float()
        dbias += sampled.T @ (weights[sample.tokens] * (sample.stands_for * eps))
        dbias = dbias.to(bias.dtype)
    return dE, dC, dbias


def _write_rank_one_and_corrections(
    dC: Tensor,
    operands: Operands,
    weights: Tensor,
    sums: Tensor,  # (2, D): the tokens' hidden states, weighted as the smoothing term and the tail weigh them
    sample: Sample,
    eps: float,
) -> None:
    """dC = corrections^T (the sample's hidden states, times their weights) + s (x) sums_0 + q (x) sums_1."""
    E, s = operands.E, len(sample.tokens)
    scales = weights[sample.tokens] * (sample.stands_for * eps)
    if E.dtype != torch.float16:
        # Both rank-one terms go along as more tokens, each in two parts, which together aren't rounded.
        e = torch.zeros(s + EXTRA_ROWS, E.shape[1], dtype=E.dtype, device=E.device)
        scale_rows(E[sample.tokens], scales, out=e)
        e[s : s + 2] = sums[0]
        e[s + 2 : s + 4] = sums[1]
        write_product(dC, sample.corrections.T, e)
        return
    lift = scales.abs().amax().clamp(min=1e-30)
    e = scale_rows(E[sample.tokens], scales / lift)
    even = torch.ones_like(sample.shape) if operands.prior is None else operands.prior
    for first in range(0, len(dC), STRIP):
        strip = slice(first, first + STRIP)
        corrected = product(sample.corrections[:s, strip].T, e) * lift
        dC[strip] = corrected + torch.outer(even[strip], sums[0]) + torch.outer(sample.shape[strip], sums[1])


def _refuse_capture(E: Tensor) -> None:
    """The backward asks the device whether it must be exact; a CUDA graph can't be asked."""
    if E.is_cuda and torch.cuda.is_current_stream_capturing():
        raise UsageError(
            "mode='filtered' waits for a number from the GPU, so that a CUDA graph can't capture it; "
            "use 'exact' or 'lean'"
        )


@torch.library.custom_op("calsmooth::filtered_losses", mutates_args=())
@on_its_device
def filtered_losses(
    E: Tensor,  # (N, D)
    C: Tensor,  # (V, D); cast to E's dtype
    bias: Tensor | None,
    targets: Tensor,  # (N,)
    prior: Tensor | None,  # (V,) float32, where the smoothed mass isn't spread evenly
    ignore_index: int,
    beta: float,
    softcap: float | None,
    scale: float,
    z_loss: float,
    head_dtype: torch.dtype,
    eps: float,
    need_C: bool,  # or a bias's gradient
) -> list[Tensor]:
    """(N,) losses, (N,) kept mass, and what `filtered_gradients` needs."""
    _refuse_capture(E)
    semantics = Semantics(beta, softcap, scale, z_loss)
    operands = Operands.make(E, C.to(E.dtype), bias, semantics, storing=False, prior=prior)
    marked = marked_targets(targets, ignore_index, len(C))
    sample = take_sample(operands, marked, eps, corrected=need_C)
    groups = cdiv(len(C), group_size(operands.configuration))
    group_maxima = padded_matrix(groups, len(E), torch.bfloat16, E.device)
    z_target = target_logits(operands, marked)
    even = torch.ones_like(sample.shape) if operands.prior is None else operands.prior
    head_sums = SumBeside(operands.C, torch.stack([even, sample.shape]))
    walked = walk(operands, marked, z_target, group_maxima=group_maxima)
    head_sums.start()
    entries = list_entries(operands, marked, z_target, walked.logsumexp, group_maxima, eps)
    del group_maxima
    mass, share = kept_sums(entries, walked.logsumexp, sample.shape)
    has_target = marked >= 0
    replaced = torch.where(has_target, 1.0 - mass, 0.0).sum() / has_target.sum().clamp(min=1)
    exact = entries.overflow | (replaced > MOST_REPLACED)
    kept_mass = torch.where(has_target & ~exact, mass, 1.0)
    return [
        walked.losses,
        kept_mass,
        walked.logsumexp,
        exact.int(),
        tail_heights(mass, share),
        sample.tokens,
        sample.stands_for,
        sample.shape,
        sample.corrections,
        head_sums.wait(),
        *entries.tensors(),
    ]


@filtered_losses.register_fake
def _(E: Tensor, C: Tensor, *rest: Any) -> list[Tensor]:
    (N, D), V = E.shape, len(C)
    *_, softcap, _, _, _, eps, need_C = rest
    size, s = capacity(N, V, eps, softcap) + N, min(SAMPLE, N)

    def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return E.new_empty(sizes, dtype=dtype)

    integer = torch.int32
    return [
        empty(N),
        empty(N),
        empty(N),
        empty(dtype=integer),
        empty(N),
        empty(s, dtype=torch.int64),
        empty(),
        empty(V),
        empty(s + EXTRA_ROWS if need_C else 0, V, dtype=E.dtype),
        empty(2, D),
        empty(size, dtype=integer),
        empty(size),
        empty(V + 1, dtype=integer),
        empty(size, dtype=integer),
        empty(size, dtype=integer),
        empty(N + 1, dtype=integer),
        empty(dtype=torch.bool),
    ]


class _Answer:
    """A number on its way from the device: work launched after it goes on while the host waits for it."""

    def __init__(self, number: Tensor) -> None:
        self.host = number
        if number.is_cuda:
            self.host = torch.empty(number.shape, dtype=number.dtype, pin_memory=True)
            self.host.copy_(number, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()

    def wait(self) -> bool:
        if hasattr(self, "copied"):
            self.copied.synchronize()
        return bool(self.host)


@torch.library.custom_op("calsmooth::filtered_gradients", mutates_args=())
@on_its_device
def filtered_gradients(
    E: Tensor,
    C: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    prior: Tensor | None,
    saved: list[Tensor],  # what `filtered_losses` returned after the kept mass
    grads: Tensor,  # (N,) incoming gradients
    ignore_index: int,
    beta: float,
    softcap: float | None,
    scale: float,
    z_loss: float,
    head_dtype: torch.dtype,
    eps: float,
    need_E: bool,
    need_C: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dE, dC, dbias; empty where not needed."""
    semantics = Semantics(beta, softcap, scale, z_loss)
    operands = Operands.make(E, C.to(E.dtype), bias, semantics, storing=True, prior=prior)
    marked = marked_targets(targets, ignore_index, len(C))
    weights = torch.where(marked >= 0, grads.float(), 0.0)
    needed = (need_E, need_C, need_bias)
    logsumexp, exact, heights, tokens, stands_for, shape, corrections, head_sums, *listed = saved
    answer = _Answer(exact)
    entries, sample = Entries(*listed), Sample(tokens, stands_for, shape, corrections)
    made = gather_gradients(
        operands, marked, logsumexp, weights, heights, entries, sample, head_sums, eps, head_dtype, needed
    )
    if answer.wait():
        made = None, None, None  # free them first
        made = gradients(operands, marked, logsumexp, weights, head_dtype, needed, LEAN_BYTES)
    dE, dC, dbias = (E.new_empty(0) if g is None else g for g in made)
    return dE, dC, dbias


@filtered_gradients.register_fake
def _(E: Tensor, C: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    head_dtype, _, need_E, need_C, need_bias = rest[-5:]
    return (
        E.new_empty(E.shape if need_E else 0),
        C.new_empty(C.shape if need_C else 0, dtype=head_dtype if need_C else E.dtype),
        E.new_empty(0) if bias is None or not need_bias else bias.new_empty(bias.shape),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *tensors, ctx.ignore_index, ctx.beta, ctx.softcap, ctx.scale, ctx.z_loss, ctx.head_dtype, ctx.eps, _ = inputs
    _, *rest = output
    ctx.mark_non_differentiable(*rest)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *rest[1:])


@once_differentiable
def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:3]
    if grads[0] is None:
        return (None,) * 13
    tensors, saved = ctx.saved_tensors[:5], list(ctx.saved_tensors[5:])
    made = filtered_gradients(
        *tensors, saved, grads[0], ctx.ignore_index,
        ctx.beta, ctx.softcap, ctx.scale, ctx.z_loss, ctx.head_dtype, ctx.eps, *needed,
    )  # fmt: skip
    made = tuple(g if need else None for g, need in zip(made, needed, strict=True))
    return (*made, *(None,) * 10)


filtered_losses.register_autograd(_backward, setup_context=_setup)
