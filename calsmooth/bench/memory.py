"""How much memory a piece of work took at its peak, and how much there is.

On CUDA the allocator counts. On a CPU the kernel does: Linux keeps each process's largest resident size and lets it be
reset, so that the peak of a single call can be read without sampling it and without a process for each call. It counts
what any library allocates and touches, not only torch's tensors. Elsewhere peaks aren't measured.
"""

import ctypes
import re
from pathlib import Path

import torch

from calsmooth.environment import available_memory

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Peak bytes above what was in use at `start`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._baseline: int | None = None

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._baseline = torch.cuda.memory_allocated(self.device)
        else:
            _return_free_memory()
            self._baseline = _resident("VmRSS") if _reset_resident_peak() else None

    def read(self) -> int | None:
        """The peak since `start`; None where it can't be measured. Never waits for the device."""
        if self.device.type == "cuda":
            # The allocator counts when it is asked for memory, which is before the GPU gets to using it.
            return torch.cuda.max_memory_allocated(self.device) - (self._baseline or 0)
        peak = _resident("VmHWM")
        return None if peak is None or self._baseline is None else max(0, peak - self._baseline)


def available(device: torch.device) -> int | None:
    """Bytes that can still be allocated on the device; None where that can't be told."""
    return available_memory(device) if device.type in ("cuda", "cpu") else None


def _return_free_memory() -> None:
    """Give freed blocks back to the system, or a call could reuse them unseen."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return  # not glibc


def _reset_resident_peak() -> bool:
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return True


def _resident(name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found.group(1)) * 1024 if found else None
