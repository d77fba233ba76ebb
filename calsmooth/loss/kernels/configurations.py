"""Block sizes that are known to be good, by architecture and by how long the inner product is.

A tile is BLOCK_N tokens by BLOCK_V vocabulary entries, multiplied BLOCK_D features at a time. Large tiles feed the
matrix units best; with few features a tile's own arithmetic (exponentials, sums) weighs more, and two smaller tiles a
multiprocessor hide one's arithmetic behind the other's product.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Configuration:
    block_n: int
    block_v: int
    block_d: int
    warps: int
    stages: int
    descriptors: bool  # tensor-memory descriptors (Hopper and later) or plain pointers
    programs_per_sm: int = 1


SHORT = 1024
"""Up to this many features an inner product counts as short."""

TABLE = {
    # (architecture, short inner product, whether the kernel stores its tiles)
    ("sm90", False, False): Configuration(128, 256, 64, warps=8, stages=3, descriptors=True),
    ("sm90", False, True): Configuration(128, 256, 64, warps=8, stages=3, descriptors=True),
    ("sm90", True, False): Configuration(128, 128, 64, warps=4, stages=3, descriptors=True, programs_per_sm=2),
    ("sm90", True, True): Configuration(128, 256, 64, warps=8, stages=3, descriptors=True),
    ("sm80", False, False): Configuration(128, 128, 64, warps=8, stages=3, descriptors=False),
    ("sm80", False, True): Configuration(128, 128, 64, warps=8, stages=3, descriptors=False),
    ("sm80", True, False): Configuration(128, 128, 64, warps=8, stages=3, descriptors=False),
    ("sm80", True, True): Configuration(128, 128, 64, warps=8, stages=3, descriptors=False),
    # Ada and the small Amperes: 100 KB of shared memory.
    ("sm86", False, False): Configuration(128, 128, 32, warps=8, stages=3, descriptors=False),
    ("sm86", False, True): Configuration(128, 128, 32, warps=8, stages=3, descriptors=False),
    ("sm86", True, False): Configuration(128, 128, 32, warps=8, stages=3, descriptors=False),
    ("sm86", True, True): Configuration(128, 128, 32, warps=8, stages=3, descriptors=False),
    # Without a GPU the kernels are only interpreted, for their tests.
    ("interpreter", False, False): Configuration(16, 32, 16, warps=4, stages=1, descriptors=True),
    ("interpreter", False, True): Configuration(16, 32, 16, warps=4, stages=1, descriptors=True),
    ("interpreter", True, False): Configuration(16, 32, 16, warps=4, stages=1, descriptors=True),
    ("interpreter", True, True): Configuration(16, 32, 16, warps=4, stages=1, descriptors=True),
}
"""Measured on an H100 for sm90, chosen by shared memory and registers for the others."""


def architecture(device: torch.device) -> str:
    if device.type != "cuda":
        return "interpreter"
    capability = torch.cuda.get_device_capability(device)
    if capability >= (9, 0):
        return "sm90"
    return "sm80" if capability == (8, 0) else "sm86"


def choose(hidden_states: Tensor, lm_head_weight: Tensor, storing: bool) -> Configuration:
    """The table's entry; with pointers where the rows' alignment rules descriptors out."""
    configuration = TABLE[architecture(hidden_states.device), hidden_states.shape[1] <= SHORT, storing]
    if configuration.descriptors and not (_describable(hidden_states) and _describable(lm_head_weight)):
        # Without the copy engine, loads take registers: half a tile.
        configuration = replace(configuration, block_v=configuration.block_v // 2, descriptors=False)
    return configuration


def schedule(
    row_blocks: int, vocabulary_tiles: int, configuration: Configuration, device: torch.device
) -> tuple[int, int]:
    """(blocks of tokens that are walked together, parts of the vocabulary), to fill the device.

    All programs at work walk the vocabulary together, so that the head streams through the cache once. Each of them
    reads its own tokens again at every tile: with more blocks of tokens together than half the multiprocessors, that
    alone takes the memory's whole bandwidth, however many features there are. A part costs a few numbers per token;
    the smallest count within 2 % of the best use of the multiprocessors wins.
    """
    sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    slots = sms * configuration.programs_per_sm
    groups = math.ceil(row_blocks / max(1, sms // 2))
    together = math.ceil(row_blocks / groups)

    def use(parts: int) -> float:
        steps = math.ceil(vocabulary_tiles / parts) * math.ceil(together * parts / slots)
        return together * vocabulary_tiles / (slots * steps)

    candidates = range(1, min(vocabulary_tiles, max(1, 2 * slots // together), 64) + 1)
    best = max(use(parts) for parts in candidates)
    return together, next(parts for parts in candidates if use(parts) >= 0.98 * best)


def _describable(x: Tensor) -> bool:
    """Rows of a descriptor start at multiples of 16 bytes."""
    return x.stride(1) == 1 and x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
