"""The public loss against its definition, torch's own cross-entropy, float64 finite differences and its promises."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calsmooth import linear_cross_entropy, linear_cross_entropy_reference
from calsmooth.errors import UsageError
from calsmooth.loss import chunked


def make(
    N: int, V: int, D: int, *, dtype: torch.dtype = torch.float64, bias: bool = False, ignored: int = 0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    g = torch.Generator().manual_seed(seed)
    E = torch.randn(N, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    C = torch.randn(V, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    b = torch.randn(V, generator=g, dtype=torch.float64).to(dtype).requires_grad_() if bias else None
    y = torch.randint(0, V, (N,), generator=g)
    y[torch.randperm(N, generator=g)[:ignored]] = -100
    return E, C, y, b


def gradients(loss: Tensor, inputs: list[Tensor], seed: int = 1) -> list[Tensor]:
    incoming = torch.randn(loss.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return list(torch.autograd.grad(loss, inputs, incoming.to(loss.dtype), retain_graph=True))


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-300))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of tokens, of rows and of vocabulary even for tiny inputs."""
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 2000)
    monkeypatch.setattr(chunked, "WIDEN_BYTES", 300)
    monkeypatch.setattr(chunked, "ROW_BLOCK_BYTES", 500)


GRID = list(itertools.product(["mean", "sum", "none"], [0.0, 0.1, 1.0], [None, 3.0], [1.0, 0.25], [False, True]))


