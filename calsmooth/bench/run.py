"""`calsmooth bench` from its options to its files: shapes x tokens -> inputs -> methods -> rows."""

import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from calsmooth import console
from calsmooth.bench import memory
from calsmooth.bench.autotune import autotune, check
from calsmooth.bench.config import BenchConfig
from calsmooth.bench.inputs import Inputs, Statistics, describe, model_inputs, random_inputs
from calsmooth.bench.measure import Measurement, matmul_rate, measure
from calsmooth.bench.methods import line_up
from calsmooth.bench.report import ROOFLINE, Row, csv_text, markdown, plot_rows
from calsmooth.bench.shapes import PAPER_TOKENS, PRESETS, Shape, default_preset
from calsmooth.environment import environment
from calsmooth.errors import CalsmoothError, UsageError
from calsmooth.files import run_folder, write_json, write_text
from calsmooth.models import pick_device, pick_dtype
from calsmooth.plots import save_figure

CPU_SECONDS = 25.0
"""What the products of all runs on a CPU may take where the user leaves the number of tokens open, and after which no
new round begins where the number of rounds is open too. With the inputs, memory traffic, compilation and the float64
reference on top it is about a minute on two cores."""

CPU_REFERENCE_SECONDS = 5.0
GPU_REFERENCE_SECONDS = 8.0


@dataclass(frozen=True)
class Case:
    """One problem with everything that was measured on it."""

    name: str
    tokens: int
    vocab: int
    hidden: int
    softcap: float | None
    statistics: Statistics
    absent: dict[str, str]  # method -> why it didn't take part
    rows: list[Row]


@dataclass(frozen=True)
class Report:
    environment: dict[str, Any]
    matmul_tflops: float
    tuned: dict[str, Any] | None  # what --autotune found
    cases: list[Case]
    folder: Path

    @property
    def rows(self) -> list[Row]:
        return [row for case in self.cases for row in case.rows]

    def to_dict(self) -> dict[str, Any]:
        """The content of bench.json."""
        cases = [{key: value for key, value in asdict(case).items() if key != "rows"} for case in self.cases]
        return {
            "environment": {**self.environment, "matmul_tflops": self.matmul_tflops},
            "tuned": self.tuned,
            "cases": cases,
            "rows": [asdict(row) for row in self.rows],
        }


