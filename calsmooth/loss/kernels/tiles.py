"""What every kernel that needs logits shares: one tile of E C^T, and the way from products to logits."""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from calsmooth.loss.kernels.configurations import Configuration, cdiv, choose, schedule
from calsmooth.loss.kernels.rows import row_sum

LOG2E = tl.constexpr(1.4426950408889634)

P = ParamSpec("P")
R = TypeVar("R")


def device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Within it x's GPU is the current one: Triton launches on that, whatever its arguments' device is."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def on_its_device(function: Callable[P, R]) -> Callable[P, R]:
    """For operators: runs on the GPU of the first argument, a tensor."""

    @functools.wraps(function)
    def guarded(*args: P.args, **options: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, Tensor)
        with device_of(first):
            return function(*args, **options)

    return guarded


@triton.jit
def product_tile(
    e,  # descriptor of, or pointer to, E (N, D)
    c,  # the same for C (V, D)
    row,  # first token
    column,  # first vocabulary entry
    N,
    V,
    D,
    stride_e,
    stride_c,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """(BLOCK_N, BLOCK_V) float32: E[row:, :] . C[column:, :]; zeros beyond N and V."""
    tile = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    if DESCRIPTORS:
        for d in range(0, D, BLOCK_D):
            tile = tl.dot(e.load([row, d]), c.load([column, d]).T, tile, input_precision="ieee")
    else:
        rows = row + tl.arange(0, BLOCK_N)
        columns = column + tl.arange(0, BLOCK_V)
        features = tl.arange(0, BLOCK_D)
        e_rows = e + rows.to(tl.int64)[:, None] * stride_e + features[None, :]
        c_rows = c + columns.to(tl.int64)[:, None] * stride_c + features[None, :]
        for d in range(0, D, BLOCK_D):
            inside = (features < D - d)[None, :]
            a = tl.load(e_rows + d, mask=(rows < N)[:, None] & inside, other=0.0)
            b = tl.load(c_rows + d, mask=(columns < V)[:, None] & inside, other=0.0)
            tile = tl.dot(a, b.T, tile, input_precision="ieee")
    return tile


@triton.jit
def to_logits(
    tile, bias, columns, V, scale, softcap, HAS_BIAS: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr
):
    """softcap(scale * (product + bias)); columns beyond V keep a finite value."""
    if HAS_BIAS:
        tile += tl.load(bias + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
    if SCALED:
        tile *= scale
    if CAPPED:
        tile = softcap * tanh(tile / softcap)
    return tile


@triton.jit
def prior_weighted(z, prior, columns, V, PRIOR: tl.constexpr):
    """z, or with PRIOR z times each column's share in the smoothing prior: 0 where that is 0, whatever z is."""
    if PRIOR:
        share = tl.load(prior + columns, mask=columns < V, other=0.0)[None, :]
        z = tl.where(share > 0.0, z * share, 0.0)
    return z


@triton.jit
def tanh(x):
    # 1 - 2 / (exp(2x) + 1) saturates at both ends without a NaN.
    return 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)


@triton.jit
def place(row_blocks, together, parts):
    """This program's block of tokens (none if it is `row_blocks` or above) and its part of the vocabulary."""
    program = tl.program_id(0)
    group = program // (together * parts)
    within = program % (together * parts)
    return group * together + within % together, within // together


@dataclass(frozen=True)
class Schedule:
    together: int  # blocks of tokens that are walked at the same time
    parts: int  # parts of the vocabulary
    programs: int


@dataclass(frozen=True)
class Semantics:
    """What is computed, apart from the tensors."""

    beta: float
    softcap: float | None
    scale: float
    z_loss: float
    vocabulary: int | None = None  # of the whole head, where C is a shard of it

    def constants(self, bias: Tensor | None) -> dict[str, Any]:
        return {"HAS_BIAS": bias is not None, "SCALED": self.scale != 1.0, "CAPPED": self.softcap is not None}


@dataclass(frozen=True)
class Operands:
    """E, C, the bias and the smoothing prior, with the launch geometry of every kernel that walks over E C^T."""

    E: Tensor  # (N, D)
    C: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    prior: Tensor | None  # (V,) float32: each column's share of the smoothed mass; None for 1 / V each
    semantics: Semantics
    configuration: Configuration

    @classmethod
    def make(
        cls,
        E: Tensor,
        C: Tensor,
        bias: Tensor | None,
        semantics: Semantics,
        *,
        storing: bool,
        prior: Tensor | None = None,
    ) -> "Operands":
        """`storing`: for kernels that write their tiles, which larger tiles suit."""
        return cls(E, C, bias, prior if semantics.beta > 0 else None, semantics, choose(E, C, storing))

    @property
    def mean_weight(self) -> float:
        """What the smoothing term weighs a column's logit by: beta / V, or with a prior beta, times the column's
        share."""
        k = self.semantics
        return k.beta if self.prior is not None else k.beta / (k.vocabulary or len(self.C))

    @property
    def prior_is_rank_one(self) -> bool:
        """Whether the prior's mean of the logits is a product of E's rows: then no kernel needs to weigh logits."""
        return self.prior is not None and self.semantics.softcap is None

    def less_mean_logits(self, losses: Tensor, targets: Tensor, head_sum: Tensor | None = None) -> Tensor:
        """Losses (N,) that lack the smoothing term, less it: beta sum_v s_v z_v. head_sum: sum_v s_v C_v, if known."""
        assert self.prior is not None
        if head_sum is None:
            head_sum = row_sum(self.C, self.prior)
        means = (self.E.float() @ head_sum) * self.semantics.scale
        if self.bias is not None:
            means = means + torch.where(self.prior > 0, self.prior * self.bias, 0.0).sum() * self.semantics.scale
        return losses - torch.where(targets >= 0, self.mean_weight * means, 0.0)

    def prior_arguments(self) -> dict[str, Any]:
        return {"prior": self.E if self.prior is None else self.prior, "PRIOR": self.prior is not None}

    def rows(self, start: int, stop: int) -> "Operands":
        return replace(self, E=self.E[start:stop])

    @property
    def row_blocks(self) -> int:
        return cdiv(len(self.E), self.configuration.block_n)

    def schedule(self, columns: int) -> "Schedule":
        tiles = cdiv(columns, self.configuration.block_v)
        together, parts = schedule(self.row_blocks, tiles, self.configuration, self.E.device)
        return Schedule(together, parts, programs=cdiv(self.row_blocks, together) * together * parts)

    def arguments(self) -> dict[str, Any]:
        """The arguments that `product_tile`, `to_logits` and `prior_weighted` need, by the names all kernels give
        them."""
        k = self.configuration
        if k.descriptors:
            e = TensorDescriptor.from_tensor(self.E, [k.block_n, k.block_d])
            c = TensorDescriptor.from_tensor(self.C, [k.block_v, k.block_d])
        else:
            e, c = self.E, self.C
        return dict(
            e=e,
            c=c,
            bias=self.bias if self.bias is not None else self.E,
            N=len(self.E),
            V=len(self.C),
            D=self.E.shape[1],
            stride_e=self.E.stride(0),
            stride_c=self.C.stride(0),
            scale=self.semantics.scale,
            softcap=self.semantics.softcap or 1.0,
            BLOCK_N=k.block_n,
            BLOCK_V=k.block_v,
            BLOCK_D=k.block_d,
            DESCRIPTORS=k.descriptors,
            num_warps=k.warps,
            num_stages=k.stages,
            **self.prior_arguments(),
            **self.semantics.constants(self.bias),
        )

    def described(self, matrix: Tensor) -> Any:
        """A matrix that tiles are stored to, as the kernels take it."""
        k = self.configuration
        return TensorDescriptor.from_tensor(matrix, [k.block_n, k.block_v]) if k.descriptors else matrix


def padded_matrix(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(rows, columns) whose rows start at multiples of 128 bytes."""
    width = cdiv(columns * dtype.itemsize, 128) * 128 // dtype.itemsize
    return torch.empty(rows, width, dtype=dtype, device=device)[:, :columns]


BUFFER_BYTES = 2**30
"""The exact mode's chunk of N x V: long enough for the products to run at full speed, small beside a large head."""


def chunk_rows(N: int, row_bytes: int, block: int) -> int:
    """Tokens a chunk: as many as the buffer holds, chunks of about the same size, whole blocks."""
    most = max(BUFFER_BYTES // row_bytes // block, 1) * block
    chunks = cdiv(N, most)
    return cdiv(cdiv(N, chunks), block) * block
