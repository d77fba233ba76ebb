"""The model's logits at the positions asked for, and nowhere else.

The model's own forward makes them, so that softcaps, scalings and biases are whatever the model does: a hook in front
of its head passes on the hidden states of the wanted positions only. Where these are many, the head runs on them a
chunk at a time, so that no more than `LOGIT_BYTES` of logits exist at once.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from calsmooth.errors import CalsmoothError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGIT_BYTES = {"cpu": 128 * 2**20, "cuda": 1024 * 2**20}


def wanted_logits(
    model: "PreTrainedModel",
    inputs: dict[str, Any],
    rows: torch.Tensor,  # (M,)
    positions: torch.Tensor,  # (M,)
) -> Iterator[tuple[int, torch.Tensor]]:
    """Run `model(**inputs)` and yield (start, logits (m, V)) for the M wanted places, at least float32.

    rows, positions: which sequence of the batch, and which token of it.

    Raises:
        CalsmoothError: the model has no output head to ask.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise CalsmoothError(f"{type(model).__name__} has no output head; expected a causal language model")
    chunk = max(LOGIT_BYTES.get(model.device.type, LOGIT_BYTES["cpu"]) // (4 * _vocabulary(model)), 1)
    picked: list[torch.Tensor] = []

    def pick(_: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        picked.append(arguments[0][rows, positions])  # (M, D)
        return (picked[0][None, :chunk], *arguments[1:])

    with head.register_forward_pre_hook(pick):
        logits = model(**inputs).logits[0]
    yield 0, _at_least_float32(logits)
    del logits
    # The other chunks ride on a forward of a single token, which costs next to nothing.
    single = {"input_ids": inputs["input_ids"][:1, :1], "use_cache": False}
    for start in range(chunk, len(rows), chunk):

        def replace(_: torch.nn.Module, arguments: tuple[Any, ...], start: int = start) -> tuple[Any, ...]:
            return (picked[0][None, start : start + chunk], *arguments[1:])

        with head.register_forward_pre_hook(replace):
            yield start, _at_least_float32(model(**single).logits[0])


def _vocabulary(model: "PreTrainedModel") -> int:
    return int(model.config.get_text_config(decoder=True).vocab_size)


def _at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