@pytest.mark.parametrize(("reduction", "beta", "softcap", "scale", "bias"), GRID)
def test_equals_the_definition(
    small_chunks: None, reduction: str, beta: float, softcap: float | None, scale: float, bias: bool
) -> None:
    E, C, y, b = make(37, 101, 13, bias=bias, ignored=5)
    options = dict(bias=b, label_smoothing=beta, softcap=softcap, scale=scale, reduction=reduction)
    loss, expected = linear_cross_entropy(E, C, y, **options), linear_cross_entropy_reference(E, C, y, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    inputs = [t for t in (E, C, b) if t is not None]
    for got, want in zip(gradients(loss, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    N=st.integers(1, 30),
    V=st.integers(1, 60),
    D=st.integers(1, 20),
    beta=st.floats(0, 1),
    ignored=st.integers(0, 30),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    seed=st.integers(0, 10_000),
)
def test_equals_torch_on_any_ragged_shape(
    N: int, V: int, D: int, beta: float, ignored: int, reduction: str, seed: int
) -> None:
    E, C, y, _ = make(N, V, D, ignored=min(ignored, N - 1), seed=seed)
    expected = F.cross_entropy(E @ C.T, y, label_smoothing=beta, reduction=reduction)
    loss = linear_cross_entropy(E, C, y, label_smoothing=beta, reduction=reduction)
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-11)
    for got, want in zip(gradients(loss, [E, C]), gradients(expected, [E, C]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(small_chunks: None, reduction: str, softcap: float | None) -> None:
    E, C, y, b = make(9, 21, 4, bias=True, ignored=2)
    assert b is not None

    def loss(E: Tensor, C: Tensor, b: Tensor) -> Tensor:
        return linear_cross_entropy(
            E, C, y, bias=b, label_smoothing=0.1, softcap=softcap, scale=0.7, reduction=reduction
        )

    assert torch.autograd.gradcheck(loss, (E, C, b))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_low_precision_is_closer_to_float64_than_torch(
    small_chunks: None, dtype: torch.dtype, softcap: float | None
) -> None:
    E, C, y, _ = make(64, 300, 32, dtype=dtype)
    options = dict(label_smoothing=0.1, softcap=softcap, scale=0.5)
    exact = linear_cross_entropy_reference(E.double(), C.double(), y, **options)
    wanted = gradients(exact, [E, C])
    loss = linear_cross_entropy(E, C, y, **options)
    assert loss.dtype == torch.float32
    assert relative(loss, exact) < 1e-6
    rounding = torch.finfo(dtype).eps
    for got, want in zip(gradients(loss, [E, C]), wanted, strict=True):
        assert got.dtype == dtype
        # `want` was itself rounded to dtype on its way back to the leaf: half an ulp each.
        assert relative(got, want) < 1.0 * rounding if dtype != torch.float32 else relative(got, want) < 2e-6


def test_every_target_ignored_gives_zero_with_a_graph() -> None:
    E, C, y, b = make(5, 7, 3, bias=True, ignored=5)
    for reduction in ("mean", "sum", "none"):
        loss = linear_cross_entropy(E, C, y, bias=b, label_smoothing=0.1, reduction=reduction)
        assert loss.requires_grad
        assert loss.abs().sum() == 0
        for g in torch.autograd.grad(loss.sum(), [E, C, b]):
            assert g.abs().sum() == 0


def test_ignored_tokens_may_hold_anything() -> None:
    E, C, y, _ = make(6, 11, 4, ignored=3)
    with torch.no_grad():
        E[y == -100] = float("nan")
    loss = linear_cross_entropy(E, C, y, label_smoothing=0.1)
    dE, dC = torch.autograd.grad(loss, [E, C])
    assert loss.isfinite()
    assert dC.isfinite().all()
    assert (dE[y == -100] == 0).all()


def test_leading_dimensions_and_int32_targets() -> None:
    E, C, y, _ = make(12, 9, 5)
    flat = linear_cross_entropy(E, C, y, reduction="none")
    shaped = linear_cross_entropy(E.view(3, 4, 5), C, y.view(3, 4).int(), reduction="none")
    assert shaped.shape == (3, 4)
    torch.testing.assert_close(shaped.flatten(), flat)


def test_no_tokens_at_all() -> None:
    E, C, y, _ = make(4, 9, 5)
    loss = linear_cross_entropy(E[:0], C, y[:0], label_smoothing=0.1)
    assert loss == 0
    assert torch.autograd.grad(loss, C)[0].abs().sum() == 0


def test_kept_graph_can_be_used_again() -> None:
    E, C, y, _ = make(8, 15, 4)
    loss = linear_cross_entropy(E, C, y, label_smoothing=0.1)
    first = torch.autograd.grad(3.0 * loss, [E, C], retain_graph=True)
    second = torch.autograd.grad(3.0 * loss, [E, C])
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)


def test_frozen_inputs_get_no_gradient_and_no_grad_makes_none() -> None:
    E, C, y, _ = make(8, 15, 4)
    wanted = torch.autograd.grad(linear_cross_entropy(E, C, y), [E, C])
    for frozen, trained, want in ((E, C, wanted[1]), (C, E, wanted[0])):
        frozen.requires_grad_(False)
        loss = linear_cross_entropy(E, C, y)
        torch.testing.assert_close(torch.autograd.grad(loss, trained)[0], want)
        frozen.requires_grad_(True)
    with torch.no_grad():
        assert not linear_cross_entropy(E, C, y).requires_grad


def test_extreme_logits_stay_finite() -> None:
    E, C, y, _ = make(6, 50, 4)
    loss = linear_cross_entropy(E * 1e4, C, y, label_smoothing=0.1)
    expected = linear_cross_entropy_reference(E * 1e4, C, y, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)
    for g in torch.autograd.grad(loss, [E, C]):
        assert g.isfinite().all()


def test_autocast_casts_and_returns_float32() -> None:
    E, C, y, _ = make(16, 40, 8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(E, C, y, label_smoothing=0.1)
    by_hand = linear_cross_entropy(E.bfloat16(), C.bfloat16(), y, label_smoothing=0.1)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, by_hand)
    assert torch.autograd.grad(loss, C)[0].dtype == torch.float32


def test_gradients_never_hold_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 64 * 1024)
    E, C, y, _ = make(512, 1024, 8, dtype=torch.float32)  # all logits: 2 MB
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, Tensor):
                    largest = max(largest, t.untyped_storage().nbytes())
            return out

    with Watch():
        linear_cross_entropy(E, C, y, label_smoothing=0.1, softcap=5.0).backward()
    assert largest <= 64 * 1024


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(targets=torch.tensor([0, 9])), "target 9 is outside the vocabulary; expected 0 to 4"),
        (dict(targets=torch.tensor([0, -1])), "target -1 is outside"),
        (dict(targets=torch.tensor([0, 1, 2])), r"targets \(3,\) don't fit hidden_states \(2, 3\)"),
        (dict(targets=torch.tensor([0.0, 1.0])), "expected class indices"),
        (dict(lm_head_weight=torch.randn(5, 4)), r"expected \(..., D\) and \(V, D\)"),
        (dict(lm_head_weight=torch.randn(5, 3).double()), "one floating-point dtype"),
        (dict(bias=torch.randn(4)), r"expected \(5,\)"),
        (dict(label_smoothing=1.5), "label_smoothing must be from 0 to 1, got 1.5"),
        (dict(label_smoothing=float("nan")), "label_smoothing must be from 0 to 1"),
        (dict(reduction="avg"), "reduction must be"),
        (dict(softcap=0.0), "softcap must be above 0"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(change: dict, message: str) -> None:
    arguments = (
        dict(hidden_states=torch.randn(2, 3), lm_head_weight=torch.randn(5, 3), targets=torch.tensor([0, 1])) | change
    )
    with pytest.raises(UsageError, match=message) as error:
        linear_cross_entropy(**arguments)
    assert "\n" not in str(error.value)
