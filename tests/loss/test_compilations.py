"""Batches have other numbers of tokens from step to step; a kernel is compiled for all of them once."""

import inspect
import os
from typing import Any

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("compiled kernels don't take CPU tensors: see tests/gpu", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET isn't 1", allow_module_level=True)
pytest.importorskip("triton")

from triton.runtime import interpreter

from calsmooth.loss import fused
from calsmooth.loss.functional import prepare
from calsmooth.loss.kernels import lean, tiles
from calsmooth.loss.kernels.configurations import VARYING
from calsmooth.loss.statistics import _fused as fused_statistics

# Overflows to infinity are what the kernels' guards look for.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

Kinds = dict[tuple[str, str], set[str]]
"""(kernel, argument) -> what Triton compiles it for."""


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> Kinds:
    """Of every integer and tensor that a kernel gets. Triton compiles anew for those that are 1, that divide by 16,
    and that do neither, unless it is told not to; and for pointers that are aligned to 16 bytes or aren't."""
    seen: Kinds = {}
    launch = interpreter.GridExecutor.__call__

    def watched(self: Any, *arguments: Any, **named: Any) -> Any:
        signature = inspect.signature(self.fn)
        given = signature.bind(*arguments, **{k: v for k, v in named.items() if k in signature.parameters})
        for name, value in given.arguments.items():
            if isinstance(value, int) and name not in (*self.constexprs, *VARYING):
                kind = "1" if value == 1 else "16 divides it" if value % 16 == 0 else "other"
                seen.setdefault((self.fn.__name__, name), set()).add(kind)
            if isinstance(value, torch.Tensor):
                aligned = value.data_ptr() % 16 == 0
                seen.setdefault((self.fn.__name__, name), set()).add("aligned" if aligned else "not aligned")
        return launch(self, *arguments, **named)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", watched)
    monkeypatch.setattr(lean, "LEAN_BYTES", 3000)
    monkeypatch.setattr("calsmooth.loss.kernels.gradient.MIN_WIDTH", 1)
    return seen


def run(N: int) -> None:
    """Every mode, with and without a softcap, and the statistics."""
    g = torch.Generator().manual_seed(N)
    E, C = (torch.randn(rows, 32, generator=g).requires_grad_() for rows in (N, 64))
    y = torch.randint(0, 64, (N,), generator=g)
    for softcap in (None, 2.0):
        for mode in ("exact", "lean", "filtered"):
            problem, _ = prepare(E, C, y, mode=mode, label_smoothing=0.1, softcap=softcap)
            loss, _ = fused.linear_cross_entropy(problem)
            loss.backward()
    fused_statistics(problem)


@pytest.mark.parametrize("buffer_bytes", [1, 2**30], ids=["in chunks", "all logits at once"])
def test_no_kernel_is_compiled_again(kinds: Kinds, buffer_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "BUFFER_BYTES", buffer_bytes)
    run(32)
    expected = dict(kinds)
    assert len({kernel for kernel, _ in expected}) > 8
    kinds.clear()
    run(5)
    assert kinds == expected
