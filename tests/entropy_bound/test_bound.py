"""Theorem 4.2 against arbitrary precision, against minimisation, and against random heads."""

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax

from calsmooth.entropy_bound.bound import (
    entropy_bound,
    entropy_bound_asymptote,
    least_entropy_logits,
    log_entropy_bound,
    logit_norm_bound,
    max_probability,
    normalized_entropy_gap,
    rho_for_entropy,
    rho_for_probability,
)
from calsmooth.errors import UsageError

DIGITS = 340  # 1 + e^-690 must keep its tail

ROUNDING = 1e-13  # of an entropy summed in float64: the top log-probability near 0 has no digits below this

vocabs = st.integers(2, 10_000_000)
hiddens = st.integers(1, 16_384)
rhos = st.one_of(st.floats(0, 3), st.floats(1e-12, 1e-3), st.floats(3, 1e6))


def entropy(logits):
    return float(-np.sum(softmax(logits) * log_softmax(logits)))


def equation_14(vocab, hidden, rho):
    """The theorem as printed, in `DIGITS` digits."""
    V, D, rho = mpmath.mpf(int(vocab)), mpmath.mpf(int(hidden)), mpmath.mpf(float(rho))
    gamma = mpmath.exp(-rho * mpmath.sqrt(D * V / (V - 1)))
    rest = 1 + (V - 1) * gamma
    return mpmath.log(rest) + rho * gamma * mpmath.sqrt(D * V * (V - 1)) / rest


def relative_error(value, exact):
    return float(abs(mpmath.mpf(float(value)) - exact) / exact)


@settings(max_examples=400, deadline=None)
@given(vocabs, hiddens, rhos)
def test_the_bound_is_equation_14_to_float64(vocab, hidden, rho):
    with mpmath.workdps(DIGITS):
        exact = equation_14(vocab, hidden, rho)
        if exact < 1e-300:
            assert entropy_bound(vocab, hidden, rho) <= 1e-299
        else:
            # The error of x = rho sqrt(D V / (V - 1)) itself, some roundings of it, is what a tiny bound inherits.
            x = rho * (hidden * vocab / (vocab - 1)) ** 0.5
            assert relative_error(entropy_bound(vocab, hidden, rho), exact) < 4e-16 * max(4, x)


def test_a_grid_over_the_whole_range_stays_within_a_trillionth():
    errors = []
    with mpmath.workdps(DIGITS):
        for vocab in (2, 3, 10, 1_000, 32_768, 128_256, 256_000, 10_000_000):
            for radius in (0.0, 1e-9, 0.1, 1, 5, 10, 12.4, 12.5, 20, 50, 100, 300, 450):
                errors.append(relative_error(entropy_bound(vocab, 1, radius), equation_14(vocab, 1, radius)))
    assert max(errors) < 1e-12


@settings(max_examples=200, deadline=None)
@given(vocabs, st.one_of(st.floats(0, 800), st.floats(0, 1e6)))
def test_the_logarithm_goes_on_where_the_bound_underflows(vocab, radius):
    with mpmath.workdps(50):
        V = mpmath.mpf(vocab)
        x = mpmath.mpf(radius) * mpmath.sqrt(V / (V - 1))
        odds = (V - 1) * mpmath.exp(-x)
        exact = mpmath.log(mpmath.log1p(odds) + x * odds / (1 + odds))
        assert float(log_entropy_bound(vocab, 1, radius)) == pytest.approx(float(exact), rel=1e-13, abs=1e-12)


@settings(max_examples=300, deadline=None)
@given(vocabs, hiddens, rhos)
def test_the_normalised_gap_keeps_its_relative_accuracy(vocab, hidden, rho):
    with mpmath.workdps(DIGITS):
        exact = 1 - equation_14(vocab, hidden, rho) / mpmath.log(vocab)
        if exact > 1e-300:
            assert relative_error(normalized_entropy_gap(vocab, hidden, rho), exact) < 1e-13 * max(1, rho * hidden**0.5)


def test_the_limits():
    vocab = np.array([2, 100, 32_768, 256_000, 10_000_000])
    assert entropy_bound(vocab, 2048, 0.0) == pytest.approx(np.log(vocab), rel=1e-15)
    assert np.all(entropy_bound(vocab, 1, 1e6) == 0)
    assert np.all(entropy_bound(vocab, 4096, 1e150) == 0)
    assert np.all(normalized_entropy_gap(vocab, 2048, 0.0) == 0)
    assert normalized_entropy_gap(vocab, 1, 1e6) == pytest.approx(1, rel=1e-15)
    assert max_probability(vocab, 7, 0.0) == pytest.approx(1 / vocab, rel=1e-15)
    assert np.all(max_probability(vocab, 1, 1e6) == 1)


@settings(max_examples=200, deadline=None)
@given(vocabs, hiddens, rhos, st.floats(1.0, 4.0))
def test_the_floor_falls_with_rho_and_with_hidden_size_and_rises_with_the_vocabulary(vocab, hidden, rho, factor):
    here = entropy_bound(vocab, hidden, rho)
    slack = 1e-12 * max(1.0, float(here))
    assert entropy_bound(vocab, hidden, rho * factor) <= here + slack
    assert entropy_bound(vocab, hidden + 100, rho) <= here + slack
    assert entropy_bound(vocab + 1000, hidden, rho) >= here - slack
    assert 0 <= here <= np.log(vocab) + slack


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 3000), hiddens, st.floats(0, 2))
def test_the_least_entropy_logits_reach_the_bound(vocab, hidden, rho):
    logits = least_entropy_logits(vocab, hidden, rho)
    assert np.linalg.norm(logits) == pytest.approx(rho * hidden**0.5, rel=1e-12)
    assert abs(logits.sum()) <= 1e-9 * max(1, rho * hidden**0.5)
    assert entropy(logits) == pytest.approx(entropy_bound(vocab, hidden, rho), rel=1e-9, abs=ROUNDING)
    assert softmax(logits).max() == pytest.approx(max_probability(vocab, hidden, rho), rel=1e-12)


