"""Who takes part: calsmooth in each of its modes, torch's own ways, and other projects' kernels where they import.

A method says why it can't run a problem before anything runs. What isn't known before, such as running out of memory,
is recorded when it happens (measure.py).
"""

import importlib.util
import math
import os
import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from calsmooth.bench.config import DEFAULT_FILTER_EPS, MODES, Mode
from calsmooth.bench.inputs import Inputs, softcapped
from calsmooth.loss import linear_cross_entropy

LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden_states (N, D), lm_head_weight (V, D), targets (N,)) -> mean loss; its backward makes the gradients."""


@dataclass(frozen=True)
class Method:
    name: str
    mode: str  # '' where there is only one
    smooths: bool  # whether label_smoothing > 0 can be asked of it
    why_not: Callable[[Inputs], str | None]
    build: Callable[..., LossFunction]  # (beta, softcap), and filter_eps where the method takes one
    bytes_per_logit: float = 0.0  # of memory for every one of the N x V logits, at float32; 0: not proportional
    by_name_only: bool = False  # left out where no names are given

    @property
    def label(self) -> str:
        return f"{self.name} {self.mode}".strip()


@dataclass(frozen=True)
class Contestant:
    """A method with the label smoothing, and where it takes one the filter threshold, that it runs with."""

    method: Method
    beta: float
    filter_eps: float | None = None

    @property
    def label(self) -> str:
        shown = self.filter_eps is not None and self.filter_eps != DEFAULT_FILTER_EPS
        return f"{self.method.label} {power_of_two(self.filter_eps)}" if shown else self.method.label

    def build(self, softcap: float | None) -> Callable[..., Tensor]:
        if self.method.name == "calsmooth":
            return self.method.build(self.beta, softcap, self.filter_eps)
        return self.method.build(self.beta, softcap)


def power_of_two(x: float | None) -> str:
    """2^-12 rather than 0.000244141."""
    if x is None:
        return ""
    exponent = math.log2(x)
    return f"2^{exponent:.0f}" if exponent == round(exponent) else f"{x:g}"


def line_up(
    inputs: Inputs,
    betas: tuple[float, ...],
    names: tuple[str, ...] = (),
    modes: tuple[str, ...] = (),
    filter_eps: tuple[float, ...] = (DEFAULT_FILTER_EPS,),
) -> tuple[list[Contestant], dict[str, str]]:
    """The contestants for a problem, and for each method that can't take part the reason.

    A method that can't smooth runs with beta = 0, whatever the others run with.
    """
    contestants: list[Contestant] = []
    absent: dict[str, str] = {}
    for method in METHODS:
        if method.name not in names if names else method.by_name_only:
            continue
        if modes and method.name == "calsmooth" and method.mode not in modes:
            continue
        reason = None if method.name == "calsmooth" and modes else method.why_not(inputs)
        if reason is not None:
            absent[method.label] = reason
            continue
        thresholds = filter_eps if (method.name, method.mode) == ("calsmooth", "filtered") else (None,)
        contestants += [
            Contestant(method, beta, eps) for eps in thresholds for beta in (betas if method.smooths else (0.0,))
        ]
    return contestants, absent


# calsmooth ------------------------------------------------------------------------------------------------------------


def _calsmooth(beta: float, softcap: float | None, filter_eps: float | None, *, mode: Mode) -> LossFunction:
    options: dict[str, Any] = {} if filter_eps is None else {"filter_eps": filter_eps}
    return partial(linear_cross_entropy, label_smoothing=beta, softcap=softcap, mode=mode, **options)


def _why_not_mode(inputs: Inputs, *, mode: Mode) -> str | None:
    if mode == "exact" or (inputs.device.type == "cuda" and inputs.dtype != torch.float32):
        return None
    return "no faster than exact without the GPU kernels (naming them with --mode measures them)"


def kept_mass(inputs: Inputs, contestant: Contestant) -> float:
    """Mean over tokens of the probability that calsmooth's filtered mode keeps."""
    kept = torch.zeros(len(inputs.targets), dtype=torch.float32, device=inputs.device)
    with torch.no_grad():
        contestant.build(inputs.softcap)(inputs.hidden_states, inputs.lm_head_weight, inputs.targets, kept_mass=kept)
    return float(kept.mean())


