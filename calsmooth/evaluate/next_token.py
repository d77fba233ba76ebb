"""Next-token predictions on given responses: the top-1 probability, whether it was right, log-loss and Brier score.

All four come from the fused forward on the hidden states of the response's tokens (`calsmooth.evaluate.readout`), so
that memory doesn't grow with the number of tokens times the vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from calsmooth.errors import CalsmoothError
from calsmooth.evaluate.batches import Batches, Size, is_out_of_memory
from calsmooth.evaluate.readout import Readout
from calsmooth.records import TokenPredictions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from calsmooth.data import Example

IGNORED = -100


class TokenPredictor:
    """Predicts the labelled tokens of examples with one model. batch_size: rows run at once; None chooses by memory."""

    def __init__(self, model: "PreTrainedModel", *, batch_size: int | None = None) -> None:
        self.model = model
        self.readout = Readout(model)
        self.batches = Batches(model, batch_size)

    @torch.inference_mode()
    def predict(
        self, examples: Sequence["Example"], advance: Callable[..., None] = lambda *_: None
    ) -> TokenPredictions:
        """Predict every token that has a label from those before it, in the order of the rows.

        advance: called with the number of rows that have just been finished.

        Raises:
            CalsmoothError: no row has a label, one row alone is too much for the memory, or a probability isn't a
                number from 0 to 1.
        """
        counts = [count_targets(example) for example in examples]
        first = np.concatenate([[0], np.cumsum(counts)])
        found = torch.full((int(first[-1]), 4), float("nan"), dtype=torch.float64)
        if len(found) == 0:
            raise CalsmoothError("no response tokens to predict; expected rows with a response that fits --max-length")
        order = sorted((i for i, n in enumerate(counts) if n), key=lambda i: -len(examples[i].input_ids))
        try:
            for batch, statistics in self.batches.run(
                order,
                lambda i: Size(len(examples[i].input_ids)),
                lambda batch: self._forward([examples[i] for i in batch]),
            ):
                slots = torch.cat([torch.arange(first[i], first[i + 1]) for i in batch])
                found[slots] = statistics
                advance(len(batch))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            longest = len(examples[order[0]].input_ids)
            raise CalsmoothError(
                f"not enough memory for one row of {longest:,} tokens; give a smaller --max-length"
            ) from error
        if not bool(found.isfinite().all()):
            raise CalsmoothError("the model gave a probability that is not a number from 0 to 1; try --dtype float32")
        confidence, correct, nll, brier = found.numpy().T
        return TokenPredictions(confidence, correct, nll, brier, np.repeat(np.arange(len(examples)), counts))

    def _forward(self, batch: Sequence["Example"]) -> torch.Tensor:
        """(m, 4) statistics of the batch's labelled tokens, row by row, float64 on the CPU."""
        width = max(len(example.input_ids) for example in batch)
        tokens = torch.tensor([[*e.input_ids, *[0] * (width - len(e.input_ids))] for e in batch])
        labels = torch.tensor([[*e.labels, *[IGNORED] * (width - len(e.labels))] for e in batch])
        targets = labels[:, 1:]
        rows, positions = (targets != IGNORED).nonzero(as_tuple=True)
        device = self.model.device
        # Right padding is behind everything that is asked: causal attention needs no mask for it.
        inputs = {
            "input_ids": tokens.to(device),
            "attention_mask": torch.ones_like(tokens).to(device),
            "use_cache": False,
        }
        wanted = (rows.to(device), positions.to(device), targets[rows, positions].to(device))
        return self.readout.token_statistics(inputs, *wanted).cpu().double()


def count_targets(example: "Example") -> int:
    """Labels that can be predicted: the first token has nothing before it."""
    return sum(label != IGNORED for label in example.labels[1:])
