"""The paper's propositions as properties of random logits, and a deliberate mistake that the theorem's tests catch.

Counts: each `@given` test draws the number of cases that its `@settings` says; the searches count what they tried.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import log_softmax, logsumexp, softmax
from scipy.stats import dirichlet

from calsmooth.entropy_bound.bound import entropy_bound, least_entropy_logits, logit_norm_bound

seeds = st.integers(0, 2**32 - 1)
betas = st.floats(1e-3, 5.0)


def random_logits(classes, size, seed):
    """Normal, heavy-tailed or one-hot: the inequalities are tight at different ends."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(3)
    if kind == 0:
        return size * rng.normal(size=classes)
    if kind == 1:
        return size * rng.standard_cauchy(size=classes)
    return size * np.eye(classes)[rng.integers(classes)]


# --- Proposition 3.3 -------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.integers(2, 2000), st.floats(1e-6, 1e3), seeds)
def test_proposition_3_3_the_mean_logit_distance_lies_between_the_divergence_and_log_k_above(classes, size, seed):
    """The paper's proof drops KL's constant, log K: it bounds A = -mean log p by A - log K <= mean d <= A.

    With the divergence itself, KL(u || p) = A - log K, that reads KL <= mean d <= KL + log K.
    """
    logits = random_logits(classes, size, seed)
    distance = float(np.mean(logits.max() - logits))
    without_constant = float(-log_softmax(logits).mean())
    divergence = without_constant - np.log(classes)
    slack = 1e-12 * max(1.0, abs(distance))
    assert without_constant - np.log(classes) <= distance + slack
    assert distance <= without_constant + slack
    assert divergence <= distance + slack
    assert distance <= divergence + np.log(classes) + slack


def test_proposition_3_3_both_ends_are_reached():
    classes = 1000
    equal, peaked = np.zeros(classes), 1e3 * np.eye(classes)[0]
    assert -log_softmax(equal).mean() - np.log(classes) == pytest.approx(np.mean(equal.max() - equal), abs=1e-12)
    assert -log_softmax(peaked).mean() == pytest.approx(np.mean(peaked.max() - peaked), rel=1e-12)


def test_proposition_3_3_with_the_exact_divergence_the_printed_upper_bound_does_not_hold():
    logits = np.array([1.0, 0.0, 0.0])
    divergence = float(-log_softmax(logits).mean() - np.log(3))
    assert np.mean(logits.max() - logits) > divergence + 0.1


# --- Proposition 3.4 -------------------------------------------------------------------------------------------------


def equation_23(log_z, target, beta):
    return float(-log_z[target] - beta * log_z.mean())


@settings(max_examples=300, deadline=None)
@given(st.integers(2, 2000), betas, st.floats(1e-3, 30), seeds)
def test_proposition_3_4_equation_23_is_label_smoothing_times_1_plus_beta(classes, beta, size, seed):
    rng = np.random.default_rng(seed)
    logits = torch.tensor(size * rng.normal(size=classes), requires_grad=True)
    target = int(rng.integers(classes))
    log_z = logits.log_softmax(0)
    ours = -log_z[target] - beta * log_z.mean()
    # The paper's epsilon is what the target loses, 1 - epsilon = (K + beta) / (K (1 + beta)), and each other class has
    # epsilon / (K - 1); torch spreads its label_smoothing over all K.
    epsilon = 1 - (classes + beta) / (classes * (1 + beta))
    weights = torch.full((classes,), epsilon / (classes - 1), dtype=torch.float64)
    weights[target] = 1 - epsilon
    smoothing = beta / (1 + beta)
    assert epsilon == pytest.approx(smoothing * (classes - 1) / classes, rel=1e-9)
    theirs = F.cross_entropy(logits[None], torch.tensor([target]), label_smoothing=smoothing)
    assert ours.item() == pytest.approx((1 + beta) * -(weights * log_z).sum().item(), rel=1e-10)
    assert ours.item() == pytest.approx((1 + beta) * theirs.item(), rel=1e-10)
    (ours_gradient,) = torch.autograd.grad(ours, logits, retain_graph=True)
    (their_gradient,) = torch.autograd.grad((1 + beta) * theirs, logits)
    assert torch.allclose(ours_gradient, their_gradient, rtol=1e-9, atol=1e-12)


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 60), betas, seeds)
def test_proposition_3_4_equation_23_is_the_posterior_under_a_dirichlet_prior(classes, beta, seed):
    rng = np.random.default_rng(seed)
    alpha = np.full(classes, beta / classes + 1)
    target = int(rng.integers(classes))
    constants = []
    for _ in range(2):
        z = softmax(rng.normal(size=classes))
        log_posterior = np.log(z[target]) + dirichlet.logpdf(z / z.sum(), alpha)
        constants.append(log_posterior + equation_23(np.log(z), target, beta))
    assert constants[0] == pytest.approx(constants[1], rel=1e-9, abs=1e-9)


# --- Lemma 4.1 -------------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.floats(1e-6, 1e6), st.booleans(), seeds)
def test_lemma_4_1_holds_and_is_reached_along_a_vector_of_signs(vocab, hidden, size, aligned, seed):
    rng = np.random.default_rng(seed)
    signs = rng.choice([-1.0, 1.0], hidden)
    if aligned:  # the head stretches most the hidden state whose entries are all as large as they may be
        head, state = size * np.outer(rng.normal(size=vocab), signs), 0.7 * signs
    else:
        head, state = size * rng.standard_t(3, size=(vocab, hidden)), rng.standard_t(3, size=hidden)
    bound = float(logit_norm_bound(np.linalg.norm(head, 2), np.abs(state).max(), hidden))
    assert np.linalg.norm(head @ state) <= bound * (1 + 1e-12)
    if aligned:
        assert np.linalg.norm(head @ state) == pytest.approx(bound, rel=1e-9)


