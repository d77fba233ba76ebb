"""The entries that `filtered` keeps: found, listed, and sorted both ways.

Group by group of 64 vocabulary entries: which tokens can hold an entry to keep there is told by the maxima that the
walk wrote down; those products are made again, and what reaches the threshold goes into one list.
"""

import math
from dataclasses import dataclass, fields

import torch
import triton
import triton.language as tl
from torch import Tensor

from calsmooth.loss.kernels.configurations import VARYING, Configuration, cdiv
from calsmooth.loss.kernels.tiles import Operands, to_logits
from calsmooth.loss.kernels.walk import GROUP

ENTRIES_PER_TOKEN = 256
"""Room in the list at eps = 2^-12, twice what real models were seen to need; grows as eps^-0.6, as they do."""

LIST_BYTES = 2**31
"""The most that the list and what is made of it may take. A list that needs more saves nothing."""

BYTES_PER_ENTRY = 32

MARGIN = tl.constexpr(2.0**-8)
"""Group maxima are stored as bfloat16, rounded to nearest; this much of their size keeps every group that counts."""

CAPPED_FACTOR = 3
"""A softcap brings a token's largest logits together: that many times as many of them count."""


EMIT = {"BLOCK_N": 128, "BLOCK_D": 64, "num_warps": 4, "num_stages": 3}
EMIT_INTERPRETED = {"BLOCK_N": 16, "BLOCK_D": 16}
"""Tokens and features a step of the second multiplication, by groups of 64 columns."""

EMIT_PROGRAMS = 4
"""Programs that share one group's tokens."""


def capacity(N: int, V: int, eps: float, softcap: float | None) -> int:
    """Entries that the list has room for. A token can't have more than 1 / eps."""
    typical = ENTRIES_PER_TOKEN * (2.0**-12 / eps) ** 0.6 * (1 if softcap is None else CAPPED_FACTOR)
    return N * min(math.ceil(min(typical, 1.0 / eps)), V)


def too_long(N: int, V: int, eps: float, softcap: float | None) -> bool:
    """Whether a list that has room for this would be larger than what it saves."""
    return capacity(N, V, eps, softcap) * BYTES_PER_ENTRY > LIST_BYTES


def group_size(configuration: Configuration) -> int:
    return min(GROUP, configuration.block_v)


@dataclass(frozen=True)
class Keys:
    """How an entry's column and token make one integer that sorts by column, then token: 32 bits where that is enough.

    column << token_bits | token, less `offset`; the largest integer of the type is no entry's.
    """

    dtype: torch.dtype
    token_bits: int
    offset: int

    @classmethod
    def of(cls, N: int, V: int) -> "Keys":
        bits = max(N - 1, 1).bit_length()
        return cls(torch.int32, bits, 2**31) if V << bits < 2**32 else cls(torch.int64, 32, 0)

    @property
    def no_entry(self) -> int:
        return torch.iinfo(self.dtype).max

    def make(self, columns: Tensor, tokens: Tensor | int) -> Tensor:
        return (((columns.long() << self.token_bits) | tokens) - self.offset).to(self.dtype)


@dataclass(frozen=True)
class Entries:
    """The entries to keep, twice: sorted by column, then token; and, as places in that list, by token, then column."""

    tokens: Tensor  # (size,) int32; N at the end, where there is no entry
    logits: Tensor  # (size,) float32
    column_starts: Tensor  # (V + 1,) int32: each column's first place
    token_places: Tensor  # (size,) int32: by token, the entries' places
    token_columns: Tensor  # (size,) int32: by token, their columns
    token_starts: Tensor  # (N + 1,) int32
    overflow: Tensor  # bool: there was no room for all

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))


