"""Small kernels over tokens and features: target logits, weighted sums of rows, and gradients' last steps.

All of them are bound by memory; none is a noticeable part of the time. Sums have a fixed order.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from calsmooth.loss.kernels.configurations import VARYING, cdiv
from calsmooth.loss.kernels.tiles import Operands, to_logits


@functools.cache
def feature_block(D: int, largest: int = 1024) -> int:
    return min(largest, triton.next_power_of_2(D))


@triton.jit
def target_logits_kernel(
    E,
    C,
    bias,
    targets,
    out,
    V,
    D,
    stride_e,
    stride_c,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    y = tl.load(targets + n).to(tl.int64)
    total = tl.zeros((BLOCK_D,), tl.float32)
    if y >= 0:
        for d in range(0, D, BLOCK_D):
            features = d + tl.arange(0, BLOCK_D)
            a = tl.load(E + n * stride_e + features, mask=features < D, other=0.0).to(tl.float32)
            b = tl.load(C + y * stride_c + features, mask=features < D, other=0.0).to(tl.float32)
            total += a * b
    column = tl.maximum(y, 0).to(tl.int32) + tl.arange(0, 1)
    z = tl.sum(total, 0) + tl.zeros((1, 1), tl.float32)
    z = to_logits(z, bias, column, V, scale, softcap, HAS_BIAS, SCALED, CAPPED)
    tl.store(out + n + tl.arange(0, 1)[None, :], tl.where(y >= 0, z, 0.0))


def target_logits(operands: Operands, targets: Tensor) -> Tensor:
    """(N,) float32 logit of each token's own target, 0 where ignored."""
    E, C = operands.E, operands.C
    out = torch.empty(len(E), device=E.device)
    target_logits_kernel[(len(E),)](
        E,
        C,
        operands.bias if operands.bias is not None else E,
        targets,
        out,
        len(C),
        E.shape[1],
        E.stride(0),
        C.stride(0),
        operands.semantics.scale,
        operands.semantics.softcap or 1.0,
        **operands.semantics.constants(operands.bias),
        BLOCK_D=feature_block(E.shape[1]),
        num_warps=4,
    )
    return out


