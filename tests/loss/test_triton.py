"""The Triton kernels on the CPU, through Triton's interpreter, in float32 and float16: small and ragged on purpose.

No size is a multiple of a block, features fill more than one block, and a vocabulary may be smaller than one. The
same promises on a GPU, in bfloat16, are in tests/gpu.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

if torch.cuda.is_available():
    pytest.skip("compiled kernels don't take CPU tensors: see tests/gpu", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET isn't 1", allow_module_level=True)
pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from calsmooth.loss import chunked, fused, linear_cross_entropy_reference, tail, token_statistics, tuning
from calsmooth.loss.functional import prepare
from calsmooth.loss.kernels import configurations, exact, filtered, lean, listing, tiles, whole
from calsmooth.loss.kernels.configurations import Configuration
from calsmooth.loss.statistics import _fused as fused_statistics

# Overflows to infinity are what the guards look for.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SHAPES = [(19, 43, 20), (1, 40, 36), (5, 7, 8)]  # N, V, D


def make(N: int, V: int, D: int, *, dtype: torch.dtype = torch.float32, ignored: int = 2) -> list[Tensor]:
    g = torch.Generator().manual_seed(N + V + D)
    E = torch.randn(N, D, generator=g).to(dtype)
    C = torch.randn(V, D, generator=g).to(dtype)
    y = torch.randint(0, V, (N,), generator=g)
    y[torch.randperm(N, generator=g)[: min(ignored, N - 1)]] = -100
    return [E.requires_grad_(), C.requires_grad_(), y]


def make_far(N: int, V: int, D: int) -> list[Tensor]:
    """The same with a target far below its row's top."""
    E, C, y = make(N, V, D)
    with torch.no_grad():
        E[0] *= 30
    return [E, C, y]


