"""`mode="exact"` with a softcap: three products and one pass over each chunk's logits.

The smoothing term isn't rank one then: its slope 1 - (z/t)^2 differs at every entry, and the whole gradient

    G_iv = ((1 + 2 z_loss lse_i) p_iv - (1 - beta) [v = y_i] - beta / V) (1 - (z_iv/t)^2)

needs the log-sum-exp, which is known only after the walk. So the walk writes z_iv - z_iy, which is small where it
matters, as float16; a pass in place turns it into G as bfloat16; two products use it up.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from calsmooth.loss.kernels.configurations import cdiv
from calsmooth.loss.kernels.products import accumulate, product
from calsmooth.loss.kernels.rows import finish_hidden, scale_rows, target_logits
from calsmooth.loss.kernels.tiles import Operands, chunk_rows, padded_matrix
from calsmooth.loss.kernels.walk import walk


@triton.jit
def gradient_in_place_kernel(
    stored,  # (N, V) z - reference
    out,  # (N, V), the same memory
    targets,
    references,
    logsumexps,
    V,
    stride,
    target_weight,  # 1 - beta
    mean_weight,  # beta / V
    z_loss,
    softcap,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < V
    y = tl.load(targets + n)
    reference = tl.load(references + n)
    lse = tl.load(logsumexps + n)
    z = tl.load(stored + n * stride + columns, mask=inside, other=0.0).to(tl.float32) + reference
    g = tl.exp(z - lse) * (1.0 + 2.0 * z_loss * lse) - tl.where(columns == y, target_weight, 0.0) - mean_weight
    g *= 1.0 - (z / softcap) * (z / softcap)
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
    losses, lse = torch.empty(N, device=device), torch.empty(N, device=device)
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
        stored = G.view(torch.float16) if G.dtype == torch.bfloat16 else G
        walked = walk(o, y, z_target[chunk], stored=stored)
        losses[chunk], lse[chunk] = walked.losses, walked.logsumexp
        gradient_in_place_kernel[(len(y), cdiv(V, 4096))](
            stored,
            G,
            y,
            z_target[chunk],
            walked.logsumexp,
            V,
            G.stride(0),
            1.0 - k.beta,
            k.mean_weight(V),
            k.z_loss,
            k.softcap,
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