def run(config: BenchConfig, show: Callable[[Case], None]) -> Report:
    """Measure every case, `show` each as soon as it is done, and write bench.json, bench.csv, bench.md and bench.png.

    bench.json is written anew after each case, so that an interrupted sweep keeps what it has.

    Raises:
        UsageError: the request can't be met: no such device, no method left, a text that is too short.
        CalsmoothError: no method got through.
    """
    device = pick_device(config.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # events and peers' kernels go to the current one
    dtype = pick_dtype(config.dtype, device)
    repeats = config.repeats or (3 if device.type == "cpu" else 20)
    seconds = CPU_SECONDS if device.type == "cpu" and config.repeats is None else math.inf
    shapes = resolve_shapes(config, device.type)
    if config.autotune:
        check(_placeholder(device, dtype))
    rate = matmul_rate(device, dtype)
    tokens = config.tokens or (pick_tokens(config, shapes, device, dtype, rate, repeats),)
    folder = run_folder(config.output, "bench")

    tuned = None
    if config.autotune:
        # Before anything is measured, so that all is measured with what later runs use.
        problems = (_inputs(config, shape, n, device, dtype) for shape in shapes for n in tokens)
        tuned = autotune(problems, len(shapes) * len(tokens), device)
    cases: list[Case] = []
    report = Report(environment(device), rate / 1e12, tuned, cases, folder)
    for shape in shapes:
        for n in tokens:
            cases.append(
                _measure_case(config, shape, n, device, dtype, rate, repeats, seconds / len(shapes) / len(tokens))
            )
            write_json(folder / "bench.json", {**report.to_dict(), "config": config.to_dict()})
            show(cases[-1])
    write_text(folder / "bench.csv", csv_text(report.rows))
    write_text(folder / "bench.md", _markdown(report))
    save_figure(plot_rows(report.rows), folder / "bench")
    if all(row.error for row in report.rows if row.method != ROOFLINE):
        first = next(row for row in report.rows if row.error)
        raise CalsmoothError(f"no method got through; {first.label}: {first.error} ({folder / 'bench.json'} has all)")
    return report


def _markdown(report: Report) -> str:
    versions = report.environment["versions"]
    packages = ", ".join(f"{name} {versions[name]}" for name in ("calsmooth", "torch", "triton") if name in versions)
    tables = [markdown(case.rows, case.statistics) for case in report.cases]
    return f"{report.environment['device']}; {packages}. Memory is the peak above the inputs.\n\n" + "\n".join(tables)


def resolve_shapes(config: BenchConfig, device_type: str) -> list[Shape | None]:
    """The heads asked for; a single None stands for that of --model."""
    if config.model is not None:
        return [None]
    names = tuple(PRESETS) if "all" in config.preset else config.preset
    shapes = [PRESETS[name] for name in names] or [default_preset(device_type)]
    if config.softcap is not None:
        shapes = [replace(shape, softcap=config.softcap or None) for shape in shapes]
    if config.vocab is None and config.hidden is None:
        return list(shapes)
    return [
        Shape(_name(vocab, config.hidden, shape), vocab, config.hidden or shape.hidden, shape.softcap)
        for shape in shapes
        for vocab in config.vocab or (shape.vocab,)
    ]


def _name(vocab: int, hidden: int | None, shape: Shape) -> str:
    return shape.name if (vocab, hidden or shape.hidden) == (shape.vocab, shape.hidden) else ""


def pick_tokens(
    config: BenchConfig,
    shapes: list[Shape | None],
    device: torch.device,
    dtype: torch.dtype,
    rate: float,
    repeats: int,
) -> int:
    """How many tokens: the paper's on a GPU; on a CPU a power of two that fits its memory and about a minute.

    A run is taken to cost its products, and these to go at half the rate of a large square one.
    """
    if device.type != "cpu":
        return PAPER_TOKENS
    if config.model is not None:
        return 256
    contestants, _ = line_up(_placeholder(device, dtype), config.beta, config.method, config.mode, config.filter_eps)
    runs = len(contestants) * (repeats + 1) * 4 / 3
    entries = sum(shape.vocab * shape.hidden for shape in shapes if shape is not None)
    largest = max(shape.vocab for shape in shapes if shape is not None)
    free = memory.available(device)
    tokens = 16
    while tokens < 2048:
        more = 2 * tokens
        seconds = runs * 6 * more * entries / (rate / 2)
        if seconds > CPU_SECONDS or (free is not None and 20 * more * largest > 0.5 * free):
            break
        tokens = more
    sizes = f"|V| = {largest:,}" if len(shapes) == 1 else f"{len(shapes)} shapes of up to |V| = {largest:,}"
    memory_words = f" with {free / 2**30:.0f} GiB free" if free is not None else ""
    console.say(
        f"tokens: {tokens}, picked so that {sizes} fits this CPU ({rate / 1e9:.0f} GFLOP/s{memory_words}) "
        "and ends in about a minute; --tokens sets it"
    )
    return tokens


def _placeholder(device: torch.device, dtype: torch.dtype) -> Inputs:
    """A problem of hardly any size, to ask who could take part."""
    states, head = (torch.zeros(rows, 8, dtype=dtype, device=device) for rows in (1, 2))
    return Inputs(states, head, torch.zeros(1, dtype=torch.long, device=device), None, "")


def _inputs(config: BenchConfig, shape: Shape | None, tokens: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    if config.model is not None and config.text is not None:
        return model_inputs(config.model, config.text, tokens, dtype=dtype, device=device)
    assert shape is not None
    _check_fits(shape, tokens, dtype, device)
    return random_inputs(shape, tokens, config.inputs, dtype=dtype, device=device, seed=config.seed)


def _measure_case(
    config: BenchConfig,
    shape: Shape | None,
    tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    rate: float,
    repeats: int,
    seconds: float,
) -> Case:
    inputs = _inputs(config, shape, tokens, device, dtype)
    contestants, absent = line_up(inputs, config.beta, config.method, config.mode, config.filter_eps)
    if not contestants:
        reasons = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in by_reason(absent).items())
        raise UsageError(f"no method is left to measure: {reasons or 'widen --method and --mode'}")
    N, V, D = inputs.sizes
    reference_seconds = CPU_REFERENCE_SECONDS if device.type == "cpu" else GPU_REFERENCE_SECONDS
    # float64 runs at half of float32's rate on a CPU, and at a few percent of bfloat16's on a GPU.
    slowdown = 2 if device.type == "cpu" else 40
    reference_tokens = max(1, min(N, int(reference_seconds * rate / slowdown / (6 * V * D))))
    title = f"{inputs.name or f'|V| = {V:,}'}, {N} tokens"
    with console.progress(title, total=len(contestants) * (repeats + 1)) as advance:
        measurements = measure(
            inputs,
            contestants,
            repeats=repeats,
            seconds=seconds,
            frozen=config.frozen,
            reference_tokens=reference_tokens,
            advance=advance,
        )
    rows = [_roofline(inputs, config.frozen, rate)]
    rows += [_row(inputs, m, config.frozen, reference_tokens) for m in measurements]
    return Case(inputs.name, N, V, D, inputs.softcap, describe(inputs), absent, rows)


def by_reason(absent: dict[str, str]) -> dict[str, list[str]]:
    """reason -> the methods it keeps away"""
    reasons: dict[str, list[str]] = {}
    for name, reason in absent.items():
        reasons.setdefault(reason, []).append(name)
    return reasons


def _check_fits(shape: Shape, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse inputs that can't be made, before they bring the machine down."""
    free = memory.available(device)
    needed = (shape.vocab + tokens) * shape.hidden * (4 + (dtype.itemsize if dtype != torch.float32 else 0))
    if free is not None and needed > 0.9 * free:
        raise UsageError(
            f"|V| = {shape.vocab:,}, D = {shape.hidden}, {tokens} tokens: the inputs alone need "
            f"{needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free; give smaller sizes"
        )


def _roofline(inputs: Inputs, frozen: str, rate: float) -> Row:
    """What any exact method needs at least: one product forward, one for each gradient, and the gradients' memory."""
    N, V, D = inputs.sizes
    product_ms = 1e3 * 2 * N * V * D / rate
    size = inputs.dtype.itemsize
    gradients = (0 if frozen == "body" else N * D * size) + (0 if frozen == "head" else V * D * size)
    products = 2 if frozen == "none" else 1
    return Row(
        **_problem(inputs),
        method=ROOFLINE,
        mode="",
        label=ROOFLINE,
        beta=None,
        frozen=frozen,
        forward_ms=product_ms,
        backward_ms=products * product_ms,
        total_ms=(1 + products) * product_ms,
        peak_bytes=gradients,
        no_grad_ms=product_ms,
    )


def _row(inputs: Inputs, m: Measurement, frozen: str, reference_tokens: int) -> Row:
    errors = [e for e in (m.grad_error_hidden, m.grad_error_head) if e is not None]
    return Row(
        **_problem(inputs),
        method=m.contestant.method.name,
        mode=m.contestant.method.mode,
        filter_eps=m.contestant.filter_eps,
        label=m.contestant.label,
        beta=m.contestant.beta,
        frozen=frozen,
        repeats=len(m.samples),
        forward_ms=m.median(lambda s: s.forward_ms),
        backward_ms=m.median(lambda s: s.backward_ms),
        total_ms=m.median(lambda s: s.forward_ms + s.backward_ms),
        total_ms_spread=m.spread(lambda s: s.forward_ms + s.backward_ms),
        no_grad_ms=statistics.median(m.no_grad_ms) if m.no_grad_ms else None,
        forward_peak_bytes=m.peak(lambda s: s.forward_peak_bytes),
        peak_bytes=m.peak(lambda s: s.peak_bytes),
        no_grad_peak_bytes=m.no_grad_peak_bytes,
        grad_error=max(errors, default=None),
        grad_error_hidden=m.grad_error_hidden,
        grad_error_head=m.grad_error_head,
        loss_error=m.loss_error,
        kept_mass=m.kept_mass,
        grad_error_tokens=reference_tokens if errors else None,
        note=m.note,
        error=m.error,
    )


def _problem(inputs: Inputs) -> dict[str, Any]:
    N, V, D = inputs.sizes
    return {
        "preset": inputs.name,
        "tokens": N,
        "vocab": V,
        "hidden": D,
        "softcap": inputs.softcap,
        "dtype": str(inputs.dtype).removeprefix("torch."),
        "device": inputs.device.type,
    }
