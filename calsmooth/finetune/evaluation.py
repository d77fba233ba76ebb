"""Next-token predictions on held-out rows while a model trains: is it right, and does it know when it is?

Everything comes from the fused forward (`calsmooth.loss.token_statistics`), so that measuring holds no logits either.
"""

import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from calsmooth.data import Example
from calsmooth.finetune.head import STATISTICS
from calsmooth.finetune.loading import BLANK, own_share
from calsmooth.metrics import expected_calibration_error
from calsmooth.processes import ALONE, Processes

LARGEST_SHARE = 0.1
"""Of a data set, at most so much is held out."""


def choose_held_out(rows: int, wanted: int, seed: int) -> list[int]:
    """Indices of the examples that aren't trained on: the same for the same seed, in ascending order."""
    count = max(1, min(wanted, int(rows * LARGEST_SHARE)))
    return sorted(random.Random(f"held out with seed {seed}").sample(range(rows), count))


@torch.no_grad()
def measure(
    model: torch.nn.Module,
    examples: Sequence[Example],
    collate: Callable[[Sequence[Example]], dict[str, Tensor]],
    batch_size: int,
    device: torch.device,
    filtered: bool = False,
    processes: Processes = ALONE,
) -> dict[str, float]:
    """Calibration of the predictions of the examples' target tokens, as plain numbers; processes share the batches.

    model: patched by `calsmooth.finetune.head.fused_loss`; its mode is kept, and no random number is drawn.

    Returns `eval_nll` (nats a token, without smoothing), `eval_ece` (15 equal-width bins), `eval_accuracy`,
    `eval_confidence` (mean top probability), `eval_entropy`, `eval_logit_distance` (Definition 3.2 of the paper,
    averaged over vocabulary and tokens), `eval_tokens`, and with `filtered` the `eval_kept_mass`.
    """
    training = model.training
    model.eval()
    try:
        found = [
            model(**batch, measure=True)["statistics"].cpu()
            for batch in _batches(examples, collate, batch_size, device, processes)
        ]
    finally:
        model.train(training)
    together = torch.cat([part for parts in processes.shared(found) for part in parts], dim=1)
    rows = dict(zip(STATISTICS, together.double().numpy(), strict=True))
    return summarize(rows, filtered)


def summarize(rows: dict[str, np.ndarray], filtered: bool) -> dict[str, float]:
    """The values of one evaluation from its tokens' `STATISTICS`."""
    values = {
        "eval_nll": -rows["logprob"].mean(),
        "eval_ece": expected_calibration_error(rows["confidence"], rows["correct"]),
        "eval_accuracy": rows["correct"].mean(),
        "eval_confidence": rows["confidence"].mean(),
        "eval_entropy": rows["entropy"].mean(),
        "eval_logit_distance": rows["logit_distance"].mean(),
        "eval_tokens": len(rows["correct"]),
    }
    if filtered:
        values["eval_kept_mass"] = rows["kept_mass"].mean()
    return {name: value if isinstance(value, int) else float(value) for name, value in values.items()}


def _batches(
    examples: Sequence[Example],
    collate: Callable[[Sequence[Example]], dict[str, Tensor]],
    batch_size: int,
    device: torch.device,
    processes: Processes,
) -> Iterator[dict[str, Tensor]]:
    """This process's: longest first, alike lengths together; where it has none in the last round, a blank."""
    ordered = sorted((examples[i] for i in range(len(examples))), key=lambda e: -len(e.input_ids))
    batches = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    for batch in own_share(batches, processes, [BLANK]):
        yield {name: t.to(device) for name, t in collate(batch).items()}
