"""What made a result: versions, device, platform. Stored beside every number that someone may want to reproduce."""

import importlib.metadata
import importlib.util
import os
import platform
from typing import Any

import calsmooth

_PACKAGES = ("torch", "triton", "transformers", "accelerate", "datasets", "tokenizers", "numpy", "peft")


def versions() -> dict[str, str]:
    """Versions of calsmooth, Python and of those of its dependencies that are installed."""
    found = {"calsmooth": calsmooth.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe_device(device: "str | Any") -> str:
    """The GPU's name, or the processor's and its number of threads."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{_processor()}, {torch.get_num_threads()} threads"
    return device.type


def environment(device: "str | Any") -> dict[str, Any]:
    """Versions, device and platform as plain values for JSON."""
    return {"versions": versions(), "device": describe_device(device), "platform": platform.platform()}


def peak_memory(device: "str | Any") -> int | None:
    """The most bytes that this process has held at once: on its GPU, else in main memory; None where no one counts."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if importlib.util.find_spec("resource") is None:  # Windows
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def free_memory(device: "str | Any") -> int:
    """Bytes that this process may still take: on its GPU, else of the main memory that is there and that it is allowed.

    Processes of one torchrun on one machine share the main memory evenly.
    """
    import torch

    available = available_memory(device)
    if torch.device(device).type == "cuda":
        return available or 0
    return max(_UNKNOWN_MEMORY if available is None else available, 0) // processes_here()


def available_memory(device: "str | Any") -> int | None:
    """Bytes that can still be allocated on a GPU, else of the main memory; None where that can't be told."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    kibibytes = _first_number("/proc/meminfo", "MemAvailable:")
    found = [] if kibibytes is None else [kibibytes * 1024]
    # A container (control groups, version 2) may be allowed less than there is.
    limit, used = _first_number("/sys/fs/cgroup/memory.max"), _first_number("/sys/fs/cgroup/memory.current")
    if limit is not None and used is not None:
        found.append(limit - used)
    return min(found, default=None)


def started_processes() -> int:
    """How many processes a launcher (torchrun, accelerate) says that it started."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def processes_here() -> int:
    """How many of them on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


_UNKNOWN_MEMORY = 4 * 2**30  # where there is no /proc


def _first_number(path: str, key: str = "") -> int | None:
    """The number behind `key` in a file's first such line; None where there is none, as in 'max'."""
    try:
        with open(path, encoding="utf-8") as file:
            words = next((line.removeprefix(key).split() for line in file if line.startswith(key)), [])
    except OSError:
        return None
    return int(words[0]) if words and words[0].isdigit() else None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
