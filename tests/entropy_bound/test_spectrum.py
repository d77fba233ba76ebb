"""The largest singular value against LAPACK's, and the covariance of a stream against numpy's of the whole."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calsmooth.entropy_bound.diversity import RunningCovariance
from calsmooth.entropy_bound.spectrum import largest_singular_value, row_mean
from calsmooth.errors import CalsmoothError

seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 80), st.integers(1, 80), st.floats(1e-4, 1e4), st.booleans(), seeds)
def test_it_is_lapacks_and_never_below(rows, columns, size, centred, seed):
    matrix = size * np.random.default_rng(seed).standard_t(3, size=(rows, columns)) + size
    exact = np.linalg.norm(matrix - matrix.mean(0) if centred else matrix, 2)
    found = largest_singular_value(torch.from_numpy(matrix), centred=centred)
    assert found.value == pytest.approx(exact, rel=1e-5, abs=1e-12 * size)
    assert found.value >= exact * (1 - 1e-12) - 1e-12 * size
    assert found.residual <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("centred", [False, True])
def test_sixteen_bit_heads_and_several_blocks(dtype, centred, monkeypatch):
    monkeypatch.setitem(__import__("calsmooth.entropy_bound.spectrum", fromlist=["x"]).BLOCK_BYTES, "cpu", 4096)
    matrix = (torch.randn(3000, 48, generator=torch.Generator().manual_seed(0)) + 0.5).to(dtype)
    exact = matrix.double().numpy()
    exact = np.linalg.norm(exact - exact.mean(0) if centred else exact, 2)
    assert largest_singular_value(matrix, centred=centred).value == pytest.approx(exact, rel=1e-5)
    assert row_mean(matrix) == pytest.approx(matrix.double().mean(0).numpy(), rel=1e-12)


def test_a_spectrum_without_a_gap_still_converges():
    """Flat but for its largest one, by a hundredth: power iteration would need thousands of products."""
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(300, 200)))
    values = np.linspace(0.99, 1.0, 200)
    found = largest_singular_value(torch.from_numpy(q * values), tolerance=1e-6)
    assert found.value == pytest.approx(1.0, rel=1e-6)
    assert found.products < 100


def test_repeated_and_vanishing_singular_values():
    assert largest_singular_value(3.0 * torch.eye(40)).value == pytest.approx(3.0, rel=1e-6)
    assert largest_singular_value(torch.zeros(10, 6)).value == 0
    assert largest_singular_value(torch.ones(10, 6), centred=True).value == 0
    assert largest_singular_value(torch.ones(10, 6)).value == pytest.approx(60**0.5, rel=1e-6)


def test_what_cannot_be_measured_is_refused():
    broken = torch.randn(20, 5)
    broken[3, 2] = float("nan")
    for centred in (False, True):
        with pytest.raises(CalsmoothError, match="not finite"):
            largest_singular_value(broken, centred=centred)
    with pytest.raises(CalsmoothError, match="didn't converge"):
        largest_singular_value(torch.randn(200, 100), max_products=3)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 30), st.lists(st.integers(0, 40), min_size=1, max_size=6), seeds)
def test_a_stream_in_any_pieces_is_the_whole(features, pieces, seed):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(sum(pieces) + 2, features)) @ rng.normal(size=(features, features)) + rng.normal(features)
    running = RunningCovariance(features)
    for piece in np.split(rows, np.cumsum(pieces)):
        running.add(torch.from_numpy(piece))
    found = running.diversity()
    exact = np.linalg.eigvalsh(np.corrcoef(rows.T))[::-1]
    assert found.eigenvalues == pytest.approx(exact, abs=1e-9 * features)
    assert found.tokens == len(rows)
    share = exact[exact > 1e-12] / features
    assert found.effective_rank == pytest.approx(np.exp(-np.sum(share * np.log(share))), rel=1e-6)
    assert (found.smallest is None) == (len(rows) <= features)


def test_a_large_mean_costs_no_digits():
    """As hidden states have them: float32 sums of squares would leave nothing of these variances."""
    rng = np.random.default_rng(0)
    small = rng.normal(size=(5000, 8)) @ rng.normal(size=(8, 8))
    running = RunningCovariance(8)
    for piece in np.array_split(1e6 + 1e-2 * small, 7):
        running.add(torch.from_numpy(piece))
    exact = np.linalg.eigvalsh(np.corrcoef(small.T))
    assert running.diversity().smallest == pytest.approx(exact[0], rel=1e-5)


def test_independent_features_have_the_spectrum_that_sampling_gives_them():
    running = RunningCovariance(100)
    running.add(torch.randn(1600, 100, generator=torch.Generator().manual_seed(0)))
    found = running.diversity()
    assert found.independent_smallest == pytest.approx(0.5625)
    assert found.smallest == pytest.approx(found.independent_smallest, rel=0.1)
    assert found.effective_rank > 90


def test_one_feature_many_times_has_rank_one_and_constants_are_left_out():
    running = RunningCovariance(6)
    x = torch.randn(50, 1, generator=torch.Generator().manual_seed(0))
    running.add(torch.cat([x, 2 * x + 1, -x, torch.full((50, 2), 0.1), x], dim=1))
    found = running.diversity()
    assert (found.features, found.constant) == (4, 2)
    assert found.effective_rank == pytest.approx(1, abs=1e-6)
    assert found.smallest == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (torch.ones(1, 3), "at least two"),
        (torch.ones(9, 3), "the same for every token"),
        (torch.full((9, 3), float("inf")), "not finite"),
    ],
)
def test_no_diversity_is_said_in_words(rows, words):
    running = RunningCovariance(3)
    running.add(rows)
    with pytest.raises(CalsmoothError, match=words):
        running.diversity()