def by_kernels(E: Tensor, C: Tensor, y: Tensor, **options: Any) -> Tensor:
    """`linear_cross_entropy` through its door, whatever the door says of CPU tensors."""
    problem, shape = prepare(E, C, y, **options)
    loss, logsumexp = fused.linear_cross_entropy(problem)
    assert (logsumexp is None) == (not options.get("return_logsumexp"))
    return loss.view(shape) if options.get("reduction") == "none" else loss


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def assert_equals_reference(E: Tensor, C: Tensor, y: Tensor, tolerance: float = 3e-6, **options: Any) -> None:
    inputs = [E, C] + ([options["bias"]] if options.get("bias") is not None else [])
    wide = [t.detach().double().requires_grad_() for t in inputs]
    plain = {k: v for k, v in options.items() if k not in ("mode", "filter_eps", "bias")}
    expected = linear_cross_entropy_reference(wide[0], wide[1], y, bias=wide[2] if len(wide) > 2 else None, **plain)
    loss = by_kernels(E, C, y, **options)
    assert relative(loss, expected) < 3e-6
    incoming = torch.rand(expected.shape, dtype=torch.float64) + 0.5
    wanted = torch.autograd.grad(expected, wide, incoming)
    for repeat in (True, False):  # the second time from a kept graph
        got = torch.autograd.grad(loss, inputs, incoming.to(loss.dtype), retain_graph=repeat)
        for g, w, t in zip(got, wanted, inputs, strict=True):
            assert g.dtype == t.dtype
            assert relative(g, w) < tolerance


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of tokens and strips of vocabulary even for tiny inputs."""
    monkeypatch.setattr(tiles, "BUFFER_BYTES", 1)
    monkeypatch.setattr(lean, "LEAN_BYTES", 3000)
    monkeypatch.setattr(lean, "WIDE_BYTES", 3000)
    monkeypatch.setattr("calsmooth.loss.kernels.gradient.MIN_WIDTH", 1)


def weights(size: int, seed: int) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) + 0.1


def prior(V: int) -> Tensor:
    """Uneven, with a class that gets nothing."""
    shares = weights(V, 1) ** 3
    shares[0] = 0.0
    return shares / shares.sum()


def several_targets(y: Tensor, V: int, K: int = 3) -> dict[str, Tensor]:
    """(N, K) targets, some of them none, ignored where y is; and their probabilities."""
    g = torch.Generator().manual_seed(2)
    targets = torch.randint(0, V, (len(y), K), generator=g)
    targets[0, 1:] = -100
    targets[y == -100] = -100
    return {"y": targets, "target_probabilities": torch.rand(len(y), K, generator=g)}


N, V = SHAPES[0][:2]
OPTIONS: list[dict[str, Any]] = [
    dict(label_smoothing=0.1),
    dict(reduction="sum", scale=0.5),
    dict(reduction="none", label_smoothing=0.3),
    dict(label_smoothing=0.1, softcap=2.0, scale=0.7),
    dict(label_smoothing=0.1, z_loss=1e-2),
    dict(label_smoothing=0.1, smoothing_prior=prior(V), scale=0.7),
    dict(label_smoothing=0.1, smoothing_prior=prior(V), softcap=2.0, z_loss=1e-2),
    dict(label_smoothing=0.1, token_weights=weights(N, 3)),
    dict(label_smoothing=0.1, token_weights=weights(N, 3), reduction="sum", divisor=torch.tensor(7.0)),
    dict(label_smoothing=0.1, class_weights=weights(V, 4), z_loss=1e-2),
    dict(label_smoothing=0.1, class_weights=weights(V, 4), smoothing_prior=prior(V), softcap=2.0),
    dict(label_smoothing=0.1, several=True, z_loss=1e-2, reduction="none", token_weights=weights(N, 3)),
    dict(label_smoothing=0.1, several=True, softcap=2.0, class_weights=weights(V, 4), smoothing_prior=prior(V)),
]


def named(options: dict[str, Any]) -> str:
    return " ".join(k if isinstance(v, Tensor) else f"{k}={v}" for k, v in options.items())


@pytest.mark.parametrize("mode", ["exact", "lean"])
@pytest.mark.parametrize("options", OPTIONS, ids=named)
def test_equals_the_definition(mode: str, options: dict[str, Any]) -> None:
    E, C, y = make(*SHAPES[0])
    options = dict(options)
    if options.pop("several", False):
        extra = several_targets(y, len(C))
        y = extra.pop("y")
        options |= extra
    assert_equals_reference(E, C, y, mode=mode, **options)


def test_the_logsumexp_is_differentiable_beside_the_loss() -> None:
    E, C, y = make(21, 75, 20)
    wide = [t.detach().double().requires_grad_() for t in (E, C)]
    expected = linear_cross_entropy_reference(*wide, y, label_smoothing=0.1)
    expected_lse = torch.where(y == -100, 0.0, (wide[0] @ wide[1].T).logsumexp(1))
    problem, _ = prepare(E, C, y, label_smoothing=0.1, return_logsumexp=True)
    loss, lse = fused.linear_cross_entropy(problem)
    assert lse is not None
    assert relative(lse, expected_lse) < 3e-6
    both = torch.autograd.grad(loss + (lse**2).sum(), [E, C], retain_graph=True)
    for g, w in zip(
        both, torch.autograd.grad(expected + (expected_lse**2).sum(), wide, retain_graph=True), strict=True
    ):
        assert relative(g, w) < 3e-6
    alone = torch.autograd.grad(lse.sum(), [E, C])
    for g, w in zip(alone, torch.autograd.grad(expected_lse.sum(), wide), strict=True):
        assert relative(g, w) < 3e-6


@pytest.mark.parametrize("mode", ["exact", "lean", "filtered"])
def test_a_target_outside_the_vocabulary_makes_the_loss_nan_and_reads_nothing(mode: str) -> None:
    E, C, y = make(9, 40, 20)
    with torch.no_grad():
        E[3] = float("nan")  # is not read
    y[1], y[3], y[5] = 40, -7, -100
    for many in (False, True):  # all logits at once, and in chunks
        tiles.BUFFER_BYTES = 2**20 if many else 1
        # As on a GPU, where nobody looks at the targets before.
        problem = replace(prepare(E, C, torch.zeros_like(y), label_smoothing=0.1)[0], mode=mode, targets=y)
        loss, _ = fused.linear_cross_entropy(problem)
        assert loss.isnan()
        dE, dC = torch.autograd.grad(loss, [E, C])
        assert dC.isfinite().all()
        assert (dE[[1, 3, 5]] == 0).all()
    losses, _ = fused.linear_cross_entropy(replace(problem, reduction="none"))
    assert losses.isnan().nonzero().flatten().tolist() == [1, 3]


@pytest.mark.parametrize("mode", ["exact", "lean", "filtered"])
@pytest.mark.parametrize("buffer_bytes", [1, 2**20])
def test_a_default_dtype_changes_nothing(mode: str, buffer_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "BUFFER_BYTES", buffer_bytes)
    E, C, y = make(21, 75, 20)
    options = dict(mode=mode, label_smoothing=0.1, filter_eps=0.02)
    loss = by_kernels(E, C, y, **options)
    expected = [loss, *torch.autograd.grad(loss, [E, C])]
    torch.set_default_dtype(torch.bfloat16)
    try:
        loss = by_kernels(E, C, y, **options)
        for a, b in zip([loss, *torch.autograd.grad(loss, [E, C])], expected, strict=True):
            assert a.dtype == torch.float32
            assert torch.equal(a, b)
        problem, _ = prepare(E, C, y, reduction="none")
        assert {t.dtype for t in fused_statistics(problem) if t.is_floating_point()} == {torch.float32}
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("buffer_bytes", [1, 2**20])
def test_columns_that_a_bias_rules_out(buffer_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "BUFFER_BYTES", buffer_bytes)
    E, C, y = make(21, 75, 20)
    bias = torch.zeros(75)
    bias[70:] = float("-inf")  # padding
    y = torch.where(y >= 70, 3, y)
    for options in (dict(), dict(label_smoothing=0.1, smoothing_prior=(bias == 0) / 70.0)):
        assert_equals_reference_without_bias_gradient(E, C, y, bias, **options)


def assert_equals_reference_without_bias_gradient(
    E: Tensor, C: Tensor, y: Tensor, bias: Tensor, **options: Any
) -> None:
    for mode in ("exact", "lean"):
        wide = [t.detach().double().requires_grad_() for t in (E, C)]
        expected = linear_cross_entropy_reference(*wide, y, bias=bias.double(), **options)
        loss = by_kernels(E, C, y, bias=bias, mode=mode, **options)
        assert relative(loss, expected) < 3e-6
        for g, w in zip(torch.autograd.grad(loss, [E, C]), torch.autograd.grad(expected, wide), strict=True):
            assert relative(g, w) < 3e-6


def test_a_head_whose_rows_are_one_row() -> None:
    E, C, y = make(21, 75, 20)
    rows = C[0].detach().expand(75, 20).requires_grad_()
    loss = by_kernels(E, rows, y, label_smoothing=0.1)
    [gradient] = torch.autograd.grad(loss, [rows])
    plain = rows.detach().contiguous().requires_grad_()
    [expected] = torch.autograd.grad(by_kernels(E, plain, y, label_smoothing=0.1), [plain])
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("mode", ["exact", "lean"])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_equals_the_definition_for_one_token_and_a_tiny_vocabulary(mode: str, shape: tuple[int, int, int]) -> None:
    assert_equals_reference(*make(*shape), mode=mode, label_smoothing=0.1)


@pytest.mark.parametrize("mode", ["exact", "lean", "filtered"])
def test_bias_with_its_gradient(mode: str) -> None:
    E, C, y = make(21, 75, 20)
    bias = torch.randn(75).requires_grad_()
    # 1e-9 keeps everything: filtered is exact then.
    assert_equals_reference(E, C, y, mode=mode, bias=bias, label_smoothing=0.1, scale=0.5, filter_eps=1e-9)


@pytest.mark.parametrize("mode", ["exact", "lean"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_pointer_path_equals_the_definition(
    mode: str, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    E, C, y = make(21, 75, 19)  # rows of 76 bytes: no descriptor can be made
    assert not configurations.choose(E, C, storing=True).descriptors
    assert_equals_reference(E, C, y, mode=mode, label_smoothing=0.1, softcap=softcap)


@pytest.mark.parametrize("mode", ["exact", "lean"])
def test_float16(mode: str) -> None:
    assert_equals_reference(*make(21, 75, 24, dtype=torch.float16), mode=mode, label_smoothing=0.1, tolerance=2e-3)


def test_targets_far_below_the_top_are_made_again() -> None:
    E, C, y = make(20, 70, 20)
    E = (E.detach() * 30).requires_grad_()
    z = (E @ C.T).detach()
    below = z.amax(1) - z.gather(1, y.clamp(min=0).unsqueeze(1)).squeeze(1)
    assert below[y >= 0].max() > 100  # exp() of that is not a float32
    # Logits of several hundred have fewer digits left.
    assert_equals_reference(E, C, y, mode="exact", label_smoothing=0.1, tolerance=2e-5)


@pytest.mark.parametrize("sample", [4, 64])
@pytest.mark.parametrize(
    "options",
    [
        dict(label_smoothing=0.1),
        dict(reduction="sum", z_loss=1e-2),
        dict(label_smoothing=0.1, softcap=3.0, scale=0.9, z_loss=1e-2),
        dict(label_smoothing=0.1, smoothing_prior=True, bias=True),
        dict(label_smoothing=0.1, smoothing_prior=True, softcap=3.0, bias=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_filtered_replaces_the_tail_and_puts_the_sample_right(
    shape: tuple[int, int, int],
    options: dict[str, Any],
    sample: int,
    filtered_in_full: Callable[..., tuple[Tensor, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tail, "SAMPLE", sample)
    E, C, y = make(*shape)
    options = dict(options, filter_eps=0.02)
    inputs = [E, C]
    if options.get("bias"):
        options["bias"] = torch.randn(shape[1], generator=torch.Generator().manual_seed(1)).requires_grad_()
        inputs.append(options["bias"])
    if options.get("smoothing_prior"):
        options["smoothing_prior"] = prior(shape[1])
    kept = torch.empty(len(y))
    problem, _ = prepare(E, C, y, mode="filtered", kept_mass=kept, **options)
    *wanted, kept_expected = filtered_in_full(E, C, y, problem.weights(), **options)
    loss, _ = fused.linear_cross_entropy(problem)
    assert relative(kept, kept_expected) < 3e-6
    for g, w in zip(torch.autograd.grad(loss, inputs), wanted, strict=False):
        # Where a softcap saturates, 1 - (z / t)^2 loses digits.
        assert relative(g, w) < (5e-6 if options.get("softcap") is None else 2e-5)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_filtered_drops_what_chunked_drops(
    shape: tuple[int, int, int], softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tail, "SAMPLE", 8)
    E, C, y = make(*shape)
    wide = [t.detach().double().requires_grad_() for t in (E, C)]
    options = dict(mode="filtered", filter_eps=0.02, label_smoothing=0.1, softcap=softcap, scale=0.5, z_loss=1e-2)
    kept, kept_expected = torch.empty(len(y)), torch.empty(len(y))
    problem, _ = prepare(*wide, y, kept_mass=kept_expected, **options)
    expected, _ = chunked.linear_cross_entropy(problem)
    loss = by_kernels(E, C, y, kept_mass=kept, **options)
    assert relative(loss, expected) < 3e-6
    assert relative(kept, kept_expected) < 3e-6
    for g, w in zip(torch.autograd.grad(loss, [E, C]), torch.autograd.grad(expected, wide), strict=True):
        assert relative(g, w) < 5e-6


def test_filtered_with_logits_at_both_ends_of_a_softcap(
    filtered_in_full: Callable[..., tuple[Tensor, ...]],
) -> None:
    """Targets whose probability is no float32, or one of few digits."""
    E, C, y = make(20, 70, 20)
    E = (E.detach() * 30).requires_grad_()
    problem, _ = prepare(E, C, y, mode="filtered", softcap=60.0, filter_eps=0.02, label_smoothing=0.1)
    wanted = filtered_in_full(E, C, y, problem.weights(), softcap=60.0, filter_eps=0.02, label_smoothing=0.1)
    loss, _ = fused.linear_cross_entropy(problem)
    for g, w in zip(torch.autograd.grad(loss, [E, C]), wanted, strict=False):
        assert relative(g, w) < 2e-5


def test_filtered_is_exact_where_most_of_the_softmax_would_be_replaced() -> None:
    E, C, y = make(20, 70, 20)
    E = (E.detach() * 0.1).requires_grad_()  # nearly flat
    kept = torch.empty(20)
    by_kernels(E, C, y, mode="filtered", filter_eps=0.1, kept_mass=kept)
    assert (kept == 1).all()
    assert_equals_reference(E, C, y, mode="filtered", filter_eps=0.1, label_smoothing=0.1)


def test_a_list_without_bounds_is_not_made() -> None:
    assert listing.too_long(8192, 256_000, 1e-9, None)
    assert not listing.too_long(8192, 256_000, 2.0**-16, None)
    E, C, y = make(20, 70, 20)
    kept = torch.empty(20)
    problem, _ = prepare(E, C, y, mode="filtered", filter_eps=1e-9, kept_mass=kept)
    fused.linear_cross_entropy(problem)  # a small vocabulary has room for all of it
    assert (kept > 1 - 1e-5).all()


@pytest.mark.parametrize(("N", "V"), [(1, 1), (2, 40), (8192, 256_000), (8192, 262_144), (16_384, 262_144), (9, 2**27)])
def test_keys_sort_by_column_then_token(N: int, V: int) -> None:
    keys = listing.Keys.of(N, V)
    corners = [(c, t) for c in sorted({0, V // 2, V - 1}) for t in sorted({0, N // 2, N - 1})]
    made = keys.make(torch.tensor([c for c, _ in corners]), torch.tensor([t for _, t in corners]))
    assert made.dtype == keys.dtype
    assert made.tolist() == sorted(set(made.tolist()))
    assert made.max() < keys.no_entry
    assert (keys.dtype == torch.int32) == (N * V <= 2**31)


@pytest.mark.parametrize(
    "options",
    [
        dict(label_smoothing=0.1),
        dict(reduction="sum"),
        dict(label_smoothing=0.5, softcap=3.0, scale=0.5),
        dict(label_smoothing=0.1, z_loss=1e-2, softcap=2.0),
        dict(label_smoothing=0.1, scale=1.7, z_loss=1e-2, bias=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(33, 75, 20), *SHAPES[1:]], ids=str)
def test_logits_that_fit_at_once(
    shape: tuple[int, int, int], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "BUFFER_BYTES", 2**20)
    called = []
    make = whole.losses_and_gradients
    monkeypatch.setattr(whole, "losses_and_gradients", lambda *a: called.append(1) or make(*a))
    E, C, y = make_far(*shape)
    bias = torch.randn(shape[1]) if options.get("bias") else None
    options = dict(options, bias=bias)
    wide = [t.detach().double().requires_grad_() for t in (E, C)]
    expected = linear_cross_entropy_reference(*wide, y, **dict(options, bias=None if bias is None else bias.double()))
    loss = by_kernels(E, C, y, **options)
    assert relative(loss, expected) < 3e-6
    incoming = torch.tensor(1.3, dtype=torch.float64)
    for g, w in zip(
        torch.autograd.grad(loss, [E, C], incoming.float()), torch.autograd.grad(expected, wide, incoming), strict=True
    ):
        # Where a softcap saturates, 1 - (z / t)^2 loses digits.
        assert relative(g, w) < (3e-6 if options.get("softcap") is None else 2e-5)
    with torch.no_grad():
        E[y == -100] = float("nan")
    loss_again = by_kernels(E, C, y, **options)
    dE, dC = torch.autograd.grad(loss_again, [E, C], incoming.float())
    assert torch.equal(loss_again, loss)
    assert dC.isfinite().all()
    assert (dE[y == -100] == 0).all()
    assert len(called) == 2


def test_a_list_that_overflows_makes_filtered_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "ENTRIES_PER_TOKEN", 0.01)
    E, C, y = make(20, 70, 20)
    kept = torch.empty(20)
    by_kernels(E, C, y, mode="filtered", filter_eps=0.01, kept_mass=kept)
    assert (kept == 1).all()
    assert_equals_reference(E, C, y, mode="filtered", filter_eps=0.01, label_smoothing=0.1)


@pytest.mark.parametrize("mode", ["exact", "lean", "filtered"])
def test_ignored_tokens_may_hold_anything(mode: str) -> None:
    E, C, y = make(21, 75, 20, ignored=5)
    with torch.no_grad():
        E[y == -100] = float("nan")
    loss = by_kernels(E, C, y, mode=mode, label_smoothing=0.1)
    dE, dC = torch.autograd.grad(loss, [E, C])
    assert loss.isfinite()
    assert dC.isfinite().all()
    assert (dE[y == -100] == 0).all()


@pytest.mark.parametrize("mode", ["exact", "lean", "filtered"])
def test_every_target_ignored_gives_zero_with_a_graph(mode: str) -> None:
    E, C, y = make(5, 40, 20)
    loss = by_kernels(E, C, torch.full_like(y, -100), mode=mode, label_smoothing=0.1)
    assert loss == 0
    for g in torch.autograd.grad(loss, [E, C]):
        assert (g == 0).all()


@pytest.mark.parametrize("mode", ["exact", "lean", "filtered"])
@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_inputs(mode: str, frozen: int) -> None:
    inputs = make(9, 40, 20)
    y = inputs.pop()
    both = torch.autograd.grad(by_kernels(*inputs, y, mode=mode, label_smoothing=0.1), inputs)
    inputs[frozen].requires_grad_(False)
    alone = torch.autograd.grad(by_kernels(*inputs, y, mode=mode, label_smoothing=0.1), inputs[1 - frozen])
    torch.testing.assert_close(alone[0], both[1 - frozen])


def test_float32_gradient_of_a_float16_head() -> None:
    E, C, y = make(21, 75, 24, dtype=torch.float16)
    wide = [t.detach().double().requires_grad_() for t in (E, C)]
    expected = torch.autograd.grad(linear_cross_entropy_reference(*wide, y, label_smoothing=0.1), wide)[1]
    master = C.detach().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = by_kernels(E, master, y, label_smoothing=0.1, mode="lean", head_gradient_dtype=torch.float32)
    got = torch.autograd.grad(loss, master)[0]
    assert got.dtype == torch.float32
    assert relative(got, expected) < 1e-3
    assert not torch.equal(got, got.half().float())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_equal_the_chunked_ones(shape: tuple[int, int, int]) -> None:
    E, C, y = make(*shape)
    problem, _ = prepare(E, C, y, reduction="none", scale=0.7)
    lse, z_target, top_token, top_logprob, entropy = fused_statistics(problem)
    expected = token_statistics(E, C, y, scale=0.7)
    torch.testing.assert_close(lse, expected.logsumexp)
    kept = y >= 0
    torch.testing.assert_close((z_target - lse)[kept], expected.target_logprob[kept])
    assert torch.equal(top_token.long(), expected.top_token)
    torch.testing.assert_close(top_logprob, expected.top_logprob)
    torch.testing.assert_close(entropy, expected.entropy, rtol=1e-4, atol=1e-5)


def test_operators_obey_the_rules_of_custom_operators() -> None:
    E, C, y = make(5, 40, 20)
    shares, masses = torch.full((40,), 1 / 40), torch.ones(5)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        exact.loss_and_gradients,
        (E, C, None, y, masses, None, -100, 0.1, None, 1.0, 0.0, torch.float32, True, True),
        test_utils=tests,
    )
    torch.library.opcheck(
        lean.token_losses,
        (E, C, None, y, shares, masses, masses, -100, 0.1, None, 1.0, 0.0, torch.float32, 3000),
        test_utils=tests,
    )
    torch.library.opcheck(
        filtered.filtered_losses,
        (E, C, None, y, shares, -100, 0.1, None, 1.0, 0.0, torch.float32, 0.02, True),
        test_utils=tests,
    )


def test_the_door_says_why_not() -> None:
    E, C, y = make(5, 40, 20)
    problem, _ = prepare(E, C, y)
    assert fused.why_not(problem) == "the tensors aren't on a CUDA device"


def test_the_schedule_fills_the_device_and_covers_every_block() -> None:
    configuration = configurations.TABLE["interpreter", True, True]
    device = torch.device("cpu")  # counts as four multiprocessors
    assert configurations.schedule(1, 100, configuration, device) == (1, 4)
    assert configurations.schedule(2, 100, configuration, device) == (2, 2)
    assert configurations.schedule(5, 100, configuration, device) == (2, 2)  # groups of 2, 2 and 1
    assert configurations.schedule(1, 1, configuration, device) == (1, 1)


@pytest.fixture
def tuned_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache folder's, and kernels that agree to be searched without a GPU."""
    monkeypatch.setenv("CALSMOOTH_CACHE", str(tmp_path))
    monkeypatch.setattr(fused, "why_not", lambda problem: None)
    configurations.tuned.cache_clear()
    yield tmp_path / "kernels.json"
    configurations.tuned.cache_clear()


