"""Priors, class and token weights, several targets a token, divisors, log-sum-exps; and the corners of the loss.

The definition is held against torch's own cross-entropy, everything else against the definition.
"""

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import calsmooth.loss
from calsmooth.errors import UsageError
from calsmooth.loss import chunked, linear_cross_entropy, linear_cross_entropy_reference, token_statistics


def random(*sizes: int, seed: int = 0) -> Tensor:
    return torch.rand(sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(N: int, V: int, D: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    E, C = (torch.randn(n, D, generator=g, dtype=torch.float64).requires_grad_() for n in (N, V))
    return E, C, torch.randint(0, V, (N,), generator=g)


def shares(V: int) -> Tensor:
    """A prior with a class that gets nothing, where there are others."""
    prior = random(V, seed=3) ** 2 + 1e-3
    if V > 1:
        prior[0] = 0.0
    return prior / prior.sum()


def assert_same(loss: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    if not loss.numel():
        return
    incoming = random(*loss.shape, seed=9)
    for got, want in zip(
        torch.autograd.grad(loss, inputs, incoming, retain_graph=True),
        torch.autograd.grad(expected, inputs, incoming, retain_graph=True, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(got, torch.zeros_like(got) if want is None else want, rtol=1e-9, atol=1e-10)


# --- the definition against torch ------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_class_weights_are_torchs(reduction: str, beta: float) -> None:
    E, C, y = make(20, 30, 5)
    y[[2, 7]] = -100
    weights = random(30)
    expected = F.cross_entropy(E @ C.T, y, weight=weights, label_smoothing=beta, reduction=reduction)
    options: Any = dict(class_weights=weights, label_smoothing=beta, reduction=reduction)
    assert_same(linear_cross_entropy_reference(E, C, y, **options), expected, [E, C])
    assert_same(linear_cross_entropy(E, C, y, **options), expected, [E, C])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_target_probabilities_are_torchs(reduction: str, weighted: bool) -> None:
    E, C, _ = make(20, 30, 5)
    targets = torch.stack([torch.randperm(30, generator=torch.Generator().manual_seed(i))[:4] for i in range(20)])
    probabilities, weights = random(20, 4), random(30, seed=1) if weighted else None
    dense = torch.zeros(20, 30, dtype=torch.float64).scatter_(1, targets, probabilities)
    expected = F.cross_entropy(E @ C.T, dense, weight=weights, label_smoothing=0.2, reduction=reduction)
    options: Any = dict(
        target_probabilities=probabilities, class_weights=weights, label_smoothing=0.2, reduction=reduction
    )
    assert_same(linear_cross_entropy_reference(E, C, targets, **options), expected, [E, C])
    assert_same(linear_cross_entropy(E, C, targets, **options), expected, [E, C])


def test_a_prior_is_a_target_distribution() -> None:
    E, C, y = make(20, 30, 5)
    dense = 0.8 * F.one_hot(y, 30).double() + 0.2 * shares(30)
    expected = F.cross_entropy(E @ C.T, dense)
    options: Any = dict(smoothing_prior=shares(30), label_smoothing=0.2)
    assert_same(linear_cross_entropy_reference(E, C, y, **options), expected, [E, C])
    assert_same(linear_cross_entropy(E, C, y, **options), expected, [E, C])


def test_the_uniform_prior_is_the_default() -> None:
    E, C, y = make(20, 30, 5)
    uniform = torch.full((30,), 1 / 30, dtype=torch.float64)
    for softcap in (None, 3.0):
        options: Any = dict(label_smoothing=0.2, softcap=softcap)
        expected = linear_cross_entropy(E, C, y, **options)
        assert_same(linear_cross_entropy(E, C, y, smoothing_prior=uniform, **options), expected, [E, C])


def test_token_weights_weigh_the_mean() -> None:
    E, C, y = make(20, 30, 5)
    y[3] = -100
    weights = random(20)
    losses = F.cross_entropy(E @ C.T, y, reduction="none")
    kept = weights * (y != -100)
    assert_same(linear_cross_entropy(E, C, y, token_weights=weights), (losses * kept).sum() / kept.sum(), [E, C])
    nothing = linear_cross_entropy(E, C, y, token_weights=torch.zeros(20, dtype=torch.float64))
    assert nothing == 0


def test_a_prior_in_low_precision_is_a_distribution_all_the_same() -> None:
    E, C, y = make(20, 300, 5)
    prior = shares(300).bfloat16()
    assert prior.double().sum() != 1
    options: Any = dict(smoothing_prior=prior, label_smoothing=0.5)
    expected = linear_cross_entropy_reference(E, C, y, **options)
    assert_same(linear_cross_entropy(E, C, y, **options), expected, [E, C])
    weighted = linear_cross_entropy(E, C, y, class_weights=torch.ones(300), **options)
    assert_same(weighted, expected, [E, C])


def test_a_mean_of_no_weight_is_0() -> None:
    E, C, y = make(20, 30, 5)
    weights = torch.ones(30)
    weights[y] = 0.0
    for options in (dict(class_weights=weights, label_smoothing=0.1), dict(token_weights=torch.zeros(20))):
        loss = linear_cross_entropy(E, C, y, **options)
        assert loss == linear_cross_entropy_reference(E, C, y, **options) == 0
        assert all((g == 0).all() for g in torch.autograd.grad(loss, [E, C]))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_divisor_of_any_shape(reduction: Any) -> None:
    E, C, y = make(20, 30, 5)
    expected = linear_cross_entropy(E, C, y, reduction=reduction) / 7
    for divisor in (7, 7.0, torch.tensor(7), torch.tensor([7.0]), torch.tensor([[7.0]])):
        for function in (linear_cross_entropy, linear_cross_entropy_reference):
            loss = function(E, C, y, reduction=reduction, divisor=divisor)
            assert loss.shape == expected.shape
            torch.testing.assert_close(loss, expected)


# --- everything against the definition -------------------------------------------------------------------------------


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_all_options_together(data: st.DataObject) -> None:
    draw = data.draw
    N, V, D = draw(st.integers(1, 12)), draw(st.integers(1, 25)), draw(st.integers(1, 6))
    E, C, y = make(N, V, D, seed=draw(st.integers(0, 99)))
    inputs, options = [E, C], {}
    K = draw(st.sampled_from([None, 1, 3]))
    if K:
        y = torch.randint(0, V, (N, K), generator=torch.Generator().manual_seed(N))
        options["target_probabilities"] = random(N, K, seed=1)
    ignored = torch.rand(y.shape, generator=torch.Generator().manual_seed(V)) < draw(st.sampled_from([0.0, 0.4, 1.0]))
    y[ignored] = -100
    if draw(st.booleans()):
        options["bias"] = random(V, seed=2).requires_grad_()
        inputs.append(options["bias"])
    if draw(st.booleans()):
        options["smoothing_prior"] = shares(V)
    if draw(st.booleans()):
        options["class_weights"] = random(V, seed=4)
    if draw(st.booleans()):
        options["token_weights"] = random(N, seed=5)
    options["label_smoothing"] = draw(st.sampled_from([0.0, 0.1, 1.0]))
    options["softcap"] = draw(st.sampled_from([None, 2.0]))
    options["scale"] = draw(st.sampled_from([1.0, -0.5]))
    options["z_loss"] = draw(st.sampled_from([0.0, 1e-2]))
    options["shift"] = draw(st.sampled_from([False, True, 2]))
    options["reduction"] = draw(st.sampled_from(["mean", "sum", "none"]))
    if options["reduction"] != "mean":
        options["divisor"] = draw(st.sampled_from([None, 3.0, torch.tensor(3.0)]))
    before = chunked.CHUNK_BYTES
    chunked.CHUNK_BYTES = draw(st.sampled_from([300, before]))
    try:
        assert_same(
            linear_cross_entropy(E, C, y, **options), linear_cross_entropy_reference(E, C, y, **options), inputs
        )
    finally:
        chunked.CHUNK_BYTES = before


@pytest.mark.parametrize("mode", ["exact", "filtered", "lean"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_logsumexp_is_differentiable_beside_the_loss(mode: Any, reduction: Any) -> None:
    E, C, y = make(20, 30, 5)
    y[3] = -100
    loss, lse = linear_cross_entropy(
        E, C, y, return_logsumexp=True, mode=mode, reduction=reduction, label_smoothing=0.1
    )
    expected = linear_cross_entropy_reference(E, C, y, reduction=reduction, label_smoothing=0.1)
    expected_lse = torch.where(y == -100, 0.0, (E @ C.T).logsumexp(1))
    torch.testing.assert_close(lse, expected_lse)
    assert_same(loss.sum() + (lse**2).sum(), expected.sum() + (expected_lse**2).sum(), [E, C])
    _, lse = linear_cross_entropy(E, C, y, return_logsumexp=True, mode=mode)
    assert_same(lse.sum(), expected_lse.sum(), [E, C])


def test_a_shift_by_two() -> None:
    g = torch.Generator().manual_seed(0)
    E, C = torch.randn(2, 7, 5, generator=g), torch.randn(30, 5, generator=g)
    y = torch.randint(0, 30, (2, 7), generator=g)
    by_hand = F.cross_entropy((E @ C.T)[:, :-2].flatten(0, 1), y[:, 2:].flatten())
    torch.testing.assert_close(linear_cross_entropy(E, C, y, shift=2), by_hand)
    assert linear_cross_entropy(E, C, y, shift=9) == 0


# --- corners ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [False, True, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_tokens_at_all(shift: Any, reduction: Any) -> None:
    E, C = torch.zeros(2, 0, 5, requires_grad=True), torch.zeros(30, 5, requires_grad=True)
    loss = linear_cross_entropy(E, C, torch.zeros(2, 0, dtype=torch.int64), shift=shift, reduction=reduction)
    assert loss.shape == ((2, 0) if reduction == "none" else ())
    for gradient in torch.autograd.grad(loss.sum(), [E, C]):
        assert (gradient == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_features(dtype: torch.dtype) -> None:
    E, C = torch.zeros(4, 0, dtype=dtype), torch.zeros(8, 0, dtype=dtype)
    loss = linear_cross_entropy(E, C, torch.zeros(4, dtype=torch.int64), label_smoothing=0.1)
    assert loss.item() == pytest.approx(torch.tensor(8.0).log().item())


def test_no_classes() -> None:
    with pytest.raises(UsageError, match=r"lm_head_weight \(0, 5\) has no rows"):
        linear_cross_entropy(torch.zeros(4, 5), torch.zeros(0, 5), torch.zeros(4, dtype=torch.int64))


def test_classes_that_a_bias_rules_out() -> None:
    E, C, y = make(20, 30, 5)
    bias = torch.zeros(30, dtype=torch.float64)
    bias[25:] = float("-inf")
    y = y.clamp(max=24)
    possible = (bias == 0).double() / 25
    for options in (dict(), dict(label_smoothing=0.1, smoothing_prior=possible)):
        expected = linear_cross_entropy_reference(
            E, C[:25], y, **{k: v if k != "smoothing_prior" else v[:25] for k, v in options.items()}
        )
        loss = linear_cross_entropy(E, C, y, bias=bias, **options)
        assert_same(loss, expected, [E, C])
    assert linear_cross_entropy(E, C, y, bias=bias, label_smoothing=0.1) == float("inf")  # as torch's
    found = token_statistics(E, C, y, bias=bias)
    p = (E @ C[:25].T).softmax(1)
    torch.testing.assert_close(found.entropy, -(p * p.log()).sum(1).detach())


@pytest.mark.parametrize(
    "options", [dict(), dict(mode="filtered"), dict(reduction="none"), dict(return_logsumexp=True)]
)
def test_second_derivatives_are_refused_not_zero(options: dict[str, Any]) -> None:
    E, C, y = make(20, 30, 5)
    result = linear_cross_entropy(E, C, y, **options)
    loss = result[0] if isinstance(result, tuple) else result
    first = torch.autograd.grad(loss.sum() + (C**2).sum(), [E, C], create_graph=True)
    for wanted in (E, C):
        with pytest.raises(UsageError, match="can be differentiated once only"):
            torch.autograd.grad(sum((g**2).sum() for g in first), wanted, retain_graph=True)


def test_float16_gradients_wait_for_the_loss_scale() -> None:
    """Made in the forward, a mean's gradients would have 1 / N in them, which float16 hardly holds."""
    g = torch.Generator().manual_seed(0)
    N, V, D = 8192, 64, 8
    E, C = torch.randn(N, D, generator=g).half(), torch.randn(V, D, generator=g).half()
    y, scale = torch.randint(0, V, (N,), generator=g), 2.0**12
    wide = [t.double().requires_grad_() for t in (E, C)]
    expected = torch.autograd.grad(scale * linear_cross_entropy_reference(*wide, y), wide)
    leaves = [t.requires_grad_() for t in (E, C)]
    for reduction, divisor in (("mean", None), ("sum", float(N))):
        loss = linear_cross_entropy(*leaves, y, reduction=reduction, divisor=divisor)
        for got, want in zip(torch.autograd.grad(scale * loss, leaves), expected, strict=True):
            assert float((got.double() - want).norm() / want.norm()) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_default_dtype_changes_nothing(dtype: torch.dtype) -> None:
    E, C, y = (t.detach().float() if t.is_floating_point() else t for t in make(20, 30, 5))
    leaves = [E.requires_grad_(), C.requires_grad_()]

    def run(mode: Any) -> list[Tensor]:
        loss = linear_cross_entropy(*leaves, y, label_smoothing=0.1, mode=mode, filter_eps=0.02)
        return [loss, *torch.autograd.grad(loss, leaves)]

    for mode in ("exact", "filtered"):
        expected = run(mode)
        torch.set_default_dtype(dtype)
        try:
            for got, want in zip(run(mode), expected, strict=True):
                assert got.dtype == torch.float32
                assert torch.equal(got, want)
        finally:
            torch.set_default_dtype(torch.float32)


FACTORIES = {"empty", "zeros", "ones", "full", "arange", "tensor", "rand", "randn", "linspace", "eye"}


def test_every_buffer_of_the_loss_names_its_dtype() -> None:
    """Else it has what `torch.set_default_dtype` says."""
    calls = 0
    for path in sorted(Path(calsmooth.loss.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner = node.func.value
            if isinstance(owner, ast.Name) and owner.id == "torch" and node.func.attr in FACTORIES:
                calls += 1
                assert "dtype" in {k.arg for k in node.keywords}, f"{path.name}:{node.lineno}"
    assert calls > 40


def test_statistics_are_probabilities() -> None:
    """Nothing above 1, and a target that is the top token is as probable as it is confident."""
    g = torch.Generator().manual_seed(0)
    E, C = 30 * torch.randn(200, 16, generator=g), torch.randn(300, 16, generator=g)
    y = (E @ C.T).argmax(1)
    found = token_statistics(E, C, y)
    assert found.top_logprob.max() <= 0
    assert torch.equal(found.target_logprob, found.top_logprob)
    other = token_statistics(E, C, (y + 1) % 300)
    assert (other.target_logprob <= other.top_logprob).all()
