"""How many sequences run at once: as many as the free memory holds, half of them where that was too many.

A batch size changes speed and memory and nothing else, so an estimate is good enough: it may be off by a factor of two
either way before the halving sets in, and beyond some size a batch is no faster for being larger.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch

from calsmooth.environment import free_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")
R = TypeVar("R")

ENOUGH_TOKENS = {"cpu": 512, "cuda": 2048}
"""New tokens of a batch beyond which even a large model isn't faster per token, and only pads more."""
ENOUGH_WORK = {"cpu": 2.5e9, "cuda": 6e12}
"""New tokens times parameters for which a forward takes far longer than its launch: small models need more tokens."""
CALL_WORK = {"cpu": 0, "cuda": 3e12}
"""New tokens times parameters that a device runs in the time in which the host launches one forward of them. (A
processor launches nothing.)"""
SHARE_OF_FREE = 0.5


@dataclass(frozen=True)
class Size:
    """Tokens of one sequence: those that run and those that it goes on from.

    kept: whether the new tokens' keys and values outlive the forward.
    """

    new: int
    past: int = 0
    kept: bool = False


class Batches:
    """Cuts work into batches for one model. `batch_size` None: chosen. `halvings` counts what memory was too small for.

    Where it was, all later batches are smaller as well. `enough`: new tokens of a batch that wouldn't be faster for
    having more. `call`: how many tokens one more forward costs as much as.
    """

    def __init__(self, model: "PreTrainedModel", batch_size: int | None = None) -> None:
        self.batch_size = batch_size
        self.halvings = 0
        self._divisor = 1
        self._device = model.device
        self._footprint = _Footprint.of(model)
        kind = "cpu" if model.device.type == "cpu" else "cuda"
        self.enough = max(ENOUGH_WORK[kind] / model.num_parameters(), ENOUGH_TOKENS[kind])
        self.call = CALL_WORK[kind] / model.num_parameters()

    def run(
        self, items: Sequence[T], size: Callable[[T], Size], work: Callable[[list[T]], R]
    ) -> Iterator[tuple[list[T], R]]:
        """Yields (batch, work(batch)) for consecutive batches of items that come longest first.

        Raises:
            torch.OutOfMemoryError: a single item is too much.
        """
        start = 0
        while start < len(items):
            largest = size(items[start])
            batch = list(items[start : start + self._rows(largest)])
            done, result = self._attempt(batch, work)
            if done:
                yield batch, result.pop()  # held by the caller alone: it may be large
                start += len(batch)
            else:
                self._halve(len(batch), largest)

    def _attempt(self, batch: list[T], work: Callable[[list[T]], R]) -> tuple[bool, list[R]]:
        # Returns before anything is freed: while the error lives, so do the tensors of the frames that it came from.
        try:
            return True, [work(batch)]
        except RuntimeError as error:
            if not is_out_of_memory(error) or len(batch) == 1:
                raise
            return False, []

    def _halve(self, rows: int, size: Size) -> None:
        self.halvings += 1
        if self.batch_size is not None:
            self.batch_size = rows // 2
        while self._rows(size) > rows // 2:
            self._divisor *= 2
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _rows(self, size: Size) -> int:
        if self.batch_size is not None:
            return self.batch_size
        by_memory = SHARE_OF_FREE * free_memory(self._device) / self._footprint.bytes(size)
        return max(int(min(by_memory, self.enough / size.new) / self._divisor), 1)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or the processor's allocator, had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


@dataclass(frozen=True)
class _Footprint:
    """What one sequence needs beside the weights, estimated from the model's sizes."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_values: int  # numbers a token and layer in the cache
    itemsize: int
    eager: bool  # attention that writes its scores down

    @staticmethod
    def of(model: "PreTrainedModel") -> "_Footprint":
        config = model.config.get_text_config(decoder=True)
        hidden = int(getattr(config, "hidden_size", 0) or 1024)
        heads = int(getattr(config, "num_attention_heads", 0) or 1)
        head_size = int(getattr(config, "head_dim", None) or hidden // heads)
        return _Footprint(
            layers=int(getattr(config, "num_hidden_layers", 0) or 1),
            hidden=hidden,
            intermediate=int(getattr(config, "intermediate_size", None) or 4 * hidden),
            heads=heads,
            key_values=2 * head_size * int(getattr(config, "num_key_value_heads", None) or heads),
            itemsize=model.dtype.itemsize,
            eager=getattr(config, "_attn_implementation", "eager") == "eager",
        )

    def bytes(self, size: Size) -> int:
        """Of one sequence, at the fullest moment of its forward."""
        seen = size.new + size.past
        # Keys and values as one layer's attention reads them, repeated for every head; those kept are of all layers.
        attention = 2 * seen * self.hidden + seen * self.key_values
        attention += size.new * self.key_values * self.layers if size.kept else 0
        activations = size.new * (8 * self.hidden + 3 * self.intermediate)
        scores = 2 * self.heads * size.new * seen if self.eager else size.new * seen
        return self.itemsize * (attention + activations) + 4 * (2 * size.new * self.hidden + scores)
