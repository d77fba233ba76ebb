"""What smoothing asks for against arbitrary precision, and what a head can give against descent inside its ball."""

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax

from calsmooth.entropy_bound.bound import entropy_bound, max_probability
from calsmooth.entropy_bound.frontier import (
    hidden_for_smoothing,
    rho_for_smoothing,
    smoothing_confidence,
    smoothing_entropy,
    smoothing_frontier,
    smoothing_logit_gap,
)
from calsmooth.entropy_bound.plot import plot_frontier, prepare_frontier
from calsmooth.errors import UsageError

vocabs = st.integers(2, 10_000_000)
hiddens = st.integers(1, 16_384)
betas = st.one_of(st.floats(1e-12, 1), st.floats(0.01, 0.5))


@settings(max_examples=300, deadline=None)
@given(vocabs, betas)
def test_smoothings_optimum_in_fifty_digits(vocab, beta):
    with mpmath.workdps(50):
        V, b = mpmath.mpf(vocab), mpmath.mpf(beta)
        target, other = 1 - b + b / V, b / V
        entropy = -target * mpmath.log(target) - (V - 1) * other * mpmath.log(other)
        assert float(smoothing_confidence(vocab, beta)) == pytest.approx(float(target), rel=1e-15)
        assert float(smoothing_entropy(vocab, beta)) == pytest.approx(float(entropy), rel=1e-13)
        gap = mpmath.log(1 + V * (1 - b) / b)
        assert float(smoothing_logit_gap(vocab, beta)) == pytest.approx(float(gap), rel=1e-13, abs=1e-15)


@settings(max_examples=300, deadline=None)
@given(vocabs, hiddens, st.floats(1e-6, 0.999))
def test_where_the_head_just_reaches_smoothings_optimum_the_floor_is_its_entropy(vocab, hidden, beta):
    rho = rho_for_smoothing(vocab, hidden, beta)
    assert entropy_bound(vocab, hidden, rho) == pytest.approx(float(smoothing_entropy(vocab, beta)), rel=1e-9)
    assert max_probability(vocab, hidden, rho) == pytest.approx(float(smoothing_confidence(vocab, beta)), rel=1e-9)
    assert smoothing_frontier(vocab, hidden, rho) == pytest.approx(beta, rel=1e-9)
    assert hidden_for_smoothing(vocab, rho, beta) == pytest.approx(hidden, rel=1e-9)


@settings(max_examples=200, deadline=None)
@given(vocabs, hiddens, st.floats(0, 3), st.floats(1e-4, 1))
def test_the_floor_is_above_smoothings_entropy_exactly_below_the_frontier(vocab, hidden, rho, beta):
    frontier, floor = float(smoothing_frontier(vocab, hidden, rho)), float(entropy_bound(vocab, hidden, rho))
    entropy = float(smoothing_entropy(vocab, beta))
    if beta > frontier * (1 + 1e-9):
        assert floor <= entropy * (1 + 1e-12)
    if beta < frontier * (1 - 1e-9):
        assert floor >= entropy * (1 - 1e-12)


def optimum_in_the_ball(vocab, radius, beta, seed):
    """Accelerated gradient descent on the smoothed loss of a free logit vector, projected onto the ball."""
    q = np.full(vocab, beta / vocab)
    q[0] += 1 - beta
    u = before = np.random.default_rng(seed).normal(size=vocab) * min(1, radius) / vocab
    for step in range(6000):
        ahead = u + step / (step + 3) * (u - before)
        before = u
        u = ahead - 2.0 * (softmax(ahead) - q)  # the loss's curvature is at most 1/2
        u *= min(1.0, radius / np.linalg.norm(u))
    return u


@pytest.mark.parametrize("vocab", [2, 7, 50, 400])
@pytest.mark.parametrize("beta", [0.02, 0.1, 0.4])
@pytest.mark.parametrize("share", [0.3, 0.9, 1.1, 2.0])
def test_descent_inside_the_ball_ends_where_the_frontier_says(vocab, beta, share):
    radius = share * float(rho_for_smoothing(vocab, 1, beta))
    p = softmax(optimum_in_the_ball(vocab, radius, beta, seed=vocab))
    entropy = float(-np.sum(p * np.log(p)))
    in_reach = beta >= smoothing_frontier(vocab, 1, radius)
    assert in_reach == (share > 1)
    if in_reach:  # smoothing restrains: the loss's own optimum, above the floor
        assert entropy == pytest.approx(float(smoothing_entropy(vocab, beta)), rel=1e-4)
        assert entropy > entropy_bound(vocab, 1, radius)
    else:  # it doesn't: the same prediction as without smoothing
        assert entropy == pytest.approx(float(entropy_bound(vocab, 1, radius)), rel=1e-6)
        unsmoothed = softmax(optimum_in_the_ball(vocab, radius, 0.0, seed=vocab))
        assert p == pytest.approx(unsmoothed, rel=1e-5)
        assert p[0] == pytest.approx(float(max_probability(vocab, 1, radius)), rel=1e-6)


def test_the_limits():
    assert smoothing_frontier(32_768, 2048, 0.0) == pytest.approx(1, rel=1e-12)
    assert smoothing_frontier(32_768, 2048, 1e6) == 0
    assert smoothing_entropy(32_768, 1.0) == pytest.approx(np.log(32_768), rel=1e-12)
    assert smoothing_logit_gap(32_768, 1.0) == 0
    assert hidden_for_smoothing(32_768, 0.0, 0.1) == np.inf
    # Each tenfold vocabulary needs log 10 more between the logits.
    assert np.diff(smoothing_logit_gap(np.array([1e4, 1e5, 1e6]), 0.1)) == pytest.approx(np.log(10), rel=1e-4)


@pytest.mark.parametrize("beta", [0.0, -0.1, 1.5, np.nan])
def test_bad_betas_are_named(beta):
    with pytest.raises(UsageError, match="beta"):
        smoothing_entropy(100, beta)


def test_the_picture_marks_where_floor_and_smoothing_meet():
    curves = prepare_frontier((32_768, 256_000), (512, 2048), 0.25, (0.05, 0.1))
    assert curves.meeting.shape == (2, 2)
    for v, vocab in enumerate(curves.vocab):
        for b, beta in enumerate(curves.beta):
            assert entropy_bound(vocab, curves.meeting[v, b], 0.25) == pytest.approx(curves.wanted[v, b], rel=1e-9)
            assert smoothing_frontier(vocab, curves.meeting[v, b], 0.25) == pytest.approx(beta, rel=1e-9)
    assert "0.25" in plot_frontier(curves).get_suptitle()


@pytest.mark.parametrize("rho", [0.0, 1e-9, 1e6])
def test_the_picture_can_be_drawn_at_the_ends(rho):
    plot_frontier(prepare_frontier((2, 10**8), (1, 100_000), rho, (1e-6, 1.0)))
