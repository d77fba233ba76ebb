"""Timing: every method once a round, round after round, so that a clock that slows down slows all of them. Each round
has its own order: a GPU at its power limit runs slower after a method that draws more, whoever comes next.

A run is what a training step does: the loss, then the gradients of hidden states and head; and apart from it the loss
alone under no_grad, as evaluation does. Compilation, autotuning and first allocations happen in an untimed round.
"""

import gc
import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from calsmooth.bench import memory
from calsmooth.bench.inputs import Inputs
from calsmooth.bench.methods import Contestant, LossFunction, kept_mass
from calsmooth.loss import linear_cross_entropy_reference

FLUSH_BYTES = 256 * 2**20  # larger than any GPU's cache: no method finds its inputs there
REFERENCE_LOGIT_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Sample:
    """One run. Milliseconds; bytes above what was allocated before it."""

    forward_ms: float
    backward_ms: float
    forward_peak_bytes: int | None
    peak_bytes: int | None


@dataclass
class Measurement:
    """All runs of one contestant on one problem; `error` says what went wrong, where something did."""

    contestant: Contestant
    samples: list[Sample] = field(default_factory=list)
    no_grad_ms: list[float] = field(default_factory=list)
    no_grad_peak_bytes: int | None = None
    grad_error_hidden: float | None = None
    grad_error_head: float | None = None
    loss_error: float | None = None
    kept_mass: float | None = None
    note: str | None = None
    error: str | None = None

    def median(self, part: Callable[[Sample], float]) -> float | None:
        return statistics.median(map(part, self.samples)) if self.samples else None

    def spread(self, part: Callable[[Sample], float]) -> float | None:
        """Half the interquartile range."""
        if not self.samples:
            return None
        low, high = np.percentile([part(sample) for sample in self.samples], (25, 75))
        return float(high - low) / 2

    def peak(self, part: Callable[[Sample], int | None]) -> int | None:
        """The largest of all runs."""
        return max((bytes_ for bytes_ in map(part, self.samples) if bytes_ is not None), default=None)


def measure(
    inputs: Inputs,
    contestants: list[Contestant],
    *,
    repeats: int,
    seconds: float,
    frozen: str,
    reference_tokens: int,
    advance: Callable[..., None],
) -> list[Measurement]:
    """Compare all contestants' gradients on one problem with float64's, then time them.

    The comparison is also each one's first run, in which it compiles and tunes itself.

    Args:
        repeats: rounds at most.
        seconds: no new round begins once the rounds have taken so long; there is always one.
        frozen: 'head' or 'body' needs no gradient, 'none': both need one.
        reference_tokens: how many tokens the float64 reference may take; the others are ignored in that comparison.
        advance: progress, called with note=label before each run; `repeats` + 1 steps for each contestant.
    """
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # what it compiled is for other shapes, and it gives up after eight
    measurements = [Measurement(contestant) for contestant in contestants]
    losses: dict[int, LossFunction] = {}

    for m in measurements:
        m.error = _refusal(inputs, m.contestant) or _attempt(partial(_build, losses, m, inputs))
    for beta in dict.fromkeys(contestant.beta for contestant in contestants):
        group = [m for m in measurements if m.contestant.beta == beta and m.error is None]
        advance(0, note="float64 reference")
        failed = _attempt(partial(_compare, losses, group, inputs, beta, frozen, reference_tokens, advance))
        if failed is not None:
            for m in group:
                m.note = f"no float64 reference to compare with ({failed})"
    for m in measurements:
        if m.error is None:
            advance(0, note=f"{m.contestant.label}: warming up")
            m.error = _attempt(partial(_warm_up, losses[id(m)], m, inputs, frozen))
        advance()

    flush = None
    if inputs.device.type == "cuda":
        flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=inputs.device)
    begin = time.perf_counter()
    for done in range(repeats):
        if done > 0 and time.perf_counter() - begin > seconds:
            break
        for m in random.Random(done).sample(measurements, len(measurements)):
            if m.error is None:
                advance(0, note=m.contestant.label)
                if flush is not None:
                    flush.zero_()
                m.error = _attempt(partial(_time_once, losses[id(m)], m, inputs, frozen))
            advance()
    return measurements


