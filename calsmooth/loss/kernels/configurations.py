"""Block sizes that are known to be good, by architecture and by how long the inner product is.

`TABLE` holds them; what `calsmooth bench --autotune` found on a GPU (`tuning`) lies in a file and goes before it.

A tile is BLOCK_N tokens by BLOCK_V vocabulary entries, multiplied BLOCK_D features at a time. Large tiles feed the
matrix units best; with few features a tile's own arithmetic (exponentials, sums) weighs more, and two smaller tiles a
multiprocessor hide one's arithmetic behind the other's product.
"""

import functools
import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from calsmooth.files import cache_folder


@dataclass(frozen=True)
class Configuration:
    block_n: int
    block_v: int
    block_d: int
    warps: int
    stages: int
    descriptors: bool  # tensor-memory descriptors (Hopper and later) or plain pointers
    programs_per_sm: int = 1


VARYING = ("N", "R", "size", "room", "token_bits", "per_token", "sampled", "together", "parts", "max_parts")
"""Arguments of the kernels that change with the number of tokens, from batch to batch. Triton would compile a kernel
again for those that are 1 and those that divide by 16, each time in the middle of a training run; nothing that is hot
gains from it: rows of matrices are aligned by their strides."""

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
    # Blackwell's workstation cards: 100 KB as well, and Hopper's copy engine.
    ("sm120", False, False): Configuration(128, 128, 64, warps=8, stages=2, descriptors=True),
    ("sm120", False, True): Configuration(128, 128, 64, warps=8, stages=2, descriptors=True),
    ("sm120", True, False): Configuration(128, 128, 64, warps=8, stages=2, descriptors=True),
    ("sm120", True, True): Configuration(128, 128, 64, warps=8, stages=2, descriptors=True),
    # Without a GPU the kernels are only interpreted, for their tests.
    ("interpreter", False, False): Configuration(16, 32, 16, warps=4, stages=1, descriptors=True),
    ("interpreter", False, True): Configuration(16, 32, 16, warps=4, stages=1, descriptors=True),
    ("interpreter", True, False): Configuration(16, 32, 16, warps=4, stages=1, descriptors=True),
    ("interpreter", True, True): Configuration(16, 32, 16, warps=4, stages=1, descriptors=True),
}
"""Measured on an H100 for sm90, chosen by shared memory and registers for the others."""


@functools.cache
def architecture(device: torch.device) -> str:
    if device.type != "cuda":
        return "interpreter"
    capability = torch.cuda.get_device_capability(device)
    if capability >= (12, 0):
        return "sm120"
    if capability >= (9, 0):
        return "sm90"
    return "sm80" if capability == (8, 0) else "sm86"


Key = tuple[str, bool, bool]
"""(the GPU's name, short inner product, whether the kernel stores its tiles)"""


def tuned_file() -> Path:
    """Where a search's results are kept."""
    return cache_folder() / "kernels.json"


@functools.cache
def tuned() -> dict[Key, Configuration]:
    """What was found by searches, read once. A file that can't be used is left aside with a warning: it only tunes."""
    path = tuned_file()
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return {(e["gpu"], e["short"], e["storing"]): Configuration(**e["configuration"]) for e in entries}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        warnings.warn(f"{path} isn't used: {error!r}; `calsmooth bench --autotune` writes it anew", stacklevel=2)
        return {}


def key(device: torch.device, D: int, storing: bool) -> Key:
    return _name(device), D <= SHORT, storing


@functools.cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def in_use(device: torch.device, D: int, storing: bool) -> Configuration:
    return tuned().get(key(device, D, storing)) or TABLE[architecture(device), D <= SHORT, storing]


def choose(hidden_states: Tensor, lm_head_weight: Tensor, storing: bool) -> Configuration:
    """The entry for this GPU; with pointers where the rows' alignment rules descriptors out."""
    device, D = hidden_states.device, hidden_states.shape[1]
    configuration = in_use(device, D, storing)
    if configuration.descriptors and not (_describable(hidden_states) and _describable(lm_head_weight)):
        # Without the copy engine, loads take registers: half a tile.
        configuration = replace(configuration, block_v=configuration.block_v // 2, descriptors=False)
    return configuration


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. (triton.cdiv is a hundred times slower on the host.)"""
    return -(-a // b)


@functools.lru_cache(maxsize=1024)
def schedule(
    row_blocks: int, vocabulary_tiles: int, configuration: Configuration, device: torch.device
) -> tuple[int, int]:
    """(blocks of tokens that are walked together, parts of the vocabulary), to fill the device.

    All programs at work walk the vocabulary together, so that the head streams through the cache once. Each of them
    reads its own tokens again at every tile: with more blocks of tokens together than half the multiprocessors, that
    alone takes the memory's whole bandwidth, however many features there are. A part costs a few numbers per token;
    the smallest count within 2 % of the best use of the multiprocessors wins.
    """
    sms = _multiprocessors(device)
    slots = sms * configuration.programs_per_sm
    groups = cdiv(row_blocks, max(1, sms // 2))
    together = cdiv(row_blocks, groups)
    candidates = range(1, min(vocabulary_tiles, max(1, 2 * slots // together), 64) + 1)
    uses = {parts: use(together, parts, vocabulary_tiles, slots) for parts in candidates}
    best = max(uses.values())
    return together, next(parts for parts in candidates if uses[parts] >= 0.98 * best)


def use(together: int, parts: int, vocabulary_tiles: int, slots: int) -> float:
    """Share of the device's time in which its multiprocessors have a tile to make."""
    steps = cdiv(vocabulary_tiles, parts) * cdiv(together * parts, slots)
    return together * vocabulary_tiles / (slots * steps)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """4 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _describable(x: Tensor) -> bool:
    """Rows of a descriptor start at multiples of 16 bytes."""
    return (
        x.stride(1) == 1
        and x.stride(0) >= x.shape[1]
        and x.stride(0) * x.element_size() % 16 == 0
        and x.data_ptr() % 16 == 0
    )
