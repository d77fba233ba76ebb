"""The entries that `filtered` keeps: found, listed, and sorted both ways.

Group by group of 64 vocabulary entries: which tokens can hold an entry to keep there is told by the maxima that the
walk wrote down; those products are made again, and what reaches the threshold goes into one list.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from calsmooth.loss.kernels.configurations import VARYING, Configuration
from calsmooth.loss.kernels.tiles import Operands, to_logits
from calsmooth.loss.kernels.walk import GROUP

ENTRIES_PER_TOKEN = 256
"""Room in the list at eps = 2^-12, twice what real models were seen to need; grows as eps^-0.6, as they do."""

NO_ENTRY = tl.constexpr(2**63 - 1)

MARGIN = tl.constexpr(2.0**-8)
"""Group maxima are stored as bfloat16, rounded to nearest; this much of their size keeps every group that counts."""

CAPPED_FACTOR = 3
"""A softcap brings a token's largest logits together: that many times as many of them count."""


def capacity(N: int, V: int, eps: float, softcap: float | None) -> int:
    """Entries that the list has room for. A token can't have more than 1 / eps."""
    typical = ENTRIES_PER_TOKEN * (2.0**-12 / eps) ** 0.6 * (1 if softcap is None else CAPPED_FACTOR)
    return N * min(math.ceil(min(typical, 1.0 / eps)), V)


def group_size(configuration: Configuration) -> int:
    return min(GROUP, configuration.block_v)


def list_entries(
    operands: Operands,
    targets: Tensor,
    target_logits: Tensor,
    logsumexp: Tensor,
    group_maxima: Tensor,
    eps: float,
) -> tuple[Tensor, ...]:
    """The entries to keep, sorted.

    Returns keys (column << 32 | token, ascending, `NO_ENTRY` at the end), their probabilities, the columns'
    first places (V + 1,), the columns by token, each token's places in the first list, their first
    places (N + 1,), the kept mass (N,), and 1 if there was no room for all (int32).
    """
    E, C, bias = operands.E, operands.C, operands.bias
    N, V, device = len(E), len(C), E.device
    groups, room = len(group_maxima), capacity(N, V, eps, operands.semantics.softcap)
    kept = targets >= 0

    thresholds = torch.where(kept, logsumexp + math.log(eps), math.inf)
    counts = torch.empty(groups, dtype=torch.int32, device=device)
    pairs = torch.empty(room, dtype=torch.int32, device=device)
    cursor = torch.zeros((), dtype=torch.int32, device=device)
    listing = {"stride": group_maxima.stride(0), "N": N, "room": room, "BLOCK": 1024 if E.is_cuda else 16}
    listing["num_warps"] = 8
    list_pairs_kernel[(groups,)](group_maxima, thresholds, counts, counts, pairs, FILL=False, **listing)
    ends = counts.cumsum(0)
    offsets = ends - counts
    list_pairs_kernel[(groups,)](group_maxima, thresholds, counts, offsets, pairs, FILL=True, **listing)

    tokens = torch.arange(N, device=device)
    keys = torch.full((room + N,), NO_ENTRY.value, dtype=torch.int64, device=device)
    keys[room:] = torch.where(kept, (targets.long() << 32) | tokens, NO_ENTRY.value)
    probabilities = torch.zeros(room + N, device=device)
    probabilities[room:] = (target_logits - logsumexp).exp()
    k = operands.semantics
    emit_kernel[(groups, 4)](
        E,
        C,
        E if bias is None else bias,
        targets,
        logsumexp,
        counts,
        offsets,
        pairs,
        keys,
        probabilities,
        cursor,
        room,
        eps,
        V,
        E.shape[1],
        E.stride(0),
        C.stride(0),
        k.scale,
        k.softcap or 1.0,
        **k.constants(bias),
        GROUP=group_size(operands.configuration),
        BLOCK_N=128 if E.is_cuda else 16,
        BLOCK_D=64 if E.is_cuda else 16,
        num_warps=4,
        num_stages=3,
    )
    overflow = ((ends[-1] > room) | (cursor > room)).int()
    del pairs, thresholds

    keys, order = torch.sort(keys)
    probabilities = probabilities[order]
    column_starts = torch.searchsorted(keys, torch.arange(V + 1, device=device) << 32).int()
    by_token = torch.where(keys == NO_ENTRY.value, N, keys & 0xFFFFFFFF).int()
    by_token, order = torch.sort(by_token, stable=True)
    token_starts = torch.searchsorted(by_token, torch.arange(N + 1, dtype=torch.int32, device=device)).int()
    token_columns = (keys[order] >> 32).int()
    kept_mass = torch.where(kept & (overflow == 0), segment_sum(token_starts, probabilities[order]), 1.0)
    return keys, probabilities, column_starts, token_columns, order.int(), token_starts, kept_mass, overflow


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
    keys,  # (room,) int64: column << 32 | token
    probabilities,  # (room,) float32
    cursor,  # int32
    room,
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
            base = tl.atomic_add(cursor, found, sem="relaxed")
            place = base + (tl.cumsum(by_row, 0) - by_row)[:, None] + tl.cumsum(ones, 1) - 1
            keep = keep & (place < room)
            key = (columns.to(tl.int64)[None, :] << 32) | tokens.to(tl.int64)[:, None]
            tl.store(keys + place, key, mask=keep)
            tl.store(probabilities + place, p, mask=keep)


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
    out = torch.empty(len(starts) - 1, device=values.device)
    segment_sum_kernel[(len(out),)](starts, values, out, BLOCK=32, num_warps=1)
    return out
