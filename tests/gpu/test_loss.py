"""The loss's compiled kernels: right in every mode, the same bits twice, no waiting, and what memory they take."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from calsmooth.loss import chunked, fused, linear_cross_entropy, linear_cross_entropy_reference, tail, token_statistics
from calsmooth.loss.functional import prepare

if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
    pytest.skip("needs a CUDA device of compute capability 8.0 or above", allow_module_level=True)
pytest.importorskip("triton")

import triton
import triton.language as tl

from calsmooth.errors import UsageError
from calsmooth.loss.kernels import configurations, lean, listing, tiles
from calsmooth.loss.kernels.gradient import EXTRA_ROWS

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
    loss, _ = chunked.linear_cross_entropy(problem)
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
        dict(label_smoothing=0.3, smoothing_prior=True),
        dict(label_smoothing=0.3, smoothing_prior=True, softcap=20.0, token_weights=True),
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
    if "smoothing_prior" in options:
        options["smoothing_prior"] = torch.rand(9003, device="cuda") ** 3
        options["smoothing_prior"] /= options["smoothing_prior"].sum()
    if "token_weights" in options:
        options["token_weights"] = torch.rand(700, device="cuda")
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


@pytest.mark.parametrize("mode", ["exact", "lean"])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_class_weights_and_several_targets_a_token(mode: str, softcap: float | None) -> None:
    E, C, y = make(700, 9003, 264)
    several = torch.randint(0, 9003, (700, 5), device="cuda")
    several[y == -100] = -100
    several[::2, 3:] = -100
    options: dict[str, Any] = dict(mode=mode, softcap=softcap, label_smoothing=0.1, return_logsumexp=False)
    weights, probabilities = torch.rand(9003, device="cuda"), torch.rand(700, 5, device="cuda")
    for targets, more in (
        (y, dict(class_weights=weights)),
        (several, dict(target_probabilities=probabilities)),
        (several, dict(target_probabilities=probabilities, class_weights=weights, token_weights=probabilities[:, 0])),
    ):
        expected, wanted, incoming = exact_in_float64(E, C, targets, {**options, **more})
        loss = linear_cross_entropy(E, C, targets, **options, **more)
        assert relative(loss, expected) < 2e-5
        for g, w in zip(torch.autograd.grad(loss, [E, C], incoming), wanted, strict=True):
            assert relative(g, w) < 5e-3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("buffer_bytes", [2**22, 2**30])
def test_targets_outside_the_vocabulary_make_the_loss_nan(
    mode: str, buffer_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "BUFFER_BYTES", buffer_bytes)
    E, C, y = make(300, 4096, 256)
    y[[1, 2, 3]] = torch.tensor([4096, -1, 2**40], device="cuda")
    loss = linear_cross_entropy(E, C, y, mode=mode)
    assert loss.isnan()
    for g in torch.autograd.grad(loss, [E, C]):
        assert g.isfinite().all()
    losses = linear_cross_entropy(E, C, y, mode=mode, reduction="none")
    assert losses.isnan().nonzero().flatten().tolist() == [1, 2, 3]
    assert token_statistics(E, C, y).target_logprob[[1, 2, 3]].isnan().all()


def test_a_head_whose_rows_are_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "BUFFER_BYTES", 2**22)
    E, _, y = make(700, 4096, 256)
    rows = torch.randn(256, device="cuda", dtype=torch.bfloat16).expand(4096, 256).requires_grad_()
    _, wanted, incoming = exact_in_float64(E, rows, y, dict(label_smoothing=0.1))
    loss = linear_cross_entropy(E, rows, y, label_smoothing=0.1)
    assert relative(torch.autograd.grad(loss, [rows], incoming)[0], wanted[1]) < 5e-3


def test_a_softcap_over_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where targets lie far below the top of their row, what is stored of the logits must not lose digits for it."""
    monkeypatch.setattr(tiles, "BUFFER_BYTES", 2**22)
    E, C, y = make(1024, 16384, 256, ignored=0)
    options = dict(label_smoothing=0.1, softcap=20.0)
    _, wanted, incoming = exact_in_float64(E, C, y, options)
    loss = linear_cross_entropy(E, C, y, **options)
    for g, w in zip(torch.autograd.grad(loss, [E, C], incoming), wanted, strict=True):
        assert relative(g, w) < 5e-3