def run_once(loss_function: LossFunction, inputs: Inputs, frozen: str) -> Sample:
    """Loss and gradients, timed."""
    E, C = _leaves(inputs, frozen)
    wanted = [t for t in (E, C) if t.requires_grad]
    peak, clock = memory.PeakMemory(inputs.device), _Clock(inputs.device)
    peak.start()
    clock.mark()
    loss = loss_function(E, C, inputs.targets)
    clock.mark()
    forward_peak = peak.read()
    gradients = torch.autograd.grad(loss, wanted)
    clock.mark()
    total_peak = peak.read()
    del loss, gradients
    forward_ms, backward_ms = clock.milliseconds()
    return Sample(forward_ms, backward_ms, forward_peak, total_peak)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """The best rate in FLOP/s of a large square product: the ceiling for anything made of products."""
    on_cpu = device.type == "cpu"
    size, best = (512 if on_cpu else 8192), 0.0
    while True:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        for _ in range(3 if on_cpu else 10):
            clock = _Clock(device)
            clock.mark()
            a @ b
            clock.mark()
            (ms,) = clock.milliseconds()
            best = max(best, 2 * size**3 / (ms / 1e3))
        # Grow on a CPU until a product takes long enough to be timed.
        if not on_cpu or ms > 50 or size >= 4096:
            return best
        size *= 2


class _Clock:
    """Marks on the device's own timeline: CUDA events, or the wall clock where work ends before the call does."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list = []

    def mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
            return
        if self.device.type == "mps":
            torch.mps.synchronize()
        self.marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Between neighbouring marks."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return [a.elapsed_time(b) for a, b in pairs]
        return [1e3 * (b - a) for a, b in pairs]


def _build(losses: dict[int, LossFunction], m: Measurement, inputs: Inputs) -> None:
    losses[id(m)] = m.contestant.build(inputs.softcap)


def _warm_up(loss_function: LossFunction, m: Measurement, inputs: Inputs, frozen: str) -> None:
    # Kernels that tune themselves settle in the run after; a CPU has nothing to settle.
    runs = 2 if inputs.device.type != "cpu" else 1 if m.loss_error is None else 0
    for _ in range(runs):
        run_once(loss_function, inputs, frozen)
    for _ in range(max(1, runs)):
        _no_grad_once(loss_function, inputs)
    if m.contestant.filter_eps is not None:
        m.kept_mass = kept_mass(inputs, m.contestant)


def _time_once(loss_function: LossFunction, m: Measurement, inputs: Inputs, frozen: str) -> None:
    m.samples.append(run_once(loss_function, inputs, frozen))
    ms, peak = _no_grad_once(loss_function, inputs)
    m.no_grad_ms.append(ms)
    if peak is not None:
        m.no_grad_peak_bytes = max(peak, m.no_grad_peak_bytes or 0)


def _no_grad_once(loss_function: LossFunction, inputs: Inputs) -> tuple[float, int | None]:
    peak, clock = memory.PeakMemory(inputs.device), _Clock(inputs.device)
    peak.start()
    with torch.no_grad():
        clock.mark()
        loss_function(inputs.hidden_states, inputs.lm_head_weight, inputs.targets)
        clock.mark()
    highest = peak.read()
    (ms,) = clock.milliseconds()
    return ms, highest


def _leaves(inputs: Inputs, frozen: str) -> tuple[Tensor, Tensor]:
    return (
        inputs.hidden_states.detach().requires_grad_(frozen != "body"),
        inputs.lm_head_weight.detach().requires_grad_(frozen != "head"),
    )


def _refusal(inputs: Inputs, contestant: Contestant) -> str | None:
    """Running out of memory is an error on a GPU, but takes a whole machine down on a CPU: ask before."""
    free = memory.available(inputs.device)
    if inputs.device.type != "cpu" or free is None:
        return None
    N, V, D = inputs.sizes
    needed = contestant.method.bytes_per_logit * N * V + 4 * (N + V) * D
    if needed <= 0.85 * free:
        return None
    return f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"


def _attempt(work: Callable[[], None]) -> str | None:
    """Run something that may fail; what went wrong in a line, or None.

    The one place where any exception is caught: a table of ten methods must not be lost because one of them, which may
    be somebody else's, can't do one shape.
    """
    error_line = None
    try:
        work()
    except Exception as error:
        error_line = _describe(error)
    if error_line is not None:
        # Only here, with the exception and its frames gone, can their tensors be freed.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return error_line


def _describe(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no message"
    # The CPU's allocator has no exception type of its own.
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in text:
        return "out of memory"
    return f"{type(error).__name__}: {text if len(text) <= 200 else text[:197] + '...'}"


def _compare(
    losses: dict[int, LossFunction],
    group: list[Measurement],
    inputs: Inputs,
    beta: float,
    frozen: str,
    tokens: int,
    advance: Callable[..., None],
) -> None:
    """Fill in each measurement's errors against float64 on the same inputs."""
    if not group:
        return
    if not _reference_fits(inputs):
        raise MemoryError
    targets = inputs.targets.clone()
    targets[tokens:] = -100
    masked = replace(inputs, targets=targets)
    exact_loss, exact = _reference(masked, beta, frozen, tokens)
    for m in group:
        advance(0, note=f"{m.contestant.label}: comparing gradients")
        failed = _attempt(partial(_compare_one, losses[id(m)], m, masked, exact_loss, exact, frozen))
        if failed is not None:
            # Not an error yet: without the reference in memory it may well run.
            m.note = f"its gradients could not be compared ({failed})"


