"""How many examples go through the model at once: what divides a step's batch and fits into memory.

Results don't depend on it beyond rounding and the draws of dropout; speed and memory do.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from calsmooth.data import Example
from calsmooth.errors import CalsmoothError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS_AT_ONCE = {"cpu": 2048, "mps": 4096, "cuda": 65536}
"""More gains no speed, on the processors and GPUs that we know."""

BUSY_TOKENS = {"mps": 1024, "cuda": 4096}
"""Fewer take hardly less time: the processor waits for its instructions."""

CALL_TOKENS = {"cpu": 256}
"""What going through the model once costs besides its tokens, as so many more: about what a model of under a million
parameters was seen to take, and more than a large one does."""

OPTIMIZER_BYTES = 8
"""AdamW's two float32 moments of one parameter, which don't exist yet while sizes are tried; others need less."""


def micro_batch_candidates(
    batch_size: int, longest: int, device_type: str, step_tokens: int | None = None
) -> list[int]:
    """Divisors of the batch size, largest first, whose longest examples together stay within TOKENS_AT_ONCE.

    step_tokens: where examples are packed, the tokens of the step that has the most of them.
    """
    budget = TOKENS_AT_ONCE.get(device_type, TOKENS_AT_ONCE["cpu"])

    def tokens(size: int) -> int:
        return size * longest if step_tokens is None else packed_tokens(step_tokens, size, batch_size, longest)

    divisors = [d for d in range(batch_size, 0, -1) if batch_size % d == 0]
    return [d for d in divisors if tokens(d) <= budget] or [1]


def packed_tokens(step_tokens: int, size: int, batch_size: int, longest: int) -> int:
    """At most so many tokens has a micro-batch of `size` of the step's examples, dealt out as `order.deal` does it.

    Its share of the step and one example more: each example goes where there are the fewest tokens yet.
    """
    return min(step_tokens * size // batch_size + longest, size * longest)


def fastest(candidates: Sequence[int], tokens: Callable[[int], Sequence[int]], device_type: str) -> list[int]:
    """The candidate that takes the least time, and after it the smaller ones, should it not fit.

    Large micro-batches keep the processor busy, and hold more padding. tokens: those of each micro-batch of a size,
    padding included, over the same steps for every size.
    """
    busy, call = BUSY_TOKENS.get(device_type, 0), CALL_TOKENS.get(device_type, 0)
    best = min(candidates, key=lambda size: sum(max(count, busy) + call for count in tokens(size)))
    return [size for size in candidates if size <= best]


def enable_gradient_checkpointing(model: "PreTrainedModel") -> None:
    """Activations are made again in the backward pass instead of being kept.

    Raises:
        UsageError: this architecture can't.
    """
    if not model.supports_gradient_checkpointing:
        raise UsageError(f"--gradient-checkpointing: {type(model).__name__} can't; leave the flag out")
    # Newer versions of transformers warn at the second name, older ones don't have the first.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    # Reentrant checkpoints would lose the gradients of adapters, whose inputs need none.
    enable({"use_reentrant": False})


def largest_that_fits(
    model: torch.nn.Module,
    heaviest: Callable[[int], Sequence[Example]],
    collate: Callable[[Sequence[Example]], dict[str, Tensor]],
    candidates: Sequence[int],
    dtype: torch.dtype,
) -> int:
    """The first candidate whose heaviest micro-batch goes forward and backward on the model's GPU.

    heaviest: gives that micro-batch's examples. model: with the fused loss plugged in, in training mode; its gradients
    are empty afterwards. Random numbers drawn here are given back.

    Raises:
        CalsmoothError: a single example doesn't fit.
    """
    device = next(model.parameters()).device
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for size in candidates:
        with torch.random.fork_rng(devices=[device]):
            fits = _fits(model, collate(heaviest(size)), device, dtype, parameters * OPTIMIZER_BYTES)
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        if fits:
            return size
    raise CalsmoothError(
        f"not even one example of {len(heaviest(1)[0].input_ids)} tokens fits into the memory of {device}; try a lower "
        "--max-length, --gradient-checkpointing, or a smaller model"
    )


def _fits(
    model: torch.nn.Module, batch: dict[str, Tensor], device: torch.device, dtype: torch.dtype, reserved: int
) -> bool:
    try:
        optimizer = torch.empty(reserved, dtype=torch.uint8, device=device)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
        loss.backward()
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        return False
    del optimizer
    return True
