"""Small kernels over tokens and features: weighted sums of rows, and gradients' last steps.

All of them are bound by memory; none is a noticeable part of the time. Sums have a fixed order.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from calsmooth.loss.kernels.configurations import VARYING, cdiv


@functools.cache
def feature_block(D: int, largest: int = 1024) -> int:
    return min(largest, triton.next_power_of_2(D))


@triton.jit(do_not_specialize=VARYING)
def row_sum_kernel(
    X,
    weights,  # (W, N) (W > 0)
    out,  # (W or 1, programs, D)
    N,
    D,
    stride,
    rows_each,
    W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * rows_each
    features = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    second = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, rows_each, BLOCK_N):
        rows = first + start + tl.arange(0, BLOCK_N)
        mask = (rows < N)[:, None] & (features < D)[None, :]
        if W > 0:
            # Ignored tokens (weight 0) may hold anything: don't read them.
            weight = tl.load(weights + rows, mask=rows < N, other=0.0)
            read = weight != 0.0
            if W == 2:
                other = tl.load(weights + N + rows, mask=rows < N, other=0.0)
                read |= other != 0.0
            mask &= read[:, None]
        x = tl.load(X + rows[:, None] * stride + features[None, :], mask=mask, other=0.0).to(tl.float32)
        if W == 2:
            second += tl.sum(x * other[:, None], 0)
        if W > 0:
            x *= weight[:, None]
        total += tl.sum(x, 0)
    here = tl.program_id(0) * D + features
    tl.store(out + here, total, mask=features < D)
    if W == 2:
        tl.store(out + tl.num_programs(0) * D + here, second, mask=features < D)


def row_sum(
    X: Tensor,  # (N, D)
    weights: Tensor | None = None,  # (N,) or (2, N) float32, contiguous
) -> Tensor:
    """(D,) float32 sum_n weights_n X_n, or (2, D) of both; rows of weight 0 aren't read. (X.sum(0) takes a lot of
    scratch memory.)"""
    N, D = X.shape
    block_n, block = 16, feature_block(D, 256)
    rows_each = cdiv(cdiv(N, 1024), block_n) * block_n
    programs = cdiv(N, rows_each)
    several = 0 if weights is None else weights.numel() // max(N, 1)
    partial = torch.empty(max(several, 1), programs, D, dtype=torch.float32, device=X.device)
    # One warp a program: the sum over rows stays within each thread.
    row_sum_kernel[(programs, cdiv(D, block))](
        X,
        X if weights is None else weights,
        partial,
        N,
        D,
        X.stride(0),
        rows_each,
        W=several,
        BLOCK_N=block_n,
        BLOCK_D=block,
        num_warps=1,
    )
    sums = partial.sum(1)
    return sums if weights is not None and weights.dim() == 2 else sums[0]


LARGE_BYTES = 256 * 2**20
"""Takes a tenth of a millisecond to read, the host as long to set a second stream going."""


class SumBeside:
    """`row_sum(X, weights)` on a second stream, while a walk runs that leaves a few multiprocessors idle.

    Make it before the walk is launched, `start` it after (so that the walk gets its multiprocessors first), and `wait`
    where the sum is needed: the stream waits, not the host. For a small X the second stream costs more than it saves.
    """

    def __init__(self, X: Tensor, weights: Tensor | None = None) -> None:
        self.X, self.weights = X, weights
        self.beside = X.is_cuda and X.numel() * X.element_size() >= LARGE_BYTES
        if self.beside:
            self.main = torch.cuda.current_stream(X.device)
            self.before = self.main.record_event()

    def start(self) -> None:
        if not self.beside:
            self.total = row_sum(self.X, self.weights)
            return
        self.side = _side_stream(self.X.device)
        self.side.wait_event(self.before)
        with torch.cuda.stream(self.side):
            self.total = row_sum(self.X, self.weights)
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
