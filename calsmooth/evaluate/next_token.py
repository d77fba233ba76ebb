"""Next-token predictions on given responses: the top-1 probability, whether it was right, log-loss and Brier score.

The statistics of a token are taken while its logits exist (a chunk at a time), so that memory doesn't grow with the
number of tokens times the vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from calsmooth.errors import CalsmoothError
from calsmooth.evaluate.logits import wanted_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from calsmooth.data import Example

IGNORED = -100
BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}


@dataclass(frozen=True)
class TokenPredictions:
    """One entry a response token, float64: top-1 probability, 1 where it was right, -log p(token), Brier score, row."""

    confidence: np.ndarray
    correct: np.ndarray
    nll: np.ndarray
    brier: np.ndarray
    row: np.ndarray


@torch.inference_mode()
def predict_tokens(
    model: "PreTrainedModel",
    examples: Sequence["Example"],
    *,
    batch_size: int | None = None,
    advance: Callable[..., None] = lambda *_: None,
) -> TokenPredictions:
    """Predict every token that has a label from those before it, in the order of the rows.

    advance: called with the number of rows that have just been finished.

    Raises:
        CalsmoothError: no row has a label, or a probability isn't a number.
    """
    found = torch.full((sum(map(_targets, examples)), 4), float("nan"), dtype=torch.float64)
    if len(found) == 0:
        raise CalsmoothError("no response tokens to predict; expected rows with a response that fits --max-length")
    first = np.concatenate([[0], np.cumsum([_targets(e) for e in examples])])
    order = sorted(
        (i for i in range(len(examples)) if _targets(examples[i])), key=lambda i: -len(examples[i].input_ids)
    )
    budget = BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["cpu"])
    start = 0
    while start < len(order):
        size = batch_size or max(budget // len(examples[order[start]].input_ids), 1)
        batch = order[start : start + size]
        start += size
        slots = torch.tensor([s for i in batch for s in range(first[i], first[i + 1])])
        for begin, statistics in _run(model, [examples[i] for i in batch]):
            found[slots[begin : begin + len(statistics)]] = statistics
        advance(len(batch))
    if not bool(found.isfinite().all()):
        raise CalsmoothError("the model gave a probability that is not a number; try --dtype float32")
    rows = np.repeat(np.arange(len(examples)), np.diff(first))
    confidence, correct, nll, brier = found.numpy().T
    return TokenPredictions(confidence, correct, nll, brier, rows)


def _targets(example: "Example") -> int:
    """Labels that can be predicted: the first token has nothing before it."""
    return sum(label != IGNORED for label in example.labels[1:])


def _run(model: "PreTrainedModel", batch: Sequence["Example"]) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields (start, (m, 4) statistics) for the batch's labelled tokens, row by row."""
    width = max(len(example.input_ids) for example in batch)
    tokens = torch.zeros(len(batch), width, dtype=torch.long)
    labels = torch.full((len(batch), width), IGNORED, dtype=torch.long)
    for r, example in enumerate(batch):
        tokens[r, : len(example.input_ids)] = torch.tensor(example.input_ids)
        labels[r, : len(example.labels)] = torch.tensor(example.labels)
    targets = labels[:, 1:].to(model.device)
    rows, positions = (targets != IGNORED).nonzero(as_tuple=True)
    target = targets[rows, positions]
    # Right padding is behind everything that is asked: causal attention needs no mask for it.
    inputs = {"input_ids": tokens.to(model.device), "attention_mask": torch.ones_like(tokens).to(model.device)}
    for start, logits in wanted_logits(model, {**inputs, "use_cache": False}, rows, positions):
        here = target[start : start + len(logits)]
        logprobs = logits.log_softmax(dim=-1)
        top, predicted = logprobs.max(dim=-1)
        nll = -logprobs.gather(-1, here[:, None])[:, 0]
        squares = logprobs.mul(2).exp().sum(dim=-1)
        brier = squares - 2 * (-nll).exp() + 1
        yield start, torch.stack([top.exp(), (predicted == here).to(nll.dtype), nll, brier], dim=-1).cpu().double()
