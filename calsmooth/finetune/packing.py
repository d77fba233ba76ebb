"""Before a packed run: do examples that share a row leave each other alone?

Whether they do is up to the architecture. Attention can be told where one example ends; a convolution over the tokens
or a recurrent state (linear attention, Mamba) carries it on into the next, unless it was written for packed rows. So
short random examples go through the model packed and one by one, and their logits have to be the same.
"""

from typing import TYPE_CHECKING

import torch

from calsmooth.data import Example
from calsmooth.errors import CalsmoothError
from calsmooth.finetune.batches import Collate, Collator, PackedCollator

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LENGTHS = (13, 9, 7, 11)
TOLERANCE = 1e-4
"""Of the logits, against their spread: float32 sums in another order."""

SEES_ALL_OF_ITS_SEQUENCE = {"full_attention", "sliding_attention"}
"""Kinds of layers whose masks are known to be cut at position ids, at any length."""


def check_packing(model: "PreTrainedModel") -> float:
    """The largest difference between packed and separate logits, against their spread.

    The model is left as it was: no gradient, no mode, no random number is touched.

    Raises:
        CalsmoothError: the model mixes packed examples; the message says by how much and which of its layers may.
    """
    model_name, kinds = type(model).__name__, _unknown_layers(model)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        difference = _difference(model)
    finally:
        for module, mode in modes.items():
            module.training = mode
    reason = f"; it has layers of the type {', '.join(kinds)}" if kinds else ""
    if not difference <= TOLERANCE:
        raise CalsmoothError(
            f"--packing: in {model_name} examples that share a row change each other's logits (by "
            f"{difference:.1e} of their spread){reason}; leave --packing out"
        )
    if kinds:
        raise CalsmoothError(
            f"--packing: {model_name} has layers of the type {', '.join(kinds)}, of which it isn't known that they "
            "keep long examples in a row apart; leave --packing out"
        )
    return difference


def collator(packing: bool, model: "PreTrainedModel", pad_token_id: int) -> Collate:
    """What makes this model's batches."""
    return PackedCollator(pad_token_id, _one_row(model)) if packing else Collator(pad_token_id)


def _one_row(model: "PreTrainedModel") -> bool:
    # Flash attention finds the sequences by their position ids only where the batch is one row.
    return "flash" in str(getattr(model.config, "_attn_implementation", ""))


def _unknown_layers(model: "PreTrainedModel") -> list[str]:
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or []
    return sorted({str(kind) for kind in kinds} - SEES_ALL_OF_ITS_SEQUENCE)


@torch.no_grad()
def _difference(model: "PreTrainedModel") -> float:
    size = int(model.config.get_text_config(decoder=True).vocab_size)
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(size, (length,), generator=generator).tolist() for length in LENGTHS]
    examples = [Example(ids, ids) for ids in tokens]
    packed = PackedCollator(0, _one_row(model))(examples)
    together = _logits(model, packed)
    worst, spread = 0.0, 0.0
    for example in examples:
        [alone] = _logits(model, Collator(0)([example]))[:, : len(example.input_ids)]
        row, start = _where(packed["input_ids"], example.input_ids)
        here = together[row, start : start + len(example.input_ids)]
        worst = max(worst, float((here - alone).abs().max()))
        spread = max(spread, float(alone.std()))
    return worst / max(spread, 1e-30)


def _logits(model: "PreTrainedModel", batch: dict[str, torch.Tensor]) -> torch.Tensor:
    inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
    return model(**inputs, use_cache=False).logits.float()


def _where(rows: torch.Tensor, tokens: list[int]) -> tuple[int, int]:
    windows = rows.unfold(1, len(tokens), 1)
    row, start = (windows == torch.tensor(tokens)).all(-1).nonzero()[0].tolist()
    return row, start
