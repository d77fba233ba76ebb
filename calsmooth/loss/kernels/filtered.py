"""`mode="filtered"`: softmax entries below `filter_eps` are replaced by their mean; the smoothing term is not touched.

One product in all instead of three. Of a real model's softmax about one entry in two thousand reaches 2^-12, so

 1. the forward walk (exact, as everywhere) also writes each token's maximum logit over every group of 64 entries;
 2. with the log-sum-exp known, the (group, token) pairs that can hold an entry to keep are listed, about 3 % of them;
 3. only those are multiplied again, tokens gathered by group, and the entries to keep are appended to one list, each
    with its column, token and probability; the targets' entries are always kept;
 4. the list is sorted by column, and by token: every later sum has a fixed order, so results are the same bits from
    run to run although the list was filled in any order;
 5. in the backward dE is a gather over each token's entries, dC one over each column's, written once together with
    the smoothing term's rank-one row:

        dE_i = sum_kept c_iv C_v - u_i csum,     dC_v = sum_kept c_iv E_i - sum_i u_i E_i

        u_i  = g_i beta / V - w_i d_i,           d_i = (1 - kept mass) / (V - kept entries)
        c_iv = w_i p_iv - g_i (1 - beta) [v = y_i] - g_i beta / V + u_i                  (without a softcap)
        c_iv = (w_i p_iv - g_i (1 - beta) [v = y_i] - g_i beta / V) (1 - (z/t)^2) + u_i    (with one)

d_i is the mean of the entries that are left out. Were they simply taken as 0, nothing would answer smoothing's steady
beta / V: over a training run each of them would rise until it reached eps. So the gradient sums to 0 over the
vocabulary as it must, and the entries that are left out together hold the mass that they should.

With a softcap the slope 1 - (z/t)^2 is taken as 1 for the entries that are left out: each is off by at most
g_i beta / V (z/t)^2 and as much of d_i.

Nothing else is dropped silently: the probability mass that each token's kept entries hold is returned, and a list that
overflows makes the backward exact (`gradient`) instead. Whether it did is known only on the device: the backward waits
for that one number, with its own work already launched, so that the device doesn't idle. No other mode waits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from calsmooth.loss.kernels.configurations import VARYING, cdiv
from calsmooth.loss.kernels.gradient import gradients
from calsmooth.loss.kernels.lean import LEAN_BYTES
from calsmooth.loss.kernels.listing import NO_ENTRY, capacity, group_size, list_entries, segment_sum
from calsmooth.loss.kernels.rows import SumBeside, feature_block, row_sum, target_logits
from calsmooth.loss.kernels.tiles import Operands, Semantics, padded_matrix
from calsmooth.loss.kernels.walk import walk


@triton.jit(do_not_specialize=VARYING)
def coefficients_kernel(
    keys,
    probabilities,
    targets,
    logsumexps,
    weights,  # (N,) scale g
    rank_one,  # (N,) u, times scale
    tokens,  # written: int32
    coefficients,  # written: what the entry adds to the gradients, beside the rank-one term
    size,
    beta,
    mean_weight,
    z_loss,
    softcap,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys + places, mask=places < size, other=NO_ENTRY)
    entry = key != NO_ENTRY
    token = (key & 0xFFFFFFFF).to(tl.int32)
    column = (key >> 32).to(tl.int32)
    p = tl.load(probabilities + places, mask=entry, other=1.0)
    y = tl.load(targets + token, mask=entry, other=-1)
    lse = tl.load(logsumexps + token, mask=entry, other=0.0)
    g = tl.load(weights + token, mask=entry, other=0.0)
    u = tl.load(rank_one + token, mask=entry, other=0.0)
    x = g * (p * (1.0 + 2.0 * z_loss * lse) - tl.where(column == y, 1.0 - beta, 0.0) - mean_weight)
    if CAPPED:
        z = (tl.log(p) + lse) / softcap
        x *= 1.0 - z * z
    x += u
    tl.store(tokens + places, token, mask=entry)
    tl.store(coefficients + places, x, mask=entry)


@triton.jit(do_not_specialize=VARYING)
def gather_rows_kernel(
    X,
    starts,  # (R + 1,)
    indices,
    coefficients,
    base,  # (D,)
    base_scales,  # (R,) or one for all
    out,  # (R, D)
    R,
    D,
    stride_x,
    stride_scale,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out_r = sum_j coefficient_j X[index_j] over r's entries, minus base_scale_r base."""
    features = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = features < D
    base_row = tl.load(base + features, mask=inside, other=0.0)
    for i in range(ROWS):
        r = tl.program_id(0) * ROWS + i
        if r < R:
            start = tl.load(starts + r)
            stop = tl.load(starts + r + 1)
            total = tl.zeros((BLOCK_D,), tl.float32)
            for first in range(start, stop, BLOCK_K):
                places = first + tl.arange(0, BLOCK_K)
                mine = places < stop
                index = tl.load(indices + places, mask=mine, other=0).to(tl.int64)
                coefficient = tl.load(coefficients + places, mask=mine, other=0.0)
                rows = X + index[:, None] * stride_x + features[None, :]
                x = tl.load(rows, mask=mine[:, None] & inside[None, :], other=0.0).to(tl.float32)
                total += tl.sum(x * coefficient[:, None], 0)
            total -= tl.load(base_scales + r * stride_scale) * base_row
            row = out + tl.cast(r, tl.int64) * D
            tl.store(row + features, total.to(out.dtype.element_ty), mask=inside)


