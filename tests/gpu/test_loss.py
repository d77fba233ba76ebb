"""The loss's compiled kernels: right in every mode, the same bits twice, no waiting, and what memory they take."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from calsmooth.loss import chunked, fused, linear_cross_entropy, linear_cross_entropy_reference, token_statistics
from calsmooth.loss.functional import prepare

if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
    pytest.skip("needs a CUDA device of compute capability 8.0 or above", allow_module_level=True)
pytest.importorskip("triton")

from calsmooth.loss.kernels import configurations, lean, listing, tiles

pytestmark = pytest.mark.gpu

MODES = ["exact", "lean", "filtered"]


def make(N: int, V: int, D: int, *, dtype: torch.dtype = torch.bfloat16, ignored: int = 40) -> list[Tensor]:
    g = torch.Generator("cuda").manual_seed(0)
    E = (4 * torch.randn(N, D, generator=g, device="cuda")).to(dtype)
    C = (torch.randn(V, D, generator=g, device="cuda") / D**0.5).to(dtype)
    y = torch.randint(0, V, (N,), generator=g, device="cuda")
    y[torch.randperm(N, generator=g, device="cuda")[:ignored]] = -100
    return [E.requires_grad_(), C.requires_grad_(), y]


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-300))


def exact_in_float64(E: Tensor, C: Tensor, y: Tensor, options: dict[str, Any]) -> tuple[Tensor, list[Tensor], Tensor]:
    """Loss, gradients and the incoming gradient they are for; filtered as the chunked implementation does it."""
    wide = [t.detach().double().requires_grad_() for t in (E, C)]
    problem, _ = prepare(*wide, y, **options)
    loss = chunked.linear_cross_entropy(problem)
    incoming = torch.rand(loss.shape, device="cuda") + 0.5
    return loss, list(torch.autograd.grad(loss, wide, incoming.double())), incoming


@pytest.mark.parametrize("mode", [*MODES, "exact in chunks"])
@pytest.mark.parametrize("descriptors", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        dict(label_smoothing=0.1),
        dict(label_smoothing=0.1, reduction="none", z_loss=1e-3),
        dict(label_smoothing=0.5, softcap=20.0, scale=0.7),
    ],
    ids=str,
)
def test_right_and_the_same_twice(
    mode: str, descriptors: bool, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not descriptors:
        for key, configuration in configurations.TABLE.items():
            smaller = replace(configuration, block_v=128, descriptors=False)
            monkeypatch.setitem(configurations.TABLE, key, smaller)
    monkeypatch.setattr(listing, "ENTRIES_PER_TOKEN", 2**12)  # room for whatever random logits need
    if mode == "exact in chunks":
        monkeypatch.setattr(tiles, "BUFFER_BYTES", 2**22)
    E, C, y = make(700, 9003, 264)
    options = dict(options, mode=mode.split()[0])
    expected, wanted, incoming = exact_in_float64(E, C, y, options)
    runs = []
    for _ in range(2):
        loss = linear_cross_entropy(E, C, y, **options)
        runs.append([loss.detach(), *torch.autograd.grad(loss, [E, C], incoming)])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)
    assert relative(runs[0][0], expected) < 2e-5
    # bfloat16 has eps 7.8e-3; torch's own path, with logits in bfloat16, is off by more than 1e-2.
    assert relative(runs[0][1], wanted[0]) < 5e-3
    assert relative(runs[0][2], wanted[1]) < 5e-3


@pytest.mark.parametrize("mode", MODES)
def test_odd_rows_and_float16(mode: str) -> None:
    E, C, y = make(300, 5003, 515, dtype=torch.float16)
    expected, wanted, incoming = exact_in_float64(E, C, y, dict(mode=mode, label_smoothing=0.1))
    loss = linear_cross_entropy(E, C, y, mode=mode, label_smoothing=0.1)
    assert relative(loss, expected) < 2e-5
    for g, w in zip(torch.autograd.grad(loss, [E, C], incoming), wanted, strict=True):
        assert relative(g, w) < 3e-3


@pytest.mark.parametrize("buffer_bytes", [2**22, 2**30])
def test_targets_far_below_the_top(buffer_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "BUFFER_BYTES", buffer_bytes)
    E, C, y = make(700, 5000, 256)
    E = (E.detach() * 12).requires_grad_()
    z = E.detach().float() @ C.detach().float().T
    assert (z.amax(1) - z.gather(1, y.clamp(min=0).unsqueeze(1)).squeeze(1)).max() > 100
    expected, wanted, incoming = exact_in_float64(E, C, y, dict(label_smoothing=0.1))
    loss = linear_cross_entropy(E, C, y, label_smoothing=0.1)
    assert relative(loss, expected) < 2e-5
    for g, w in zip(torch.autograd.grad(loss, [E, C], incoming), wanted, strict=True):
        assert relative(g, w) < 5e-3


def test_a_list_that_overflows_makes_filtered_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "ENTRIES_PER_TOKEN", 1)
    E, C, y = make(700, 5000, 256)
    _, wanted, incoming = exact_in_float64(E, C, y, dict(label_smoothing=0.1))
    loss = linear_cross_entropy(E, C, y, label_smoothing=0.1, mode="filtered")
    for g, w in zip(torch.autograd.grad(loss, [E, C], incoming), wanted, strict=True):
        assert relative(g, w) < 5e-3


@pytest.mark.parametrize("mode", MODES)
def test_torch_compile_sees_one_operator(mode: str) -> None:
    E, C, y = make(512, 4096, 256)

    def scaled(e: Tensor, c: Tensor, y: Tensor) -> Tensor:
        return linear_cross_entropy(e * 2, c, y, label_smoothing=0.1, mode=mode)

    compiled, plain = torch.compile(scaled, fullgraph=True)(E, C, y), scaled(E, C, y)
    torch.testing.assert_close(compiled, plain)
    for a, b in zip(torch.autograd.grad(compiled, [E, C]), torch.autograd.grad(plain, [E, C]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mode", ["exact", "lean"])
@pytest.mark.parametrize("buffer_bytes", [2**22, 2**30])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_nothing_waits_for_the_device(
    mode: str, buffer_bytes: int, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "BUFFER_BYTES", buffer_bytes)
    E, C, y = make(512, 4096, 256)
    torch.cuda.set_sync_debug_mode("error")
    try:
        (3 * linear_cross_entropy(E, C, y, label_smoothing=0.1, mode=mode, softcap=softcap)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("buffer_bytes", [2**22, 2**30])
def test_other_numbers_of_tokens_compile_nothing_again(buffer_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    compiled: list[str] = []
    monkeypatch.setattr(tiles, "BUFFER_BYTES", buffer_bytes)
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **made: compiled.append(made["repr"]))

    def run(N: int) -> None:
        E, C, y = make(N, 4096, 256, ignored=0)
        for mode in MODES:
            linear_cross_entropy(E, C, y, label_smoothing=0.1, mode=mode).backward()
        token_statistics(E, C, y)

    run(1600)
    first = len(compiled)
    assert first
    for N in (1601, 2048, 300, 17):
        run(N)
    assert compiled[first:] == []


def test_statistics() -> None:
    E, C, y = make(700, 9003, 264)
    logprob = (E.detach().double() @ C.detach().double().T).log_softmax(-1)
    found = token_statistics(E, C, y)
    assert torch.equal(found.top_token, logprob.argmax(-1))
    assert relative(found.top_logprob, logprob.amax(-1)) < 1e-5
    assert relative(found.entropy, -(logprob.exp() * logprob).sum(-1)) < 1e-5


def test_more_logits_than_an_int32_can_count() -> None:
    N, V = 8320, 262144
    assert N * V > 2**31
    E, C, y = make(N, V, 64)
    rows = slice(N - 64, N)  # the last ones, where an offset would wrap around
    expected = linear_cross_entropy_reference(
        E.detach()[rows].double(), C.detach().double(), y[rows], label_smoothing=0.1, reduction="none"
    )
    for mode in MODES:
        loss = linear_cross_entropy(E, C, y, label_smoothing=0.1, reduction="none", mode=mode)
        assert relative(loss[rows], expected) < 2e-5
        dE, dC = torch.autograd.grad(loss.sum(), [E, C])
        assert dE.isfinite().all()
        assert dC.isfinite().all()


def test_memory_above_the_inputs() -> None:
    E, C, y = make(4096, 65536, 512)
    logits = 4096 * 65536 * 2
    gradients = 2 * (E.numel() + C.numel())
    for mode, extra in (("lean", 2 * lean.LEAN_BYTES), ("filtered", 160 * 2**20)):
        for _ in range(2):  # cuBLAS takes its workspace the first time
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            grads = torch.autograd.grad(linear_cross_entropy(E, C, y, label_smoothing=0.1, mode=mode), [E, C])
            peak = torch.cuda.max_memory_allocated() - before
            del grads
        assert peak < gradients + extra < logits


def test_the_door_takes_these() -> None:
    E, C, y = make(8, 64, 32)
    assert fused.why_not(prepare(E, C, y)[0]) is None
    assert "float32" in str(fused.why_not(prepare(E.float(), C.float(), y)[0]))
