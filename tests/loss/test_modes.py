"""Modes, z-loss, shift, kept mass, the head's gradient dtype and token statistics, on any device."""

from typing import Any

import pytest
import torch
from torch import Tensor

from calsmooth.errors import UsageError
from calsmooth.loss import chunked, linear_cross_entropy, linear_cross_entropy_reference, token_statistics


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    E = torch.randn(4, 9, 12, generator=g, dtype=torch.float64).requires_grad_()
    C = torch.randn(50, 12, generator=g, dtype=torch.float64).requires_grad_()
    y = torch.randint(0, 50, (4, 9), generator=g)
    y[0, :3] = -100
    return E, C, y


Inputs = tuple[Tensor, Tensor, Tensor]


@pytest.mark.parametrize("mode", ["exact", "lean"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_z_loss_and_shift_equal_the_definition(
    inputs: Inputs, mode: str, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 2000)
    E, C, y = inputs
    options: dict[str, Any] = dict(label_smoothing=0.1, z_loss=1e-2, shift=True, softcap=4.0, reduction=reduction)
    loss = linear_cross_entropy(E, C, y, mode=mode, **options)
    expected = linear_cross_entropy_reference(E, C, y, **options)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(torch.autograd.grad(loss.sum(), [E, C]), torch.autograd.grad(expected.sum(), [E, C]), strict=True):
        torch.testing.assert_close(a, b)


def test_shift_is_what_people_write_by_hand(inputs: Inputs) -> None:
    E, C, y = inputs
    by_hand = torch.nn.functional.cross_entropy((E @ C.T)[:, :-1].flatten(0, 1), y[:, 1:].flatten())
    torch.testing.assert_close(linear_cross_entropy(E, C, y, shift=True), by_hand)


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_filtered_keeps_the_target_the_smoothing_term_what_reaches_eps_and_the_mean_of_the_rest(
    inputs: Inputs, softcap: float | None
) -> None:
    E, C, y = inputs
    beta, eps, V = 0.1, 0.03, len(C)
    z = E.detach() @ C.detach().T
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    slope = torch.ones_like(z) if softcap is None else 1 - (z / softcap) ** 2
    p, valid = z.softmax(-1), y != -100
    onehot = torch.nn.functional.one_hot(y.clamp(min=0), V).double()
    keep = (p >= eps) | (onehot > 0)
    mean_of_the_rest = (p * ~keep).sum(-1, keepdim=True) / (~keep).sum(-1, keepdim=True)
    G = torch.where(keep, (p - (1 - beta) * onehot - beta / V) * slope, mean_of_the_rest - beta / V)
    if softcap is None:
        assert G.sum(-1).abs().max() < 1e-12  # as the exact gradient's
    G = G * valid.unsqueeze(-1) / valid.sum()

    kept = torch.empty(y.shape)
    loss = linear_cross_entropy(
        E, C, y, label_smoothing=beta, softcap=softcap, mode="filtered", filter_eps=eps, kept_mass=kept
    )
    torch.testing.assert_close(loss, linear_cross_entropy_reference(E, C, y, label_smoothing=beta, softcap=softcap))
    dE, dC = torch.autograd.grad(loss, [E, C])
    torch.testing.assert_close(dE, G @ C)
    torch.testing.assert_close(dC, G.flatten(0, 1).T @ E.flatten(0, 1))
    torch.testing.assert_close(kept, torch.where(valid, (p * keep).sum(-1), 1.0).float())
    assert 0.05 < kept[valid].mean() < 0.95


def test_other_modes_keep_everything(inputs: Inputs) -> None:
    E, C, y = inputs
    kept = torch.empty(y.shape)
    linear_cross_entropy(E, C, y, kept_mass=kept)
    assert (kept == 1).all()


def test_float32_gradient_of_a_master_weight_under_autocast(inputs: Inputs) -> None:
    E, C, y = inputs
    master = C.detach().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = torch.autograd.grad(linear_cross_entropy(E.detach(), master, y), master)[0]
        full = torch.autograd.grad(
            linear_cross_entropy(E.detach(), master, y, head_gradient_dtype=torch.float32), master
        )[0]
    assert rounded.dtype == full.dtype == torch.float32
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert not torch.equal(full, full.bfloat16().float())
    torch.testing.assert_close(rounded, full, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_statistics(inputs: Inputs, dtype: torch.dtype, softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 2000)
    E, C, y = inputs
    E, C = E.detach().to(dtype), C.detach().to(dtype)
    bias = torch.randn(50, dtype=torch.float64).to(dtype)
    z = 0.5 * (E.double() @ C.double().T + bias.double())
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    logprob = z.log_softmax(-1)
    found = token_statistics(E, C, y, bias=bias, scale=0.5, softcap=softcap)
    close = dict(rtol=1e-5, atol=1e-5, check_dtype=False)
    torch.testing.assert_close(found.logsumexp, z.logsumexp(-1), **close)
    assert torch.equal(found.top_token, z.argmax(-1))
    torch.testing.assert_close(found.top_logprob, logprob.amax(-1), **close)
    torch.testing.assert_close(found.entropy, -(logprob.exp() * logprob).sum(-1), **close)
    target = logprob.gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(
        found.target_logprob, target.masked_fill(y == -100, float("nan")), equal_nan=True, **close
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(mode="fast"), "mode must be 'exact', 'filtered' or 'lean', got 'fast'"),
        (dict(filter_eps=0.0), "filter_eps must be between 0 and 1, got 0.0"),
        (dict(z_loss=-1.0), "z_loss must not be negative, got -1.0"),
        (dict(kept_mass=torch.empty(3)), r"kept_mass is \(3,\) torch.float32; expected \(4, 9\) torch.float32"),
        (dict(head_gradient_dtype=torch.float16), "head_gradient_dtype must be torch.float64"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(inputs: Inputs, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        linear_cross_entropy(*inputs, **change)
    assert "\n" not in str(error.value)


def test_training_with_filtered_ends_where_exact_does() -> None:
    """Were small entries' softmax just left out, smoothing would lift each of them up to filter_eps."""
    V, beta, eps = 400, 0.1, 2.0**-8  # beta / V is far below eps
    targets = torch.randint(0, 8, (64,), generator=torch.Generator().manual_seed(0))
    entropies = {}
    for mode in ("exact", "filtered"):
        head = torch.zeros(V, 1, dtype=torch.float64, requires_grad=True)
        ones = torch.ones(64, 1, dtype=torch.float64)
        optimizer = torch.optim.Adam([head], lr=0.05)
        for _ in range(400):
            optimizer.zero_grad()
            linear_cross_entropy(ones, head, targets, label_smoothing=beta, mode=mode, filter_eps=eps).backward()
            optimizer.step()
        p = head.detach().squeeze(1).softmax(0)
        entropies[mode] = float(-(p * p.log()).sum())
        assert float(p[8:].sum()) == pytest.approx(beta * (V - 8) / V, rel=0.02)
    assert entropies["filtered"] == pytest.approx(entropies["exact"], rel=0.01)