def list_entries(
    operands: Operands,
    targets: Tensor,  # (N,) int32, below 0: none
    target_logits: Tensor,
    logsumexp: Tensor,
    group_maxima: Tensor,
    eps: float,
) -> Entries:
    E, C, bias = operands.E, operands.C, operands.bias
    N, V, device = len(E), len(C), E.device
    groups, room = len(group_maxima), capacity(N, V, eps, operands.semantics.softcap)
    size, packing = room + N, Keys.of(N, V)
    kept = targets >= 0

    thresholds = torch.where(kept, logsumexp + math.log(eps), math.inf)
    counts = torch.empty(groups, dtype=torch.int32, device=device)
    pairs = torch.empty(room, dtype=torch.int32, device=device)
    cursor = torch.zeros((), dtype=torch.int64, device=device)
    listing = {"stride": group_maxima.stride(0), "N": N, "room": room, "BLOCK": 1024 if E.is_cuda else 16}
    listing["num_warps"] = 8
    list_pairs_kernel[(groups,)](group_maxima, thresholds, counts, counts, pairs, FILL=False, **listing)
    ends = counts.cumsum(0)
    offsets = ends - counts
    list_pairs_kernel[(groups,)](group_maxima, thresholds, counts, offsets, pairs, FILL=True, **listing)

    tokens = torch.arange(N, dtype=torch.int64, device=device)
    keys = torch.full((size,), packing.no_entry, dtype=packing.dtype, device=device)
    keys[room:] = torch.where(kept, packing.make(targets, tokens), packing.no_entry)
    logits = torch.empty(size, dtype=torch.float32, device=device)
    logits[room:] = target_logits
    k = operands.semantics
    emit_kernel[(groups, EMIT_PROGRAMS)](
        E,
        C,
        E if bias is None else bias,
        targets,
        logsumexp,
        counts,
        offsets,
        pairs,
        keys,
        logits,
        cursor,
        room,
        packing.token_bits,
        packing.offset,
        eps,
        V,
        E.shape[1],
        E.stride(0),
        C.stride(0),
        k.scale,
        k.softcap or 1.0,
        **k.constants(bias),
        GROUP=group_size(operands.configuration),
        **(EMIT if E.is_cuda else EMIT_INTERPRETED),
    )
    overflow = (ends[-1] > room) | (cursor > room)
    del pairs, thresholds

    keys, order = torch.sort(keys)
    logits = logits[order]
    edges = torch.arange(V + 1, dtype=torch.int64, device=device)
    column_starts = torch.searchsorted(keys, packing.make(edges, 0)).int()
    # Two buffers: a kernel is compiled again for a pointer that isn't aligned, as the middle of one may be.
    by_column, columns = (torch.empty(size, dtype=torch.int32, device=device) for _ in range(2))
    decode_kernel[(cdiv(size, 1024),)](
        keys, by_column, columns, size, N, packing.no_entry, packing.token_bits, packing.offset, BLOCK=1024
    )
    by_token, places = torch.sort(by_column, stable=True)
    token_edges = torch.arange(N + 1, dtype=torch.int32, device=device)
    token_starts = torch.searchsorted(by_token, token_edges).int()
    return Entries(by_column, logits, column_starts, places.int(), columns[places], token_starts, overflow)


def kept_sums(
    entries: Entries,
    logsumexp: Tensor,  # (N,)
    shape: Tensor,  # (V,)
) -> tuple[Tensor, Tensor]:
    """(N,) each: the mass of a token's kept entries, and what of the tail's shape lies under them."""
    N = len(entries.token_starts) - 1
    mass, share = (torch.empty(N, dtype=torch.float32, device=shape.device) for _ in range(2))
    kept_sums_kernel[(N,)](
        entries.token_starts,
        entries.token_columns,
        entries.token_places,
        entries.logits,
        logsumexp,
        shape,
        mass,
        share,
        BLOCK=128 if shape.is_cuda else 16,
        num_warps=1,
    )
    return mass, share


@triton.jit
def kept_sums_kernel(starts, columns, places, logits, logsumexps, shape, masses, shares, BLOCK: tl.constexpr):
    token = tl.program_id(0)
    start = tl.load(starts + token)
    stop = tl.load(starts + token + 1)
    lse = tl.load(logsumexps + token)
    mass = tl.zeros((BLOCK,), tl.float32)
    share = tl.zeros((BLOCK,), tl.float32)
    for first in range(start, stop, BLOCK):
        mine = first + tl.arange(0, BLOCK)
        inside = mine < stop
        z = tl.load(logits + tl.load(places + mine, mask=inside, other=0), mask=inside, other=float("-inf"))
        mass += tl.where(inside, tl.exp(z - lse), 0.0)
        share += tl.load(shape + tl.load(columns + mine, mask=inside, other=0), mask=inside, other=0.0)
    tl.store(masses + token, tl.sum(mass, 0))
    tl.store(shares + token, tl.sum(share, 0))


@triton.jit(do_not_specialize=(*VARYING, "no_entry", "offset"))
def decode_kernel(keys, tokens, columns, size, N, no_entry, token_bits, offset, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys + places, mask=places < size, other=0).to(tl.int64)
    entry = key != no_entry
    key += offset
    column = key >> token_bits
    token = key - (column << token_bits)
    tl.store(tokens + places, tl.where(entry, token, N).to(tl.int32), mask=places < size)
    tl.store(columns + places, tl.where(entry, column, 0).to(tl.int32), mask=places < size)


