"""A search for the kernels' block sizes on the GPU at hand, for `calsmooth bench --autotune`.

What the kernels come with is known to be good on Hopper and chosen by shared memory for others; nobody waits for a
search in training. This one tries the tile sizes, pipeline depths and occupancies that can make sense, on the problem
it is given, and keeps what is fastest for its kind: this GPU, and an inner product as short or as long.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from calsmooth.loss import fused
from calsmooth.loss.functional import linear_cross_entropy, prepare
from calsmooth.loss.kernels import configurations
from calsmooth.loss.kernels.configurations import Configuration

TILES = ((128, 256, 8), (128, 128, 8), (128, 128, 4), (64, 256, 8), (64, 256, 4), (64, 128, 4))
"""Tokens, vocabulary entries, warps."""

RUNS = 5

AGREEMENT = 1e-3
"""A candidate whose loss is further off than this, relatively, is no candidate."""


@dataclass(frozen=True)
class Found:
    storing: bool  # for the kernels that store their tiles; else for those that only walk
    configuration: Configuration
    ms: float  # loss and gradients, or the loss alone
    ms_before: float  # with the configuration that was in use
    tried: int  # configurations that ran


def candidates(device: torch.device) -> Iterator[Configuration]:
    """What can make sense on this architecture; whether it fits the device shows when it is compiled."""
    descriptors = configurations.architecture(device) == "sm90"
    for n, v, warps in TILES:
        for block_d, stages in ((64, 2), (64, 3), (64, 4), (32, 3), (32, 4)):
            # Below Hopper, loads take registers as well.
            if (block_d == 32) if descriptors else (n * v > 128 * 128):
                continue
            for programs in (1, 2) if n * v <= 128 * 128 else (1,):
                yield Configuration(n, v, block_d, warps, stages, descriptors, programs)


def search(
    hidden_states: Tensor,  # (N, D), bfloat16
    lm_head_weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    timed: Callable[[Callable[[], Tensor]], tuple[float, Tensor]],
    choices: list[Configuration],
    advance: Callable[[], None],
) -> list[Found]:
    """The fastest of `choices` for the walk and for the kernels that store their tiles; in use from now on.

    Args:
        timed: runs a function that gives the loss; milliseconds and the loss.
        advance: called once for each choice and kind.
    """
    E, C = hidden_states.detach(), lm_head_weight.detach()
    found = []
    for storing in (False, True):
        key = configurations.key(E.device, E.shape[1], storing)
        before = configurations.choose(E, C, storing)
        run = _gradients(E, C, targets) if storing else _loss(E, C, targets)
        best, (ms, expected) = before, timed(run)
        ms_before, tried = ms, 1
        for candidate in choices:
            configurations.tuned()[key] = candidate
            result = _attempt(timed, run)
            if result is not None:
                tried += 1
                its_ms, loss = result
                if abs(loss - expected) <= AGREEMENT * abs(expected) and its_ms < ms:
                    best, ms = candidate, its_ms
            advance()
        configurations.tuned()[key] = best
        found.append(Found(storing, best, ms, ms_before, tried))
    return found


def on_device(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Median of a few runs in milliseconds on the GPU's clock, after one that compiles; and the loss."""
    loss, times = run(), []
    for _ in range(RUNS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times), loss


def tuned_file() -> Path:
    return configurations.tuned_file()


def file_content() -> list[dict[str, Any]]:
    """All that is tuned, earlier results for other GPUs and sizes included, as `tuned_file()` holds it."""
    return [
        {"gpu": gpu, "short": short, "storing": storing, "configuration": asdict(configuration)}
        for (gpu, short, storing), configuration in sorted(configurations.tuned().items(), key=lambda item: item[0])
    ]


def why_not(hidden_states: Tensor, lm_head_weight: Tensor, targets: Tensor) -> str | None:
    """What keeps the kernels from running this problem at all, in a few words."""
    problem, _ = prepare(hidden_states, lm_head_weight, targets)
    return fused.why_not(problem)


def _loss(E: Tensor, C: Tensor, targets: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return linear_cross_entropy(E, C, targets, label_smoothing=0.1)

    return run


def _gradients(E: Tensor, C: Tensor, targets: Tensor) -> Callable[[], Tensor]:
    from calsmooth.loss.kernels import whole

    E, C = E.detach().requires_grad_(), C.detach().requires_grad_()
    # The exact mode's short path, for logits that fit into one buffer, stores no tiles: nothing there to choose.
    mode: Literal["exact", "lean"] = "lean" if whole.fits(len(E), len(C)) else "exact"

    def run() -> Tensor:
        loss = linear_cross_entropy(E, C, targets, label_smoothing=0.1, mode=mode)
        torch.autograd.grad(loss, [E, C])
        return loss.detach()

    return run


def _attempt(
    timed: Callable[[Callable[[], Tensor]], tuple[float, Tensor]], run: Callable[[], Tensor]
) -> tuple[float, Tensor] | None:
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    try:
        return timed(run)
    except (OutOfResources, PTXASError, CompilationError):
        return None  # too much shared memory or too many registers for this device
