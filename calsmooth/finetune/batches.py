"""Examples -> tensors: one example a row, padded; or packed, several to a row.

Packed examples don't see each other. Their position ids begin at 0 again, which transformers' attention masks (SDPA,
eager, flex) take as the beginning of another sequence where no attention mask is given, and flash attention where the
batch is a single row. Labels need nothing: the first of each example is ignored, so that no target is predicted from
another example's last token. `calsmooth.finetune.packing` checks that a model does as it is told.
"""

import bisect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from calsmooth.data import IGNORED, Example

Collate = Callable[[Sequence[Example]], dict[str, Tensor]]

WIDTHS_TRIED = 4
"""Widths of packed rows that are compared for the least padding."""


class Collator:
    """Examples -> one batch, padded on the right to the longest (a multiple of 8)."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        width = _multiple_of_8(max(len(e.input_ids) for e in examples))
        input_ids = torch.full((len(examples), width), self.pad_token_id)
        labels = torch.full((len(examples), width), IGNORED)
        attention_mask = torch.zeros(len(examples), width, dtype=torch.long)
        for i, e in enumerate(examples):
            n = len(e.input_ids)
            input_ids[i, :n] = torch.tensor(e.input_ids)
            labels[i, :n] = torch.tensor(e.labels)
            attention_mask[i, :n] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


class PackedCollator:
    """Examples -> as few rows as they fit into, one after another; the ends of the rows are padding.

    one_row: all in a single row, for flash attention, to which the width costs nothing.
    """

    def __init__(self, pad_token_id: int, one_row: bool = False) -> None:
        self.pad_token_id, self.one_row = pad_token_id, one_row

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        lengths = [len(e.input_ids) for e in examples]
        rows = [list(range(len(examples)))] if self.one_row else pack(lengths)
        width = _multiple_of_8(max(sum(lengths[i] for i in row) for row in rows))
        input_ids = torch.full((len(rows), width), self.pad_token_id)
        labels = torch.full((len(rows), width), IGNORED)
        position_ids = torch.empty(len(rows), width, dtype=torch.long)
        for r, row in enumerate(rows):
            start = 0
            for i in row:
                here = slice(start, start + lengths[i])
                input_ids[r, here] = torch.tensor(examples[i].input_ids)
                labels[r, here] = torch.tensor(examples[i].labels)
                position_ids[r, here] = torch.arange(lengths[i])
                start += lengths[i]
            position_ids[r, start:] = torch.arange(width - start)  # the padding is a sequence of its own
        return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}


def pack(lengths: Sequence[int]) -> list[list[int]]:
    """Which examples share a row: indices, by row, with the least padding that a few widths give.

    No row is longer than about twice the longest example, because attention costs what a row is wide.
    """
    longest, total = max(lengths), sum(lengths)
    fewest, most = -(-total // (2 * longest)), -(-total // longest)
    # So many rows could hold all, were there no seams: from narrow rows to wide ones.
    counts = range(most, max(fewest, most - WIDTHS_TRIED) - 1, -1)
    candidates = [best_fit(lengths, max(longest, _multiple_of_8(-(-total // count)))) for count in counts]
    return min(candidates, key=lambda rows: packed_size(lengths, rows))


def padded_size(lengths: Sequence[int]) -> int:
    """Tokens of the batch with an example a row, padding included."""
    return len(lengths) * _multiple_of_8(max(lengths))


def packed_size(lengths: Sequence[int], rows: Sequence[Sequence[int]]) -> int:
    """Tokens of the batch, padding included."""
    return len(rows) * _multiple_of_8(max(sum(lengths[i] for i in row) for row in rows))


def best_fit(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Best fit, longest first: each example goes into the row that it fills best, or begins a new one.

    width: at least the longest example.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(free, (lengths[i], -1))
        left, row = free.pop(at) if at < len(free) else (width, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        bisect.insort(free, (left - lengths[i], row))
    return rows


def _multiple_of_8(width: int) -> int:
    return -(-width // 8) * 8