@pytest.mark.parametrize("vocab", [2, 3, 5, 17, 60])
@pytest.mark.parametrize("radius", [0.3, 1.0, 2.5, 5.0, 9.0])
def test_minimising_the_entropy_over_the_ball_reaches_the_bound_and_never_goes_below(vocab, radius):
    rng = np.random.default_rng(vocab * 1000 + int(radius * 10))
    u = rng.normal(size=(48, vocab))  # 48 starts at once
    u *= radius * rng.uniform(0.2, 1, size=(48, 1)) / np.linalg.norm(u, axis=1, keepdims=True)
    for step in range(4000):
        log_p = log_softmax(u, axis=1)
        p = np.exp(log_p)
        h = -(p * log_p).sum(1, keepdims=True)
        gradient = -p * (log_p + h)
        direction = gradient / (np.linalg.norm(gradient, axis=1, keepdims=True) + 1e-300)
        u -= radius * 0.1 * 0.998**step * direction
        u *= np.minimum(1, radius / np.linalg.norm(u, axis=1, keepdims=True))
    found = np.array([entropy(row) for row in u])
    bound = float(entropy_bound(vocab, 1, radius))
    assert found.min() >= bound * (1 - 1e-12) - ROUNDING
    assert found.min() == pytest.approx(bound, rel=1e-3)


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 40), st.integers(1, 24), st.floats(0.01, 4), st.integers(0, 2**32 - 1))
def test_a_random_head_obeys_the_lemma_and_the_theorem(vocab, hidden, size, seed):
    rng = np.random.default_rng(seed)
    head, state = rng.normal(size=(vocab, hidden)) * size / hidden**0.5, rng.uniform(-1, 1, hidden)
    sigma_c, sigma_h = np.linalg.norm(head, 2), np.abs(state).max()
    logits = head @ state
    assert np.linalg.norm(logits) <= logit_norm_bound(sigma_c, sigma_h, hidden) * (1 + 1e-12)
    floor = entropy_bound(vocab, hidden, sigma_c * sigma_h)
    assert entropy(logits) >= floor * (1 - 1e-12) - ROUNDING
    # A softcap keeps the floor, and raises the entropy of every prediction.
    assert entropy(3.0 * np.tanh(logits / 3.0)) >= entropy(logits) * (1 - 1e-12) - ROUNDING
    # A temperature divides rho.
    assert entropy(logits / 2.5) >= entropy_bound(vocab, hidden, sigma_c * sigma_h / 2.5) * (1 - 1e-12) - ROUNDING


def test_the_lemma_is_tight():
    head = np.diag([3.0, 3.0, 3.0, 3.0])
    assert np.linalg.norm(head @ np.full(4, 0.5)) == pytest.approx(float(logit_norm_bound(3.0, 0.5, 4)))


def test_the_asymptote_is_reached_far_out():
    ratio = entropy_bound_asymptote(256_000, 2304, 1.0) / entropy_bound(256_000, 2304, 1.0)
    assert ratio == pytest.approx(1, abs=1e-12)
    assert entropy_bound_asymptote(256_000, 2304, 0.1) > entropy_bound(256_000, 2304, 0.1)


@settings(max_examples=200, deadline=None)
@given(vocabs, hiddens, st.floats(1e-9, 1 - 1e-12))
def test_the_inverse_by_probability(vocab, hidden, share):
    p = 1 / vocab + share * (1 - 1 / vocab)
    rho = rho_for_probability(vocab, hidden, p)
    assert max_probability(vocab, hidden, rho) == pytest.approx(p, rel=1e-9)
    assert 1 - max_probability(vocab, hidden, rho) == pytest.approx(1 - p, rel=1e-3)


@settings(max_examples=100, deadline=None)
@given(vocabs, hiddens, st.one_of(st.floats(1e-6, 0.999), st.floats(1e-250, 1e-6)))
def test_the_inverse_by_entropy(vocab, hidden, share):
    target = share * np.log(vocab)
    assert entropy_bound(vocab, hidden, rho_for_entropy(vocab, hidden, target)) == pytest.approx(target, rel=1e-9)


def test_the_inverse_gives_the_temperature_for_a_confidence():
    rho, wanted = 0.5, 0.3
    temperature = rho / rho_for_probability(128_256, 2048, wanted)
    assert temperature > 1
    assert max_probability(128_256, 2048, rho / temperature) == pytest.approx(wanted, rel=1e-12)


def test_arrays_broadcast():
    assert entropy_bound(np.array([100, 1000]), np.array([[64], [128], [256]]), 0.1).shape == (3, 2)
    assert rho_for_entropy(np.array([100, 1000]), 64, 1.0).shape == (2,)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((1, 64, 0.1), "vocab"), ((100, 0, 0.1), "hidden"), ((100, 64, -0.1), "rho"), ((100, 64, np.inf), "rho")],
)
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises(UsageError, match=named):
        entropy_bound(*arguments)


def test_unreachable_targets_are_refused():
    with pytest.raises(UsageError, match="probability"):
        rho_for_probability(100, 64, 1.0)
    with pytest.raises(UsageError, match="entropy"):
        rho_for_entropy(100, 64, 5.0)