@pytest.mark.parametrize("mode", MODES)
def test_a_default_dtype_changes_nothing(mode: str) -> None:
    E, C, y = make(512, 4096, 256)
    expected = torch.autograd.grad(linear_cross_entropy(E, C, y, label_smoothing=0.1, mode=mode), [E, C])
    torch.set_default_dtype(torch.bfloat16)
    try:
        loss = linear_cross_entropy(E, C, y, label_smoothing=0.1, mode=mode)
        assert loss.dtype == torch.float32
        for g, w in zip(torch.autograd.grad(loss, [E, C]), expected, strict=True):
            assert torch.equal(g, w)
    finally:
        torch.set_default_dtype(torch.float32)


def test_cuda_graphs() -> None:
    E, C, y = make(512, 4096, 256)

    def step(mode: str) -> list[Tensor]:
        loss = linear_cross_entropy(E, C, y, label_smoothing=0.1, mode=mode)
        return [loss.detach(), *torch.autograd.grad(loss, [E, C])]

    for mode in ("exact", "lean"):
        expected = step(mode)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(mode)
        graph.replay()
        for got, want in zip(captured, expected, strict=True):
            assert torch.equal(got, want)
    step("filtered")
    with pytest.raises(UsageError, match="a CUDA graph can't capture it"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        step("filtered")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("mode", MODES)
def test_tensors_on_a_gpu_that_is_not_the_current_one(mode: str) -> None:
    inputs = make(512, 4096, 256)
    expected = torch.autograd.grad(linear_cross_entropy(*inputs, label_smoothing=0.1, mode=mode), inputs[:2])
    E, C, y = (t.detach().to("cuda:1") for t in inputs)
    leaves = [E.requires_grad_(), C.requires_grad_()]
    assert torch.cuda.current_device() == 0
    loss = linear_cross_entropy(*leaves, y, label_smoothing=0.1, mode=mode)
    for g, w in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        assert torch.equal(g.to("cuda:0"), w)
    assert token_statistics(E, C, y).top_token.device == E.device


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
    compiled.clear()
    canary_kernel[(1,)](torch.zeros(1, device="cuda"), buffer_bytes)
    assert len(compiled) == 1  # the hook sees what is compiled
    for N in (1601, 2048, 300, 17):
        run(N)
    assert len(compiled) == 1


@triton.jit
def canary_kernel(x, new: tl.constexpr):
    tl.store(x, new)


def test_statistics() -> None:
    E, C, y = make(700, 9003, 264)
    logprob = (E.detach().double() @ C.detach().double().T).log_softmax(-1)
    found = token_statistics(E, C, y)
    assert torch.equal(found.top_token, logprob.argmax(-1))
    assert relative(found.top_logprob, logprob.amax(-1)) < 1e-5
    assert relative(found.entropy, -(logprob.exp() * logprob).sum(-1)) < 1e-5


def test_statistics_are_probabilities() -> None:
    """Nothing above 1, and a target that is the top token is as probable as it is confident."""
    E, C, _ = make(700, 9003, 264)
    E = 4 * E.detach()  # logits up to 60 and more
    y = (E @ C.detach().T).float().argmax(1)
    found = token_statistics(E, C, y)
    assert found.top_logprob.max() <= 0
    mine = found.top_token == y
    assert mine.float().mean() > 0.9
    assert torch.equal(found.target_logprob[mine], found.top_logprob[mine])
    assert (found.target_logprob <= found.top_logprob).all()


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
    corrections = 2 * (tail.SAMPLE + EXTRA_ROWS) * 65536
    for mode, extra in (("lean", 2 * lean.LEAN_BYTES), ("filtered", 150 * 2**20 + corrections)):
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
