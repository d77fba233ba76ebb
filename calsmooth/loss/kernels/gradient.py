"""Gradients once every token's log-sum-exp is known: three products, a strip of the vocabulary at a time.

For one strip the logits are made again and turned, tile by tile and before they are written, into

    G_iv = a_i p_iv - b_i [v = y_i]                              (without a softcap)
    G_iv = (a_i p_iv - b_i [v = y_i] - c_i beta s_v) (1 - (z/t)^2)    (with one)

which is used up at once: dC of the strip is G^T (r E), complete and rounded once; dE is summed over the strips in
float32. s is the smoothing prior, 1 / V each without one. Without a softcap its term is rank one and added apart.

Mostly a = 1 + 2 z_loss lse, b = 1 - beta, c = 1, and the incoming gradients g are on E's side, r = g: so any are
possible, and ignored tokens' rows of E are never read by a product. `Terms` holds a, b and c where they differ from
token to token, with g in them and r = 1: for class weights, several targets a token, and gradients of the
log-sum-exp. Several targets a token aren't entries of G: their few rows are added to the sums.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from calsmooth.loss.kernels.configurations import VARYING
from calsmooth.loss.kernels.products import accumulate, product
from calsmooth.loss.kernels.rows import finish_hidden, row_sum, scale_rows
from calsmooth.loss.kernels.targets import add_head_rows, add_target_rows, target_logits
from calsmooth.loss.kernels.tiles import LOG2E, Operands, padded_matrix, place, prior_weighted, product_tile, to_logits

MIN_WIDTH = 4096
"""Strips aren't narrower than this, however many tokens there are: each strip rewrites dE's sum."""


EXTRA_ROWS = 8
"""Tokens that a product gets beside the real ones, for what is rank one; a multiple that suits the matrix units."""


@dataclass(frozen=True)
class Terms:
    """What a token's gradient by its logits is made of, the incoming gradients included. (N,) float32 each."""

    softmax: Tensor
    target: Tensor | None  # None: 0, there are `targets` instead
    smoothing: Tensor
    targets: Tensor | None = None  # (N, K) int32, below 0 for none
    target_weights: Tensor | None = None  # (N, K)


