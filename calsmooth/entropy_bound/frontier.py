"""Where label smoothing and the reach of a head meet: Remark 4.3 made exact. Ours; the paper has no such section.

**What smoothing asks for.** With weight beta its loss -sum_k q_k log p_k, where q is 1 - beta + beta / V on the target
and beta / V elsewhere, is least at p = q (Gibbs). Logits whose softmax is q are those of equation 36, one above V - 1
equal ones, and stand apart by

    x* = log(q_target / q_other) = log(1 + V (1 - beta) / beta)

which grows with log V. The shortest of them (sum 0) have norm x* sqrt((V - 1) / V), and their entropy is

    H* = -q_target log q_target - (V - 1) (beta / V) log(beta / V)

**What the head can give.** Logits in the ball of radius r = rho sqrt(D) (Lemma 4.1). The loss L(u) =
logsumexp(u) - (1 - beta) u_target - beta mean(u) is convex, and so is the ball. Averaging u over the permutations of
the other tokens raises neither the loss nor the norm, and subtracting the mean keeps the loss and shortens u; so the
best u is again of equation 36's form, and only its gap x is to be found:

    L(x) = log(1 + (V - 1) e^-x) + beta x (V - 1) / V,    0 <= x <= x_max = rho sqrt(D V / (V - 1))

L is convex and its slope is zero at x*. Therefore the optimum inside the ball is x = min(x*, x_max):

* x_max >= x*: the head reaches q. Without smoothing it could go on to the floor of Theorem 4.2, which lies below H*;
  H* - floor is the over-confidence, in nats, that smoothing restrains.
* x_max < x*: the floor lies above H*. The optimum is the floor's own prediction, x = x_max, for this beta, for every
  smaller one and for none (beta = 0, whose x* is infinite): smoothing changes nothing.

**The frontier** is the beta with x* = x_max,

    beta(D, V) = V / (V - 1 + e^x_max)

which is V times the probability that the least-entropy prediction leaves to each other token. Smoothing with less than
that has nothing to restrain, with more it has.

This is about one prediction with one right token. Where several tokens are right with some probability, the
unsmoothed optimum is less confident to begin with. And it is about what the head can do, not about what training does.

Functions take numbers or arrays that broadcast, and return float64. Entropies are in nats.
"""

import numpy as np
from numpy.typing import ArrayLike

from calsmooth.entropy_bound.bound import Array, checked_sizes, logit_gap, require


def smoothing_confidence(vocab: ArrayLike, beta: ArrayLike) -> Array:
    """1 - beta + beta / V, the probability that smoothing's optimum gives the target."""
    V, b = _vocab_and_beta(vocab, beta)
    return 1 - b * ((V - 1) / V)


def smoothing_entropy(vocab: ArrayLike, beta: ArrayLike) -> Array:
    """H*(beta, V) in nats, the entropy of smoothing's optimum: 0 for beta -> 0, log V for beta = 1."""
    V, b = _vocab_and_beta(vocab, beta)
    rest = b * ((V - 1) / V)  # all that is not on the target
    # As a sum of 1 + x terms: the target's probability rounds to 0 only where V beta says that it is 1 / V.
    target = (1 - b) + b / V
    return -target * np.log1p(-np.minimum(rest, 1 - 1 / V)) + rest * (np.log(V) - np.log(b))


def smoothing_logit_gap(vocab: ArrayLike, beta: ArrayLike) -> Array:
    """x* = log(1 + V (1 - beta) / beta): how far smoothing wants the target's logit above the others."""
    V, b = _vocab_and_beta(vocab, beta)
    return np.log1p(V * (1 - b) / b)


def rho_for_smoothing(vocab: ArrayLike, hidden: ArrayLike, beta: ArrayLike) -> Array:
    """The least rho with which the head can reach smoothing's optimum; there, the floor is H*."""
    V, D = checked_sizes(vocab, hidden)
    return smoothing_logit_gap(V, beta) * np.sqrt((V - 1) / V / D)


def hidden_for_smoothing(vocab: ArrayLike, rho: ArrayLike, beta: ArrayLike) -> Array:
    """The hidden size (not rounded) from which on a head of this rho can reach smoothing's optimum; inf for rho = 0.

    Raises:
        UsageError: an argument is outside its range.
    """
    r = np.asarray(rho, float)
    require(np.all(np.isfinite(r) & (r >= 0)), "rho must be finite and at least 0", rho)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(r > 0, (rho_for_smoothing(vocab, 1, beta) / r) ** 2, np.inf)


def smoothing_frontier(vocab: ArrayLike, hidden: ArrayLike, rho: ArrayLike) -> Array:
    """The least beta whose optimum the head can reach: V / (V - 1 + e^x). A smaller one acts as none.

    1 at rho = 0, falling to 0 as rho sqrt(D) grows.

    Raises:
        UsageError: an argument is outside its range.
    """
    V, x = logit_gap(vocab, hidden, rho)
    return np.exp(np.log(V) - np.logaddexp(np.log(V - 1), x))


def _vocab_and_beta(vocab: ArrayLike, beta: ArrayLike) -> tuple[Array, Array]:
    V, _ = checked_sizes(vocab, 1)
    b = np.asarray(beta, float)
    require(np.all((b > 0) & (b <= 1)), "beta must be above 0 and at most 1", beta)
    return V, b