def gather_rows(
    X: Tensor,
    starts: Tensor,
    indices: Tensor,
    coefficients: Tensor,
    base: Tensor,  # (D,)
    base_scales: Tensor,  # (R,), or one for all
    dtype: torch.dtype,
) -> Tensor:
    R, D = len(starts) - 1, X.shape[1]
    out = torch.empty(R, D, dtype=dtype, device=X.device)
    # One warp a program: the sum over entries stays within each thread.
    block, rows = feature_block(D, 256), 4 if R > 2**16 else 1
    gather_rows_kernel[(cdiv(R, rows), cdiv(D, block))](
        X,
        starts,
        indices,
        coefficients,
        base,
        base_scales,
        out,
        R,
        D,
        X.stride(0),
        1 if base_scales.dim() else 0,
        ROWS=rows,
        BLOCK_K=16,
        BLOCK_D=block,
        num_warps=1,
    )
    return out


def gather_gradients(
    operands: Operands,
    targets: Tensor,
    kept_mass: Tensor,  # (N,)
    logsumexp: Tensor,
    weights: Tensor,  # (N,) float32, 0 where ignored
    entries: tuple[Tensor, ...],  # as from list_entries, without kept mass and overflow
    head_sum: Tensor,  # (D,) sum of C's rows
    head_dtype: torch.dtype,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    E, C, bias, k = operands.E, operands.C, operands.bias, operands.semantics
    V, device = len(C), E.device
    need_E, need_C, need_bias = needed
    keys, probabilities, column_starts, token_columns, token_places, token_starts = entries
    weights = weights * k.scale
    left_out = (V - token_starts.diff()).clamp(min=1)
    mean_left_out = (1.0 - kept_mass).clamp(min=0.0) / left_out
    rank_one = weights * (k.mean_weight(V) - (1.0 + 2.0 * k.z_loss * logsumexp) * mean_left_out)
    rank_one = torch.where(targets >= 0, rank_one, 0.0)  # an ignored token's log-sum-exp may be NaN
    tokens = torch.empty(len(keys), dtype=torch.int32, device=device)
    coefficients = torch.empty(len(keys), device=device)
    coefficients_kernel[(cdiv(len(keys), 1024),)](
        keys,
        probabilities,
        targets,
        logsumexp,
        weights,
        rank_one,
        tokens,
        coefficients,
        len(keys),
        k.beta,
        k.mean_weight(V),
        k.z_loss,
        k.softcap or 1.0,
        CAPPED=k.softcap is not None,
        BLOCK=1024,
    )
    dE = dC = dbias = None
    if need_E:
        by_token = coefficients[token_places]
        dE = gather_rows(C, token_starts, token_columns, by_token, head_sum, rank_one, E.dtype)
    if need_C:
        one = torch.ones((), device=device)
        dC = gather_rows(E, column_starts, tokens, coefficients, row_sum(E, rank_one), one, head_dtype)
    if need_bias and bias is not None:
        dbias = (segment_sum(column_starts, coefficients) - rank_one.sum()).to(bias.dtype)
    return dE, dC, dbias


@torch.library.custom_op("calsmooth::filtered_losses", mutates_args=())
def filtered_losses(
    E: Tensor,  # (N, D)
    C: Tensor,  # (V, D); cast to E's dtype
    bias: Tensor | None,
    targets: Tensor,  # (N,) int32, -1: ignored
    beta: float,
    softcap: float | None,
    scale: float,
    z_loss: float,
    head_dtype: torch.dtype,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(N,) losses, (N,) kept mass, (N,) log-sum-exps, the six lists of `list_entries`, overflow, (D,) sum of C."""
    operands = Operands.make(E, C.to(E.dtype), bias, Semantics(beta, softcap, scale, z_loss), storing=False)
    groups = cdiv(len(C), group_size(operands.configuration))
    group_maxima = padded_matrix(groups, len(E), torch.bfloat16, E.device)
    z_target = target_logits(operands, targets)
    head_sum = SumBeside(operands.C)
    walked = walk(operands, targets, z_target, group_maxima=group_maxima)
    head_sum.start()
    *entries, kept_mass, overflow = list_entries(operands, targets, z_target, walked.logsumexp, group_maxima, eps)
    return walked.losses, kept_mass, walked.logsumexp, *entries, overflow, head_sum.wait()  # type: ignore[return-value]


@filtered_losses.register_fake
def _(E: Tensor, C: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    N, V = len(E), len(C)
    _, _, _, softcap, *_, eps = rest
    size = capacity(N, V, eps, softcap) + N

    def integers(n: int) -> Tensor:
        return E.new_empty(n, dtype=torch.int32)

    def floats(n: int) -> Tensor:
        return E.new_empty(n, dtype=torch.float32)

    return (
        *(floats(N) for _ in range(3)),
        E.new_empty(size, dtype=torch.int64),
        floats(size),
        integers(V + 1),
        integers(size),
        integers(size),
        integers(N + 1),
        E.new_empty((), dtype=torch.int32),
        floats(E.shape[1]),
    )


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
def filtered_gradients(
    E: Tensor,
    C: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    kept_mass: Tensor,
    logsumexp: Tensor,
    keys: Tensor,
    probabilities: Tensor,
    column_starts: Tensor,
    token_columns: Tensor,
    token_places: Tensor,
    token_starts: Tensor,
    overflow: Tensor,
    head_sum: Tensor,
    weights: Tensor,  # (N,) incoming gradients
    beta: float,
    softcap: float | None,
    scale: float,
    z_loss: float,
    head_dtype: torch.dtype,
    need_E: bool,
    need_C: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dE, dC, dbias; empty where not needed."""
    operands = Operands.make(E, C.to(E.dtype), bias, Semantics(beta, softcap, scale, z_loss), storing=True)
    weights = torch.where(targets >= 0, weights.float(), 0.0)
    needed = (need_E, need_C, need_bias)
    overflowed = _Answer(overflow)
    entries = (keys, probabilities, column_starts, token_columns, token_places, token_starts)
    made = gather_gradients(operands, targets, kept_mass, logsumexp, weights, entries, head_sum, head_dtype, needed)
    if overflowed.wait():
        made = None, None, None  # free them first
        made = gradients(operands, targets, logsumexp, weights, head_dtype, needed, LEAN_BYTES)
    dE, dC, dbias = (E.new_empty(0) if g is None else g for g in made)
    return dE, dC, dbias


@filtered_gradients.register_fake
def _(E: Tensor, C: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    head_dtype, need_E, need_C, need_bias = rest[-4:]
    return (
        E.new_empty(E.shape if need_E else 0),
        C.new_empty(C.shape if need_C else 0, dtype=head_dtype if need_C else E.dtype),
        E.new_empty(0) if bias is None or not need_bias else bias.new_empty(bias.shape),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    E, C, bias, targets, *options = inputs
    _, *rest = output
    ctx.options = options[:-1]
    ctx.mark_non_differentiable(*rest)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(E, C, bias, targets, *rest)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:3]
    if grad is None:
        return (None,) * 10
    made = filtered_gradients(*ctx.saved_tensors, grad, *ctx.options, *needed)
    return (*(g if need else None for g, need in zip(made, needed, strict=True)), *(None,) * 7)


filtered_losses.register_autograd(_backward, setup_context=_setup)