@triton.jit(do_not_specialize=VARYING)
def gradient_kernel(
    e,
    c,
    bias,
    out,  # (N, last - first)
    targets,  # (N,) int32, -1: ignored
    logsumexps,  # (N,)
    softmax_terms,  # (N,), times factor, as the two below (TERMS)
    target_terms,
    smoothing_terms,
    prior,  # (V,) (PRIOR)
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
    mean_weight,  # beta / V; beta (PRIOR)
    z_loss,
    factor,
    TERMS: tl.constexpr,
    PRIOR: tl.constexpr,
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
    if TERMS:
        softmax_weight = tl.load(softmax_terms + rows, mask=rows < N, other=0.0)
        row_target_weight = tl.load(target_terms + rows, mask=rows < N, other=0.0)
        row_mean_weight = mean_weight * tl.load(smoothing_terms + rows, mask=rows < N, other=0.0)
    else:
        softmax_weight = factor * (1.0 + 2.0 * z_loss * lse)
        row_target_weight = tl.zeros((BLOCK_N,), tl.float32) + factor * target_weight
        row_mean_weight = tl.zeros((BLOCK_N,), tl.float32) + factor * mean_weight
    steps = tl.where(block < row_blocks, tl.cdiv(tl.cdiv(last - first, BLOCK_V), parts), 0)
    for step in range(steps):
        column = first + (step * parts + part) * BLOCK_V
        columns = column + tl.arange(0, BLOCK_V)
        z = product_tile(e, c, row, column, N, V, D, stride_e, stride_c, BLOCK_N, BLOCK_V, BLOCK_D, DESCRIPTORS)
        z = to_logits(z, bias, columns, V, scale, softcap, HAS_BIAS, SCALED, CAPPED)
        g = tl.exp2(z * LOG2E - (lse * LOG2E)[:, None]) * softmax_weight[:, None]
        g = tl.where(columns[None, :] == y[:, None], g - row_target_weight[:, None], g)
        if CAPPED:
            share = prior_weighted(row_mean_weight[:, None], prior, columns, V, PRIOR)
            g = (g - share) * (1.0 - (z / softcap) * (z / softcap))
        g = tl.where((y >= 0)[:, None], g, 0.0)
        if DESCRIPTORS:
            out.store([row, column - first], g.to(out.dtype))
        else:
            where = out + rows.to(tl.int64)[:, None] * stride_out + (columns - first)[None, :]
            mask = (rows < N)[:, None] & (columns < last)[None, :]
            tl.store(where, g.to(out.dtype.element_ty), mask=mask)


def gradients(
    operands: Operands,
    targets: Tensor,  # (N,) int32, below 0: none
    logsumexp: Tensor,  # (N,)
    weights: Tensor,  # (N,) float32 gradient of the result by each token's loss, 0 where there is none; 1 with terms
    head_dtype: torch.dtype,
    needed: tuple[bool, bool, bool],  # E, C, bias
    buffer_bytes: int,
    hidden_dtype: torch.dtype | None = None,  # of dE; E's if None
    terms: Terms | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    E, C, bias, k = operands.E, operands.C, operands.bias, operands.semantics
    (N, D), V, device = E.shape, len(C), E.device
    need_E, need_C, need_bias = needed
    rank_one = k.beta > 0 and k.softcap is None
    weights = weights * k.scale
    mean_scales = weights * operands.mean_weight
    if terms is not None:
        mean_scales = mean_scales * terms.smoothing

    # float16 has the digits but not the range: a power of two lifts the softmax's tail, another the incoming
    # gradients, and both leave with the float32 result.
    narrow = E.dtype == torch.float16
    factor = 16.0 if narrow else 1.0
    one = torch.ones((), dtype=torch.float32, device=device)
    lift_rows = lift_terms = one  # of E's rows, of G
    if narrow and terms is None:
        lift_rows = weights.abs().amax().clamp(min=1e-30)
    elif narrow and terms is not None:
        lift_terms = torch.stack([t.abs().amax() for t in (terms.softmax, terms.smoothing)]).amax().clamp(min=1e-30)
    softmax_terms = target_terms = smoothing_terms = weights
    if terms is not None:
        softmax_terms, smoothing_terms = terms.softmax * (factor / lift_terms), terms.smoothing * (factor / lift_terms)
        target_terms = torch.zeros_like(weights) if terms.target is None else terms.target * (factor / lift_terms)

    mean_row = row_sum(E, -mean_scales) if need_C and rank_one else None
    # The smoothing term's row goes along as one more token, whose G is 1 everywhere, or the prior; in two parts, since
    # one would round it.
    extra = EXTRA_ROWS if mean_row is not None and not narrow else 0
    e = None
    if need_C:
        e = torch.empty(N + extra, D, dtype=E.dtype, device=device)
        scale_rows(E, weights / lift_rows, out=e)
        if mean_row is not None and extra:
            e[N:] = 0.0
            e[N : N + 2] = mean_row
    extra_rows = None if extra == 0 else smoothing_rows(operands)

    dE_sum = torch.zeros(N, D, dtype=torch.float32, device=device) if need_E else None
    dC = torch.empty(V, D, dtype=head_dtype, device=device) if need_C else None
    dbias = torch.empty(V, dtype=torch.float32, device=device) if need_bias else None
    two_weights = None
    if dbias is not None:
        # One column in low precision would round every token's weight alike; the second holds what the first lost.
        lifted = weights / lift_rows
        high = lifted.to(E.dtype)
        two_weights = torch.stack([high, (lifted - high.float()).to(E.dtype)], 1)

    block = operands.configuration.block_v
    width = max(buffer_bytes // ((N + extra) * E.element_size()), min(MIN_WIDTH, V)) // block * block
    width = min(max(width, block), V)
    buffer = padded_matrix(N + extra, width, E.dtype, device)
    if extra_rows is not None and operands.prior is None:
        buffer[N:] = extra_rows
    schedule = operands.schedule(width)
    for first in range(0, V, width):
        last = min(first + width, V)
        G, longer, c = buffer[:N, : last - first], buffer[:, : last - first], C[first:last]
        if extra_rows is not None and operands.prior is not None:
            longer[N:] = extra_rows[:, first:last]
        gradient_kernel[(schedule.programs,)](
            out=operands.described(G),
            targets=targets,
            logsumexps=logsumexp,
            softmax_terms=softmax_terms,
            target_terms=target_terms,
            smoothing_terms=smoothing_terms,
            first=first,
            last=last,
            stride_out=G.stride(0),
            together=schedule.together,
            parts=schedule.parts,
            target_weight=1.0 - k.beta,
            mean_weight=operands.mean_weight,
            z_loss=k.z_loss,
            factor=factor,
            TERMS=terms is not None,
            **operands.arguments(),
        )
        if dE_sum is not None:
            accumulate(dE_sum, G, c)
        if dC is not None and e is not None:
            strip = dC[first:last]
            if narrow:
                total = product(G.T, e) * (lift_rows * lift_terms / factor)
                if mean_row is not None:
                    total += mean_row if operands.prior is None else torch.outer(operands.prior[first:last], mean_row)
                strip.copy_(total)
            elif strip.dtype == e.dtype:
                torch.mm(longer.T, e, out=strip)
            else:
                strip.copy_(product(longer.T, e))
        if dbias is not None and two_weights is not None:
            dbias[first:last] = product(G.T, two_weights).sum(1) * (lift_rows * lift_terms / factor)

    del buffer, e
    if terms is not None and terms.targets is not None and terms.target_weights is not None:
        target_scales = _target_scales(operands, terms.targets, terms.target_weights)
        if dE_sum is not None:
            add_head_rows(dE_sum, C, terms.targets, target_scales * (factor / lift_terms))
        token_scales = target_scales * weights.unsqueeze(1)
        if dC is not None:
            add_target_rows(dC, E, terms.targets, token_scales)
        if dbias is not None:
            add_target_rows(dbias.unsqueeze(1), E.new_ones(N, 1), terms.targets, token_scales)
    dE = None
    if dE_sum is not None:
        dE = torch.empty(N, D, dtype=hidden_dtype or E.dtype, device=device)
        head_sum = row_sum(C, operands.prior) if rank_one else None
        finish_hidden(
            dE,
            dE_sum,
            C,
            targets,
            row_scales=weights * (lift_terms / factor),
            mean_scales=mean_scales,
            head_sum=head_sum,
        )
    if dbias is not None and bias is not None:
        if rank_one:
            total = mean_scales.sum()
            dbias -= total if operands.prior is None else total * operands.prior
        dbias = dbias.to(bias.dtype)
    return dE, dC, dbias


def smoothing_rows(operands: Operands) -> Tensor:
    """(EXTRA_ROWS, V or 1) in E's dtype: each column's share in the smoothing prior, in two parts that add up to it (1
    and 0 without one), then zeros."""
    E, prior = operands.E, operands.prior
    share = torch.ones(1, dtype=torch.float32, device=E.device) if prior is None else prior
    rows = torch.zeros(EXTRA_ROWS, len(share), dtype=E.dtype, device=E.device)
    rows[0] = share
    rows[1] = share - rows[0].float()
    return rows


def _target_scales(operands: Operands, targets: Tensor, target_weights: Tensor) -> Tensor:
    """(N, K) gradient by the targets' products with E, as far as their own terms go."""
    softcap = operands.semantics.softcap
    if softcap is None:
        return -target_weights
    z = target_logits(operands, targets)
    return -target_weights * (1.0 - (z / softcap) ** 2)
