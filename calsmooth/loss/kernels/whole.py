"""`mode="exact"` where all logits fit into the buffer at once: three products of cuBLAS and one pass over the logits.

Few tokens, or a small vocabulary. The device is done in a few milliseconds then, and what counts is how little the host
has to ask of it: a handful of launches instead of two dozen. The logits are kept in float32, nothing is rounded before
the softmax, and every row's maximum is known, so that no reference has to be guessed. One program a row turns them
where they lie into

    G_iv = f ((1 + 2 z_loss lse_i) p_iv - (1 - beta) [v = y_i] - beta s_v) (1 - (z/t)^2)     (the last with a softcap)

in bfloat16, s the smoothing prior. Without one, s = 1 / V, f makes f beta / V a power of two: smoothing's share of
the many entries whose softmax is next to nothing isn't rounded. Then dE = w (G C) and dC = G^T (w E), w the tokens'
weights over f.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from calsmooth.loss.kernels import tiles
from calsmooth.loss.kernels.products import product
from calsmooth.loss.kernels.rows import scale_rows
from calsmooth.loss.kernels.targets import loss_or_not
from calsmooth.loss.kernels.tiles import LOG2E, Operands, prior_weighted, to_logits
from calsmooth.loss.kernels.walk import LOWEST


def fits(N: int, V: int) -> bool:
    return N * V * 4 <= tiles.BUFFER_BYTES


@triton.jit
def gradients_in_place_kernel(
    products,  # (N, V) float32
    gradients,  # (N, V), the same memory: each row starts where the products' row does
    bias,
    prior,  # (V,) (PRIOR)
    targets,  # (N,) int32, -1: ignored
    losses,
    logsumexps,
    V,
    stride_gradients,
    scale,
    softcap,
    target_weight,  # 1 - beta
    mean_weight,  # beta / V; beta (PRIOR)
    z_loss,
    factor,
    SMOOTH: tl.constexpr,
    PRIOR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(targets + row)
    z_row = products + row * V
    g_row = gradients + row * stride_gradients
    offsets = tl.arange(0, BLOCK)
    m = tl.full((BLOCK,), LOWEST, tl.float32)
    s = tl.zeros((BLOCK,), tl.float32)
    z_sum = tl.zeros((BLOCK,), tl.float32)
    z_target = tl.zeros((BLOCK,), tl.float32)
    # Of a row that is ignored nothing is read: it may hold anything.
    columns_read = tl.where(y >= 0, V, 0)
    for start in range(0, columns_read, BLOCK):
        columns = start + offsets
        z = tl.load(z_row + columns, mask=columns < V, other=0.0)
        z = _row_logits(z, bias, columns, V, scale, softcap, HAS_BIAS, SCALED, CAPPED)
        if SMOOTH:
            z_sum += tl.where(columns < V, _row_weighted(z, prior, columns, V, PRIOR), 0.0)
        z_target += tl.where(columns == y, z, 0.0)
        z = tl.where(columns < V, z, float("-inf"))
        m_new = tl.maximum(m, z)
        s = s * tl.exp2((m - m_new) * LOG2E) + tl.exp2((z - m_new) * LOG2E)
        m = m_new
    top = tl.max(m, 0)
    lse = top + tl.log(tl.sum(s * tl.exp2((m - top) * LOG2E), 0))
    loss = lse - target_weight * tl.sum(z_target, 0) - mean_weight * tl.sum(z_sum, 0) + z_loss * lse * lse
    tl.store(losses + row, loss_or_not(loss, y))
    tl.store(logsumexps + row, tl.where(y >= 0, lse, 0.0))

    softmax_weight = 1.0 + 2.0 * z_loss * lse
    for start in range(0, V, BLOCK):
        columns = start + offsets
        z = tl.load(z_row + columns, mask=columns < columns_read, other=0.0)
        z = _row_logits(z, bias, columns, V, scale, softcap, HAS_BIAS, SCALED, CAPPED)
        mean_weights = mean_weight + tl.zeros((BLOCK,), tl.float32)
        mean_weights = _row_weighted(mean_weights, prior, columns, V, PRIOR)
        g = softmax_weight * tl.exp2((z - lse) * LOG2E) - mean_weights
        g = tl.where(columns == y, g - target_weight, g)
        if CAPPED:
            g *= 1.0 - (z / softcap) * (z / softcap)
        g = tl.where(y >= 0, g * factor, 0.0)
        # Entries half as wide are written before where the next block is read; in this one all threads must have read.
        tl.debug_barrier()
        tl.store(g_row + columns, g.to(gradients.dtype.element_ty), mask=columns < V)


@triton.jit
def _row_logits(
    z, bias, columns, V, scale, softcap, HAS_BIAS: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr
):
    """`to_logits` of one row."""
    tile = to_logits(z[None, :], bias, columns, V, scale, softcap, HAS_BIAS, SCALED, CAPPED)
    return tl.reshape(tile, z.shape)


@triton.jit
def _row_weighted(z, prior, columns, V, PRIOR: tl.constexpr):
    """`prior_weighted` of one row."""
    return tl.reshape(prior_weighted(z[None, :], prior, columns, V, PRIOR), z.shape)


def losses_and_gradients(
    operands: Operands,
    targets: Tensor,  # (N,) int32, -1: ignored
    weights: Tensor,  # (N,) float32, 0 where ignored
    head_dtype: torch.dtype,
    need_E: bool,
    need_C: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(N,) losses, (N,) log-sum-exps, dE and dC where needed. `fits(N, V)` holds."""
    E, C, bias, k = operands.E, operands.C, operands.bias, operands.semantics
    (N, D), V, device = E.shape, len(C), E.device
    mean_weight = operands.mean_weight
    factor = 1.0
    if mean_weight > 0 and operands.prior is None:
        factor = 2.0 ** round(math.log2(mean_weight)) / mean_weight
    losses, lse = (torch.empty(N, dtype=torch.float32, device=device) for _ in range(2))
    products = product(E, C.T)
    overlaid = products.view(E.dtype).view(N, -1)
    gradients_in_place_kernel[(N,)](
        products,
        overlaid,
        E if bias is None else bias,
        E if operands.prior is None else operands.prior,
        targets,
        losses,
        lse,
        V,
        overlaid.stride(0),
        k.scale,
        k.softcap or 1.0,
        1.0 - k.beta,
        mean_weight,
        k.z_loss,
        factor,
        SMOOTH=k.beta > 0,
        PRIOR=operands.prior is not None,
        **k.constants(bias),
        BLOCK=4096 if E.is_cuda else 32,
        num_warps=8,
    )
    G = overlaid[:, :V]
    weights = weights * (k.scale / factor)
    dE = dC = None
    if need_E:
        dE = torch.empty(N, D, dtype=E.dtype, device=device)
        torch.mul(product(G, C), weights.unsqueeze(1), out=dE)
    if need_C:
        e = scale_rows(E, weights)  # without reading the rows of ignored tokens
        dC = torch.mm(G.T, e) if head_dtype == e.dtype else product(G.T, e).to(head_dtype)
    return losses, lse, dE, dC