@triton.jit(do_not_specialize=VARYING)
def list_pairs_kernel(
    group_maxima,  # (groups, N) bfloat16
    thresholds,  # (N,) logit from which an entry is kept; inf where ignored
    counts,  # (groups,) int32
    offsets,  # (groups,) int64 (FILL)
    pairs,  # (room,) int32: tokens, group after group (FILL)
    stride,
    N,
    room,
    FILL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    found = tl.zeros((), tl.int32)
    if FILL:
        offset = tl.load(offsets + group)
    for start in range(0, N, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        # Up to the stride, which is aligned; from N to it lies padding, which may hold anything.
        top = tl.load(group_maxima + group * stride + tokens, mask=tokens < stride, other=float("-inf")).to(tl.float32)
        threshold = tl.load(thresholds + tokens, mask=tokens < N, other=float("inf"))
        # -inf + inf isn't a number, and no reason to keep a group.
        reaches = top + tl.minimum(tl.abs(top), 1e30) * MARGIN >= threshold
        active = (reaches & (tokens < N)).to(tl.int32)
        if FILL:
            places = offset + found + tl.cumsum(active, 0) - 1
            tl.store(pairs + places, tokens, mask=(active > 0) & (places < room))
        found += tl.sum(active, 0)
    if not FILL:
        tl.store(counts + group, found)


@triton.jit(do_not_specialize=VARYING)
def emit_kernel(
    E,
    C,
    bias,
    targets,
    logsumexps,
    counts,  # (groups,)
    offsets,  # (groups,)
    pairs,  # (room,)
    keys,  # (room,): see Keys
    logits,  # (room,) float32
    cursor,  # int64
    room,
    token_bits,
    offset_of_keys,
    eps,
    V,
    D,
    stride_e,
    stride_c,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    group = tl.program_id(0)
    columns = group * GROUP + tl.arange(0, GROUP)
    features = tl.arange(0, BLOCK_D)
    offset = tl.load(offsets + group)
    count = tl.minimum(tl.load(counts + group).to(tl.int64), tl.maximum(room - offset, 0)).to(tl.int32)
    c_rows = C + columns.to(tl.int64)[:, None] * stride_c + features[None, :]
    for start in range(tl.program_id(1) * BLOCK_N, count, tl.num_programs(1) * BLOCK_N):
        places = start + tl.arange(0, BLOCK_N)
        listed = places < count
        tokens = tl.load(pairs + offset + places, mask=listed, other=0)
        e_rows = E + tokens.to(tl.int64)[:, None] * stride_e + features[None, :]
        z = tl.zeros((BLOCK_N, GROUP), tl.float32)
        for d in range(0, D, BLOCK_D):
            inside = (features < D - d)[None, :]
            a = tl.load(e_rows + d, mask=listed[:, None] & inside, other=0.0)
            b = tl.load(c_rows + d, mask=(columns < V)[:, None] & inside, other=0.0)
            z = tl.dot(a, b.T, z, input_precision="ieee")
        z = to_logits(z, bias, columns, V, scale, softcap, HAS_BIAS, SCALED, CAPPED)
        lse = tl.load(logsumexps + tokens, mask=listed, other=0.0)
        y = tl.load(targets + tokens, mask=listed, other=-1)
        p = tl.exp(z - lse[:, None])
        keep = (p >= eps) & listed[:, None] & (columns < V)[None, :] & (columns[None, :] != y[:, None])
        ones = keep.to(tl.int32)
        by_row = tl.sum(ones, 1)
        found = tl.sum(by_row, 0)
        if found > 0:
            # The cursor has 64 bits, since it goes on counting where there is no room; places need no more than room.
            base = tl.minimum(tl.atomic_add(cursor, found.to(tl.int64), sem="relaxed"), room).to(tl.int32)
            place = base + (tl.cumsum(by_row, 0) - by_row)[:, None] + tl.cumsum(ones, 1) - 1
            keep = keep & (place < room)
            key = ((columns.to(tl.int64)[None, :] << token_bits) | tokens.to(tl.int64)[:, None]) - offset_of_keys
            tl.store(keys + place, key.to(keys.dtype.element_ty), mask=keep)
            tl.store(logits + place, z, mask=keep)


@triton.jit
def segment_sum_kernel(starts, values, out, BLOCK: tl.constexpr):
    segment = tl.program_id(0)
    start = tl.load(starts + segment)
    stop = tl.load(starts + segment + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(start, stop, BLOCK):
        places = first + tl.arange(0, BLOCK)
        total += tl.load(values + places, mask=places < stop, other=0.0)
    tl.store(out + segment, tl.sum(total, 0))


def segment_sum(starts: Tensor, values: Tensor) -> Tensor:
    """(segments,) sums of values[starts_i : starts_{i + 1}]."""
    out = torch.empty(len(starts) - 1, dtype=torch.float32, device=values.device)
    segment_sum_kernel[(len(out),)](starts, values, out, BLOCK=32, num_warps=1)
    return out