def sized(block_v: int) -> Configuration:
    return replace(configurations.TABLE["interpreter", True, False], block_v=block_v)


def test_a_search_keeps_the_fastest_that_agrees(tuned_file: Path) -> None:
    E, C, y = make(40, 90, 20)
    slow, fast, wrong, impossible = (sized(size) for size in (16, 64, 128, 256))
    cost = {slow: 9.0, fast: 2.0, wrong: 1.0, impossible: 0.0}
    calls: list[Configuration] = []

    def timed(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
        used = configurations.choose(E, C, storing=len(calls) > len(cost))
        calls.append(used)
        if used == impossible:
            raise OutOfResources(300, 200, "shared memory")
        loss = run()
        return cost.get(used, 5.0), 2 * loss if used == wrong else loss

    walking, storing = tuning.search([(E, C, y)], timed, [slow, fast, wrong, impossible], lambda: None)
    assert walking == tuning.Found(True, False, fast, True, 3, [(40, 90, 20)], [2.0], [5.0])
    assert storing.storing
    assert storing.configuration == fast

    # The file holds it, and whoever reads the file uses it.
    tuned_file.write_text(json.dumps(tuning.file_content()))
    configurations.tuned.cache_clear()
    assert configurations.choose(E, C, storing=False) == fast
    assert_equals_reference(E, C, y, label_smoothing=0.1)
    tuned_file.write_text('[{"gpu": 1}]')
    configurations.tuned.cache_clear()
    with pytest.warns(UserWarning, match="--autotune"):
        assert configurations.choose(E, C, storing=False) == configurations.TABLE["interpreter", True, False]


def test_a_search_over_several_problems_keeps_one_for_each_kind(tuned_file: Path) -> None:
    default, steady, lopsided, partial = (sized(size) for size in (32, 16, 64, 128))
    # In sum `lopsided` would win by the large problem alone; `partial` fails there.
    costs = {
        (20, 40, 20): {default: 1.0, steady: 0.5, lopsided: 4.0, partial: 0.1},
        (30, 60, 20): {default: 100.0, steady: 90.0, lopsided: 60.0},
        (10, 20, configurations.SHORT + 4): {default: 1.0, steady: 2.0, lopsided: 2.0, partial: 2.0},
    }
    calls = iter([(sizes, storing) for sizes in costs for storing in (False, True) for _ in range(4)])

    def timed(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
        sizes, storing = next(calls)
        used = configurations.in_use(torch.device("cpu"), sizes[2], storing)
        if used not in costs[sizes]:
            raise OutOfResources(300, 200, "shared memory")
        return costs[sizes][used], torch.tensor(1.0)

    ticks: list[None] = []
    found = tuning.search(
        (make(*sizes) for sizes in costs), timed, [steady, lopsided, partial], lambda: ticks.append(None)
    )
    small, large, long = costs
    assert found == [
        *(tuning.Found(True, s, steady, True, 3, [small, large], [0.5, 90.0], [1.0, 100.0]) for s in (False, True)),
        *(tuning.Found(False, s, default, False, 4, [long], [1.0], [1.0]) for s in (False, True)),
    ]
    assert len(ticks) == 2 * 3 * 3
    # Where nothing was faster nothing is kept: a better table, one day, isn't hidden.
    assert [(entry["short"], entry["storing"]) for entry in tuning.file_content()] == [(True, False), (True, True)]


def test_a_search_times_kernels_that_have_tiles_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "why_not", lambda problem: None)
    monkeypatch.setattr(tiles, "BUFFER_BYTES", 2**20)  # all logits fit
    used = []
    choose = configurations.choose
    monkeypatch.setattr(tiles, "choose", lambda E, C, storing: used.append(storing) or choose(E, C, storing))
    monkeypatch.setattr(whole, "losses_and_gradients", lambda *_: pytest.fail("takes no tiles"))
    E, C, y = make(40, 90, 20)
    tuning._gradients(E.detach(), C.detach(), y)()
    assert True in used
