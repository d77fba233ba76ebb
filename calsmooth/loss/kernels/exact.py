"""`mode="exact"`: every entry's gradient from three products, made while the forward has the logits.

For a chunk of tokens, with a reference r_i near the top of each row (the target's own logit),

    P_iv = exp(z_iv - r_i), 0 at the target      written in bfloat16 by the kernel that makes the logits
    l_i  = exp(z_iy - r_i) + sum_v P_iv          float32, so lse_i = r_i + log l_i

    dE_i  = w_i / l_i (P C)_i + (w_i p_iy - g_i (1 - beta)) C_y - g_i beta sum_v s_v C_v
    dC   += P^T (w / l E), at the end + the targets' rows and the rank-one term

with s the smoothing prior (1 / V each without one), g the incoming gradients and w_i = g_i (1 + 2 z_loss lse_i). The
row scales move from the N x V matrix to the N x D ones, so that no pass over N x V is left but the products, and the
target's coefficient, the largest, is never rounded.

Where a target lies so far below its row's top that the sums leave a safe range, the chunk's blocks of tokens that hold
such a row are made again with the row's maximum as reference. That is decided on the device: two launches that mostly
find nothing to do.

Without a softcap only: with one, the smoothing term isn't rank one and needs l_i before it is written (`capped`). And
for problems that are larger than one buffer: smaller ones take less asking of the host (`whole`).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from calsmooth.loss.derivatives import once_differentiable
from calsmooth.loss.kernels import capped, whole
from calsmooth.loss.kernels.configurations import VARYING
from calsmooth.loss.kernels.gradient import EXTRA_ROWS, smoothing_rows
from calsmooth.loss.kernels.lean import WIDE_BYTES, token_gradients
from calsmooth.loss.kernels.products import accumulate, product, product_plus_row, write_product
from calsmooth.loss.kernels.rows import SumBeside, finish_hidden, row_sum, scale_in_place, scale_rows
from calsmooth.loss.kernels.targets import add_target_rows, loss_or_not, marked_targets, target_logits
from calsmooth.loss.kernels.tiles import (
    LOG2E,
    Operands,
    Semantics,
    chunk_rows,
    on_its_device,
    padded_matrix,
    place,
    prior_weighted,
    product_tile,
    to_logits,
)
from calsmooth.loss.kernels.walk import maxima_and_sums

SAFE_SUM = tl.constexpr(5e21)
"""exp(50). Its inverse times a weight and an E stays a normal bfloat16, as does a row's largest entry."""