@triton.jit(do_not_specialize=VARYING)
def row_sum_kernel(
    X,
    weights,  # (N,) (WEIGHTED)
    out,  # (programs, D)
    N,
    D,
    stride,
    rows_each,
    WEIGHTED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * rows_each
    features = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, rows_each, BLOCK_N):
        rows = first + start + tl.arange(0, BLOCK_N)
        mask = (rows < N)[:, None] & (features < D)[None, :]
        if WEIGHTED:
            # Ignored tokens (weight 0) may hold anything: don't read them.
            weight = tl.load(weights + rows, mask=rows < N, other=0.0)
            mask &= (weight != 0.0)[:, None]
        x = tl.load(X + rows[:, None] * stride + features[None, :], mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            x *= weight[:, None]
        total += tl.sum(x, 0)
    tl.store(out + tl.program_id(0) * D + features, total, mask=features < D)


def row_sum(X: Tensor, weights: Tensor | None = None) -> Tensor:
    """(D,) float32: sum_n weights_n X_n, with rows of weight 0 left out. (X.sum(0) takes a lot of scratch memory.)"""
    N, D = X.shape
    block_n, block = 16, feature_block(D, 256)
    rows_each = cdiv(cdiv(N, 1024), block_n) * block_n
    partial = torch.empty(cdiv(N, rows_each), D, device=X.device)
    # One warp a program: the sum over rows stays within each thread.
    row_sum_kernel[(len(partial), cdiv(D, block))](
        X,
        X if weights is None else weights,
        partial,
        N,
        D,
        X.stride(0),
        rows_each,
        WEIGHTED=weights is not None,
        BLOCK_N=block_n,
        BLOCK_D=block,
        num_warps=1,
    )
    return partial.sum(0)


LARGE_BYTES = 256 * 2**20
"""Takes a tenth of a millisecond to read, the host as long to set a second stream going."""


class SumBeside:
    """`row_sum(X)` on a second stream, while a walk runs that leaves a few multiprocessors idle.

    Make it before the walk is launched, `start` it after (so that the walk gets its multiprocessors first), and `wait`
    where the sum is needed: the stream waits, not the host. For a small X the second stream costs more than it saves.
    """

    def __init__(self, X: Tensor) -> None:
        self.X = X
        self.beside = X.is_cuda and X.numel() * X.element_size() >= LARGE_BYTES
        if self.beside:
            self.main = torch.cuda.current_stream(X.device)
            self.before = self.main.record_event()

    def start(self) -> None:
        if not self.beside:
            self.total = row_sum(self.X)
            return
        self.side = _side_stream(self.X.device)
        self.side.wait_event(self.before)
        with torch.cuda.stream(self.side):
            self.total = row_sum(self.X)
        self.total.record_stream(self.main)

    def wait(self) -> Tensor:
        if self.beside:
            self.main.wait_stream(self.side)
        return self.total


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@triton.jit
def finish_hidden_kernel(
    product,  # (N, D) float32
    C,
    targets,
    row_scales,  # (N,) (HAS_SCALE)
    target_scales,  # (N,) (HAS_TARGET)
    mean_scales,  # (N,) (HAS_MEAN)
    head_sum,  # (D,)
    dE,
    D,
    stride_c,
    HAS_SCALE: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    features = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = features < D
    y = tl.load(targets + n).to(tl.int64)
    x = tl.load(product + n * D + features, mask=inside, other=0.0)
    if HAS_SCALE:
        x *= tl.load(row_scales + n)
    if HAS_TARGET:
        row = tl.load(C + tl.maximum(y, 0) * stride_c + features, mask=inside, other=0.0).to(tl.float32)
        x += tl.load(target_scales + n) * row
    if HAS_MEAN:
        x -= tl.load(mean_scales + n) * tl.load(head_sum + features, mask=inside, other=0.0)
    tl.store(dE + n * D + features, tl.where(y >= 0, x, 0.0).to(dE.dtype.element_ty), mask=inside)


def finish_hidden(
    dE: Tensor,  # (N, D), contiguous, written
    product: Tensor,  # (N, D) float32
    C: Tensor,
    targets: Tensor,
    *,
    row_scales: Tensor | None = None,
    target_scales: Tensor | None = None,
    mean_scales: Tensor | None = None,
    head_sum: Tensor | None = None,
) -> None:
    """dE_i = row_scale_i product_i + target_scale_i C_{y_i} - mean_scale_i head_sum, 0 where ignored."""
    N, D = dE.shape
    block = feature_block(D)
    finish_hidden_kernel[(N, cdiv(D, block))](
        product,
        C,
        targets,
        product if row_scales is None else row_scales,
        product if target_scales is None else target_scales,
        product if mean_scales is None else mean_scales,
        product if head_sum is None else head_sum,
        dE,
        D,
        C.stride(0),
        HAS_SCALE=row_scales is not None,
        HAS_TARGET=target_scales is not None,
        HAS_MEAN=head_sum is not None,
        BLOCK_D=block,
        num_warps=4,
    )


@triton.jit
def scale_rows_kernel(X, scales, out, D, stride, BLOCK_D: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    features = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    scale = tl.load(scales + n)
    read = tl.where(scale != 0.0, D, 0)
    x = tl.load(X + n * stride + features, mask=features < read, other=0.0).to(tl.float32)
    tl.store(out + n * D + features, (x * scale).to(out.dtype.element_ty), mask=features < D)


def scale_rows(X: Tensor, scales: Tensor, out: Tensor | None = None) -> Tensor:
    """scales_n X_n in X's dtype, rows of scale 0 without reading them; `out` may have more rows."""
    N, D = X.shape
    if out is None:
        out = torch.empty(N, D, dtype=X.dtype, device=X.device)
    block = feature_block(D)
    scale_rows_kernel[(N, cdiv(D, block))](X, scales, out, D, X.stride(0), BLOCK_D=block, num_warps=4)
    return out


@triton.jit(do_not_specialize=VARYING)
def add_target_rows_kernel(
    sorted_targets,  # (N,) ascending; V where ignored
    order,  # (N,) token of each sorted target
    scales,  # (N,) by token
    E,
    dC,
    N,
    V,
    D,
    stride_e,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    first = tl.program_id(0)
    y = tl.load(sorted_targets + first).to(tl.int64)
    before = tl.load(sorted_targets + first - 1, mask=first > 0, other=-1).to(tl.int64)
    if (y < V) & (y != before):
        features = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = features < D
        row = dC + y * D + features
        total = tl.load(row, mask=inside, other=0.0).to(tl.float32)
        start = first
        more = 1
        while more > 0:
            places = start + tl.arange(0, BLOCK_N)
            mine = tl.load(sorted_targets + places, mask=places < N, other=V).to(tl.int64) == y
            tokens = tl.load(order + places, mask=mine, other=0).to(tl.int64)
            scale = tl.load(scales + tokens, mask=mine, other=0.0)
            mask = mine[:, None] & inside[None, :]
            x = tl.load(E + tokens[:, None] * stride_e + features[None, :], mask=mask, other=0.0).to(tl.float32)
            total += tl.sum(x * scale[:, None], 0)
            more = (tl.sum(mine.to(tl.int32), 0) == BLOCK_N).to(tl.int32)
            start += BLOCK_N
        tl.store(row, total.to(dC.dtype.element_ty), mask=inside)


def add_target_rows(dC: Tensor, E: Tensor, targets: Tensor, scales: Tensor) -> None:
    """dC[y_i] += scale_i E_i, in the tokens' order: one program adds up all tokens of one target."""
    N, D = E.shape
    V = len(dC)
    sorted_targets, order = torch.sort(torch.where(targets < 0, V, targets), stable=True)
    block = feature_block(D, 512)
    add_target_rows_kernel[(N, cdiv(D, block))](
        sorted_targets, order, scales, E, dC, N, V, D, E.stride(0), BLOCK_N=8, BLOCK_D=block, num_warps=4
    )


@triton.jit
def scale_in_place_kernel(X, Y, factor, x_size, y_size, BLOCK: tl.constexpr):
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        x_programs = tl.cdiv(x_size, BLOCK)
        program = tl.program_id(0)
        offsets = tl.arange(0, BLOCK)
        if program < x_programs:
            places = program.to(tl.int64) * BLOCK + offsets
            x = tl.load(X + places, mask=places < x_size, other=0.0).to(tl.float32)
            tl.store(X + places, (x * by).to(X.dtype.element_ty), mask=places < x_size)
        else:
            places = (program - x_programs).to(tl.int64) * BLOCK + offsets
            y = tl.load(Y + places, mask=places < y_size, other=0.0).to(tl.float32)
            tl.store(Y + places, (y * by).to(Y.dtype.element_ty), mask=places < y_size)


def scale_in_place(X: Tensor, Y: Tensor, factor: Tensor) -> None:
    """X *= factor and Y *= factor, which stays on the device; nothing is read or written when it is 1, as mostly."""
    block = 8192
    programs = cdiv(X.numel(), block) + cdiv(Y.numel(), block)
    scale_in_place_kernel[(programs,)](X, Y, factor, X.numel(), Y.numel(), BLOCK=block, num_warps=8)
