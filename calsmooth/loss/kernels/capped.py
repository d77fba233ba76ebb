"""`mode="exact"` with a softcap: three products and one pass over each chunk's logits.

The smoothing term isn't rank one then: its slope 1 - (z/t)^2 differs at every entry, and the whole gradient

    G_iv = ((1 + 2 z_loss lse_i) p_iv - (1 - beta) [v = y_i] - beta s_v) (1 - (z_iv/t)^2)

needs the log-sum-exp, which is known only after the walk. So the walk writes z_iv, which lies between -t and t, as
an integer of 16 bits: off by at most t / 65,534 whatever the target's logit is, which for t up to LARGEST is less than
bfloat16 makes of the softmax. A pass in place turns it into G as bfloat16; two products use it up.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from calsmooth.loss.kernels.configurations import cdiv
from calsmooth.loss.kernels.products import accumulate, product
from calsmooth.loss.kernels.rows import finish_hidden, scale_rows
from calsmooth.loss.kernels.targets import target_logits
from calsmooth.loss.kernels.tiles import Operands, chunk_rows, padded_matrix
from calsmooth.loss.kernels.walk import walk

LARGEST = 64.0
"""The largest softcap: beyond it exp() of a rounded logit is off by more than bfloat16's rounding, 2^-9."""

LEVELS = {torch.bfloat16: (torch.int16, 2.0**15 - 1), torch.float32: (torch.int32, 2.0**24)}
"""By dtype of the gradients: what the logits are stored as in their place, and the integer that the softcap becomes."""


@triton.jit
def gradient_in_place_kernel(
    stored,  # (N, V) z * levels / softcap, integers
    out,  # (N, V), the same memory
    prior,  # (V,) (PRIOR)
    targets,
    logsumexps,
    V,
    stride,
    target_weight,  # 1 - beta
    mean_weight,  # beta / V; beta (PRIOR)
    z_loss,
    softcap,
    levels,
    PRIOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < V
    y = tl.load(targets + n)
    lse = tl.load(logsumexps + n)
    share = tl.load(stored + n * stride + columns, mask=inside, other=0).to(tl.float32) / levels
    if PRIOR:
        mean_weight *= tl.load(prior + columns, mask=inside, other=0.0)
    softmax = tl.exp(share * softcap - lse) * (1.0 + 2.0 * z_loss * lse)
    g = (softmax - tl.where(columns == y, target_weight, 0.0) - mean_weight) * (1.0 - share * share)
    g = tl.where(y >= 0, g, 0.0)
    tl.store(out + n * stride + columns, g.to(out.dtype.element_ty), mask=inside)


def losses_and_gradients(
    operands: Operands,
    targets: Tensor,  # (N,) int32, -1: ignored
    weights: Tensor,  # (N,) float32, 0 where ignored
    head_dtype: torch.dtype,
    need_E: bool,
    need_C: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(N,) losses, (N,) log-sum-exps, dE and dC where needed."""
    E, C, k = operands.E, operands.C, operands.semantics
    (N, D), V, device = E.shape, len(C), E.device
    assert k.softcap is not None
    losses, lse = (torch.empty(N, dtype=torch.float32, device=device) for _ in range(2))
    z_target = target_logits(operands, targets)
    weights = weights * k.scale
    dE = torch.empty(N, D, dtype=E.dtype, device=device) if need_E else None
    dC = torch.empty(V, D, dtype=head_dtype, device=device) if need_C else None

    rows = chunk_rows(N, V * E.element_size(), operands.configuration.block_n)
    buffer = padded_matrix(min(rows, N), V, E.dtype, device)
    for start in range(0, N, rows):
        chunk = slice(start, min(start + rows, N))
        o, y = operands.rows(chunk.start, chunk.stop), targets[chunk]
        G = buffer[: len(y)]
        integers, levels = LEVELS[G.dtype]
        stored = G.view(integers)
        walked = walk(o, y, z_target[chunk], stored=stored, store_scale=levels / k.softcap)
        losses[chunk], lse[chunk] = walked.losses, walked.logsumexp
        gradient_in_place_kernel[(len(y), cdiv(V, 4096))](
            stored,
            G,
            G if operands.prior is None else operands.prior,
            y,
            walked.logsumexp,
            V,
            G.stride(0),
            1.0 - k.beta,
            operands.mean_weight,
            k.z_loss,
            k.softcap,
            levels,
            PRIOR=operands.prior is not None,
            BLOCK=4096,
            num_warps=8,
        )
        if dE is not None:
            finish_hidden(dE[chunk], product(G, C), C, y, row_scales=weights[chunk])
        if dC is not None:
            e = scale_rows(o.E, weights[chunk])
            if start > 0:
                accumulate(dC, G.T, e)
            elif dC.dtype == e.dtype:
                torch.mm(G.T, e, out=dC)
            else:
                dC.copy_(product(G.T, e))
    return losses, lse, dE, dC