@triton.jit(do_not_specialize=VARYING)
def exponential_kernel(
    e,
    c,
    bias,
    out,  # (N, V)
    targets,  # (N,) int32, -1: ignored
    references,  # (N,)
    redo,  # (row blocks,) int32 (REDO)
    maxima,  # (max_parts, N) (REDO)
    prior,  # (V,) (PRIOR)
    sums,  # (parts, N)
    logit_sums,  # (parts, N) (LOGIT_SUM)
    stride_out,
    max_parts,
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
    LOGIT_SUM: tl.constexpr,
    PRIOR: tl.constexpr,
    REDO: tl.constexpr,
):
    row_blocks = tl.cdiv(N, BLOCK_N)
    block, part = place(row_blocks, together, parts)
    row = block * BLOCK_N
    rows = row + tl.arange(0, BLOCK_N)
    inside = rows < N
    y = tl.load(targets + rows, mask=inside, other=-1)
    steps = tl.where(block < row_blocks, tl.cdiv(tl.cdiv(V, BLOCK_V), parts), 0)
    if REDO:
        wanted = tl.load(redo + block, mask=block < row_blocks, other=0)
        steps = steps * wanted
        inside = rows < N * wanted
        reference = tl.full((BLOCK_N,), float("-inf"), tl.float32)
        for other in range(max_parts):
            mine = tl.cast(other, tl.int64) * N + rows
            reference = tl.maximum(reference, tl.load(maxima + mine, mask=inside, other=0.0))
        tl.store(references + rows, reference, mask=rows < N * wanted * (part == 0))
    else:
        reference = tl.load(references + rows, mask=inside, other=0.0)
    reference = reference * LOG2E
    limit = tl.where(y >= 0, V, 0)

    s = tl.zeros((BLOCK_N,), tl.float32)
    z_sum = tl.zeros((BLOCK_N,), tl.float32)
    for step in range(steps):
        column = (step * parts + part) * BLOCK_V
        columns = column + tl.arange(0, BLOCK_V)
        z = product_tile(e, c, row, column, N, V, D, stride_e, stride_c, BLOCK_N, BLOCK_V, BLOCK_D, DESCRIPTORS)
        z = to_logits(z, bias, columns, V, scale, softcap, HAS_BIAS, SCALED, CAPPED)
        if LOGIT_SUM:
            z_sum += tl.sum(prior_weighted(z, prior, columns, V, PRIOR), 1)
        p = tl.exp2(z * LOG2E - reference[:, None])
        p = tl.where((columns[None, :] == y[:, None]) | (columns[None, :] >= limit[:, None]), 0.0, p)
        s += tl.sum(p, 1)
        if DESCRIPTORS:
            out.store([row, column], p.to(out.dtype))
        else:
            where = out + rows.to(tl.int64)[:, None] * stride_out + columns[None, :]
            tl.store(where, p.to(out.dtype.element_ty), mask=(rows < N)[:, None] & (columns < V)[None, :])
    mine = part.to(tl.int64) * N + rows
    tl.store(sums + mine, s, mask=inside)
    if LOGIT_SUM:
        tl.store(logit_sums + mine, z_sum, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def settle_kernel(
    references,
    target_logits,
    targets,
    weights,  # (N,) incoming gradients, 0 where ignored
    sums,  # (parts, N)
    logit_sums,  # (parts, N)
    redo,  # (row blocks,) int32 (CHECK)
    losses,
    logsumexps,
    row_scales,  # scale w / l
    target_scales,  # scale (w p_y - g (1 - beta))
    N,
    parts,
    beta,
    mean_weight,
    z_loss,
    scale,
    CHECK: tl.constexpr,
    LOGIT_SUM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Joins the parts. CHECK: only marks the blocks whose sums left the safe range."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    z_target = tl.load(target_logits + rows, mask=inside, other=0.0)
    reference = tl.load(references + rows, mask=inside, other=0.0)
    p_target = tl.exp(z_target - reference)
    total = p_target
    z_sum = tl.zeros((BLOCK_N,), tl.float32)
    for part in range(parts):
        mine = tl.cast(part, tl.int64) * N + rows
        total += tl.load(sums + mine, mask=inside, other=0.0)
        if LOGIT_SUM:
            z_sum += tl.load(logit_sums + mine, mask=inside, other=0.0)
    y = tl.load(targets + rows, mask=inside, other=-1)
    kept = y >= 0
    if CHECK:
        unsafe = kept & ((total < SAFE_SUM) == 0)  # a NaN is unsafe too
        tl.store(redo + tl.program_id(0), tl.max(unsafe.to(tl.int32), 0))
    else:
        lse = reference + tl.log(total)
        loss = lse - (1.0 - beta) * z_target + z_loss * lse * lse
        if LOGIT_SUM:
            loss -= mean_weight * z_sum
        g = tl.load(weights + rows, mask=inside, other=0.0)
        w = g * (1.0 + 2.0 * z_loss * lse)
        tl.store(losses + rows, loss_or_not(loss, y), mask=inside)
        tl.store(logsumexps + rows, lse, mask=inside)
        tl.store(row_scales + rows, tl.where(kept, scale * w / total, 0.0), mask=inside)
        target_scale = scale * (w * p_target / total - g * (1.0 - beta))
        tl.store(target_scales + rows, tl.where(kept, target_scale, 0.0), mask=inside)


def losses_and_gradients(
    operands: Operands,
    targets: Tensor,  # (N,) int32, -1: ignored
    weights: Tensor,  # (N,) float32, 0 where ignored
    head_dtype: torch.dtype,
    need_E: bool,
    need_C: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(N,) losses, (N,) log-sum-exps, dE and dC where needed."""
    E, C, k, configuration = operands.E, operands.C, operands.semantics, operands.configuration
    (N, D), V, device = E.shape, len(C), E.device
    smooth = k.beta > 0
    sum_logits = smooth and not operands.prior_is_rank_one
    losses, lse, row_scales, target_scales = (torch.empty(N, dtype=torch.float32, device=device) for _ in range(4))
    z_target = target_logits(operands, targets)
    references = z_target.clone()
    mean_scales = weights * (k.scale * operands.mean_weight) if smooth else None
    head_sum = SumBeside(C, operands.prior) if smooth and (need_E or not sum_logits) else None
    mean_row = row_sum(E, -mean_scales) if mean_scales is not None and need_C else None
    # With a prior the rank-one term goes along with the first chunk's product as a few more tokens.
    extra = EXTRA_ROWS if mean_row is not None and operands.prior is not None else 0
    dE = torch.empty_like(E, memory_format=torch.contiguous_format) if need_E else None
    dC = torch.empty(V, D, dtype=head_dtype, device=device) if need_C else None

    rows = chunk_rows(N, V * E.element_size(), configuration.block_n)
    buffer = padded_matrix(min(rows, N) + extra, V, E.dtype, device)
    for start in range(0, N, rows):
        chunk = slice(start, min(start + rows, N))
        o, y = operands.rows(chunk.start, chunk.stop), targets[chunk]
        P = buffer[: len(y)]
        schedule = o.schedule(V)
        parts = schedule.parts
        redo = torch.empty(o.row_blocks, dtype=torch.int32, device=device)
        places: dict[str, Any] = {
            "targets": y,
            "references": references[chunk],
            "sums": torch.empty(parts, len(y), dtype=torch.float32, device=device),
            "logit_sums": torch.empty(parts, len(y), dtype=torch.float32, device=device),
            "redo": redo,
            "parts": parts,
            "LOGIT_SUM": sum_logits,
        }
        walking = dict(
            out=o.described(P), together=schedule.together, stride_out=P.stride(0), **places, **o.arguments()
        )
        settling = dict(
            target_logits=z_target[chunk],
            weights=weights[chunk],
            losses=losses[chunk],
            logsumexps=lse[chunk],
            row_scales=row_scales[chunk],
            target_scales=target_scales[chunk],
            N=len(y),
            beta=k.beta,
            mean_weight=operands.mean_weight,
            z_loss=k.z_loss,
            scale=k.scale,
            BLOCK_N=configuration.block_n,
            **places,
        )
        exponential_kernel[(schedule.programs,)](maxima=references, max_parts=0, REDO=False, **walking)
        if head_sum is not None and start == 0:
            head_sum.start()
        settle_kernel[(o.row_blocks,)](CHECK=True, **settling)
        maxima, *_ = maxima_and_sums(o, only=redo)
        exponential_kernel[(schedule.programs,)](maxima=maxima, max_parts=len(maxima), REDO=True, **walking)
        settle_kernel[(o.row_blocks,)](CHECK=False, **settling)

        if dE is not None:
            finish_hidden(
                dE[chunk],
                product(P, C),
                C,
                y,
                row_scales=row_scales[chunk],
                target_scales=target_scales[chunk],
                mean_scales=None if mean_scales is None else mean_scales[chunk],
                head_sum=None if head_sum is None else head_sum.wait(),
            )
        if dC is not None and extra and start == 0:
            assert mean_row is not None
            e = torch.zeros(len(y) + extra, D, dtype=E.dtype, device=device)
            scale_rows(o.E, row_scales[chunk], out=e)
            e[len(y) : len(y) + 2] = mean_row
            longer = buffer[: len(e)]
            longer[len(y) :] = smoothing_rows(operands)
            write_product(dC, longer.T, e)
        elif dC is not None:
            e = scale_rows(o.E, row_scales[chunk])
            if start > 0:
                accumulate(dC, P.T, e)
            elif mean_row is not None:
                product_plus_row(dC, mean_row, P.T, e)
            else:
                write_product(dC, P.T, e)
    if dC is not None:
        add_target_rows(dC, E, targets, target_scales)
    if head_sum is not None and operands.prior_is_rank_one:
        losses = operands.less_mean_logits(losses, targets, head_sum.wait())
    return losses, lse, dE, dC


@torch.library.custom_op("calsmooth::loss_and_gradients", mutates_args=())
@on_its_device
def loss_and_gradients(
    E: Tensor,  # (N, D)
    C: Tensor,  # (V, D); cast to E's dtype
    bias: Tensor | None,  # (V,), without a gradient
    targets: Tensor,  # (N,)
    weights: Tensor,  # (N,) float32: each token's share of the result, 0 where ignored
    prior: Tensor | None,  # (V,) float32, where the smoothed mass isn't spread evenly
    ignore_index: int,
    beta: float,
    softcap: float | None,
    scale: float,
    z_loss: float,
    head_dtype: torch.dtype,
    need_E: bool,
    need_C: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, (N,) log-sum-exps, dE and dC (empty where not needed) for an incoming gradient of 1."""
    semantics = Semantics(beta, softcap, scale, z_loss)
    operands = Operands.make(E, C.to(E.dtype), bias, semantics, storing=True, prior=prior)
    marked = marked_targets(targets, ignore_index, len(C))
    weights = torch.where(marked >= 0, weights, 0.0)
    if whole.fits(len(E), len(C)):
        make = whole.losses_and_gradients
    else:
        make = losses_and_gradients if softcap is None else capped.losses_and_gradients
    losses, lse, dE, dC = make(operands, marked, weights, head_dtype, need_E, need_C)
    nothing = E.new_empty(0)
    return (losses * weights).sum(), lse, nothing if dE is None else dE, E.new_empty(0) if dC is None else dC


@loss_and_gradients.register_fake
def _(E: Tensor, C: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    head_dtype, need_E, need_C = rest[-3:]
    return (
        E.new_empty((), dtype=torch.float32),
        E.new_empty(len(E), dtype=torch.float32),
        E.new_empty(E.shape if need_E else 0),
        C.new_empty(C.shape if need_C else 0, dtype=head_dtype if need_C else E.dtype),
    )


@torch.library.custom_op("calsmooth::scale_", mutates_args=("X", "Y"))
@on_its_device
def scale_(X: Tensor, Y: Tensor, factor: Tensor) -> None:
    scale_in_place(X, Y, factor)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.ignore_index, ctx.beta, ctx.softcap, ctx.scale, ctx.z_loss, ctx.head_dtype, _, _ = inputs
    _, logsumexp, dE, dC = output
    ctx.mark_non_differentiable(logsumexp, dE, dC)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, logsumexp)
    # Not saved as tensors: they leave with the first backward, scaled in place, and take no memory after it.
    ctx.gradients = (dE, dC)


@once_differentiable
def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    need_E, need_C = ctx.needs_input_grad[:2]
    if grad is None:
        return (None,) * 14
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is None:
        # The graph was kept and the gradients went out with the first backward: make them again.
        E, C, bias, targets, weights, prior, logsumexp = ctx.saved_tensors
        dE, dC, _ = token_gradients(
            E, C, bias, targets, prior, None, None, logsumexp, weights * grad, None, ctx.ignore_index,
            ctx.beta, ctx.softcap, ctx.scale, ctx.z_loss, ctx.head_dtype, WIDE_BYTES, need_E, need_C, False,
        )  # fmt: skip
    else:
        dE, dC = gradients
        scale_(dE, dC, grad)
    return (dE if need_E else None, dC if need_C else None, *(None,) * 12)


loss_and_gradients.register_autograd(_backward, setup_context=_setup)