# torch ----------------------------------------------------------------------------------------------------------------


def _always(inputs: Inputs) -> str | None:
    return None


def _full_logits(E: Tensor, C: Tensor, y: Tensor, beta: float, softcap: float | None) -> Tensor:
    """The baseline that everybody knows: all logits in float32, torch's own cross-entropy."""
    return F.cross_entropy(softcapped((E @ C.T).float(), softcap), y, label_smoothing=beta)


def _eager(beta: float, softcap: float | None) -> LossFunction:
    return partial(_full_logits, beta=beta, softcap=softcap)


def _compiled(beta: float, softcap: float | None) -> LossFunction:
    return partial(torch.compile(_full_logits, dynamic=False), beta=beta, softcap=softcap)


def _why_not_compile(inputs: Inputs) -> str | None:
    if inputs.device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "needs triton"
    compilers = [os.environ.get("CXX") or "", "g++", "clang++", "c++"]
    if not any(shutil.which(name) for name in compilers if name):
        return "needs a C++ compiler (none of g++, clang++, c++ is here)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "needs Python's headers (Python.h)"
    return None


CHUNKS, CHUNK_TOKENS = 8, 128


def _chunked(beta: float, softcap: float | None) -> LossFunction:
    """torchtune's way: the head a chunk of tokens at a time, the logits kept for the backward pass.

    Eight chunks as there, but of no fewer tokens than would make sense.
    """

    def loss(E: Tensor, C: Tensor, y: Tensor) -> Tensor:
        chunks = max(1, min(CHUNKS, len(E) // CHUNK_TOKENS))
        logits = [e @ C.T for e in E.chunk(chunks)]
        targets = y.chunk(chunks)
        total = E.new_zeros((), dtype=torch.float32)
        for z, t in zip(logits, targets, strict=True):
            z = softcapped(z.float(), softcap)
            total = total + F.cross_entropy(z, t, label_smoothing=beta, reduction="sum")
        return total / (y != -100).sum()

    return loss


def _torch_linear(beta: float, softcap: float | None) -> LossFunction:
    options = torch.nn.LinearCrossEntropyOptions()

    def loss(E: Tensor, C: Tensor, y: Tensor) -> Tensor:
        return F.linear_cross_entropy(E, C, y, options=options)

    return loss


def _why_not_torch_linear(inputs: Inputs) -> str | None:
    if not hasattr(F, "linear_cross_entropy") or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return "needs torch 2.13 or newer"
    return "has no softcap" if inputs.softcap is not None else None


# Other projects: kernels for GPUs only --------------------------------------------------------------------------------


def _why_not_peer(inputs: Inputs, *, module: str, install: str, softcap: bool = True, half: bool = False) -> str | None:
    if importlib.util.find_spec(module) is None:
        return f"not installed (pip install {install})"
    if inputs.device.type != "cuda":
        return "needs a GPU"
    if inputs.softcap is not None and not softcap:
        return "has no softcap"
    if half and inputs.dtype == torch.float32:
        return "takes no float32"
    return None


def _cut_cross_entropy(beta: float, softcap: float | None, *, filter_eps: str | None) -> LossFunction:
    from cut_cross_entropy import linear_cross_entropy as cce

    return lambda E, C, y: cce(E, C, y, softcap=softcap, filter_eps=filter_eps)


def _liger(beta: float, softcap: float | None) -> LossFunction:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger

    return lambda E, C, y: liger(E, C, y, label_smoothing=beta, softcap=softcap)


def _trl(beta: float, softcap: float | None) -> LossFunction:
    from trl.kernels import ChunkedLogProbFunction

    # As its SFTTrainer calls it, but for the entropy and accuracy that it logs.
    columns = 32_768  # at once

    def loss(E: Tensor, C: Tensor, y: Tensor) -> Tensor:
        logprobs, *_ = ChunkedLogProbFunction.apply(E, C, None, y, 1.0, columns, softcap, 1.0, ())
        return -logprobs.mean()

    return loss


def _why_not_trl(inputs: Inputs) -> str | None:
    parts = ("trl", "trl.kernels", "trl.kernels.chunked_logprob")  # in this order: a missing parent is an error
    absent = any(importlib.util.find_spec(part) is None for part in parts)
    return f"not installed, or older than 1.16 (pip install {_EXTRA})" if absent else None


def _quack(beta: float, softcap: float | None) -> LossFunction:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy as quack

    return lambda E, C, y: quack(E, C, y)


def _fla(beta: float, softcap: float | None) -> LossFunction:
    from fla.modules.fused_linear_cross_entropy import fused_linear_cross_entropy_loss as fla

    return lambda E, C, y: fla(E, y, C, label_smoothing=beta, logit_softcapping=softcap)


# The paper's kernel, written after its text ---------------------------------------------------------------------------


def _paper(beta: float, softcap: float | None, **switches: bool) -> LossFunction:
    from calsmooth.bench.paper_kernel import Switches, paper_loss

    return partial(paper_loss, beta=beta, softcap=softcap, switches=Switches(**switches))


def _why_not_paper(inputs: Inputs) -> str | None:
    if inputs.device.type != "cuda":
        return "needs a GPU"
    if importlib.util.find_spec("triton") is None:
        return "needs triton"
    if torch.version.hip is not None:
        return "was never run on a ROCm device"
    major, minor = torch.cuda.get_device_capability(inputs.device)
    return None if major >= 8 else f"needs compute capability 8.0 (this GPU's is {major}.{minor})"


_EXTRA = "'calsmooth[bench]'"

METHODS = (
    *(
        Method("calsmooth", mode, True, partial(_why_not_mode, mode=mode), partial(_calsmooth, mode=mode))
        for mode in MODES
    ),
    # Logits, their log-softmax and the gradients of both.
    Method("eager", "", True, _always, _eager, bytes_per_logit=16),
    Method("torch.compile", "", True, _why_not_compile, _compiled, bytes_per_logit=12),
    Method("chunked", "", True, _always, _chunked, bytes_per_logit=12),
    # Its chunks are for beta = 0 only; with smoothing it is `eager` under another name.
    Method("F.linear_cross_entropy", "chunked", False, _why_not_torch_linear, _torch_linear, bytes_per_logit=12),
    *(
        Method(
            "cut-cross-entropy",
            mode,
            False,
            partial(_why_not_peer, module="cut_cross_entropy", install=_EXTRA),
            partial(_cut_cross_entropy, filter_eps=filter_eps),
        )
        for mode, filter_eps in (("filtered", "auto"), ("unfiltered", None))
    ),
    Method("liger-kernel", "", True, partial(_why_not_peer, module="liger_kernel", install=_EXTRA), _liger),
    Method("trl", "", False, _why_not_trl, _trl),
    Method(
        "quack-kernels",
        "",
        False,
        partial(_why_not_peer, module="quack", install="quack-kernels", softcap=False, half=True),
        _quack,
    ),
    Method("fla-core", "", True, partial(_why_not_peer, module="fla", install="fla-core"), _fla),
    # The rows of the paper's Table 3; the first alone stands for it where nobody asks for the others.
    *(
        Method("paper", mode, True, _why_not_paper, partial(_paper, **switches), by_name_only=mode != "")
        for mode, switches in (
            ("", {}),
            ("unsorted", {"sorted": False}),
            ("unfiltered", {"filtered": False}),
            ("fused", {"fused": True}),
            ("fused unfiltered", {"fused": True, "filtered": False}),
        )
    ),
)
