"""Modes, z-loss, shift, kept mass, the head's gradient dtype and token statistics, on any device."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from calsmooth.errors import UsageError
from calsmooth.loss import chunked, linear_cross_entropy, linear_cross_entropy_reference, tail, token_statistics


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


@pytest.mark.parametrize("sample", [4, 64])
@pytest.mark.parametrize(
    "options", [dict(), dict(softcap=4.0, scale=0.9), dict(smoothing_prior=True, z_loss=1e-2, bias=True)], ids=str
)
def test_filtered_replaces_the_tail_and_puts_the_sample_right(
    inputs: Inputs,
    options: dict[str, Any],
    sample: int,
    filtered_in_full: Callable[..., tuple[Tensor, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 2000)
    monkeypatch.setattr(tail, "SAMPLE", sample)
    E, C, y = inputs
    flat, V = y.flatten(), len(C)
    options = dict(options, label_smoothing=0.1, filter_eps=0.03)
    leaves = [E, C]
    if options.get("bias"):
        options["bias"] = torch.randn(V, dtype=torch.float64).requires_grad_()
        leaves.append(options["bias"])
    if options.get("smoothing_prior"):
        options["smoothing_prior"] = torch.arange(V, dtype=torch.float64) / (V * (V - 1) / 2)
    kept = torch.empty(y.shape)
    loss = linear_cross_entropy(E, C, y, mode="filtered", kept_mass=kept, **options)
    plain = {k: v for k, v in options.items() if k != "filter_eps"}
    torch.testing.assert_close(loss, linear_cross_entropy_reference(E, C, y, **plain))
    shares = (flat != -100).double() / (flat != -100).sum()
    *wanted, kept_expected = filtered_in_full(E.flatten(0, -2), C, flat, shares, **options)
    for g, w in zip(torch.autograd.grad(loss, leaves), wanted, strict=False):
        torch.testing.assert_close(g, w.view(g.shape))
    torch.testing.assert_close(kept.flatten(), kept_expected.float())
    assert 0.5 < kept[y != -100].mean() < 0.97


def test_filtered_is_exact_on_average_over_the_places_of_the_sample(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever distribution stands in for the tails: if it isn't the sample's own, to the last digit."""
    anything = torch.rand(50, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    class AnyTail(chunked._Tail):
        def replacement(self, softmax: Tensor, left_out: Tensor) -> Tensor:
            return replace(self, shape=anything / anything.sum()).parent_replacement(softmax, left_out)

        parent_replacement = chunked._Tail.replacement

    monkeypatch.setattr(chunked, "_Tail", AnyTail)
    E, C, y = inputs
    E, y = E.flatten(0, 1), y.flatten()
    options: dict[str, Any] = dict(label_smoothing=0.1, softcap=4.0, filter_eps=0.03)
    exact = torch.autograd.grad(linear_cross_entropy(E, C, y, **options), C)[0]
    tokens = (y != -100).nonzero().squeeze(1)
    gradients = []
    for token in tokens:
        sample = token.unsqueeze(0), torch.tensor(float(len(tokens)))
        monkeypatch.setattr(chunked, "sample_tokens", lambda has_target, targets, sample=sample: sample)
        gradients.append(torch.autograd.grad(linear_cross_entropy(E, C, y, mode="filtered", **options), C)[0])
        assert not torch.allclose(gradients[-1], exact, rtol=1e-2)
    torch.testing.assert_close(torch.stack(gradients).mean(0), exact)


def test_filtered_is_exact_where_most_of_the_softmax_would_be_replaced(inputs: Inputs) -> None:
    E, C, y = inputs
    kept = torch.empty(y.shape)
    options = dict(label_smoothing=0.1, scale=0.05)  # nearly flat
    loss = linear_cross_entropy(E, C, y, mode="filtered", filter_eps=0.1, kept_mass=kept, **options)
    expected = torch.autograd.grad(linear_cross_entropy_reference(E, C, y, **options), [E, C])
    for g, w in zip(torch.autograd.grad(loss, [E, C]), expected, strict=True):
        torch.testing.assert_close(g, w)
    assert (kept == 1).all()


@pytest.mark.parametrize(
    "options",
    [
        dict(class_weights=True),
        dict(target_probabilities=True),
        dict(return_logsumexp=True),
    ],
    ids=str,
)
def test_filtered_is_exact_where_it_has_no_list_for_it(inputs: Inputs, options: dict[str, Any]) -> None:
    E, C, y = inputs
    options = dict(options)
    if options.get("class_weights"):
        options["class_weights"] = torch.rand(len(C), dtype=torch.float64)
    if options.get("target_probabilities"):
        options["target_probabilities"] = torch.rand(*y.shape, 2, dtype=torch.float64)
        y = y.unsqueeze(-1).expand(*y.shape, 2).clone()
    kept = torch.empty(E.shape[:-1])
    result = linear_cross_entropy(E, C, y, mode="filtered", filter_eps=0.1, kept_mass=kept, **options)
    loss = result[0] if options.pop("return_logsumexp", False) else result
    expected = torch.autograd.grad(linear_cross_entropy_reference(E, C, y, **options), [E, C])
    for g, w in zip(torch.autograd.grad(loss, [E, C]), expected, strict=True):
        torch.testing.assert_close(g, w)
    assert (kept == 1).all()


def test_a_sample_is_spread_over_the_tokens_that_have_a_target() -> None:
    y = torch.arange(1000)
    y[::3] = -100
    tokens, stands_for = tail.sample_tokens(y >= 0, y, 32)
    assert (y[tokens] >= 0).all()
    assert float(stands_for) == pytest.approx(666 / 32)
    gaps = torch.cat([tokens, torch.tensor([1000])]).diff()
    assert gaps.min() > 0
    assert gaps.max() <= 2 * 1000 / 32 + 3
    again, _ = tail.sample_tokens(y >= 0, y, 32)
    assert torch.equal(tokens, again)
    other, _ = tail.sample_tokens(y >= 0, torch.where(y == 1, 12_345, y), 32)
    assert not torch.equal(tokens, other)
    alone, stands_for = tail.sample_tokens(y == 4, y, 32)
    assert (alone == 4).all()
    assert float(stands_for) == pytest.approx(1 / 32)
    _, nothing = tail.sample_tokens(y == -1, y, 32)
    assert float(nothing) == 0.0


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
        (dict(z_loss=-1.0), "z_loss must be 0 or above and finite, got -1.0"),
        (dict(kept_mass=torch.empty(3)), r"kept_mass is \(3,\) torch.float32; expected \(4, 9\) torch.float32"),
        (dict(kept_mass=torch.empty(9, 4).T), r"torch.float32 \(not contiguous\); expected \(4, 9\)"),
        (dict(head_gradient_dtype=torch.float16), "head_gradient_dtype must be torch.float64"),
        (dict(softcap=float("inf")), "softcap must be above 0 and finite .*, got inf"),
        (dict(scale=float("nan")), "scale must be a finite number, got nan"),
        (dict(shift=-1), "shift must be True, False or a number of positions, got -1"),
        (dict(shift=0.5), "shift must be True, False or a number of positions, got 0.5"),
        (dict(class_weights=torch.ones(50, requires_grad=True)), "class_weights requires a gradient"),
        (dict(token_weights=[1.0]), "token_weights is a list; expected a tensor"),
        (dict(divisor="4", reduction="sum"), "divisor must be above 0 and finite, got '4'"),
        (dict(divisor=2.0), "divisor goes with reduction 'sum' or 'none'"),
        (dict(divisor=0.0, reduction="sum"), "divisor must be above 0 and finite, got 0.0"),
        (dict(divisor=torch.ones(2), reduction="sum"), "divisor has 2 elements"),
        (dict(smoothing_prior=torch.ones(50)), "smoothing_prior sums to 50; expected 1"),
        (dict(smoothing_prior=torch.ones(9) / 9), r"smoothing_prior is \(9,\) torch.float32; expected \(50,\)"),
        (dict(class_weights=torch.ones(50).long()), r"class_weights is \(50,\) torch.int64; .* floating point"),
        (dict(token_weights=torch.full((4, 9), -1.0)), "token_weights holds -1.0; expected nothing negative"),
        (dict(target_probabilities=torch.ones(4, 9, 2)), "with target_probabilities expected"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(inputs: Inputs, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        linear_cross_entropy(*inputs, **change)
    assert "\n" not in str(error.value)


CONTEXTS, VOCABULARY = 96, 600


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_training_with_filtered_ends_where_exact_does(beta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """From an asymmetric start, on contexts that each have their own distribution, with a threshold of 40 times beta
    / V at 0.1. Replacing what is left out by its mean ends at twice the loss and more; leaving it out, likewise; a
    tail of one shape without the sample's corrections several percent above."""
    monkeypatch.setattr(tail, "SAMPLE", 32)
    g = torch.Generator().manual_seed(0)
    zipf = -torch.log(torch.arange(1.0, VOCABULARY + 1))
    own = torch.randn(CONTEXTS, 6, generator=g) @ torch.randn(6, VOCABULARY, generator=g)
    truth = (zipf + 2.0 * own).softmax(1)
    ends, filtered_steps = {}, 0
    for mode in ("exact", "filtered"):
        g = torch.Generator().manual_seed(1)
        contexts = torch.randn(CONTEXTS, 16, generator=g).requires_grad_()
        head = (0.5 * torch.randn(VOCABULARY, 16, generator=g)).requires_grad_()
        optimizer = torch.optim.Adam([contexts, head], lr=2e-2)
        for _ in range(TRAINING_STEPS):
            x = torch.randint(CONTEXTS, (512,), generator=g)
            y = torch.multinomial(truth[x], 1, generator=g).squeeze(1)
            optimizer.zero_grad()
            kept, eps = torch.empty(len(x)), 40 * 0.1 / VOCABULARY
            linear_cross_entropy(
                contexts[x], head, y, label_smoothing=beta, mode=mode, filter_eps=eps, kept_mass=kept
            ).backward()
            filtered_steps += int(kept.min() < 1)
            optimizer.step()
        with torch.no_grad():
            logprob = (contexts @ head.T).log_softmax(1)
        nll = float(-(truth * logprob).sum(1).mean())
        ends[mode] = nll, (1 - beta) * nll - beta * float(logprob.mean())
    assert filtered_steps > 0.8 * TRAINING_STEPS
    for filtered, exact in zip(ends["filtered"], ends["exact"], strict=True):
        assert filtered == pytest.approx(exact, rel=0.02)


TRAINING_STEPS = 300
