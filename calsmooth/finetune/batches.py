"""Examples -> tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from calsmooth.data import IGNORED, Example


class Collator:
    """Examples -> one batch, padded on the right to the longest (a multiple of 8)."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        width = -(-max(len(e.input_ids) for e in examples) // 8) * 8
        input_ids = torch.full((len(examples), width), self.pad_token_id)
        labels = torch.full((len(examples), width), IGNORED)
        attention_mask = torch.zeros(len(examples), width, dtype=torch.long)
        for i, e in enumerate(examples):
            n = len(e.input_ids)
            input_ids[i, :n] = torch.tensor(e.input_ids)
            labels[i, :n] = torch.tensor(e.labels)
            attention_mask[i, :n] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
