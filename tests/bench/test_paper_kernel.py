"""The paper's kernel on the CPU, through Triton's interpreter: against the definition, and what its filter keeps.

No size is a multiple of a block, features fill more than one, and a vocabulary may be smaller than one.
"""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

if torch.cuda.is_available():
    pytest.skip("compiled kernels don't take CPU tensors", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET isn't 1", allow_module_level=True)
pytest.importorskip("triton")

from calsmooth.bench.inputs import Inputs
from calsmooth.bench.methods import METHODS, line_up
from calsmooth.bench.paper_kernel import FILTER_EPS, Switches, choose_blocks, paper_loss
from calsmooth.loss import linear_cross_entropy_reference

PLAIN = Switches(filtered=False)
SHAPES = [(21, 75, 20), (1, 40, 36), (5, 7, 3)]  # N, V, D


def make(N: int, V: int, D: int, *, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(N + V + D)
    E, C = (torch.randn(size, D, generator=g).to(dtype) for size in (N, V))
    y = torch.randint(0, V, (N,), generator=g)
    if N > 2:
        y[1], y[2] = -100, 0  # rows outside a block must not pass for entry 0
    return [E.requires_grad_(), C.requires_grad_(), y]


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def definition(E: Tensor, C: Tensor, y: Tensor, beta: float, softcap: float | None) -> tuple[Tensor, list[Tensor]]:
    wide = [t.detach().double().requires_grad_() for t in (E, C)]
    loss = linear_cross_entropy_reference(*wide, y, label_smoothing=beta, softcap=softcap)
    return loss, list(torch.autograd.grad(loss, wide))


def assert_equals_definition(
    E: Tensor, C: Tensor, y: Tensor, beta: float, softcap: float | None, switches: Switches, tolerance: float = 3e-6
) -> None:
    expected, wanted = definition(E, C, y, beta, softcap)
    loss = paper_loss(E, C, y, beta=beta, softcap=softcap, switches=switches)
    assert loss.dtype == torch.float32
    assert relative(loss, expected) < 3e-6
    got = torch.autograd.grad(2 * loss, [E, C])
    for g, w, t in zip(got, wanted, (E, C), strict=True):
        assert g.dtype == t.dtype
        assert relative(g, 2 * w) < tolerance


@pytest.mark.parametrize("switches", [PLAIN, Switches(filtered=False, fused=True)], ids=["two calls", "fused"])
@pytest.mark.parametrize(("beta", "softcap"), [(0.0, None), (0.1, None), (1.0, None), (0.3, 2.0)])
def test_without_a_filter_it_is_the_definition(beta: float, softcap: float | None, switches: Switches) -> None:
    assert_equals_definition(*make(*SHAPES[0]), beta, softcap, switches)


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_other_ragged_shapes(shape: tuple[int, int, int]) -> None:
    assert_equals_definition(*make(*shape), 0.1, None, PLAIN)


def test_without_the_forwards_lock() -> None:
    assert_equals_definition(*make(*SHAPES[0]), 0.1, None, Switches(filtered=False, locked=False))


def test_float16() -> None:
    # The sums are rounded to float16 at every block.
    assert_equals_definition(*make(*SHAPES[0], dtype=torch.float16), 0.1, None, PLAIN, tolerance=1e-3)


def test_strided_inputs() -> None:
    E, C, y = make(*SHAPES[0])
    E_, C_ = (torch.stack([t.detach(), t.detach()], 2)[:, :, 1].requires_grad_() for t in (E, C))
    assert_equals_definition(E_, C_, y, 0.1, None, PLAIN)


def test_offsets_beyond_32_bits() -> None:
    """Rows that lie 2^30 entries apart, in memory of which only they are ever touched."""
    E, C, y = make(3, 3, 4, dtype=torch.float16)
    far = torch.empty(2**31 + 64, dtype=torch.float16).as_strided((3, 4), (2**30 + 8, 1))
    far.copy_(C.detach())
    assert_equals_definition(E, far.requires_grad_(), y, 0.1, None, PLAIN, tolerance=1e-3)
    assert_equals_definition(far, C, y, 0.1, None, PLAIN, tolerance=1e-3)


def test_tokens_that_are_all_ignored() -> None:
    E, C, y = make(*SHAPES[0])
    loss = paper_loss(E, C, torch.full_like(y, -100), beta=0.1)
    assert loss == 0
    assert all(not g.any() for g in torch.autograd.grad(loss, [E, C]))


@pytest.mark.parametrize("fused", [False, True])
def test_what_is_frozen_gets_no_gradient(fused: bool) -> None:
    E, C, y = make(*SHAPES[0])
    _, wanted = definition(E, C, y, 0.1, None)
    switches = Switches(filtered=False, fused=fused)
    (dE,) = torch.autograd.grad(paper_loss(E, C.detach(), y, beta=0.1, switches=switches), [E])
    (dC,) = torch.autograd.grad(paper_loss(E.detach(), C, y, beta=0.1, switches=switches), [C])
    assert relative(dE, wanted[0]) < 3e-6
    assert relative(dC, wanted[1]) < 3e-6


def test_the_loss_alone() -> None:
    E, C, y = make(*SHAPES[0])
    expected, _ = definition(E, C, y, 0.1, 2.0)
    with torch.no_grad():
        assert relative(paper_loss(E, C, y, beta=0.1, softcap=2.0), expected) < 3e-6


# The filter -----------------------------------------------------------------------------------------------------------

BETA = 0.02  # beta / V is below the filter's threshold, as for any real vocabulary even at beta = 0.5


def trained(strength: float) -> list[Tensor]:
    """Tokens that know their targets, which are few of many; some entries are likelier than others everywhere."""
    N, V, D = 35, 300, 24
    g = torch.Generator().manual_seed(7)
    C = torch.randn(V, D, generator=g)
    y = torch.randperm(V, generator=g)[:5][torch.randint(0, 5, (N,), generator=g)]
    E = strength * C[y] + 0.3 * torch.randn(N, D, generator=g)
    E[:, 0] += 2
    y[3] = -100
    return [E.requires_grad_(), C.requires_grad_(), y]


def blocks_kept(
    E: Tensor, C: Tensor, y: Tensor, beta: float, softcap: float | None, sort: bool
) -> tuple[Tensor, list[Tensor]]:
    """By the paper's rule, in float64: (N, V) whether an entry's block is kept, and the gradients of those that are."""
    e, c, valid = E.detach().double(), C.detach().double(), y >= 0
    z = e @ c.T
    slope = torch.ones_like(z)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
        slope = 1 - (z / softcap) ** 2
    S = z.softmax(1) - beta / len(C)
    S[valid, y[valid]] -= 1 - beta
    S[~valid] = 0
    order = z.sum(0).argsort(descending=True) if sort else torch.arange(len(C))
    kept = torch.zeros_like(S, dtype=torch.bool)
    size = choose_blocks(E)
    for rows in torch.arange(len(E)).split(size.tokens):
        for columns in order.split(size.vocabulary):
            block = rows[:, None], columns[None, :]
            kept[block] = S[block].abs().max() >= FILTER_EPS
    G = torch.where(kept, S * slope, 0) / valid.sum()
    return kept, [G @ c, G.T @ e]


@pytest.mark.parametrize("softcap", [None, 40.0])
@pytest.mark.parametrize(
    "switches", [Switches(), Switches(sorted=False), Switches(fused=True)], ids=["sorted", "unsorted", "fused"]
)
def test_the_filter_keeps_the_blocks_that_hold_a_large_entry(switches: Switches, softcap: float | None) -> None:
    E, C, y = trained(2.0)
    sort = switches.sorted and not switches.fused
    kept, wanted = blocks_kept(E, C, y, BETA, softcap, sort)
    assert 0.2 < kept.float().mean() < 0.9
    got = torch.autograd.grad(paper_loss(E, C, y, beta=BETA, softcap=softcap, switches=switches), [E, C])
    for g, w, exact in zip(got, wanted, definition(E, C, y, BETA, softcap)[1], strict=True):
        assert relative(g, w) < 2e-5
        assert relative(g, exact) > 2e-4


def test_sorting_leaves_fewer_blocks() -> None:
    E, C, y = trained(2.0)
    ordered, plain = (blocks_kept(E, C, y, BETA, None, sort)[0].float().mean() for sort in (True, False))
    assert ordered < plain


def test_the_filter_loses_the_smoothing_gradient() -> None:
    """Where the softmax is all but 0, the definition's gradient is the smoothing term: -beta / V, whatever the logits.

    It is what keeps probabilities away from 0, and none of it reaches the entries of a dropped block.
    """
    E, C, y = trained(4.0)
    beta, V = BETA, len(C)
    kept, _ = blocks_kept(E, C, y, beta, None, sort=False)
    dropped = ~kept.any(0)
    assert dropped.float().mean() > 0.1
    smoothing = -beta / V * E.detach()[y >= 0].mean(0)

    def head_gradient(**options: Any) -> Tensor:
        return torch.autograd.grad(paper_loss(E, C, y, beta=beta, switches=Switches(**options)), [C])[0]

    assert relative(definition(E, C, y, beta, None)[1][1][dropped], smoothing.expand(int(dropped.sum()), -1)) < 1e-2
    assert relative(head_gradient(filtered=False)[dropped], smoothing.expand(int(dropped.sum()), -1)) < 1e-2
    assert not head_gradient(sorted=False)[dropped].any()


# As methods of `calsmooth bench` --------------------------------------------------------------------------------------


def test_its_name_selects_all_of_table_3s_rows() -> None:
    rows = [m for m in METHODS if m.name == "paper"]
    assert [m.label for m in rows] == [
        "paper",
        "paper unsorted",
        "paper unfiltered",
        "paper fused",
        "paper fused unfiltered",
    ]
    E, C, y = make(*SHAPES[0])
    inputs = Inputs(E, C, y, None, "")
    _, absent = line_up(inputs, (0.1,), ("paper",))
    assert absent == {m.label: "needs a GPU" for m in rows}
    # Only the first takes part where nobody asks for it.
    assert [label for label in line_up(inputs, (0.1,))[1] if label.startswith("paper")] == ["paper"]
    E, C, y = trained(2.0)
    exact = definition(E, C, y, BETA, None)[1][1]
    errors = {m.label: relative(torch.autograd.grad(m.build(BETA, None)(E, C, y), [C])[0], exact) for m in rows}
    assert errors["paper unfiltered"] < 2e-5
    assert errors["paper fused unfiltered"] < 2e-5
    assert errors["paper unsorted"] == pytest.approx(errors["paper fused"], rel=1e-3)
    assert errors["paper"] > errors["paper unsorted"] > 1e-4
