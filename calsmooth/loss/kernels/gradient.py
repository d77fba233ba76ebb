"""Gradients once every token's log-sum-exp is known: three products, a strip of the vocabulary at a time.

For one strip the logits are made again and turned, tile by tile and before they are written, into

    G_iv = (1 + 2 z_loss lse_i) p_iv - (1 - beta) [v = y_i]                            (without a softcap)
    G_iv = ((1 + 2 z_loss lse_i) p_iv - (1 - beta) [v = y_i] - beta / V) (1 - (z/t)^2)  (with one)

which is used up at once: dC of the strip is G^T (g E), complete and rounded once; dE is summed over the strips in
float32. Without a softcap the -beta / V is rank one and added apart. The incoming gradients g are on E's side, so that
any are possible, and ignored tokens' rows of E are never read by a product.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from calsmooth.loss.kernels.configurations import VARYING
from calsmooth.loss.kernels.products import accumulate, product
from calsmooth.loss.kernels.rows import finish_hidden, row_sum, scale_rows
from calsmooth.loss.kernels.tiles import LOG2E, Operands, padded_matrix, place, product_tile, to_logits

MIN_WIDTH = 4096
"""Strips aren't narrower than this, however many tokens there are: each strip rewrites dE's sum."""


@triton.jit(do_not_specialize=VARYING)
def gradient_kernel(
    e,
    c,
    bias,
    out,  # (N, last - first)
    targets,  # (N,) int32, -1: ignored
    logsumexps,  # (N,)
    first,
    last,
    stride_out,
    N,
    V,
    D,
    stride_e,
    stride_c,
    together,
    parts,
    scale,
    softcap,
    target_weight,  # 1 - beta
    mean_weight,  # beta / V
    z_loss,
    factor,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
):
    row_blocks = tl.cdiv(N, BLOCK_N)
    block, part = place(row_blocks, together, parts)
    row = block * BLOCK_N
    rows = row + tl.arange(0, BLOCK_N)
    lse = tl.load(logsumexps + rows, mask=rows < N, other=0.0)
    y = tl.load(targets + rows, mask=rows < N, other=-1)
    softmax_weight = factor * (1.0 + 2.0 * z_loss * lse)
    steps = tl.where(block < row_blocks, tl.cdiv(tl.cdiv(last - first, BLOCK_V), parts), 0)
    for step in range(steps):
        column = first + (step * parts + part) * BLOCK_V
        columns = column + tl.arange(0, BLOCK_V)
        z = product_tile(e, c, row, column, N, V, D, stride_e, stride_c, BLOCK_N, BLOCK_V, BLOCK_D, DESCRIPTORS)
        z = to_logits(z, bias, columns, V, scale, softcap, HAS_BIAS, SCALED, CAPPED)
        g = tl.exp2(z * LOG2E - (lse * LOG2E)[:, None]) * softmax_weight[:, None]
        g = tl.where(columns[None, :] == y[:, None], g - factor * target_weight, g)
        if CAPPED:
            g = (g - factor * mean_weight) * (1.0 - (z / softcap) * (z / softcap))
        g = tl.where((y >= 0)[:, None], g, 0.0)
        if DESCRIPTORS:
            out.store([row, column - first], g.to(out.dtype))
        else:
            where = out + rows.to(tl.int64)[:, None] * stride_out + (columns - first)[None, :]
            mask = (rows < N)[:, None] & (columns < last)[None, :]
            tl.store(where, g.to(out.dtype.element_ty), mask=mask)


def gradients(
    operands: Operands,
    targets: Tensor,  # (N,) int32, -1: ignored
    logsumexp: Tensor,  # (N,)
    weights: Tensor,  # (N,) float32 gradient of the result by each token's loss, 0 where ignored
    head_dtype: torch.dtype,
    needed: tuple[bool, bool, bool],  # E, C, bias
    buffer_bytes: int,
    hidden_dtype: torch.dtype | None = None,  # of dE; E's if None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    E, C, bias, k = operands.E, operands.C, operands.bias, operands.semantics
    (N, D), V, device = E.shape, len(C), E.device
    need_E, need_C, need_bias = needed
    rank_one = k.beta > 0 and k.softcap is None
    weights = weights * k.scale

    # float16 has the digits but not the range: a power of two lifts the softmax's tail, another the incoming
    # gradients, and both leave with the float32 result.
    narrow = E.dtype == torch.float16
    factor = 16.0 if narrow else 1.0
    lift = weights.abs().amax().clamp(min=1e-30) if narrow else torch.ones((), device=device)
    mean_row = row_sum(E, weights * -k.mean_weight(V)) if need_C and rank_one else None
    # The smoothing term's row goes along as one more token, whose G is 1 everywhere.
    extra = 8 if mean_row is not None and not narrow else 0
    e = None
    if need_C:
        e = torch.empty(N + extra, D, dtype=E.dtype, device=device)
        scale_rows(E, weights / lift, out=e)
        if mean_row is not None and extra:
            e[N:] = 0.0
            e[N] = mean_row

    dE_sum = torch.zeros(N, D, device=device) if need_E else None
    dC = torch.empty(V, D, dtype=head_dtype, device=device) if need_C else None
    dbias = torch.empty(V, device=device) if need_bias else None
    two_weights = None
    if dbias is not None:
        # One column in low precision would round every token's weight alike; the second holds what the first lost.
        high = weights.to(E.dtype)
        two_weights = torch.stack([high, (weights - high.float()).to(E.dtype)], 1)

    block = operands.configuration.block_v
    width = max(buffer_bytes // ((N + extra) * E.element_size()), min(MIN_WIDTH, V)) // block * block
    width = min(max(width, block), V)
    buffer = padded_matrix(N + extra, width, E.dtype, device)
    buffer[N:] = 1.0
    schedule = operands.schedule(width)
    for first in range(0, V, width):
        last = min(first + width, V)
        G, longer, c = buffer[:N, : last - first], buffer[:, : last - first], C[first:last]
        gradient_kernel[(schedule.programs,)](
            out=operands.described(G),
            targets=targets,
            logsumexps=logsumexp,
            first=first,
            last=last,
            stride_out=G.stride(0),
            together=schedule.together,
            parts=schedule.parts,
            target_weight=1.0 - k.beta,
            mean_weight=k.mean_weight(V),
            z_loss=k.z_loss,
            factor=factor,
            **operands.arguments(),
        )
        if dE_sum is not None:
            accumulate(dE_sum, G, c)
        if dC is not None and e is not None:
            strip = dC[first:last]
            if narrow:
                total = product(G.T, e) * (lift / factor)
                strip.copy_(total if mean_row is None else total + mean_row)
            elif strip.dtype == e.dtype:
                torch.mm(longer.T, e, out=strip)
            else:
                strip.copy_(product(longer.T, e))
        if dbias is not None and two_weights is not None:
            dbias[first:last] = product(G.T, two_weights).sum(1) / factor

    del buffer, e
    dE = None
    if dE_sum is not None:
        dE = torch.empty(N, D, dtype=hidden_dtype or E.dtype, device=device)
        head_sum = row_sum(C) if rank_one else None
        finish_hidden(
            dE,
            dE_sum,
            C,
            targets,
            row_scales=weights / factor,
            mean_scales=weights * k.mean_weight(V),
            head_sum=head_sum,
        )
    if dbias is not None and bias is not None:
        if rank_one:
            dbias -= weights.sum() * k.mean_weight(V)
        dbias = dbias.to(bias.dtype)
    return dE, dC, dbias