def _compare_one(
    loss_function: LossFunction,
    m: Measurement,
    inputs: Inputs,
    exact_loss: float,
    exact: list[Tensor | None],
    frozen: str,
) -> None:
    E, C = _leaves(inputs, frozen)
    loss = loss_function(E, C, inputs.targets)
    found = list(torch.autograd.grad(loss, [t for t in (E, C) if t.requires_grad]))
    m.loss_error = abs(float(loss.detach()) - exact_loss) / abs(exact_loss)
    if exact[0] is not None:
        m.grad_error_hidden = relative_error(found.pop(0), exact[0])
    if exact[1] is not None:
        m.grad_error_head = relative_error(found.pop(0), exact[1])
    if any(e is not None and not math.isfinite(e) for e in (m.loss_error, m.grad_error_hidden, m.grad_error_head)):
        m.loss_error = m.grad_error_hidden = m.grad_error_head = None
        m.note = "its loss or gradients are not finite"


def relative_error(value: Tensor, exact: Tensor) -> float:
    """||value - exact|| / ||exact||, a few rows at a time: a head's gradient in float64 is large enough once."""
    error = norm = torch.zeros((), dtype=torch.float64, device=exact.device)
    for v, e in zip(value.split(8192), exact.split(8192), strict=True):
        error = error + (v.to(exact.device, torch.float64) - e).square().sum()
        norm = norm + e.square().sum()
    return float((error / norm).sqrt())


def _reference(inputs: Inputs, beta: float, frozen: str, tokens: int) -> tuple[float, list[Tensor | None]]:
    """Loss and gradients of the definition in float64, a chunk of tokens at a time."""
    # Apple's GPUs have no float64.
    device = torch.device("cpu") if inputs.device.type == "mps" else inputs.device
    C = inputs.lm_head_weight.to(device, torch.float64).requires_grad_(frozen != "head")
    rows = max(1, REFERENCE_LOGIT_BYTES // (8 * len(C)))
    total, dE = 0.0, []
    for E, y in zip(inputs.hidden_states[:tokens].split(rows), inputs.targets[:tokens].split(rows), strict=True):
        e = E.to(device, torch.float64).requires_grad_(frozen != "body")
        loss = linear_cross_entropy_reference(
            e, C, y.to(device), label_smoothing=beta, softcap=inputs.softcap, reduction="sum"
        )
        (loss / tokens).backward()
        total += float(loss.detach())
        if e.grad is not None:
            dE.append(e.grad)
    exact_dE = None
    if dE:
        exact_dE = torch.zeros(inputs.hidden_states.shape, dtype=torch.float64, device=device)
        exact_dE[:tokens] = torch.cat(dE)
    return total / tokens, [exact_dE, C.grad]


def _reference_fits(inputs: Inputs) -> bool:
    free = memory.available(inputs.device)
    _, V, D = inputs.sizes
    return free is None or free > 5 * REFERENCE_LOGIT_BYTES + 3.5 * V * D * 8
