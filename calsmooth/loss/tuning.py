"""A search for the kernels' block sizes on the GPU at hand, for `calsmooth bench --autotune`.

What the kernels come with is known to be good on Hopper and chosen by shared memory for others; nobody waits for a
search in training. This one tries the tile sizes, pipeline depths and occupancies that can make sense, on the problems
it is given, and keeps one for each kind of problem: this GPU, an inner product as short or as long, and kernels that
store their tiles or only walk. Of several problems of a kind each counts as much as another, however long it takes.
"""

import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
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

Inputs = tuple[Tensor, Tensor, Tensor]
"""Hidden states (N, D) in bfloat16, the head (V, D), targets (N,)."""

Timed = Callable[[Callable[[], Tensor]], tuple[float, Tensor]]
"""Runs a function that gives the loss; milliseconds and the loss."""


@dataclass(frozen=True)
class Found:
    """The fastest for one kind of problem. Times are of loss and gradients where tiles are stored, else of the loss."""

    short: bool  # inner products of up to `configurations.SHORT` features
    storing: bool
    configuration: Configuration
    new: bool  # False where nothing was faster than what was in use
    tried: int  # configurations that ran on every problem
    problems: list[tuple[int, int, int]]  # N, V, D
    ms: list[float]  # one a problem
    ms_before: list[float]  # with the configuration that was in use


@dataclass(frozen=True)
class _Trial:
    """All configurations on one problem."""

    sizes: tuple[int, int, int]
    ms_before: float
    ms: dict[Configuration, float]  # of those that run and agree


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
    problems: Iterable[Inputs], timed: Timed, choices: list[Configuration], advance: Callable[[], None]
) -> list[Found]:
    """The fastest of `choices` for each kind among `problems`, which are taken one at a time; in use from now on.

    Fastest is the least geometric mean of the problems' times. A configuration that fails on one of them is none.

    Args:
        advance: called twice for each problem and choice.
    """
    trials: dict[configurations.Key, list[_Trial]] = {}
    before: dict[configurations.Key, Configuration] = {}
    for hidden_states, lm_head_weight, targets in problems:
        E, C = hidden_states.detach(), lm_head_weight.detach()
        for storing in (False, True):
            run = _gradients(E, C, targets) if storing else _loss(E, C, targets)
            key = configurations.key(E.device, E.shape[1], storing)
            before[key] = configurations.in_use(E.device, E.shape[1], storing)
            trial = _Trial((len(E), *C.shape), *_try_all(key, run, timed, choices, advance))
            trials.setdefault(key, []).append(trial)
    return [_decide(key, before[key], of_a_kind) for key, of_a_kind in trials.items()]


def _try_all(
    key: configurations.Key,
    run: Callable[[], Tensor],
    timed: Timed,
    choices: list[Configuration],
    advance: Callable[[], None],
) -> tuple[float, dict[Configuration, float]]:
    """(milliseconds with what is in use, and with each choice that runs and agrees). What is in use stays in use."""
    ms_before, expected = timed(run)
    ms = {}
    for candidate in choices:
        with _in_use(key, candidate):
            result = _attempt(timed, run)
        if result is not None and abs(result[1] - expected) <= AGREEMENT * abs(expected):
            ms[candidate] = result[0]
        advance()
    return ms_before, ms


def _decide(key: configurations.Key, before: Configuration, trials: list[_Trial]) -> Found:
    _, short, storing = key
    everywhere = [c for c in trials[0].ms if all(c in t.ms for t in trials)]
    # First, so that it wins where nothing is faster. Where it is among the choices, too, the better of two measurements
    # would be no gain.
    ms = {before: [t.ms_before for t in trials]}
    ms |= {c: [t.ms[c] for t in trials] for c in everywhere if c != before}
    best = min(ms, key=lambda c: statistics.geometric_mean(ms[c]))
    if best != before:
        configurations.tuned()[key] = best
    return Found(short, storing, best, best != before, len(ms), [t.sizes for t in trials], ms[best], ms[before])


@contextmanager
def _in_use(key: configurations.Key, configuration: Configuration) -> Iterator[None]:
    tuned = configurations.tuned()
    before = tuned.get(key)
    tuned[key] = configuration
    try:
        yield
    finally:
        if before is None:
            del tuned[key]
        else:
            tuned[key] = before


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


def _attempt(timed: Timed, run: Callable[[], Tensor]) -> tuple[float, Tensor] | None:
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    try:
        return timed(run)
    except (OutOfResources, PTXASError, CompilationError):
        return None  # too much shared memory or too many registers for this device