# --- Theorem 4.2 -----------------------------------------------------------------------------------------------------


def entropy_and_slope(u):
    log_p = u - logsumexp(u)
    p = np.exp(log_p)
    h = float(-(p * log_p).sum())
    return h, -p * (log_p + h)


def least_found(vocab, radius, seed):
    """(the least entropy of all that a descent over the ball's sphere went through, how many that were).

    Entropy falls outwards along each ray, so that the least lies on the sphere. One descent starts anywhere, one near
    a peak, where the least is; both report every point on their way.
    """
    rng = np.random.default_rng(seed)
    seen = []

    def on_the_sphere(v):
        length = np.linalg.norm(v)
        h, slope = entropy_and_slope(radius * v / length)
        seen.append(h)
        inwards = slope - v * (slope @ v) / length**2
        return h, radius * inwards / length

    for start in (rng.normal(size=vocab), np.eye(vocab)[0] + 0.3 * rng.normal(size=vocab) / vocab**0.5):
        minimize(on_the_sphere, start, jac=True, method="L-BFGS-B", options={"maxiter": 200, "ftol": 0, "gtol": 1e-13})
    return min(seen), len(seen)


def search(floor, cases=60):
    """Against a floor: how often a found entropy lies below it, how often it stays far above, how many were tried."""
    rng = np.random.default_rng(0)
    below = unreached = tried = 0
    for seed in range(cases):
        vocab, hidden = int(rng.integers(2, 400)), int(rng.integers(2, 64))
        radius = float(rng.uniform(0.5, 12))
        found, points = least_found(vocab, radius, seed)
        tried += points
        bound = float(floor(vocab, hidden, radius / hidden**0.5))
        below += found < bound * (1 - 1e-9) - 1e-13
        unreached += found > bound * (1 + 1e-3)
    return below, unreached, tried


def test_theorem_4_2_a_search_over_the_ball_reaches_the_floor_and_never_goes_below():
    below, unreached, tried = search(entropy_bound)
    assert below == 0
    assert unreached == 0
    assert tried > 1000


@settings(max_examples=300, deadline=None)
@given(st.integers(3, 10_000_000), st.floats(1e-3, 60))
def test_theorem_4_2_no_number_of_equal_peaks_does_better_in_any_vocabulary(vocab, radius):
    """k logits above V - k others, for vocabularies in which one can't search: k = 1 has the least entropy."""
    k = np.unique(np.geomspace(1, vocab - 1, 60).astype(int)).astype(float)
    gap = radius * np.sqrt(vocab / (k * (vocab - k)))
    odds = np.exp(np.log(vocab - k) - np.log(k) - gap)  # of everything but the peaks
    entropy = np.log(k) + np.log1p(odds) + gap * odds / (1 + odds)
    floor = float(entropy_bound(vocab, 1, radius))
    assert entropy[0] == pytest.approx(floor, rel=1e-9)
    assert np.all(entropy >= floor * (1 - 1e-9))


@pytest.mark.parametrize(
    ("mistake", "wrong"),
    [
        ("rho instead of rho sqrt(D), as in two exponents of equation 37", lambda v, d, rho: entropy_bound(v, 1, rho)),
        ("rho D instead of rho sqrt(D)", lambda v, d, rho: entropy_bound(v, d, rho * d**0.5)),
    ],
)
def test_a_wrong_root_of_the_hidden_size_is_caught(mistake, wrong):
    below, unreached, _ = search(wrong, cases=15)
    assert below + unreached == 15


def test_equation_37_as_printed_is_not_the_entropy_of_equation_36():
    """Its sqrt(D) is missing in two exponents. Equation 14 is the entropy of the logits of equation 36."""
    vocab, hidden, rho = 1000, 64, 0.9
    inside = rho * np.sqrt(vocab / (vocab - 1))
    gamma, dropped = np.exp(-inside * np.sqrt(hidden)), np.exp(-inside)
    factor = rho * np.sqrt(hidden * vocab * (vocab - 1))
    equation_37 = np.log(1 + (vocab - 1) * gamma) + factor * dropped / (1 + (vocab - 1) * dropped)
    truth, _ = entropy_and_slope(least_entropy_logits(vocab, hidden, rho))
    assert float(entropy_bound(vocab, hidden, rho)) == pytest.approx(truth, rel=1e-12)
    assert abs(equation_37 - truth) > 0.1


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 3000), st.floats(0.01, 50), st.floats(0.1, 60), seeds)
def test_a_softcap_raises_every_entropy_and_keeps_the_floor(vocab, size, cap, seed):
    """Section 4 of the paper says that softcapping reduces the bound; for given raw logits it can only raise it."""
    logits = size * np.random.default_rng(seed).normal(size=vocab)
    raw, _ = entropy_and_slope(logits)
    capped, _ = entropy_and_slope(cap * np.tanh(logits / cap))
    assert capped >= raw - 1e-12 * max(1, raw)
    assert capped >= float(entropy_bound(vocab, 1, np.linalg.norm(logits))) * (1 - 1e-12) - 1e-13
